"""One of the processes that train: `launch` runs it as a module, with the work folder.

It reads the job and the prepared dataset there, goes on from the last checkpoint if there is one,
and leaves checkpoints and exported weights. The first process speaks, and writes what all have.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
from omegaconf import DictConfig
from torch import distributed

from audiocraft.data.dataset import Example, load_prepared
from audiocraft.errors import TrainingError
from audiocraft.models.finetunes import file_base_sha256, save_finetune
from audiocraft.models.lm import LMModel
from audiocraft.models.loaders import (
    LM_FILE,
    build_lm_model,
    find_file,
    read_checkpoint,
    text_encoder_of,
)
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.lora import attach, lora_config
from audiocraft.solvers.checkpoints import (
    disk_of,
    find_checkpoint,
    load_state,
    read_notes,
    save_checkpoint,
)
from audiocraft.solvers.clips import LEAST_SONGS, hold_out, load_clips, load_measured_clips
from audiocraft.solvers.conditions import condition_settings
from audiocraft.solvers.job import Place, TrainingJob, read_job
from audiocraft.solvers.musicgen import Clip, Trainer, TrainSettings, Update
from audiocraft.solvers.optimizers import OptimizerSettings
from audiocraft.solvers.output import log_to_stdout
from audiocraft.solvers.prepare import DATASET_FILE
from audiocraft.solvers.rank import end
from audiocraft.solvers.state import (
    Measured,
    RunState,
    check_resumable,
    describe_passes,
    read_state,
    remove_weights,
    show_time,
    weights_file,
)

logger = logging.getLogger(__name__)

_SAVE_EVERY_S: Final = 600.0
_PAUSE_S: Final = 60.0  # least from one checkpoint to that of an epoch's end
_SMALL: Final = 50_000_000  # trained weights, with a state of some 1 GB: it is saved in each epoch
_LINES: Final = 10  # of an epoch
# A process may wait while the first one hashes a base or writes a checkpoint of many GB.
_PATIENCE: Final = timedelta(hours=1)


@dataclass(frozen=True)
class _Base:
    """What a training begins from.

    Attributes:
        lm: on its device, with adapters where they are trained.
        cfg: its resolved `xp.cfg`.
        path: of its file.
    """

    lm: LMModel
    cfg: DictConfig
    path: Path


def main() -> None:
    """Trains until the job's last update."""
    work = Path(sys.argv[1])
    job, place = read_job(work)
    device = _join(place)
    first = int(os.environ.get("RANK", "0")) == 0
    log_to_stdout(logging.INFO if first else logging.ERROR)
    trained, held_out = hold_out(load_prepared(work / DATASET_FILE).examples, job.seed)
    can = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    # DDP needs weights of one type in all processes.
    bfloat16 = _all_say(can, place.processes, device)
    base = _load_base(job, device, bfloat16=bfloat16)
    settings = _settings(job, place, base.cfg, len(trained), bfloat16=bfloat16)
    trainer = Trainer(base.lm, settings)
    measured = load_measured_clips(held_out, settings.conditions, job.seed)
    run = _Run(work, job, trainer, base, _begin(job, trainer, base, trained, held_out))
    run.train(load_clips(trained), measured)
    end(0)


def _join(place: Place) -> torch.device:
    """Join the other processes of the job, and take the device that is this one's own."""
    on_gpu = place.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if place.processes > 1:
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=_PATIENCE, device_id=device if on_gpu else None
        )
    return device


def _all_say(said: bool, processes: int, device: torch.device) -> bool:
    """Whether all processes say so; their GPUs may differ, and their clocks."""
    if processes == 1:
        return said
    least = torch.tensor([said], dtype=torch.int32, device=device)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return bool(least.item())


def _load_base(job: TrainingJob, device: torch.device, *, bfloat16: bool) -> _Base:
    path = find_file(VERSIONS[job.version].source, LM_FILE)
    # Weights that are trained have to be float32, frozen ones are what autocast makes of them.
    dtype = torch.bfloat16 if job.lora_rank and bfloat16 else torch.float32
    lm = build_lm_model(read_checkpoint(path), text_encoder_of(path), device, dtype)
    if job.lora_rank:
        attach(lm, lora_config(job.lora_rank), torch.Generator().manual_seed(job.seed))
    assert lm.cfg is not None, "build_lm_model always sets it"
    return _Base(lm, lm.cfg, path)


