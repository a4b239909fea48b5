"""What the language model is asked in training besides the codes: what it hears, and what is next.

A key or a beat makes few codes likelier, and those seldom: of their loss alone, a small model that
hears some hundred hours learns neither. So the middle of the decoder answers questions whose
answers the composer knows, for every frame. The answers are not kept: a release has no trace of
them but what the decoder has learnt for them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from tools.synthetic_music.composing import compose, step_at
from tools.synthetic_music.instruments import LEADS
from tools.synthetic_music.midi import DRUM_CHANNEL, TICKS
from tools.synthetic_music.pieces import BEATS, FRAME, KEYS, TEMPI, Piece
from tools.synthetic_music.score import BASS, COMP, LEAD, Score
from tools.synthetic_music.styles import STYLES

_LONGEST_BAR: Final = 8  # beats
_PITCHES: Final = 12
_FIRST: Final = 16  # frames that count as much as all: only there a key is not heard yet
UNKNOWN: Final = -100
"""Stands for the answer to a question that is not asked."""

_ONSETS: Final = {"lead": (LEAD, ()), "bass": (BASS, ()), "chords": (COMP, ())} | {
    name: (DRUM_CHANNEL, pitches)
    for name, pitches in {"kick": (36,), "snare": (37, 38, 39), "hat": (42, 44, 46, 51)}.items()
}
"""Whose notes are listened for: a part, and, of drums, which."""

OF_PIECE: Final = {"key": len(KEYS), "bpm": len(TEMPI), "lead": len(LEADS), "style": len(STYLES)}
"""Questions to which a piece has one answer, and how many answers there are."""

QUESTIONS: Final = {
    **OF_PIECE,
    "frame_of_beat": max(BEATS),
    "beat_of_bar": _LONGEST_BAR,
    "chord": _PITCHES,  # its root
    "bass": _PITCHES,  # the note that sounds, or comes next
    "tune": _PITCHES,  # likewise, of the lead
    **{f"begins_{name}": 2 for name in _ONSETS},
    "chroma": _PITCHES,  # the melody that may be given
}
"""All questions, and how many answers each has; those about frames come after those of pieces."""


def answers_of(piece: Piece) -> tuple[int, ...]:
    """To the questions `OF_PIECE`."""
    return (
        KEYS.index(piece.key),
        TEMPI.index(piece.bpm),
        list(LEADS).index(piece.lead),
        list(STYLES).index(piece.style),
    )


@lru_cache(None)
def answers(piece: Piece) -> NDArray[np.uint8]:
    """What is right in each frame of a piece, but for the chroma: (questions, T)."""
    frames, beat = round(piece.seconds / FRAME), round(piece.beat / FRAME)
    score, notes = Score(piece), compose(piece).notes
    start = score.start // TICKS * beat
    since = np.arange(frames) - start  # the first bar
    ticks = np.arange(frames) * TICKS / beat
    rows = [np.full(frames, answer) for answer in answers_of(piece)]
    rows += [since % beat, since // beat % score.pattern.beats]
    roots = [score.tonic_chord[0] if t < score.start else score.chord(t)[0] for t in ticks]
    rows.append(np.array(roots))
    begins = np.array([step_at(note[0], beat) for note in notes])
    ends = begins + np.array([max(1, round(note[4] * beat / TICKS)) for note in notes])
    channels = np.array([note[1] for note in notes])
    pitches = np.array([note[2] for note in notes])
    rows += [
        _now_or_next(frames, ends[channels == part], pitches[channels == part] % _PITCHES)
        for part in (BASS, LEAD)
    ]
    for channel, which in _ONSETS.values():
        heard = (channels == channel) & (np.isin(pitches, which) if which else True)
        begun = np.zeros(frames)
        begun[begins[heard & (begins < frames)]] = 1
        rows.append(begun)
    return np.stack(rows).astype(np.uint8)


def _now_or_next(frames: int, ends: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """The value of the first note that is not over in each frame; the last one's after it."""
    if not len(ends):
        return np.zeros(frames)
    order = np.argsort(ends, kind="stable")
    place = np.searchsorted(ends[order], np.arange(frames), side="right")
    return values[order][np.minimum(place, len(order) - 1)]


class _WithLoss(torch.autograd.Function):
    """Hand values on, and have a loss take part in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        (grad,) = grads
        return grad, torch.ones((), device=grad.device)


class Lessons(nn.Module):
    """A head for each question, and a hook that lets a layer of the decoder answer.

    Args:
        dim: width of the decoder.
        weight: of the mean of the questions' losses, beside the codes' loss.
    """

    def __init__(self, dim: int, weight: float) -> None:
        super().__init__()
        self.heads = nn.Linear(dim, sum(QUESTIONS.values()))
        self._weight = weight
        self._waiting: list[Tensor] = []
        self._right: list[Tensor] = []

    def ask(self, targets: Sequence[Tensor]) -> None:
        """Say what is right in the clips that the decoder gets next, in their order.

        Args:
            targets: (questions, T) of each; `UNKNOWN` where something is not asked.
        """
        self._waiting = list(targets)
        self._right = []

    def results(self) -> dict[str, float]:
        """Share of frames that were answered right since they were asked."""
        shares = torch.cat(self._right).mean(0)
        return {name: round(float(s), 3) for name, s in zip(QUESTIONS, shares, strict=True)}

    def hook(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:  # noqa: ARG002
        """Of a layer: its output goes on as it is."""
        if not self._waiting:
            return None
        targets = torch.stack(self._waiting[: len(output)]).to(output.device)
        del self._waiting[: len(output)]
        frames = targets.shape[-1]
        # One step more than frames: what is predicted after the last one is not asked for.
        heard = output[:, -frames - 1 : -1]
        logits = self.heads(F.layer_norm(heard, heard.shape[-1:])).float()
        losses, right = [], []
        for part, target in zip(
            logits.split([*QUESTIONS.values()], -1), targets.unbind(1), strict=True
        ):
            nats = F.cross_entropy(part.transpose(1, 2), target, reduction="none")
            asked = target != UNKNOWN
            losses += [
                nats[:, some].sum() / asked[:, some].sum().clamp(min=1)
                for some in (slice(None), slice(_FIRST))
            ]
            right.append((part.detach().argmax(-1) == target).float().mean(1))
        self._right.append(torch.stack(right, 1))
        loss = self._weight * torch.stack(losses).mean()
        handed: Tensor = _WithLoss.apply(output, loss)  # type: ignore[no-untyped-call]
        return handed
