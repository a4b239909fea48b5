"""Train the codec of the bundled `tiny` release on synthetic music.

    python -m tools.tiny.codec --out FOLDER --hours H [--resume]
    python -m tools.tiny.codec --out FOLDER --hours H --begin-from FILE --decoder-only [--resume]

Two cores need about two hours. The folder gets `compression_state_dict.safetensors`, the averaged
weights after the last evaluation; `log.jsonl`, a line for each evaluation on pieces that are not
trained on; and a checkpoint, from which `--resume` goes on after whatever ended the run. Hours are
those that two cores work for it: a run that is stopped for a while, or that shares the machine,
takes longer. A run that is resumed with fewer hours comes to its end sooner. With `--begin-from`
the weights of an earlier run are trained on, on the same music from its beginning.
The bundled weights are of 1.7 hours on cores that have no 16 bit: 0.6 with time and spectra weighed
6 to 4, and the rest as it is now, but with a loss on spectra that looked down to 100 dB. With
`--decoder-only` codes stay what they are.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from audiocraft.errors import AudiocraftError, InputError
from audiocraft.models.builders import get_compression_model
from audiocraft.models.encodec import EncodecModel
from audiocraft.models.loaders import load_compression_model
from audiocraft.modules.precision import has_bfloat16
from audiocraft.solvers.checkpoints import (
    find_checkpoint,
    load_state,
    read_notes,
    save_checkpoint,
    work_folder,
)
from audiocraft.solvers.compression import CodecSettings, CodecUpdate, Trainer
from audiocraft.solvers.schedules import lr_factor
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.rendering import RATE, rendered

CODEC: Final[dict[str, Any]] = {
    "compression_model": "encodec",
    "sample_rate": RATE,
    "channels": 1,
    "encodec": {
        "autoencoder": "seanet",
        "quantizer": "rvq",
        "sample_rate": RATE,
        "channels": 1,
        "causal": False,
        "renormalize": False,
    },
    "seanet": {
        "dimension": 64,
        "channels": 1,
        "causal": False,
        "n_filters": 16,
        "n_residual_layers": 1,
        "ratios": [8, 5, 4, 4],
        "activation": "ELU",
        "activation_params": {"alpha": 1.0},
        "norm": "weight_norm",
        "norm_params": {},
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 7,
        "dilation_base": 2,
        "pad_mode": "constant",
        "true_skip": True,
        "compress": 2,
        "lstm": 1,
        "disable_norm_outer_blocks": 0,
        "decoder": {
            "trim_right_ratio": 1.0,
            "final_activation": None,
            "final_activation_params": None,
        },
        "encoder": {},
    },
    "rvq": {"n_q": 4, "bins": 512, "q_dropout": False},
}
"""The `xp.cfg` of the codec."""

FILE: Final = "compression_state_dict.safetensors"
TRAINED_SEED: Final = 101
"""Of the set of pieces that the codec is trained on."""
HELD_OUT_SEED: Final = 102
"""Of those that it is measured on."""

_CORES = 2
_NICE = 10
# OpenMP's threads wait for each other by spinning, which costs much on cores that others use: of
# two threads an update took 5.9 s beside ten busy processes, and 1.7 s beside two. With few spins
# that is 1.4 s beside two, and on free cores nothing is lost.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
_LR = 1e-3
# With most of it on time, the waveform of the low notes comes first and timbre is lost.
_SHARES = {"time": 0.15, "spectrum": 0.85}
_WARM_UP_SECONDS = 30
_REPORT_SECONDS = 240  # of the clock, from evaluation to evaluation

_BATCH = 8
_CROP = RATE  # samples
_PIECE_SECONDS = 20.0
# Rendering a piece takes a core 0.4 s, and an update 0.6 s or more: this many updates per piece
# leave rendering a twentieth of the time, and hear six times as much of each as there is in it.
_UPDATES_PER_PIECE = 16
_FIRST_PIECES, _POOL = 16, 64  # pieces at hand for a batch: at first, and at most
_GAINS = (-12.0, 3.0)  # decibels
_HELD_OUT, _HELD_OUT_SECONDS = 16, 10.0
_AHEAD = 16  # batches

_PART_BYTES = 14_000_000


class Batches(IterableDataset[Tensor]):
    """Batches of crops for the updates of a run, (B, 1, T) each, rendered as they are needed.

    What an update gets depends on its number alone.

    Args:
        update: the last one that is done.
    """

    def __init__(self, update: int) -> None:
        super().__init__()
        self.update = update

    def __iter__(self) -> Iterator[Tensor]:
        oldest = max(0, _pieces(self.update + 1) - _POOL)
        pieces = islice(plan(TRAINED_SEED, 10**6, _PIECE_SECONDS), oldest, None)
        sounds = (wav.half() for _, wav in rendered(pieces))
        pool: deque[Tensor] = deque(maxlen=_POOL)
        update = self.update
        while True:
            update += 1
            while oldest < _pieces(update):
                pool.append(next(sounds))
                oldest += 1
            random = np.random.default_rng([TRAINED_SEED, update])
            yield torch.stack([_crop(pool, random) for _ in range(_BATCH)])


def _pieces(update: int) -> int:
    """Pieces that are rendered for an update and all before it."""
    return _FIRST_PIECES + update // _UPDATES_PER_PIECE


def _crop(pool: deque[Tensor], random: np.random.Generator) -> Tensor:
    """Left, right or middle of some second of some piece at some level, (1, T)."""
    piece = pool[int(random.integers(len(pool)))]
    start = int(random.integers(piece.shape[1] - _CROP + 1))
    stereo = piece[:, start : start + _CROP].float()
    mono = (*stereo, stereo.mean(0))[int(random.integers(3))][None]
    gain = 10 ** (float(random.uniform(*_GAINS)) / 20)
    level = min(gain, 1 / max(float(mono.abs().max()), 1e-3))
    return torch.mul(mono, level)


def held_out() -> list[Tensor]:
    """Clips that the codec is measured on, (1, T) each, left and right by turns."""
    pieces = plan(HELD_OUT_SEED, _HELD_OUT, _HELD_OUT_SECONDS)
    return [wav[i % 2][None] for i, (_, wav) in enumerate(rendered(pieces))]


def _load(model: EncodecModel, path: Path) -> None:
    """Load weights that a run has exported.

    Raises:
        InputError: they are of a codec of another shape.
    """
    try:
        model.load_state_dict(load_compression_model(path).state_dict())
    except RuntimeError as error:
        raise InputError(
            f"{path} is a codec of another shape: give one that this command has trained."
        ) from error


def split(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A trainer's state in parts of at most 14 MB; `join` puts them together."""
    parts: list[dict[str, Any]] = [{"leaves": []}]
    size = 0
    for path, value in _leaves(state):
        need = value.nbytes if isinstance(value, Tensor) else 0
        if size + need > _PART_BYTES:
            parts.append({"leaves": []})
            size = 0
        size += need
        parts[-1]["leaves"].append((path, value))
    return parts


