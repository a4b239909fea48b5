"""The training loop: what one update does, and what a run is made of.

Everything random is drawn from the seed, the number of the update and the clip, so a run is the
same however its batches are split over micro-batches and processes, and wherever it is resumed.
"""

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from audiocraft.errors import InputError, TrainingError
from audiocraft.models.lm import LMModel, LMOutput
from audiocraft.modules.conditioners import ChromaStemConditioner, T5Conditioner
from audiocraft.modules.lora import adapter_parameters, adapter_state
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
from audiocraft.solvers.ema import Ema, updates_per_step
from audiocraft.solvers.loss import CodebookLoss, clip_mask, codebook_loss, count_targets
from audiocraft.solvers.optimizers import (
    OptimizerSettings,
    build_optimizer,
    effective_lr,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
)
from audiocraft.solvers.schedules import ScheduleName, lr_factor, set_lr
from audiocraft.solvers.sharding import clip_gradients, local, shard, take_apart, whole

logger = logging.getLogger(__name__)


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
        checkpointing: compute the activations of each layer again in the backward pass.
        sharded: spread weights, gradients and optimizer state over the processes (FSDP2).
        ema_on_host: keep the moving average in the host's memory.
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
    checkpointing: bool = False
    sharded: bool = False
    ema_on_host: bool = False


@dataclass(frozen=True)
class Update:
    """What an update was like.

    Attributes:
        number: from 1.
        loss: of the global batch, on the CPU.
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
    chosen: list[Clip] = []
    while len(chosen) < size:
        number, place = divmod((update - 1) * size + len(chosen), len(ordered))
        order = list(range(len(ordered)))
        random.Random(f"pass {settings.seed} {number}").shuffle(order)  # noqa: S311
        chosen += [ordered[index] for index in order[place : place + size - len(chosen)]]
    return chosen


_Inputs = Mapping[str, Mapping[str, Tensor] | tuple[Tensor, Tensor]]
"""What conditions are made of, by name: tokens of a text, or chroma and mask of a melody."""


class _Predictions(torch.nn.Module):
    """All that trained weights take part in, in one forward pass for DDP or FSDP2 to wrap."""

    def __init__(self, lm: LMModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, codes: Tensor, inputs: _Inputs) -> tuple[Tensor, Tensor]:
        conditions = {}
        for name, given in inputs.items():
            conditioner: Any = self.lm.condition_provider.conditioners[name]
            is_text = isinstance(given, Mapping)
            conditions[name] = conditioner(given) if is_text else conditioner.project(*given)
        output = self.lm.compute_predictions(codes, [], conditions)
        return output.logits, output.mask


def _trained(lm: LMModel) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained, by the names of a fine-tune's file."""
    return adapter_parameters(lm) or {
        name: weight for name, weight in lm.named_parameters() if weight.requires_grad
    }


