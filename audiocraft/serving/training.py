"""From a request to a file of fine-tuned weights: what `train.py` asks for."""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from audiocraft.data.labels import Vocabularies
from audiocraft.errors import InputError
from audiocraft.models.shapes import shape_of
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.device import device_warning
from audiocraft.serving.worker import checked_path, local_files_allowed, log_to_stderr
from audiocraft.solvers.devices import find_devices
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.optimizers import OPTIMIZERS, OptimizerName, learning_rate
from audiocraft.solvers.run import describe_run, run_job
from audiocraft.solvers.schedules import SCHEDULES, ScheduleName

logger = logging.getLogger(__name__)

RUNS: Final = Path("runs")
"""Where the work of trainings lies, below the working folder."""
WEIGHTS: Final = Path("weights")
"""Where their results go, below the working folder."""

SOURCES: Final = ("all", "drop-vocals", "vocals", "bass", "drums", "other")
_WITHOUT_VOCALS: Final = ("drums", "bass", "other")
_MOST: Final = 1_000_000  # of what is counted: beyond, a number is a slip of the hand
_MOST_PROCESSES: Final = 64


@dataclass(frozen=True)
class TrainingRequest:
    """The inputs of `train.py`, see their descriptions there."""

    dataset_path: Path
    one_same_description: str | None = None
    auto_labeling: bool = True
    drop_vocals: bool = True
    source: str = "all"
    model_version: str = "stereo-melody"
    lr: float = 1.0
    epochs: int = 10
    updates_per_epoch: int = 100
    batch_size: int = 3
    optimizer: str = "dadam"
    lr_scheduler: str = "cosine"
    warmup: int = 8
    cfg_p: float = 0.3
    lora_rank: int = 0
    seed: int = 2036

    def check(self) -> None:
        """Refuse what can be refused without looking at the dataset.

        Raises:
            InputError: naming the input, the limit and the remedy.
        """
        if self.dataset_path == Path():
            raise InputError(
                "dataset_path is empty or the server's working folder: give a URL, or the path of "
                "your music."
            )
        for name, choices in (
            ("source", SOURCES),
            ("model_version", tuple(VERSIONS)),
            ("optimizer", OPTIMIZERS),
            ("lr_scheduler", SCHEDULES),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, it must be one of {', '.join(choices)}."
                )
        if not 0 < self.lr < math.inf:
            raise InputError(
                f"lr is {self.lr:g}, it must be a finite number above 0: leave it at 1 if in doubt."
            )
        for name, least, remedy in (
            ("epochs", 1, ""),
            ("updates_per_epoch", 0, "; 0 is once through the dataset"),
            ("batch_size", 1, ""),
            ("warmup", 0, "; 0 starts at the full rate"),
            ("lora_rank", 0, "; 0 trains all weights"),
        ):
            if not least <= getattr(self, name) <= _MOST:
                raise InputError(
                    f"{name} is {getattr(self, name)}, it must be from {least} to {_MOST}{remedy}."
                )
        width = shape_of(self.model_version).dim
        if self.lora_rank > width:
            raise InputError(
                f"lora_rank is {self.lora_rank}, an adapter of {self.model_version} can have 1 to "
                f"{width}: beyond, full fine-tuning is cheaper, lora_rank=0."
            )
        if not 0 <= self.cfg_p <= 1:
            raise InputError(
                f"cfg_p is {self.cfg_p:g}, it must be from 0 to 1; 0.3 suits most music."
            )
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, it must be from -2^63 to 2^63 - 1.")

    @property
    def stems(self) -> tuple[str, ...] | None:
        """What is kept of the music; None is all of it."""
        if self.source == "drop-vocals" or (self.source == "all" and self.drop_vocals):
            return _WITHOUT_VOCALS
        return None if self.source == "all" else (self.source,)

    @property
    def removal(self) -> str:
        """What will be removed from the music, as a sentence for the log."""
        if self.stems is None:
            return "Nothing is removed from the music: source=all, drop_vocals=false."
        if self.source == "all":
            return "Vocals will be removed from the music: drop_vocals=true."
        if self.source == "drop-vocals":
            return "Vocals will be removed from the music: source=drop-vocals."
        overrides = ", which overrides drop_vocals=true" if self.drop_vocals else ""
        return (
            f"All but {self.source} will be removed from the music: "
            f"source={self.source}{overrides}."
        )


def vocabularies_of(metadata: Mapping[str, Any]) -> Vocabularies:
    """The vocabularies of the automatic labels.

    Args:
        metadata: the names in `metadata.py`.
    """
    return Vocabularies(
        genre=tuple(metadata["genre_labels"]),
        moods=tuple(metadata["mood_theme_classes"]),
        instrument=tuple(metadata["instrument_classes"]),
    )


