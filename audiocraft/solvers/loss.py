"""The training loss: cross-entropy of each codebook, in a form that adds up.

Per codebook the mean over its valid positions, then the plain mean over codebooks. Both means are
over the batch: the parts of a batch that is split over micro-batches or processes differ in their
numbers of positions, so sums and counts are kept, and never means of means.
Golden test: `train_loss`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from audiocraft.errors import InputError
from audiocraft.models.lm import LMOutput


@dataclass(frozen=True)
class CodebookLoss:
    """Cross-entropy of a batch or of a part of one.

    Attributes:
        sums: [K], nats summed over the counted positions of each codebook, float64, so that the
            order in which parts are added does not show.
        counts: [K], number of those positions, int64.
    """

    sums: Tensor
    counts: Tensor

    @property
    def per_codebook(self) -> Tensor:
        """[K], nats per position; 0 for a codebook of which nothing is counted."""
        return self.sums / self.counts.clamp(min=1)

    @property
    def total(self) -> Tensor:
        """The loss, nats per position: a scalar."""
        return self.per_codebook.mean()

    def share(self, counts: Tensor) -> Tensor:
        """What this part adds to the loss of the batch that it is of: a scalar to differentiate.

        The shares of all parts add up to the batch's `total`, and so do their gradients. A process
        whose gradients are averaged over the processes, as DDP does, multiplies its share by their
        number.

        Args:
            counts: [K], of the whole batch, see `count_targets`.
        """
        return (self.sums / counts.to(self.sums.device).clamp(min=1)).mean()


def clip_mask(lengths: Tensor, frames: int) -> Tensor:
    """Where clips have not ended yet.

    Args:
        lengths: [B], frames of each clip.
        frames: T, frames of the batch.

    Returns:
        [B, 1, T], true for the frames before each clip's end.
    """
    return (torch.arange(frames, device=lengths.device) < lengths[:, None])[:, None]


def count_targets(delays: Sequence[int], frames: int, lengths: Sequence[int]) -> Tensor:
    """Positions that count in a batch, without having seen it.

    Code `t` of codebook `k` is predicted where `t + delays[k] < frames` (golden test `patterns`),
    and counts where `t` is before the clip's end.

    Args:
        delays: K delays, in steps.
        frames: T, frames of the batch.
        lengths: frames of each clip; T for clips whose padding counts, as officially.

    Returns:
        [K], int64, on the CPU.
    """
    return torch.tensor(
        [sum(max(0, min(length, frames - delay)) for length in lengths) for delay in delays]
    )


def codebook_loss(output: LMOutput, codes: Tensor, counted: Tensor | None = None) -> CodebookLoss:
    """Cross-entropy of predictions, in float32 whatever their type.

    Args:
        output: predictions for `codes`.
        codes: [B, K, T]; what stands where nothing is counted does not matter.
        counted: true where a frame counts, of a shape that broadcasts to [B, K, T], such as
            `clip_mask` gives; all frames if not given, padding included, as officially.

    Raises:
        InputError: predictions of other codes.
    """
    if codes.shape != output.mask.shape:
        raise InputError(
            f"The loss of codes {list(codes.shape)} needs predictions of the same shape, got "
            f"{list(output.mask.shape)}: predict the codes that are given."
        )
    mask = output.mask if counted is None else output.mask & counted
    # Selecting by mask would make the host wait for the device. Zeroing both logits (NaN where
    # there is no prediction) and targets (maybe the special token) keeps shapes fixed instead.
    targets = codes.masked_fill(~mask, 0)
    sums = []
    # One codebook at a time, which bounds the copies. Unbound together, since the gradient of a
    # selected one is as large as that of all.
    for k, logits in enumerate(output.logits.unbind(dim=1)):
        logits = logits.masked_fill(~mask[:, k, :, None], 0.0)  # noqa: PLW2901
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), targets[:, k].flatten(), reduction="none"
        )
        sums.append((nats.double() * mask[:, k].flatten()).sum())
    return CodebookLoss(torch.stack(sums), mask.sum(dim=(0, 2)))
