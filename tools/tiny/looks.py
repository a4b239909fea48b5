"""Where the language model is to look in training: at what it heard a beat and a bar ago.

Positions are added to what is heard, so a head that looks back by a length of time has to learn it
for each tempo. Of the codes' loss alone a small model does not: it counts frames since the last
note, and the longer that was ago, the oftener it is wrong by one. So two heads are told where to
look, as a layer is told what there is to know by `Lessons`. A release has no trace of it but what
the heads have learnt.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from audiocraft.modules.transformer import SelfAttention
from tools.synthetic_music.pieces import BEATS
from tools.synthetic_music.styles import STYLES
from tools.tiny.lessons import OF_PIECE, with_loss

SPANS: Final = ("beat", "bar")
"""How far the first heads look back, each by one."""

_BPM, _STYLE = ([*OF_PIECE].index(name) for name in ("bpm", "style"))
_BARS: Final = [style.pattern.beats for style in STYLES.values()]  # beats


class Looks:
    """A hook for a layer's attention, which tells its first heads where to look.

    Args:
        weight: of the mean of the heads' losses, beside the codes' loss.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._frames = 0
        self._waiting: list[Tensor] = []
        self._right: list[Tensor] = []

    def ask(self, targets: Sequence[Tensor]) -> None:
        """Say what is right in the clips that the decoder gets next, see `Lessons.ask`."""
        self._waiting = []
        for truth in targets:
            beat = BEATS[int(truth[_BPM, 0])]
            self._waiting.append(torch.tensor([beat, beat * _BARS[int(truth[_STYLE, 0])]]))
        self._frames = targets[0].shape[-1]
        self._right = []

    def results(self) -> dict[str, float]:
        """Share of frames where each head looked most at the right one, since they were asked."""
        shares = torch.stack(self._right).mean(0)
        return {name: round(float(share), 3) for name, share in zip(SPANS, shares, strict=True)}

    def hook(self, module: SelfAttention, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before an attention: what it gets goes on as it is."""
        if not self._waiting:
            return None
        x, *rest = given
        spans = torch.stack(self._waiting[: len(x)]).to(x.device)
        del self._waiting[: len(x)]
        width = x.shape[-1] // module.num_heads
        queries, keys = (
            F.linear(x, module.in_proj_weight[first : first + len(SPANS) * width])
            .view(*x.shape[:2], len(SPANS), width)
            .transpose(1, 2)
            for first in (0, x.shape[-1])
        )
        # As in the lessons, the last steps but one predict the frames.
        prefix = x.shape[1] - self._frames - 1
        now = torch.arange(prefix, x.shape[1] - 1, device=x.device)
        logits = (queries[:, :, now] @ keys.transpose(2, 3)).float() / math.sqrt(width)
        future = torch.arange(x.shape[1], device=x.device) > now[:, None]
        nats = -logits.masked_fill(future, -math.inf).log_softmax(-1)
        there = now - spans[..., None] + 1  # a frame is heard a step after it is predicted
        asked = there > prefix
        there = there.clamp(min=0)
        found = nats.gather(-1, there[..., None])[..., 0]
        loss = self._weight * (found * asked).sum() / asked.sum().clamp(min=1)
        right = (nats.detach().argmin(-1) == there) & asked
        self._right.append(right.sum((0, 2)) / asked.sum((0, 2)).clamp(min=1))
        return (with_loss(x, loss), *rest)
