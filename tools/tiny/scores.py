"""What clips are worth: how many have what was asked for, and how near two models are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tools.synthetic_music.classifier import Classifier, classify
from tools.synthetic_music.measures import TOLERANCE, bpm_of, key_of, same_tempo
from tools.synthetic_music.pieces import Piece

_SILENT: Final = 1e-3  # RMS
_DECIBELS: Final = 20.0


@dataclass(frozen=True)
class Heard:
    """What is heard in a clip.

    Attributes:
        bpm: beats a minute.
        key: with its mode.
        lead: the instrument.
        style: of the music.
    """

    bpm: float
    key: str
    lead: str
    style: str


def listen(classifier: Classifier, wav: Tensor, sample_rate: int) -> Heard:
    """Measure a clip.

    Args:
        classifier: of instruments and styles.
        wav: (2, T), 10 s or more, on the CPU.
        sample_rate: Hz.
    """
    told = classify(classifier, wav, sample_rate)
    return Heard(bpm_of(wav, sample_rate), key_of(wav, sample_rate), told.lead, told.style)


_CHECKS: Final[dict[str, Callable[[Heard, Piece], bool]]] = {
    "bpm": lambda heard, piece: same_tempo(heard.bpm, piece.bpm),
    "key": lambda heard, piece: heard.key == piece.key,
    "lead": lambda heard, piece: heard.lead == piece.lead,
    "style": lambda heard, piece: heard.style == piece.style,
}


def adherence(heard: Sequence[Heard], pieces: Sequence[Piece]) -> dict[str, float]:
    """Share of clips that have the bpm, key, lead and style of their piece."""
    return {name: sum(map(check, heard, pieces)) / len(pieces) for name, check in _CHECKS.items()}


def chance(heard: Sequence[Heard], pieces: Sequence[Piece]) -> dict[str, float]:
    """The mean `adherence` of the clips to the pieces in another order, over all rotations."""
    turned = [adherence(heard, [*pieces[turn:], *pieces[:turn]]) for turn in range(1, len(pieces))]
    return {name: sum(shares[name] for shares in turned) / len(turned) for name in _CHECKS}


def agreement(heard: Sequence[Heard], others: Sequence[Heard]) -> dict[str, float]:
    """Share of clips in which bpm, key, lead and style are those of other clips.

    A bpm may also be the double or the half, as anywhere; `bpm_exact` is the share without these.
    """
    pairs = list(zip(heard, others, strict=True))
    same = {
        "bpm": sum(same_tempo(one.bpm, other.bpm) for one, other in pairs),
        "bpm_exact": sum(abs(one.bpm / other.bpm - 1) <= TOLERANCE for one, other in pairs),
        **{
            name: sum(getattr(one, name) == getattr(other, name) for one, other in pairs)
            for name in ("key", "lead", "style")
        },
    }
    return {name: count / len(pairs) for name, count in same.items()}


def decibels(wav: Tensor) -> float:
    """RMS of audio relative to full scale; at least -200."""
    return _DECIBELS * float(wav.square().mean().sqrt().clamp(min=1e-10).log10())


def level_spread(wav: Tensor, sample_rate: int, seconds: float) -> float:
    """How far the level of a part is from that of the whole, at most, in decibels.

    Args:
        wav: (C, T).
        sample_rate: Hz.
        seconds: of a part; a shorter rest is left out.
    """
    parts = wav.unfold(-1, round(seconds * sample_rate), round(seconds * sample_rate))
    whole = decibels(wav)
    return max(abs(decibels(parts[:, index]) - whole) for index in range(parts.shape[1]))


def faults(clips: Sequence[Tensor]) -> dict[str, float]:
    """What no clip should have.

    Args:
        clips: (C, T) each, before normalisation.

    Returns:
        `silent`, how many are (RMS below 0.001); `constant`, how many do not move; `full_scale`,
        the share of all samples that are at full scale or beyond.
    """
    samples = sum(clip.numel() for clip in clips)
    return {
        "silent": sum(float(clip.square().mean().sqrt()) < _SILENT for clip in clips),
        "constant": sum(float(clip.std(dim=-1).max()) < _SILENT for clip in clips),
        "full_scale": sum(int((clip.abs() >= 1).sum()) for clip in clips) / samples,
    }


def mean_kl(reference: Tensor, logits: Tensor, mask: Tensor) -> float:
    """Kullback-Leibler divergence of predictions from those of a reference, in nats per code.

    Args:
        reference: [B, K, T, card].
        logits: likewise.
        mask: [B, K, T], true where there is a prediction.
    """
    ours, theirs = (values[mask].double().log_softmax(-1) for values in (logits, reference))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def mean(values: Sequence[float]) -> float:
    """Mean of at least one number."""
    return float(torch.tensor(values, dtype=torch.float64).mean())