def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The state that `split` has made parts of."""
    state: dict[str, Any] = {}
    for part in parts:
        for path, value in part["leaves"]:
            inner = state
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = value
    return state


def _leaves(state: Mapping[Any, Any]) -> Iterator[tuple[list[Any], Any]]:
    for key, value in state.items():
        if isinstance(value, Mapping) and value:
            for path, leaf in _leaves(value):
                yield [key, *path], leaf
        else:
            yield [key], value


class Run:
    """A training in its folder.

    Args:
        folder: of the run.
        hours: that two cores are to work, all starts together.
        begin_from: weights of an earlier run, if any.
        decoder_only: train the decoder alone; codes stay what they are.
    """

    def __init__(
        self,
        folder: Path,
        hours: float,
        begin_from: Path | None = None,
        decoder_only: bool = False,
    ) -> None:
        self.folder = folder
        self.seconds = 3600 * hours
        torch.manual_seed(TRAINED_SEED)
        self.cfg = OmegaConf.create(CODEC)
        model = get_compression_model(self.cfg)
        assert isinstance(model, EncodecModel)
        if begin_from is not None:
            _load(model, begin_from)
        # By AMX oneDNN's strided convolutions of bfloat16 are wrong for some numbers of channels.
        has_amx = torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - no public name
        bfloat16 = not has_amx and has_bfloat16(torch.device("cpu"))
        settings = CodecSettings(
            seed=TRAINED_SEED, shares=_SHARES, bfloat16=bfloat16, decoder_only=decoder_only
        )
        self.trainer = Trainer(model, settings, trained=begin_from is not None)
        self._before = -self._working()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        notes = read_notes(checkpoint)
        parts = [load_state(checkpoint, part) for part in range(notes["parts"])]
        self.trainer.load_state_dict(join(parts))
        self._before = notes["seconds"] - self._working()

    def train(self) -> None:
        """Train until the time is spent."""
        clips = held_out()
        loader = DataLoader(
            Batches(self.trainer.update),
            batch_size=None,
            num_workers=1,
            prefetch_factor=_AHEAD,
            multiprocessing_context="spawn",
        )
        recent: list[CodecUpdate] = []
        reported = time.monotonic()
        for wav in loader:
            spent = round(self.spent())
            lr = _LR * lr_factor("cosine", spent + 1, _WARM_UP_SECONDS, round(self.seconds))
            recent.append(self.trainer.train(wav, lr))
            done = self.spent() >= self.seconds
            if done or time.monotonic() - reported > _REPORT_SECONDS:
                self._report(clips, recent, lr, time.monotonic() - reported)
                self._save()
                reported, recent = time.monotonic(), []
            if done:
                return

    def spent(self) -> float:
        """Seconds that the cores have worked, this start and those before."""
        return self._before + self._working()

    def _working(self) -> float:
        return time.process_time() / _CORES

    def _report(
        self, clips: list[Tensor], recent: list[CodecUpdate], lr: float, clock: float
    ) -> None:
        measures = self.trainer.evaluate(clips)
        self.trainer.export(self.folder / FILE, self.cfg)
        line = {
            "update": self.trainer.update,
            "hours": round(self.spent() / 3600, 3),
            "lr": float(f"{lr:.3g}"),
            "times_real_time": round(len(recent) * _BATCH * _CROP / RATE / clock, 1),
            **{
                name: round(float(np.mean([update.losses[name] for update in recent])), 5)
                for name in recent[0].losses
            },
            "grad_norm": round(float(np.mean([update.grad_norm for update in recent])), 3),
            "si_sdr": round(measures.si_sdr, 2),
            "log_mel": round(measures.log_mel, 2),
            "perplexities": [round(value, 1) for value in measures.perplexities],
        }
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(text + "\n")

    def _save(self) -> None:
        parts = split(self.trainer.state_dict())
        notes = {"seconds": self.spent(), "parts": len(parts)}
        for rank, part in reversed(list(enumerate(parts))):  # the first one ends it
            save_checkpoint(
                self.folder, self.trainer.update, part, notes, rank=rank, parts=len(parts)
            )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--hours", type=float, required=True, help="that two cores are to work")
    parser.add_argument("--begin-from", type=Path, help="weights of an earlier run to train on")
    parser.add_argument("--decoder-only", action="store_true", help="codes stay what they are")
    parser.add_argument("--resume", action="store_true", help="go on from its checkpoint, if any")
    parser.add_argument("--threads", type=int, default=_CORES, help="fewer on a busy machine")
    arguments = parser.parse_args()
    if arguments.decoder_only and arguments.begin_from is None:
        parser.error("--decoder-only needs an encoder that has learnt: give --begin-from.")
    if os.environ.keys().isdisjoint(_ENVIRONMENT):
        # It is read when torch is loaded.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **_ENVIRONMENT})  # noqa: S606
    os.nice(_NICE)
    torch.set_num_threads(arguments.threads)
    try:
        with work_folder(arguments.out) as folder:
            checkpoint = find_checkpoint(folder)
            if checkpoint is not None and not arguments.resume:
                raise InputError(f"{folder} has a checkpoint: give --resume, or another folder.")
            run = Run(folder, arguments.hours, arguments.begin_from, arguments.decoder_only)
            if checkpoint is not None:
                run.resume(checkpoint)
            run.train()
    except AudiocraftError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
