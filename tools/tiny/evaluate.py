"""Measure what the `tiny` release, or a fine-tune of it, has learnt.

    python -m tools.tiny.evaluate [--model FOLDER] [--only text melody]

Prompts and melodies are of pieces that nothing was trained on. Each score stands beside the one of
the same audio against the prompts of other clips (`shuffled`) and the one of rendered pieces
(`clean`), which is as high as can be. It prints a JSON object for each part; the last line is all
of them in one.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, cast

import torch
from torch import Tensor

from audiocraft.errors import AudiocraftError
from audiocraft.models.lm import LMModel
from audiocraft.models.musicgen import MusicGen
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition
from audiocraft.solvers.spectral_losses import LogMelDistance, MelSpectrogram, si_sdr
from tools.synthetic_music.classifier import classify, load_classifier
from tools.synthetic_music.measures import (
    bpm_of,
    chroma_of,
    chroma_similarity,
    same_tempo,
    stereo_width,
)
from tools.synthetic_music.pieces import Piece, plan
from tools.synthetic_music.rendering import RATE, rendered
from tools.synthetic_music.styles import STYLES
from tools.tiny.scores import (
    Heard,
    adherence,
    agreement,
    chance,
    faults,
    level_spread,
    listen,
    mean,
    mean_kl,
)

SEED: Final = 203
"""Of the pieces that prompts and melodies are taken of."""

GUIDANCE: Final = 3.0
"""What music is made with, unless it is compared."""

_SECONDS: Final = 12.0  # of a clip: tempo and key need 10
_LONG_SECONDS, _PART_SECONDS = 60.0, 20.0
_SPEED_SECONDS, _SPEED_RUNS = 8.0, 3
_AT_ONCE: Final = 12  # clips
_MEL_WINDOW: Final = 1024  # samples
_KL_AT_ONCE: Final = 4
_KEYS: Final = 24  # pieces in which each key comes once


@dataclass(frozen=True)
class Sizes:
    """How many clips each part takes.

    Attributes:
        prompts: of the text part and those that use its clips.
        codec: pieces that are encoded and decoded.
        melodies: that are followed; at most the 24 keys.
        long: clips of a minute.
        tokens: clips whose codes the two precisions predict.
    """

    prompts: int = 96
    codec: int = 64
    melodies: int = 24
    long: int = 24
    tokens: int = 16


def prompt(piece: Piece) -> str:
    """What is asked for so that a piece with these properties be made."""
    return f"{piece.bpm} bpm {piece.lead} {piece.style} in {piece.key}"


class Evaluation:
    """The parts, each a method that returns its figures.

    Args:
        model: as it is loaded, float32.
        sizes: of the parts.
        style: all pieces have it, if given.
        exclude_style: no piece has it.
        temperature: of the sampling.
    """

    def __init__(
        self,
        model: MusicGen,
        sizes: Sizes,
        style: str | None = None,
        exclude_style: str | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.model = model
        self.sizes = sizes
        self._style, self._excluded = style, exclude_style
        self._temperature = temperature
        self._classifier = load_classifier()
        self._renders: dict[Piece, Tensor] = {}
        self._made: dict[float, list[Tensor]] = {}

    def codec(self) -> dict[str, Any]:
        """What is left of pieces that are encoded and decoded."""
        pieces = self._pieces(self.sizes.codec)
        wavs = self._clean(pieces)
        decoded = [self._decoded(wav) for wav in wavs]
        pairs = list(zip(decoded, wavs, strict=True))
        before, after = self._heard(wavs), self._heard(decoded)
        mel = LogMelDistance(MelSpectrogram(RATE, _MEL_WINDOW))
        clean, left = adherence(before, pieces), adherence(after, pieces)
        return {
            "pieces": len(pieces),
            "same_as_original": agreement(after, before),
            "decoded": left,
            "clean": clean,
            "shuffled": chance(after, pieces),
            "lead_ratio": left["lead"] / clean["lead"] if clean["lead"] else None,
            "si_sdr_db": mean([float(si_sdr(*pair).mean()) for pair in pairs]),
            "log_mel_db": mean([float(mel(*pair).mean()) for pair in pairs]),
        }

    def text(self) -> dict[str, Any]:
        """Whether music has the tempo, the key and the lead that were asked for."""
        pieces = self._pieces(self.sizes.prompts)
        heard = self._heard(self._prompted(GUIDANCE))
        clean = self._heard(self._clean(pieces))
        return {
            "prompts": len(pieces),
            "right": adherence(heard, pieces),
            "shuffled": chance(heard, pieces),
            "clean": adherence(clean, pieces),
            "clean_shuffled": chance(clean, pieces),
        }

    def heard_as(self, style: str) -> dict[str, float]:
        """Share of clips that are heard as a style, whatever was asked for.

        Args:
            style: a key of `STYLES`.

        Returns:
            Of the clips of the text part (`right`), and of its pieces as rendered (`clean`).
        """
        clips = {
            "right": self._prompted(GUIDANCE),
            "clean": self._clean(self._pieces(self.sizes.prompts)),
        }
        return {
            name: mean([classify(self._classifier, wav, RATE).style == style for wav in wavs])
            for name, wavs in clips.items()
        }

    def guidance(self) -> dict[str, Any]:
        """Whether more guidance makes music that has more of what was asked for."""
        pieces = self._pieces(self.sizes.prompts)
        figures = {}
        for coef in (1.0, GUIDANCE):
            heard = self._heard(self._prompted(coef))
            figures[f"{coef:g}"] = adherence(heard, pieces)
            figures[f"{coef:g}_shuffled"] = chance(heard, pieces)
        return figures

    def melody(self) -> dict[str, Any]:
        """How much of a melody's chroma is in music that was to follow it.

        Returns:
            Mean similarity to the melody: of music that follows it (`followed`), of the same
            prompts without one (`without`) and with another piece's in the same key (`other`); of
            the melody itself, encoded and decoded (`clean`); and `followed` against the melodies of
            other clips (`shuffled`).
        """
        pieces = self._pieces(2 * _KEYS)
        partners = {piece.key: piece for piece in pieces[_KEYS:]}
        pieces = [p for p in pieces[:_KEYS] if p.key in partners][: self.sizes.melodies]
        prompts = [prompt(piece) for piece in pieces]
        melodies = self._clean(pieces)
        others = self._clean([partners[piece.key] for piece in pieces])
        given = [chroma_of(wav, RATE) for wav in melodies]
        makes: dict[str, Callable[[], list[Tensor]]] = {
            "followed": lambda: self._generate(prompts, melodies),
            "without": lambda: self._generate(prompts),
            "other": lambda: self._generate(prompts, others),
            "clean": lambda: [self._decoded(wav) for wav in melodies],
        }
        figures: dict[str, Any] = {"melodies": len(pieces)}
        for name, make in makes.items():
            chromas = [chroma_of(wav, RATE) for wav in make()]
            figures[name] = mean([*map(chroma_similarity, chromas, given)])
            if name == "followed":
                turned = [*given[1:], given[0]]
                figures["shuffled"] = mean([*map(chroma_similarity, chromas, turned)])
        return figures

    def sound(self) -> dict[str, Any]:
        """Stereo, silence and levels of the clips of the text part."""
        made = self._prompted(GUIDANCE)
        clean = self._clean(self._pieces(self.sizes.prompts))
        return {
            "clips": len(made),
            "width": mean([stereo_width(wav) for wav in made]),
            "least_width": min(stereo_width(wav) for wav in made),
            "clean_width": mean([stereo_width(wav) for wav in clean]),
            **faults(made),
            "clean_full_scale": faults(clean)["full_scale"],
        }

    def long(self) -> dict[str, Any]:
        """A minute by windows: whether level and tempo stay, in parts of 20 s."""
        pieces = self._pieces(self.sizes.long, _LONG_SECONDS)
        made = self._generate([prompt(piece) for piece in pieces], seconds=_LONG_SECONDS)
        figures: dict[str, Any] = {"clips": len(pieces)}
        for name, wavs in {"": made, "clean_": self._clean(pieces)}.items():
            spreads = [level_spread(wav, RATE, _PART_SECONDS) for wav in wavs]
            kept, right = [], []
            for piece, wav in zip(pieces, wavs, strict=True):
                parts = torch.split(wav, round(_PART_SECONDS * RATE), dim=1)
                first, *rest = [bpm_of(part, RATE) for part in parts]
                kept.append(all(same_tempo(bpm, first) for bpm in rest))
                right.append(all(same_tempo(bpm, piece.bpm) for bpm in (first, *rest)))
            figures |= {
                f"{name}level_spread_db": mean(spreads),
                f"{name}most_spread_db": max(spreads),
                f"{name}bpm_kept": mean(kept),
                f"{name}bpm_right": mean(right),
            }
        return figures

    def speed(self) -> dict[str, Any]:
        """Music over the time that it takes, once loaded."""
        text = prompt(self._pieces(1)[0])
        self._generate([text], seconds=_SPEED_SECONDS)
        times = []
        for _ in range(_SPEED_RUNS):
            began = time.perf_counter()
            self._generate([text], seconds=_SPEED_SECONDS)
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times)
        return {
            "seconds": _SPEED_SECONDS,
            "times_real_time": _SPEED_SECONDS / seconds,
            "threads": torch.get_num_threads(),
        }

    @torch.no_grad()
    def int8(self) -> dict[str, Any]:
        """How far predictions with 8 bits are from those in float32; the model keeps the 8 bits."""
        if self.model.device.type != "cpu":
            return {"kl": None}
        lm, batches = self.model.lm, []
        pieces = self._pieces(self.sizes.tokens)
        for start in range(0, len(pieces), _KL_AT_ONCE):
            part = pieces[start : start + _KL_AT_ONCE]
            wavs = self._clean(part)
            codes, _ = self.model.compression_model.encode(torch.stack(wavs))
            attributes = [*map(_attributes, part, wavs)]
            batches.append((codes, attributes, lm.compute_predictions(codes, attributes)))
        lm.set_precision("int8")
        divergences = []
        for codes, attributes, exact in batches:
            found = _step_by_step(lm, codes, attributes)
            divergences += [mean_kl(exact.logits, found, exact.mask)] * len(codes)
        tokens = sum(int(exact.mask.sum()) for _, _, exact in batches)
        return {"kl": mean(divergences), "tokens": tokens}

    def _pieces(self, count: int, seconds: float = _SECONDS) -> list[Piece]:
        """The first pieces of the set that have the style that is asked for."""
        planned = plan(SEED, 10**6, seconds, self._excluded)
        return list(islice((p for p in planned if self._style in {None, p.style}), count))

    def _clean(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Pieces as sound, (2, T) each; they are rendered once."""
        missing = [piece for piece in pieces if piece not in self._renders]
        self._renders |= {composition.piece: wav for composition, wav in rendered(missing)}
        return [self._renders[piece] for piece in pieces]

    def _prompted(self, coef: float) -> list[Tensor]:
        """Music for the prompts; it is made once."""
        if coef not in self._made:
            prompts = [prompt(piece) for piece in self._pieces(self.sizes.prompts)]
            self._made[coef] = self._generate(prompts, coef=coef)
        return self._made[coef]

    def _generate(
        self,
        prompts: Sequence[str],
        melodies: Sequence[Tensor] | None = None,
        seconds: float = _SECONDS,
        coef: float = GUIDANCE,
    ) -> list[Tensor]:
        """Clips (2, T) of prompts, some at a time."""
        made: list[Tensor] = []
        for start in range(0, len(prompts), _AT_ONCE):
            texts = prompts[start : start + _AT_ONCE]
            self.model.set_generation_params(
                duration=seconds, cfg_coef=coef, temperature=self._temperature, seed=SEED + start
            )
            if melodies is None:
                audio = self.model.generate(texts)
            else:
                given = melodies[start : start + _AT_ONCE]
                audio = self.model.generate_with_chroma(texts, given, RATE)
            made += cast("Tensor", audio).cpu().unbind()
        return made

    @torch.no_grad()
    def _decoded(self, wav: Tensor) -> Tensor:
        """Audio (2, T) that was encoded and decoded, of the same length."""
        codec = self.model.compression_model
        codes, scale = codec.encode(wav[None].to(self.model.device))
        return codec.decode(codes, scale)[0, :, : wav.shape[1]].cpu()

    def _heard(self, wavs: Sequence[Tensor]) -> list[Heard]:
        return [listen(self._classifier, wav, RATE) for wav in wavs]


