"""Learn what `audiocraft/data/tempo.py` and `key.py` know about music, from rendered pieces.

    python -m tools.fit_labels FOLDER --seeds 1 3 4 5 6 7 8 9 10

Renders 48 pieces of each seed (see `render_music.py`) below FOLDER, prints how often the tempo and
the key of a seed are right when the weights are learnt from all others, and writes those learnt
from all seeds to `tempo_weights.py` and `key_profiles.py` of `audiocraft/data`. Both are softmax
regressions: over the candidates of a tempo, over the 24 keys. Seed 2 is for `tools/score_labels.py`
and must not be given here.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from audiocraft.data import key, tempo
from audiocraft.data.audio import audio_read
from audiocraft.data.labels import mono_at
from tools.render_music import SECONDS, TONICS, Piece, render_set

PIECES = 48
HELD_OUT: Final = 2
RIGHT: Final = 0.02  # of the tempo
_TEMPO_PENALTY: Final = 1.0
_KEY_PENALTY: Final = 0.3
# Shares of the pitch classes in a corpus of common-practice music: J. Albrecht and D. Shanahan,
# "The Use of Large Corpora to Train a New Type of Key-Finding Algorithm" (2013). The key's weights
# are drawn to these.
_PUBLISHED: Final = (
    (0.238, 0.006, 0.111, 0.006, 0.137, 0.094, 0.016, 0.214, 0.009, 0.080, 0.008, 0.081),
    (0.220, 0.006, 0.104, 0.123, 0.019, 0.103, 0.012, 0.214, 0.062, 0.022, 0.061, 0.052),
)
_SCALE: Final = 80.0  # of those, to be weights; measured
_DATA: Final = Path(__file__).parents[1] / "audiocraft" / "data"

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """A choice among rows of features.

    Attributes:
        name: of the piece.
        features: (n, F).
        right: (n,), which rows are right; at least one.
    """

    name: str
    features: Floats
    right: Flags


def examples_of(folder: Path, piece: Piece) -> tuple[Example, Example]:
    """The choice of a tempo and of a key that a piece poses.

    Args:
        folder: of its `.wav`.
        piece: the truth.
    """
    wav, rate = audio_read(folder / f"{piece.name}.wav", duration=SECONDS)
    tempi, evidence = tempo.tempo_features(tempo.onset_envelopes(mono_at(wav, rate, tempo.RATE)))
    chroma, _ = key.chroma_of(mono_at(wav, rate, key.RATE))
    tonic, mode = piece.key.split()
    number = TONICS.index(tonic) + 12 * (mode == "minor")
    return (
        Example(piece.name, evidence, np.abs(tempi / piece.bpm - 1) < RIGHT),
        Example(piece.name, key.key_features(chroma), np.arange(24) == number),
    )


def fit(examples: Sequence[Example], prior: Floats, penalty: float) -> Floats:
    """Weights (F,) that make right rows likely.

    Args:
        examples: to learn from.
        prior: (F,), where weights lie that nothing speaks against.
        penalty: on the square of their distance from it, in standard deviations of the features.
    """
    spread = np.concatenate([example.features for example in examples]).std(0) + 1e-6
    cases = [(e.features / spread, e.right) for e in examples if e.right.any()]

    def loss(weights: Floats) -> tuple[float, Floats]:
        away = weights - prior * spread
        total, gradient = 0.5 * penalty * float(away @ away), penalty * away
        for rows, right in cases:
            score = rows @ weights
            chance = np.exp(score - score.max())
            chance /= chance.sum()
            hit = float(chance[right].sum()) + 1e-12
            total -= float(np.log(hit))
            gradient = gradient + rows.T @ (chance - chance * right / hit)
        return total, gradient

    found = minimize(loss, prior * spread, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weights: Floats = found.x / spread
    return weights


def cross_validate(sets: Sequence[Sequence[Example]], prior: Floats, penalty: float) -> list[str]:
    """Names of the pieces that come out wrong when their own set is not learnt from."""
    wrong = []
    for held in sets:
        weights = fit([e for other in sets if other is not held for e in other], prior, penalty)
        wrong += [e.name for e in held if not e.right[int(np.argmax(e.features @ weights))]]
    return wrong


def main() -> None:
    """Render, learn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    given = parser.parse_args()
    if HELD_OUT in given.seeds:
        parser.error(f"seed {HELD_OUT} is held out for scoring; leave it out")
    tempi: list[list[Example]] = []
    keys: list[list[Example]] = []
    with ProcessPoolExecutor() as pool:
        for seed in given.seeds:
            folder = given.folder / str(seed)
            pieces = render_set(folder, seed, PIECES)
            pairs = list(pool.map(partial(examples_of, folder), pieces))
            tempi.append([pair[0] for pair in pairs])
            keys.append([pair[1] for pair in pairs])
    count = sum(map(len, tempi))
    tempo_prior = np.zeros(tempi[0][0].features.shape[1])
    key_prior = np.array([*(_SCALE * np.array(_PUBLISHED)).flatten(), 0.0])
    for what, sets, prior, penalty in (
        ("tempo", tempi, tempo_prior, _TEMPO_PENALTY),
        ("key", keys, key_prior, _KEY_PENALTY),
    ):
        wrong = cross_validate(sets, prior, penalty)
        print(f"{what}: {1 - len(wrong) / count:.1%} of {count} right, wrong: {' '.join(wrong)}")
    weights = fit([e for s in tempi for e in s], tempo_prior, _TEMPO_PENALTY)
    profiles = fit([e for s in keys for e in s], key_prior, _KEY_PENALTY)
    source = f"learnt by tools/fit_labels.py from {count} pieces"
    _write(_DATA / "tempo_weights.py", f"Weights of the evidence for a tempo, {source}.", {
        "WEIGHTS": weights,
    })  # fmt: skip
    _write(_DATA / "key_profiles.py", f"Weights of pitch classes, from the tonic on, {source}.", {
        "MAJOR": profiles[:12], "MINOR": profiles[12:24], "MINOR_BIAS": profiles[24],
    })  # fmt: skip


def _write(path: Path, purpose: str, tables: dict[str, Floats]) -> None:
    lines = [f'"""{purpose}"""', "", "from typing import Final", ""]
    for name, values in tables.items():
        if np.ndim(values) == 0:
            lines.append(f"{name}: Final = {values:.3f}")
            continue
        lines.append(f"{name}: Final = (")
        lines += [f"    {value:.3f}," for value in values]
        lines.append(")")
    path.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
