"""Train the language model and the text encoder of the bundled `tiny` release.

    python -m tools.tiny.lm --data FOLDER --codec FILE --out FOLDER --hours H [--resume]
    python -m tools.tiny.lm ... --begin-from RELEASE [--resume]

It trains from nothing, or goes on from a release's weights, on what `tools.tiny.dataset` has made.
The text encoder comes first: it is taught what descriptions say, and then left as it is; a release
brings its own. The folder gets `release/`, the averaged weights at the lowest loss on pieces that
are not trained on, as a release that `MusicGen` loads; `log.jsonl`, a line for each evaluation; and
a checkpoint, from which `--resume` goes on after whatever ended the run. Hours are those that the
cores work for it: a run that shares the machine takes longer. A run that is resumed with other
hours comes to its end sooner or later.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from audiocraft.errors import AudiocraftError, InputError
from audiocraft.models.builders import get_lm_model
from audiocraft.models.loaders import LM_FILE, assign_state, find_file, read_checkpoint
from audiocraft.modules.conditioners import T5Conditioner
from audiocraft.modules.precision import has_bfloat16
from audiocraft.solvers.checkpoints import (
    find_checkpoint,
    load_state,
    read_notes,
    save_checkpoint,
    work_folder,
)
from audiocraft.solvers.conditions import Drops, condition_settings
from audiocraft.solvers.musicgen import Clip, Trainer, TrainSettings, Update, batch_clips
from audiocraft.solvers.optimizers import OptimizerSettings
from tools.synthetic_music.rendering import RATE
from tools.tiny.alignment import align
from tools.tiny.codec import join, split
from tools.tiny.config import MELODY, TEXT, Shape, lm_config
from tools.tiny.crops import SEED, Crops, unlearnt
from tools.tiny.dataset import (
    HELD_OUT,
    TRAINED,
    extractor,
    load_music,
    load_settings,
    stereo_codec,
)
from tools.tiny.lessons import Lessons
from tools.tiny.release import RELEASE, Work, work_of, write_release
from tools.tiny.text_encoder import make_text_encoder, teach_text_encoder

_NICE: Final = 10
_THREADS: Final = 2
_WARM_UP: Final = 200  # updates
_BETAS: Final = (0.9, 0.975)  # the second one of larger batches, 0.95, for half as many crops
_TRIAL: Final = 50  # updates after which it is known how many there will be
_REPORT_SECONDS: Final = 240  # from evaluation to evaluation
_SAVE_SECONDS: Final = 180
_MEASURED: Final = 48  # crops
# Of 256 values that a layer adds: there are fewer pieces than can be learnt by heart.
_DROPPED: Final = 26
# How much of the gradient of a codebook's loss gets beyond its head. All of the music is in the
# first ones; the last ones have most of the loss, which can only be learnt by heart.
_SHARES: Final = (1.0, 0.5, 0.25, 0.125)
_LESSONS_NAME: Final = "lessons"
_LESSONS: Final = 1.0  # weight of the questions beside the codes


def _pass_back(share: float) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
    """A hook that lets a share of a head's gradient through to what it gets."""

    def hook(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (hidden,) = inputs
        return (hidden.detach() + share * (hidden - hidden.detach()),)

    return hook


def _drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """A hook that drops values of what a module gives, in training.

    Each takes a byte of random numbers; `F.dropout` draws one for each, three times as slowly on a
    CPU.
    """
    if not module.training:
        return output
    words = torch.empty(-(-output.numel() // 8), dtype=torch.int64, device=output.device)
    drawn = words.random_(-(2**63), None).view(torch.uint8)[: output.numel()].view(output.shape)
    return torch.where(drawn >= _DROPPED, output * (256 / (256 - _DROPPED)), 0)


def evaluate(
    trainer: Trainer, clips: Sequence[Clip], lessons: Lessons, truths: Sequence[Tensor]
) -> dict[str, Any]:
    """Losses of the averaged weights, in nats per code, and what conditions are worth.

    Args:
        trainer: of the model.
        clips: not trained on.
        lessons: of the model.
        truths: of each clip, for the lessons.

    Returns:
        `loss` with text and melody, and `per_codebook`; `text`, without the melody; `other_text`,
        the same with another clip's text; `nothing`, with no condition; `answers`, the share of the
        lessons' questions that are answered right without the melody, and `followed`, that of the
        melody's chroma where it is given.
    """
    no_melody = Drops(wav=frozenset({MELODY}))
    others = [
        replace(clip, description=other.description)
        for clip, other in zip(clips, [*clips[1:], clips[0]], strict=True)
    ]
    lessons.ask(truths)
    both = trainer.evaluate(clips)
    followed = lessons.results()["chroma"]
    lessons.ask(truths)
    text, answered = trainer.evaluate(clips, drops=no_melody), lessons.results()
    return {
        "loss": round(float(both.total), 4),
        "per_codebook": [round(value, 3) for value in both.per_codebook.tolist()],
        "text": round(float(text.total), 4),
        "other_text": round(float(trainer.evaluate(others, drops=no_melody).total), 4),
        "nothing": round(float(trainer.evaluate(clips, drops=Drops(everything=True)).total), 4),
        "followed": followed,
        "answers": answered,
    }


class Run:
    """A training in its folder.

    Args:
        folder: of the run.
        data: of the dataset.
        codec: its weights.
        hours: of work, all starts together.
        shape: what is trained.
        device: where.
        begin_from: release that is trained on; from nothing if not given.
        bfloat16: compute in 16 bit, where the device does.

    Raises:
        WeightsError: it has another shape.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        codec: Path,
        hours: float,
        shape: Shape,
        device: torch.device,
        begin_from: Path | None = None,
        bfloat16: bool = True,
    ) -> None:
        self.folder = folder
        self.codec = codec
        self.earlier = Work() if begin_from is None else work_of(begin_from)
        self.seconds = 3600 * hours
        self.shape = shape
        settings, model = load_settings(data), stereo_codec(codec)
        music, rate = load_music(data, TRAINED), model.frame_rate
        self.crops = Crops(music, settings.context, rate)
        self.context, self.exclude_style = settings.context, settings.exclude_style
        self._each = shape.batch_size * self.context  # seconds of an update
        held_out = load_music(data, HELD_OUT)
        crops = Crops(held_out, self.context, rate)
        self.measured = crops.measured(min(_MEASURED, len(held_out.pieces)))
        self.truths = [*map(crops.answers, self.measured)]
        if begin_from is not None:
            shutil.copytree(begin_from / "t5", folder / "t5", dirs_exist_ok=True)
        elif not (folder / "t5").is_dir():
            make_text_encoder(folder / "t5")
            teach_text_encoder(folder / "t5", music.pieces)
        torch.manual_seed(SEED)
        cfg = OmegaConf.create(lm_config(shape, self.context, model.cardinality))
        lm = get_lm_model(cfg, folder / "t5")
        if begin_from is not None:
            weights = read_checkpoint(find_file(begin_from, LM_FILE)).state
            assign_state(lm, weights, "cpu", name=str(begin_from))
        else:
            chroma = extractor()
            frames = chroma.num_frames(round(self.context * RATE))
            ratio = chroma.winhop / RATE * rate
            align(lm, MELODY, frames, ratio, round(self.context * rate))
        self.lessons = Lessons(shape.dim, _LESSONS)
        lm.add_module(_LESSONS_NAME, self.lessons)
        lm.transformer.layers[shape.layers // 2].register_forward_hook(self.lessons.hook)
        delays = cfg.codebooks_pattern.delay.delays
        for number, head in enumerate(lm.linears):
            head.register_forward_pre_hook(_pass_back(_SHARES[number * len(_SHARES) // lm.n_q]))
            head.register_forward_hook(partial(self._leave_unlearnt, delays[number]))
        for name, module in lm.transformer.named_modules():
            if name.endswith((".out_proj", ".linear2")):
                module.register_forward_hook(_drop)
        self.trainer = Trainer(
            lm.to(device),
            TrainSettings(
                updates=10**9,  # for now; the rate rises at first, however many there are
                batch_size=shape.batch_size,
                micro_batch=shape.batch_size,
                seed=SEED,
                optimizer=OptimizerSettings("adamw", shape.lr, _BETAS),
                warmup=_WARM_UP,
                conditions=condition_settings(cfg),
                bfloat16=bfloat16 and has_bfloat16(device),
            ),
        )
        self.best: float | None = None
        # Where nothing is learnt in the clips of an update: (B, T).
        self._unlearnt = torch.zeros(1, 0, dtype=torch.bool)
        self._planned = False
        self._before = -self._clock()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it is of another shape.
        """
        notes = read_notes(checkpoint)
        if notes["shape"] != asdict(self.shape):
            raise InputError(
                f"The run has the shape {notes['shape']}: give the same, or no --resume."
            )
        parts = [load_state(checkpoint, part) for part in range(notes["parts"])]
        self.trainer.load_state_dict(join(parts))
        self.best = notes["best"]
        self._before = notes["spent"] - self._clock()
        if notes["updates"] is not None and notes["seconds"] == self.seconds:
            self.plan(notes["updates"])

    def train(self, stop_after: float | None = None) -> bool:
        """Train until the time is spent.

        Args:
            stop_after: seconds of this start.

        Returns:
            Whether the run is at its end.
        """
        began = reported = saved = time.monotonic()
        recent: list[Update] = []
        trainer, size = self.trainer, self.shape.batch_size
        while trainer.update < trainer.settings.updates:
            number = trainer.update + 1
            torch.manual_seed(SEED + number)  # of the dropout
            batch = self.crops.batch(number, size)
            self.attend(batch_clips(batch, trainer.settings, number))
            trainer.train(batch, recent.append, number)
            if not self._planned and number >= _TRIAL:
                left = max(0.0, self.seconds - self.spent())
                self.plan(number + round(left * number / self.spent()))
            now = time.monotonic()
            if number == trainer.settings.updates or now - reported > _REPORT_SECONDS:
                self._report(recent, now - reported)
                reported, recent = time.monotonic(), []
            stopped = stop_after is not None and now - began > stop_after
            if stopped or number == trainer.settings.updates or now - saved > _SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
            if stopped:
                return False
        return True

    def spent(self) -> float:
        """Seconds of work, this start and those before."""
        return self._before + self._clock()

    def _clock(self) -> float:
        """Of the cores that work, or of a GPU that nobody shares."""
        if self.trainer.lm.device.type == "cuda":
            return time.monotonic()
        return time.process_time() / _THREADS

    def attend(self, clips: Sequence[Clip]) -> None:
        """Say what is to be learnt of the clips that the decoder gets next, in their order."""
        truths = [*map(self.crops.answers, clips)]
        self.lessons.ask(truths)
        self._unlearnt = unlearnt(truths)

    def _leave_unlearnt(self, delay: int, head: nn.Module, _: Any, logits: Tensor) -> Tensor:
        """A hook of a head: in some frames nothing is learnt of its codes, which come delayed."""
        if not head.training:
            return logits
        after = logits.shape[1] - self._unlearnt.shape[1] - delay
        places = F.pad(self._unlearnt, (delay, after))[..., None]
        return torch.where(places.to(logits.device), logits.detach(), logits)

    def plan(self, updates: int) -> None:
        """Make so many updates in all."""
        self.trainer.settings = replace(self.trainer.settings, updates=updates)
        self._planned = True

    def _report(self, recent: Sequence[Update], clock: float) -> None:
        measures = evaluate(self.trainer, self.measured, self.lessons, self.truths)
        if self.best is None or measures["loss"] < self.best:
            self.best = measures["loss"]
            self.export(self.folder / RELEASE)
        work = self.work()
        line = {
            "update": self.trainer.update,
            "updates": self.trainer.settings.updates,
            "hours": round(work.hours, 3),
            "heard_hours": round(work.heard_hours, 2),
            "times_real_time": round(len(recent) * self._each / clock, 1),
            "lr": float(f"{recent[-1].lr:.3g}"),
            "grad_norm": round(float(np.mean([update.grad_norm for update in recent])), 3),
            "exclude_style": self.exclude_style,
            "earlier": asdict(self.earlier),
            "trained": round(float(np.mean([float(u.loss.total) for u in recent])), 4),
            **measures,
        }
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(text + "\n")

    def work(self) -> Work:
        """What this run has taken, all starts together."""
        return Work(self.spent() / 3600, self.trainer.update * self._each / 3600)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a release."""
        lm = self.trainer.lm
        assert lm.cfg is not None, "get_lm_model has set it"
        state = self.trainer.exported_state()
        assert state is not None, "there is one process"
        state = {key: v for key, v in state.items() if not key.startswith(f"{_LESSONS_NAME}.")}
        with self.trainer.ema.applied():
            text = cast("T5Conditioner", lm.condition_provider.conditioners[TEXT])
            work = self.earlier + self.work()
            write_release(folder, lm.cfg, state, self.codec, text.load(), work)

    def _save(self) -> None:
        parts = split(self.trainer.state_dict())
        notes = {
            "spent": self.spent(),
            "seconds": self.seconds,
            "updates": self.trainer.settings.updates if self._planned else None,
            "parts": len(parts),
            "best": self.best,
            "shape": asdict(self.shape),
        }
        for rank, part in reversed(list(enumerate(parts))):  # the first one ends it
            save_checkpoint(
                self.folder, self.trainer.update, part, notes, rank=rank, parts=len(parts)
            )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--codec", type=Path, required=True, help="weights of the codec")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--hours", type=float, required=True, help="of work")
    parser.add_argument("--begin-from", type=Path, metavar="RELEASE", help="weights to train on")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--float32",
        action="store_true",
        help="compute in 32 bit: some CPUs have 16 bit and are slower with it",
    )
    parser.add_argument("--resume", action="store_true", help="go on from its checkpoint, if any")
    parser.add_argument("--stop-after", type=float, help="seconds after which this start ends")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    os.nice(_NICE)
    torch.set_num_threads(_THREADS)
    shape = Shape(**{name: getattr(given, name) for name in asdict(Shape())})
    try:
        with work_folder(given.out) as folder:
            checkpoint = find_checkpoint(folder)
            if checkpoint is not None and not given.resume:
                raise InputError(f"{folder} has a checkpoint: give --resume, or another folder.")
            device = torch.device(given.device)
            run = Run(
                folder,
                given.data,
                given.codec,
                given.hours,
                shape,
                device,
                given.begin_from,
                not given.float32,
            )
            if checkpoint is not None:
                run.resume(checkpoint)
            run.train(given.stop_after)
    except AudiocraftError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