def train(request: TrainingRequest, vocabularies: Vocabularies) -> Path:
    """Fine-tune a model; `TRAIN_FRESH=1` begins again where there is something to go on from.

    Args:
        request: the inputs.
        vocabularies: of the automatic labels.

    Returns:
        The file of fine-tuned weights, absolute.

    Raises:
        AudiocraftError: the request cannot be met, something is missing, or the training failed;
            the message is meant for the user.
    """
    log_to_stderr()
    dataset, processes = _check(request)
    weights = run_job(
        _job(request, vocabularies, processes),
        dataset,
        runs=RUNS.absolute(),
        weights=WEIGHTS.absolute(),
        processes=processes,
        fresh=os.environ.get("TRAIN_FRESH") == "1",
        allow_cpu=_allow_cpu(),
        log=_log,
    )
    return weights.absolute()


def describe(request: TrainingRequest, vocabularies: Vocabularies) -> None:
    """Log what `train` would do and how long that takes, and do nothing of it.

    Args:
        request: the inputs.
        vocabularies: of the automatic labels.

    Raises:
        AudiocraftError: `train` would refuse the request.
    """
    log_to_stderr()
    dataset, processes = _check(request)
    describe_run(
        _job(request, vocabularies, processes),
        dataset,
        runs=RUNS.absolute(),
        weights=WEIGHTS.absolute(),
        processes=processes,
        allow_cpu=_allow_cpu(),
        log=_log,
    )


def rounded_batch(batch_size: int, processes: int) -> int:
    """The multiple of a number of processes that is nearest; of two the greater, and never 0."""
    return max(1, (2 * batch_size + processes) // (2 * processes)) * processes


def _check(request: TrainingRequest) -> tuple[Path, int]:
    """The dataset, and how many processes there will be.

    Raises:
        InputError: an input is wrong.
    """
    request.check()
    return _dataset(request.dataset_path), _processes()


def _dataset(given: Path) -> Path:
    path = checked_path(given, "dataset_path")
    name = path.name or str(path)
    try:
        if path.is_dir():
            if not local_files_allowed():
                raise InputError(
                    "dataset_path is a folder of the server, which is not allowed: give a URL, or "
                    "start the server with ALLOW_LOCAL_FILES=1."
                )
            if not any(files for _, _, files in os.walk(path)):
                raise InputError(
                    f"dataset_path: the folder {name} holds no files; put your music into it."
                )
        elif not path.is_file():
            raise InputError(
                f"dataset_path: there is no file or folder {given}: give a URL, or on the command "
                f"line the path of one as in dataset_path=@music.zip."
            )
        elif path.stat().st_size == 0:
            raise InputError(f"dataset_path: {name} is empty (0 bytes); make or upload it again.")
        if not os.access(path, os.R_OK):
            raise InputError(f"dataset_path: {name} must not be read; check its permissions.")
    except OSError as error:
        raise InputError(
            f"dataset_path: {name} cannot be looked up ({error.strerror}); check its permissions."
        ) from error
    return path


def _processes() -> int:
    """One for each GPU; without one, what TRAIN_PROCESSES says."""
    text = os.environ.get("TRAIN_PROCESSES") or "1"
    wanted = int(text) if text.isascii() and text.isdecimal() and len(text) < len("1000") else 0
    if not 1 <= wanted <= _MOST_PROCESSES:
        raise InputError(
            f"TRAIN_PROCESSES is {text!r}, it must be a whole number from 1 to {_MOST_PROCESSES}: "
            "leave it out for a single process."
        )
    devices = len(find_devices())
    if not devices:
        logger.warning("%s", device_warning() or "There is no GPU: this trains on the CPU.")
    if devices and "TRAIN_PROCESSES" in os.environ and wanted != devices:
        logger.warning(
            "TRAIN_PROCESSES=%d is for machines without a GPU; with CUDA_VISIBLE_DEVICES you "
            "choose among the %d here, one process for each.",
            wanted,
            devices,
        )
    return devices or wanted


def _allow_cpu() -> bool:
    return os.environ.get("ALLOW_CPU") == "1"


def _job(request: TrainingRequest, vocabularies: Vocabularies, processes: int) -> TrainingJob:
    """The job, and a line in the log for each input that is not taken as it stands."""
    logger.info("%s", request.removal)
    batch_size = rounded_batch(request.batch_size, processes)
    if batch_size != request.batch_size:
        logger.info(
            "batch_size is %d and becomes %d, a multiple of the %d processes.",
            request.batch_size,
            batch_size,
            processes,
        )
    updates = request.epochs * request.updates_per_epoch
    if 0 < updates < request.warmup:
        logger.warning(
            "warmup is %d updates and the training has %d, so the learning rate never comes to its "
            "full height: lower warmup, or raise epochs.",
            request.warmup,
            updates,
        )
    optimizer = cast("OptimizerName", request.optimizer)
    return TrainingJob(
        version=request.model_version,
        one_same_description=request.one_same_description,
        vocabularies=vocabularies if request.auto_labeling else None,
        stems=request.stems,
        optimizer=optimizer,
        lr=learning_rate(optimizer, request.lr),
        schedule=cast("ScheduleName", request.lr_scheduler),
        warmup=request.warmup,
        epochs=request.epochs,
        updates_per_epoch=request.updates_per_epoch,
        batch_size=batch_size,
        cfg_p=request.cfg_p,
        lora_rank=request.lora_rank,
        seed=request.seed,
    )


def _log(line: str) -> None:
    logger.info("%s", line)
