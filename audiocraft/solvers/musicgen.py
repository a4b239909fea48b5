"""The training loop: what one update does, and what a run is made of.

Everything random is drawn from the seed, the number of the update and the clip, so a run is the
same however its batches are split over micro-batches and processes, and wherever it is resumed.
"""

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from audiocraft.errors import InputError, TrainingError
from audiocraft.models.lm import LMModel, LMOutput
from audiocraft.modules.conditioners import ChromaStemConditioner, ConditionTensors, T5Conditioner
from audiocraft.solvers.conditions import (
    ConditionSettings,
    Drops,
    Metadata,
    batch_random,
    clip_random,
    draw_drops,
    drop_words,
    merge_metadata,
)
from audiocraft.solvers.ema import Ema
from audiocraft.solvers.loss import CodebookLoss, clip_mask, codebook_loss, count_targets
from audiocraft.solvers.optimizers import (
    OptimizerSettings,
    build_optimizer,
    effective_lr,
    parameter_groups,
)
from audiocraft.solvers.schedules import ScheduleName, lr_factor, set_lr

logger = logging.getLogger(__name__)

_NULL_CHROMA_FRAMES = 5  # golden test `lm_tiny_melody`: what no melody is in training


@dataclass(frozen=True)
class Clip:
    """A chunk of music as the model is trained with it.

    Attributes:
        key: its own name, such as a hash of its content; chance depends on it.
        codes: (K, T), T frames of the context for every clip of a run.
        frames: of them before the clip's end.
        description: its own text.
        metadata: from `parse_metadata`.
        chroma: (T', n_chroma) of its melody, over the whole context; None for versions without.
        samples: of the melody before the clip's end, at the rate of its chroma.
    """

    key: str
    codes: Tensor
    frames: int
    description: str | None = None
    metadata: Metadata = field(default_factory=dict)
    chroma: Tensor | None = None
    samples: int = 0


@dataclass(frozen=True)
class TrainSettings:
    """How a run goes.

    Attributes:
        updates: N, of the run, >= 1.
        batch_size: clips of an update, over all processes; a multiple of their number.
        micro_batch: most clips that a process computes at once, >= 1.
        seed: of every random choice.
        optimizer: which, and its numbers.
        schedule: of the learning rate.
        warmup: updates.
        conditions: how conditions are dropped and merged.
        max_norm: gradients longer than this are scaled down to it.
        bfloat16: compute in 16 bit, under autocast.
        count_padding: let frames beyond a clip's end count, as officially.
    """

    updates: int
    batch_size: int
    micro_batch: int
    seed: int
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleName = "cosine"
    warmup: int = 8
    conditions: ConditionSettings = field(default_factory=ConditionSettings)
    max_norm: float = 1.0
    bfloat16: bool = False
    count_padding: bool = False


@dataclass(frozen=True)
class Update:
    """What an update was like.

    Attributes:
        number: from 1.
        loss: of the global batch.
        grad_norm: before clipping.
        lr: in use, see `effective_lr`.
    """

    number: int
    loss: CodebookLoss
    grad_norm: float
    lr: float


def batch_clips(clips: Sequence[Clip], settings: TrainSettings, update: int) -> list[Clip]:
    """The clips of an update: passes over all of them, each in an order of its own.

    Args:
        clips: all of them; their order does not matter.
        settings: of the run.
        update: its number, from 1.
    """
    ordered = sorted(clips, key=lambda clip: clip.key)
    size = settings.batch_size
    chosen = []
    for index in range((update - 1) * size, update * size):
        number, place = divmod(index, len(ordered))
        order = list(range(len(ordered)))
        random.Random(f"pass {settings.seed} {number}").shuffle(order)  # noqa: S311
        chosen.append(ordered[order[place]])
    return chosen