def _attributes(piece: Piece, wav: Tensor) -> ConditioningAttributes:
    melody = WavCondition(wav[None], torch.tensor([wav.shape[1]]), [RATE], [None], [None])
    return ConditioningAttributes({"description": prompt(piece)}, {"self_wav": melody})


PARTS: Final = {
    "codec": Evaluation.codec,
    "text": Evaluation.text,
    "guidance": Evaluation.guidance,
    "melody": Evaluation.melody,
    "sound": Evaluation.sound,
    "long": Evaluation.long,
    "speed": Evaluation.speed,
    "int8": Evaluation.int8,  # the last one, since it changes the weights
}
"""The parts in their order."""


def _step_by_step(
    lm: LMModel, codes: Tensor, attributes: Sequence[ConditioningAttributes]
) -> Tensor:
    """What `compute_predictions` finds, with the keys, values and products that music is made with.

    Args:
        lm: the language model.
        codes: [B, K, T].
        attributes: of each item.

    Returns:
        Logits [B, K, T, card].
    """
    pattern = lm.pattern_provider.get_pattern(codes.shape[-1])
    sequence, _, _ = pattern.build_pattern_sequence(
        codes, lm.special_token_id, keep_only_valid_steps=True
    )
    state = lm.start(attributes, sequence.shape[-1])
    steps = [lm.advance(state, sequence[..., step, None]) for step in range(sequence.shape[-1])]
    logits, _, _ = pattern.revert_pattern_logits(
        torch.stack(steps, dim=3).transpose(1, 2), math.nan, keep_only_valid_steps=True
    )
    return logits.permute(0, 2, 3, 1)


