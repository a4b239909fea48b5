"""Whether what is known of synthetic pieces is heard in them.

    python -m tools.synthetic_music.check [--pieces 64] [--seconds 30] [--seed 9003] [--jobs 2]

Renders pieces, prints a line for each that a measure gets wrong, and ends with one JSON object:
shares of tempi (within 4 % of the true one, its double or half), of keys with mode, of lead
instruments and of styles; the mean cosine of the chroma with the melody's notes, and with another
piece's in the same key; the least stereo width; the range of loudness, and the greatest sample.
Exits with 1 where tempi are below 90 %, keys below 85 % or a sample above 0.95.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch import Tensor

from audiocraft.data.audio_utils import measure_loudness
from tools.synthetic_music import measures
from tools.synthetic_music.classifier import classify, load_classifier
from tools.synthetic_music.composing import Composition
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.rendering import RATE, rendered

LEAST_TEMPI, LEAST_KEYS, GREATEST_PEAK = 0.9, 0.85, 0.95
SEED: Final = 9003


@dataclass(frozen=True)
class Result:
    """What was measured of a piece.

    Attributes:
        composition: the truth.
        bpm: found.
        key: found.
        lead: found.
        style: found.
        chroma: (frames, 12) of the sound.
        notes: (frames, 12) of the melody's notes.
        width: of the stereo.
        loudness: LKFS.
        peak: the greatest sample.
    """

    composition: Composition
    bpm: float
    key: str
    lead: str
    style: str
    chroma: Tensor
    notes: Tensor
    width: float
    loudness: float
    peak: float

    @property
    def right(self) -> dict[str, bool]:
        """By what was to be found."""
        piece = self.composition.piece
        return {
            "bpm": measures.same_tempo(self.bpm, piece.bpm),
            "key": self.key == piece.key,
            "lead": self.lead == piece.lead,
            "style": self.style == piece.style,
        }


def check_pieces(seed: int, count: int, seconds: float, jobs: int = 1) -> list[Result]:
    """Render pieces and measure them.

    Args:
        seed: see `plan`.
        count: how many.
        seconds: of each.
        jobs: how many are rendered at a time.
    """
    classifier = load_classifier()
    results = []
    for composition, wav in rendered(plan(seed, count, seconds), jobs):
        heard = classify(classifier, wav, RATE)
        results.append(
            Result(
                composition,
                measures.bpm_of(wav, RATE),
                measures.key_of(wav, RATE),
                heard.lead,
                heard.style,
                measures.chroma_of(wav, RATE),
                measures.melody_chroma(composition.melody, seconds, RATE),
                measures.stereo_width(wav),
                measure_loudness(wav, RATE),
                float(wav.abs().max()),
            )
        )
    return results


def summary(results: list[Result]) -> dict[str, Any]:
    """The figures over pieces, for people: rounded."""
    shares = {
        what: round(float(np.mean([result.right[what] for result in results])), 3)
        for what in ("bpm", "key", "lead", "style")
    }
    similarity = [measures.chroma_similarity(r.chroma, r.notes) for r in results]
    others = [
        measures.chroma_similarity(first.chroma, second.notes)
        for first in results
        for second in results
        if first is not second and first.composition.piece.key == second.composition.piece.key
    ]
    loudness = [result.loudness for result in results]
    return {
        "pieces": len(results),
        **shares,
        "melody_chroma": round(float(np.mean(similarity)), 3),
        "other_melody_chroma": round(float(np.mean(others)), 3) if others else None,
        "least_width": round(min(result.width for result in results), 3),
        "loudness": [round(min(loudness), 2), round(max(loudness), 2)],
        "peak": round(max(result.peak for result in results), 4),
    }


def main() -> int:
    """Measure, print, and judge: 0 where every figure is within its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", type=int, default=64, help="how many")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each, 10 to 60")
    parser.add_argument("--seed", type=int, default=SEED, help="of the pieces")
    parser.add_argument("--jobs", type=int, default=1, help="pieces rendered at a time")
    given = parser.parse_args()
    results = check_pieces(given.seed, given.pieces, given.seconds, given.jobs)
    for result in results:
        wrong = [what for what, right in result.right.items() if not right]
        if wrong:
            piece = result.composition.piece
            truth = f"{piece.key}, {piece.bpm} bpm, {piece.lead}, {piece.style}"
            found = f"{result.key}, {result.bpm:.1f} bpm, {result.lead}, {result.style}"
            print(f"{piece.name}: {', '.join(wrong)}: {truth}; found {found}")
    figures = summary(results)
    print(json.dumps(figures))
    passed = (
        figures["bpm"] >= LEAST_TEMPI
        and figures["key"] >= LEAST_KEYS
        and figures["peak"] <= GREATEST_PEAK
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