class _Predictions(torch.nn.Module):
    """A forward pass that DDP can wrap."""

    def __init__(self, lm: LMModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, codes: Tensor, conditions: ConditionTensors) -> tuple[Tensor, Tensor]:
        output = self.lm.compute_predictions(codes, [], conditions)
        return output.logits, output.mask


class Trainer:
    """One model in training, in this process and the others of its job.

    Args:
        lm: float32 weights, on its device; those that require gradients are trained.
        settings: of the run.

    Raises:
        InputError: settings that do not fit the number of processes.
    """

    def __init__(self, lm: LMModel, settings: TrainSettings) -> None:
        joined = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if joined else 0
        self.ranks = distributed.get_world_size() if joined else 1
        if settings.batch_size % self.ranks:
            raise InputError(
                f"batch_size is {settings.batch_size}, it must be a multiple of the {self.ranks} "
                "processes."
            )
        self.lm = lm.train()
        self.settings = settings
        self.update = 0
        self.optimizer = build_optimizer(settings.optimizer, parameter_groups(lm))
        self._base_lr: float = self.optimizer.param_groups[0]["lr"]
        self.ema = Ema(dict(self._trained()))
        self._predict: torch.nn.Module = _Predictions(lm)
        if joined:
            device = lm.device
            self._predict = DistributedDataParallel(
                self._predict, device_ids=[device] if device.type == "cuda" else None
            )

    def train(
        self, clips: Sequence[Clip], report: Callable[[Update], None], until: int | None = None
    ) -> None:
        """Make the updates that are left.

        Args:
            clips: all of them; each process has them all.
            report: told after each update.
            until: last update to make now; the run's last if not given.

        Raises:
            TrainingError: the loss is not finite; the weights are then worth nothing.
        """
        last = self.settings.updates if until is None else until
        while self.update < last:
            report(self._step(batch_clips(clips, self.settings, self.update + 1)))

    @torch.no_grad()
    def evaluate(self, clips: Sequence[Clip]) -> CodebookLoss:
        """Loss over clips with nothing dropped, of the weights as they are, in this process."""
        device, delays = self.lm.device, self.lm.pattern_provider.delays
        zero = torch.zeros(len(delays), dtype=torch.float64, device=device)
        total = CodebookLoss(zero, zero.long())
        texts = [clip.description for clip in clips]
        self.lm.eval()
        try:
            for start in range(0, len(clips), self.settings.micro_batch):
                part = slice(start, start + self.settings.micro_batch)
                conditions = self._conditions(clips[part], texts, part, Drops())
                codes, counted = self._codes(clips[part])
                with self._precision():
                    output = self.lm.compute_predictions(codes, [], conditions)
                total += codebook_loss(output, codes, counted)
        finally:
            self.lm.train()
        return total

    def state_dict(self) -> dict[str, Any]:
        """All that the run goes on from; tensors are not copied."""
        return {
            "update": self.update,
            "weights": {name: weight.detach() for name, weight in self._trained()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of a run with the same settings."""
        with torch.no_grad():
            for name, weight in self._trained():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.update = state["update"]

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return (item for item in self.lm.named_parameters() if item[1].requires_grad)

    def _step(self, batch: Sequence[Clip]) -> Update:
        settings, number = self.settings, self.update + 1
        share = len(batch) // self.ranks
        own = range(self.rank * share, (self.rank + 1) * share)
        texts = [self._text(clip, number) for clip in batch]
        drops = draw_drops(settings.conditions, batch_random(settings.seed, number).random)
        if drops.everything or "description" in drops.text:
            texts = [None] * len(texts)
        counts = self._counts(batch)
        lr = self._base_lr * lr_factor(settings.schedule, number, settings.warmup, settings.updates)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        total: CodebookLoss | None = None
        starts = range(own.start, own.stop, settings.micro_batch)
        for start in starts:
            rows = slice(start, min(start + settings.micro_batch, own.stop))
            last = start == starts[-1]
            # Gradients meet those of the other processes once an update.
            wait = nullcontext() if last else getattr(self._predict, "no_sync", nullcontext)()
            with wait:
                conditions = self._conditions(batch[rows], texts, rows, drops)
                codes, counted = self._codes(batch[rows])
                with self._precision():
                    logits, mask = self._predict(codes, conditions)
                loss = codebook_loss(LMOutput(logits, mask), codes, counted)
                (self.ranks * loss.share(counts)).backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None, "each process has clips"
        if self.ranks > 1:
            distributed.all_reduce(total.sums)
            distributed.all_reduce(total.counts)
        value = float(total.total)
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss of update {number} is {value}: give a lower lr, or begin from the last "
                "checkpoint."
            )
        weights = [weight for _, weight in self._trained()]
        norm = float(clip_grad_norm_(weights, settings.max_norm))
        self.optimizer.step()
        self.update = number
        self.ema.after(number)
        return Update(number, total, norm, effective_lr(self.optimizer))

    def _text(self, clip: Clip, update: int) -> str | None:
        conditions = self.settings.conditions
        rng = clip_random(self.settings.seed, update, clip.key)
        text = merge_metadata(clip.description, clip.metadata, conditions, rng)
        return drop_words(text, conditions.word_p, rng.random)

    def _counts(self, batch: Sequence[Clip]) -> Tensor:
        frames = batch[0].codes.shape[-1]
        lengths = [frames if self.settings.count_padding else clip.frames for clip in batch]
        return count_targets(self.lm.pattern_provider.delays, frames, lengths)

    def _codes(self, clips: Sequence[Clip]) -> tuple[Tensor, Tensor | None]:
        """Codes (B, K, T), and where they count."""
        device = self.lm.device
        codes = torch.stack([clip.codes for clip in clips]).to(device, torch.long)
        if self.settings.count_padding:
            return codes, None
        lengths = torch.tensor([clip.frames for clip in clips], device=device)
        return codes, clip_mask(lengths, codes.shape[-1])

    def _conditions(
        self, clips: Sequence[Clip], texts: Sequence[str | None], rows: slice, drops: Drops
    ) -> ConditionTensors:
        """Conditions of some rows of a batch, whose texts are padded to the longest of them all."""
        encoded: ConditionTensors = {}
        conditioners = self.lm.condition_provider.conditioners
        for name in self.lm.condition_provider.text_conditions:
            conditioner = conditioners[name]
            assert isinstance(conditioner, T5Conditioner)
            tokens = conditioner.tokenize(texts)
            encoded[name] = conditioner({key: value[rows] for key, value in tokens.items()})
        for name in self.lm.condition_provider.wav_conditions:
            conditioner = conditioners[name]
            assert isinstance(conditioner, ChromaStemConditioner)
            is_dropped = drops.everything or name in drops.wav
            encoded[name] = conditioner.project(*_chroma(conditioner, clips, is_dropped))
        return encoded

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.lm.device.type, torch.bfloat16, enabled=self.settings.bfloat16)


def _chroma(
    conditioner: ChromaStemConditioner, clips: Sequence[Clip], is_dropped: bool
) -> tuple[Tensor, Tensor]:
    """Chroma (B, T', n_chroma) and mask (B, T') of clips; a dropped melody is all masked."""
    device = conditioner.output_proj.weight.device
    if is_dropped:
        shape = (len(clips), _NULL_CHROMA_FRAMES)
        chroma = torch.zeros(*shape, conditioner.chroma.n_chroma, device=device)
        return chroma, torch.zeros(shape, dtype=torch.long, device=device)
    given = [clip.chroma for clip in clips if clip.chroma is not None]
    if len(given) != len(clips):
        raise InputError("A melody version is trained with clips that have chroma: encode them.")
    chroma = torch.stack(given).to(device, torch.float32)
    lengths = torch.tensor([clip.samples for clip in clips], device=device)
    return chroma, conditioner.length_mask(lengths, chroma.shape[1])