def _settings(
    job: TrainingJob, place: Place, cfg: DictConfig, clips: int, *, bfloat16: bool
) -> TrainSettings:
    return TrainSettings(
        updates=job.epochs * (job.updates_per_epoch or -(-clips // job.batch_size)),
        batch_size=job.batch_size,
        micro_batch=place.plan.micro_batch,
        seed=job.seed,
        optimizer=OptimizerSettings(job.optimizer, job.lr),
        schedule=job.schedule,
        warmup=job.warmup,
        conditions=condition_settings(cfg, job.cfg_p),
        bfloat16=bfloat16,
        checkpointing=place.plan.checkpointing,
        sharded=place.plan.sharded,
        ema_on_host=place.plan.ema_on_host,
    )


def _begin(
    job: TrainingJob,
    trainer: Trainer,
    base: _Base,
    trained: Sequence[Example],
    held_out: Sequence[Example],
) -> RunState:
    """The state of a new run."""
    settings = trainer.settings
    # Kept in the store, so it takes its time but once.
    is_first = trainer.rank == 0
    sha256 = file_base_sha256(base.path, read_checkpoint(base.path)) if is_first else ""
    return RunState(
        updates=settings.updates,
        updates_per_epoch=settings.updates // job.epochs,
        clips=len(trained),
        songs=len({example.song for example in trained}),
        held_out=len({example.song for example in held_out}),
        held_out_clips=len(held_out),
        ranks=trainer.ranks,
        sharded=settings.sharded and trainer.ranks > 1,
        base_sha256=sha256,
    )


class _Run:
    """A training in its work folder.

    Args:
        work: the folder.
        job: what to do.
        trainer: at its start.
        base: what it begins from.
        state: of a new run.
    """

    def __init__(
        self, work: Path, job: TrainingJob, trainer: Trainer, base: _Base, state: RunState
    ) -> None:
        self._work = work
        self._job = job
        self._trainer = trainer
        self._base = base
        self._state = state
        self._every = max(1, state.updates_per_epoch // _LINES)
        trained = sum(weight.numel() for weight in base.lm.parameters() if weight.requires_grad)
        self._is_small = trained <= _SMALL
        self._began = self._counted = self._saved = self._spoken = time.monotonic()
        self._start = self._said = 0

    def train(self, clips: Sequence[Clip], measured: Sequence[Clip]) -> None:
        """Make the updates that are left.

        Args:
            clips: to train on.
            measured: held out, to measure with.

        Raises:
            TrainingError: it cannot go on.
        """
        self._announce()
        if not self._resume() and measured:
            self._validate(measured)
        trainer, state = self._trainer, self._state
        self._start = self._said = trainer.update
        self._began = self._counted = self._saved = self._spoken = time.monotonic()
        while trainer.update < state.updates:
            epoch = trainer.update // state.updates_per_epoch + 1
            try:
                trainer.train(clips, self._after_update, epoch * state.updates_per_epoch)
                trainer.check_weights()
                if measured:
                    self._validate(measured)
            except TrainingError as error:
                raise self._stopped(error) from error
            saved = ", and saved" if self._keep(is_measured=bool(measured)) else ""
            logger.info("Epoch %d of %d is done%s.", epoch, self._job.epochs, saved)

    def _announce(self) -> None:
        state = self._state
        size = self._trainer.settings.batch_size
        what = f"the {state.clips} clips of {state.songs} songs"
        for line in describe_passes(state.updates, size, state.clips, what):
            logger.info("%s", line)
        if state.held_out:
            logger.info(
                "%d songs (%d clips) are held out, to measure it with after each epoch.",
                *(state.held_out, state.held_out_clips),
            )
        else:
            logger.info("Nothing is held out, for there are less than %d songs.", LEAST_SONGS)

    def _resume(self) -> bool:
        """Go on from the last checkpoint, if there is one."""
        trainer, fresh = self._trainer, self._state
        checkpoint = find_checkpoint(self._work)
        if checkpoint is None:
            return False
        state = RunState.of(read_notes(checkpoint))
        check_resumable(state, trainer.ranks, sharded=fresh.sharded)
        if fresh.base_sha256 not in {"", state.base_sha256}:
            raise TrainingError(
                f"The weights of {self._job.version} are not those that this training began with: "
                "bring them back, or begin again with --fresh."
            )
        mapped = trainer.lm.device.type != "cpu"
        part = trainer.rank if state.sharded else 0
        trainer.load_state_dict(load_state(checkpoint, part, mapped=mapped))
        state.ranks = trainer.ranks
        self._state = state
        logger.info("Going on after update %d of %d.", state.update, state.updates)
        return True

    def _after_update(self, update: Update) -> None:
        state = self._state
        state.update = update.number
        state.recent.append(tuple(update.loss.per_codebook.tolist()))
        if update.number % self._every == 0 or update.number == state.updates:
            self._speak(update)
        is_end = update.number % state.updates_per_epoch == 0
        if not is_end and self._has_waited(_SAVE_EVERY_S):
            self._trainer.check_weights()
            self._save()

    def _speak(self, update: Update) -> None:
        state, now = self._state, time.monotonic()
        rows = zip(*state.recent, strict=True)
        means = tuple(sum(row) / len(row) for row in rows)
        loss = sum(means) / len(means)
        state.losses.append(Measured(update.number, loss, means, update.lr, update.grad_norm))
        state.recent.clear()
        speed = (update.number - self._said) / (now - self._spoken)
        mean = (now - self._began) / (update.number - self._start)
        logger.info(
            "update %d/%d: loss %.4f (%s), lr %.3g, gradient norm %.3g, %.3g steps/s, %s left",
            update.number,
            state.updates,
            loss,
            " ".join(f"{value:.3f}" for value in means),
            update.lr,
            update.grad_norm,
            speed,
            show_time(mean * (state.updates - update.number)),
        )
        self._spoken, self._said = now, update.number

    def _validate(self, measured: Sequence[Clip]) -> None:
        """Measure the averaged weights; before the first update those are the base's."""
        state = self._state
        found = self._trainer.evaluate(measured, averaged=True)
        loss, parts = float(found.total), tuple(found.per_codebook.tolist())
        if not math.isfinite(loss):
            raise TrainingError(
                f"The validation loss after update {state.update} is {loss}: give a lower lr."
                if state.update
                else f"The validation loss of {self._job.version} is {loss} before its first "
                "update: give another model_version, or other music."
            )
        best = state.best_loss
        state.validation.append(Measured(state.update, loss, parts))
        if state.update == 0:
            logger.info("Validation loss of the base: %.4f.", loss)
            return
        if best is None or loss < best:
            state.best = state.update
        logger.info(
            "Validation loss of the averaged weights after update %d: %.4f%s.",
            state.update,
            loss,
            ", the best so far" if state.best == state.update else f" (best: {best:.4f})",
        )

    def _keep(self, *, is_measured: bool) -> bool:
        """Export and save what an epoch has come to, as far as that is of use.

        A checkpoint of a large model takes as long as many updates, and from the one before, all
        that came since is made again bit for bit. The best weights are exported at once, for at the
        next checkpoint they are gone; where nothing is measured, the last ones go with it. So at
        most two exports are there: that of the checkpoint on the disk, and the next.

        Args:
            is_measured: whether the best weights are known, which are the result then.

        Returns:
            Whether it is saved.
        """
        state = self._state
        is_saved = state.has_ended or self._is_small or self._has_waited(_PAUSE_S)
        is_of_use = state.best == state.update if is_measured else is_saved
        if is_of_use:
            self._export()
        if is_saved:
            self._save()
        return is_saved

    def _export(self) -> None:
        """Write the averaged weights, after those are removed that are no longer of use."""
        state, base = self._state, self._base
        weights = self._trainer.exported_state()
        state.exported = state.update
        if weights is None:
            return
        remove_weights(self._work)
        with disk_of(self._work, f"the export of update {state.update}"):
            save_finetune(
                weights_file(self._work, state.update),
                weights,
                base.cfg,
                base=self._job.version,
                base_sha256=state.base_sha256,
                license=VERSIONS[self._job.version].license,
                lora=lora_config(self._job.lora_rank) if self._job.lora_rank else None,
            )

    def _save(self) -> None:
        state, trainer = self._state, self._trainer
        now = time.monotonic()
        state.seconds += now - self._counted
        self._counted = now
        # Nothing goes on from the last update: its notes say that the training has ended.
        is_part = not state.has_ended and (trainer.rank == 0 or state.sharded)
        own = trainer.state_dict() if is_part else None
        save_checkpoint(
            self._work,
            state.update,
            own,
            state.notes(),
            rank=trainer.rank,
            parts=trainer.ranks if state.sharded else 1,
            barrier=self._barrier(),
        )
        if trainer.rank == 0:
            remove_weights(self._work)
        self._saved = time.monotonic()  # a large one takes minutes

    def _barrier(self) -> Callable[[], object]:
        return distributed.barrier if self._trainer.ranks > 1 else lambda: None

    def _has_waited(self, seconds: float) -> bool:
        """Whether the last checkpoint is so old, for all processes."""
        waited = time.monotonic() - self._saved >= seconds
        return _all_say(waited, self._trainer.ranks, self._trainer.lm.device)

    def _stopped(self, error: TrainingError) -> TrainingError:
        """The error, with what is kept; the same settings would end the same way."""
        text, state, saved = str(error).removesuffix("."), self._state, read_state(self._work)
        kept = [f"the checkpoint of update {saved.update}"] if saved else []
        if state.chosen is not None:
            name = weights_file(self._work, state.chosen).name
            kept.append(f"as replicate_weights takes them, {name}")
        if not kept:
            return TrainingError(f"{text}; nothing was saved yet.")
        return TrainingError(f"{text}, or use what is kept in {self._work}: {' and, '.join(kept)}.")


if __name__ == "__main__":
    main()