def rounded(value: Any) -> Any:
    """Figures as they are printed, whatever they are in."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def evaluate(evaluation: Evaluation, parts: Sequence[str] = tuple(PARTS)) -> dict[str, Any]:
    """Figures of some parts; each is printed when it is known."""
    figures: dict[str, Any] = {}
    for name, part in PARTS.items():
        if name in parts:
            began = time.monotonic()
            figures[name] = rounded(part(evaluation))
            took = round(time.monotonic() - began, 1)
            print(json.dumps({name: figures[name], "took_s": took}), flush=True)
    return figures


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="version, release folder or fine-tune")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--style", choices=list(STYLES), help="ask for it alone")
    parser.add_argument("--exclude-style", choices=list(STYLES), help="do not ask for it")
    parser.add_argument("--prompts", type=int, default=Sizes.prompts, help="of the text part")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    given = parser.parse_args()
    try:
        model = MusicGen.get_pretrained(given.model, given.device, "float32")
        sizes = Sizes(prompts=given.prompts)
        evaluation = Evaluation(model, sizes, given.style, given.exclude_style, given.temperature)
        figures = evaluate(evaluation, given.only)
    except AudiocraftError as error:
        parser.error(str(error))
    print(json.dumps({"model": given.model, **figures}))


if __name__ == "__main__":
    main()