class Trainer:
    """One model in training, in this process and the others of its job.

    Args:
        lm: on its device; its weights that require gradients are trained, or the adapters that are
            attached to it. These are float32, frozen ones may be 16 bit under `bfloat16`.
        settings: of the run.

    Raises:
        InputError: settings that do not fit the number of processes or the weights.
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
        if not settings.bfloat16 and any(w.dtype != torch.float32 for w in lm.parameters()):
            raise InputError("Frozen weights of 16 bit need bfloat16: load them in float32.")
        self.lm = lm.train()
        self.settings = settings
        self.update = 0
        lm.transformer.checkpointing = settings.checkpointing
        self._predictions = _Predictions(lm)
        self._sharded = settings.sharded and self.ranks > 1
        if self._sharded:
            shard(self._predictions, lm.transformer.layers, lm.device, self.ranks)
        self._weights = _trained(lm)
        self.optimizer = build_optimizer(settings.optimizer, parameter_groups(lm))
        self._base_lr: float = self.optimizer.param_groups[0]["lr"]
        self.ema = Ema(
            self._weights,
            every=updates_per_step(settings.updates),
            device="cpu" if settings.ema_on_host else None,
        )
        self._replicated: DistributedDataParallel | None = None
        self._adds_in_buckets = False
        self._is_in_order = False
        if joined and not self._sharded:
            self._adds_in_buckets = settings.micro_batch < settings.batch_size // self.ranks
            if self._adds_in_buckets:  # where DDP lays the gradients that it finds
                for weight in self._weights.values():
                    weight.grad = torch.zeros_like(weight)
            self._replicated = DistributedDataParallel(
                self._predictions,
                device_ids=[lm.device] if lm.device.type == "cuda" else None,
                broadcast_buffers=False,  # they are constants
                gradient_as_bucket_view=True,  # else gradients are there twice
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
            TrainingError: loss or gradient are not finite; the weights are those of the update
                before.
        """
        last = self.settings.updates if until is None else until
        while self.update < last:
            report(self._step(batch_clips(clips, self.settings, self.update + 1)))

    def check_weights(self) -> None:
        """Look for what the last update may have made of the weights, before they are kept.

        Each process has to call it.

        Raises:
            TrainingError: one that is trained is not finite.
        """
        norm = whole(get_total_norm([weight.detach() for weight in self._weights.values()])).item()
        if not math.isfinite(norm):
            raise TrainingError(
                f"The norm of the weights after update {self.update} is {norm}: give a lower lr."
            )

    @torch.no_grad()
    def evaluate(
        self, clips: Sequence[Clip], *, averaged: bool = True, drops: Drops | None = None
    ) -> CodebookLoss:
        """Loss over clips; texts are padded to the longest of them all.

        Each process computes a share of them, and all get the sum.

        Args:
            clips: at least one; each process has them all.
            averaged: of the moving average, once it has taken a step; else of the weights.
            drops: what they go without; nothing if not given.
        """
        with self.ema.applied() if averaged else nullcontext():
            self.lm.eval()
            try:
                sums = self._evaluate(clips, drops or Drops())
            finally:
                self.lm.train()
                if self._sharded:
                    take_apart(self._predictions)
        self._add_up(sums)
        return CodebookLoss(sums.cpu(), self._counts(clips))

    def _evaluate(self, clips: Sequence[Clip], drops: Drops) -> Tensor:
        """Nats of each codebook over this process's share, [K]."""
        size, delays = self.settings.micro_batch, self.lm.pattern_provider.delays
        sums = torch.zeros(len(delays), dtype=torch.float64, device=self.lm.device)
        tokens = self._tokens([clip.description for clip in clips], drops)
        rows = range(self.rank, len(clips), self.ranks)
        # Where weights are spread, all processes have to be in each forward pass.
        rounds = -(-len(range(0, len(clips), self.ranks)) // size) * size
        for start in range(0, rounds if self._sharded else len(rows), size):
            part = rows[start : start + size]
            loss = self._loss(self._predictions, clips, part or range(1), tokens, drops)
            if part:
                sums += loss.sums
        return sums

    def exported_state(self) -> dict[str, Tensor] | None:
        """What a fine-tune's file holds: the averaged weights, or adapters, in 16 bit.

        Before the first step of the average it is the weights as they are. Each process has to
        call it.

        Returns:
            Official names to float16 tensors on the CPU, or `<name>.lora_a` and `<name>.lora_b`;
            None but in the first process.
        """
        if self.rank > 0 and not self._sharded:
            return None
        exported = {}
        with torch.no_grad(), self.ema.applied():
            for name, value in (adapter_state(self.lm) or self.lm.state_dict()).items():
                half = whole(value.detach().half())  # one at a time: they need not fit all at once
                if self.rank == 0:
                    exported[name] = half.cpu()
        return exported if self.rank == 0 else None

    def state_dict(self) -> dict[str, Any]:
        """All that the run goes on from; tensors are not copied.

        Where weights are spread it is this process's part, else it is equal in each.
        """
        return {
            "update": self.update,
            "weights": {name: local(weight).detach() for name, weight in self._weights.items()},
            "optimizer": optimizer_state(self.optimizer),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of a run with the same settings."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                local(weight).copy_(state["weights"][name])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.update = state["update"]

    def _step(self, batch: Sequence[Clip]) -> Update:
        settings, number = self.settings, self.update + 1
        share = len(batch) // self.ranks
        own = range(self.rank * share, (self.rank + 1) * share)
        texts = [self._text(clip, number) for clip in batch]
        drops = draw_drops(settings.conditions, batch_random(settings.seed, number).random)
        tokens = self._tokens(texts, drops)
        counts = self._counts(batch)
        counts_there = self._send(counts)
        lr = self._base_lr * lr_factor(settings.schedule, number, settings.warmup, settings.updates)
        set_lr(self.optimizer, lr)
        parts = [
            own[start : start + settings.micro_batch]
            for start in range(0, share, settings.micro_batch)
        ]
        if self._replicated is not None and not self._is_in_order:
            # DDP puts its buckets in order when their gradients have met for the first time, and in
            # which order more than two processes are added up depends on that: so they meet once
            # for nothing, at each start, and a run that goes on rounds as one that was not stopped.
            loss = self._loss(self._replicated, batch, parts[0], tokens, drops)
            loss.share(counts_there).backward()  # type: ignore[no-untyped-call]
            self._is_in_order = True
        # New ones would lie beside DDP's buckets until processes meet.
        self.optimizer.zero_grad(set_to_none=not self._adds_in_buckets)
        sums = torch.zeros(len(counts), dtype=torch.float64, device=self.lm.device)
        for rows in parts:
            # Gradients meet those of the other processes once an update. Those of shards do so each
            # time: in between, each process would have to hold them for all weights.
            together = self._replicated
            alone = (
                nullcontext() if together is None or rows.stop == own.stop else together.no_sync()
            )
            with alone:
                loss = self._loss(together or self._predictions, batch, rows, tokens, drops)
                (self.ranks * loss.share(counts_there)).backward()  # type: ignore[no-untyped-call]
            sums += loss.sums.detach()
        self._add_up(sums)
        norm = clip_gradients(list(self._weights.values()), settings.max_norm)
        # The one time that the host waits for the device.
        *values, length = torch.cat([sums, norm.double()[None]]).tolist()
        loss = CodebookLoss(torch.tensor(values, dtype=torch.float64), counts)
        for what, value in {"loss": float(loss.total), "gradient norm": length}.items():
            if not math.isfinite(value):
                raise TrainingError(f"The {what} of update {number} is {value}: give a lower lr.")
        self.optimizer.step()
        self.update = number
        self.ema.after(number)
        return Update(number, loss, length, effective_lr(self.optimizer))

    def _add_up(self, sums: Tensor) -> None:
        """Add the other processes' sums to this one's."""
        if self.ranks > 1:
            distributed.all_reduce(sums)

    def _loss(
        self,
        predict: torch.nn.Module,
        clips: Sequence[Clip],
        rows: range,
        tokens: Mapping[str, Mapping[str, Tensor]],
        drops: Drops,
    ) -> CodebookLoss:
        """Loss of some rows of a batch, whose texts are padded to the longest of them all."""
        chosen = [clips[row] for row in rows]
        inputs: dict[str, Mapping[str, Tensor] | tuple[Tensor, Tensor]] = {
            name: {key: value[rows.start : rows.stop : rows.step] for key, value in given.items()}
            for name, given in tokens.items()
        }
        for name in self.lm.condition_provider.wav_conditions:
            inputs[name] = self._chroma(name, chosen, drops.everything or name in drops.wav)
        codes = self._send(torch.stack([clip.codes for clip in chosen])).long()
        counted = None
        if not self.settings.count_padding:
            lengths = self._send(torch.tensor([clip.frames for clip in chosen]))
            counted = clip_mask(lengths, codes.shape[-1])
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            logits, mask = predict(codes, inputs)
        return codebook_loss(LMOutput(logits, mask), codes, counted)

    def _text(self, clip: Clip, update: int) -> str | None:
        conditions = self.settings.conditions
        rng = clip_random(self.settings.seed, update, clip.key)
        text = merge_metadata(clip.description, clip.metadata, conditions, rng)
        return drop_words(text, conditions.word_p, rng.random)

    def _counts(self, batch: Sequence[Clip]) -> Tensor:
        frames = batch[0].codes.shape[-1]
        lengths = [frames if self.settings.count_padding else clip.frames for clip in batch]
        return count_targets(self.lm.pattern_provider.delays, frames, lengths)

    def _tokens(self, texts: Sequence[str | None], drops: Drops) -> dict[str, dict[str, Tensor]]:
        """Tokens of a batch's texts, by name of the condition.

        They are padded to the longest of them, and padding counts (nothing masks it): so those of
        the whole batch are made together, and divided over processes and micro-batches after.
        """
        tokens = {}
        for name in self.lm.condition_provider.text_conditions:
            conditioner = cast("T5Conditioner", self.lm.condition_provider.conditioners[name])
            is_dropped = drops.everything or name in drops.text
            is_short = is_dropped and not self.settings.conditions.null_as_generated
            tokens[name] = conditioner.tokenize([None] * len(texts) if is_short else texts)
            if is_dropped:
                tokens[name]["attention_mask"].zero_()
        return tokens

    def _chroma(self, name: str, clips: Sequence[Clip], is_dropped: bool) -> tuple[Tensor, Tensor]:
        """Chroma (B, T', n_chroma) and mask (B, T') of clips."""
        conditioner = cast("ChromaStemConditioner", self.lm.condition_provider.conditioners[name])
        if is_dropped and self.settings.conditions.null_as_generated:
            shape = (len(clips), conditioner.chroma_len)
            chroma = torch.zeros(*shape, conditioner.chroma.n_chroma, device=self.lm.device)
            chroma[..., 0] = 1.0  # as silence has it, golden test `lm_tiny_melody`
            return chroma, torch.ones(shape, dtype=torch.long, device=self.lm.device)
        if is_dropped:
            # No melody is a single sample, golden test `lm_tiny_melody`, case `train_cfg.allnull`.
            shape = (len(clips), conditioner.chroma.num_frames(1))
            chroma = torch.zeros(*shape, conditioner.chroma.n_chroma, device=self.lm.device)
            return chroma, torch.zeros(shape, dtype=torch.long, device=self.lm.device)
        given = [clip.chroma for clip in clips if clip.chroma is not None]
        if len(given) != len(clips):
            raise InputError(
                "A melody version is trained with clips that have chroma: encode them."
            )
        chroma = self._send(torch.stack(given).float())
        lengths = self._send(torch.tensor([clip.samples for clip in clips]))
        return chroma, conditioner.length_mask(lengths, chroma.shape[1])

    def _send(self, tensor: Tensor) -> Tensor:
        """A tensor on the model's device; the host does not wait until it is there."""
        if self.lm.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.lm.device, non_blocking=True)
