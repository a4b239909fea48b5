"""What a training needs on disk: the files of its version, and room for its own."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Final

from omegaconf import DictConfig

from audiocraft.assets.download import check_space
from audiocraft.assets.store import PARTS, fetch_folder
from audiocraft.models.loaders import (
    CODEC_FILE,
    LM_FILE,
    check_config,
    config_in_use,
    find_file,
    read_checkpoint,
    text_encoder_of,
)
from audiocraft.models.shapes import shape_of
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.stems import htdemucs_files
from audiocraft.solvers.checkpoints import unwritable
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.memory import memory_need
from audiocraft.solvers.plan import Plan

_RESULT: Final = "The result of this training"
_CHECKPOINTS: Final = 2  # the last one stays until the next is whole
_EXPORTS: Final = 2  # that of the last checkpoint, and the next


def fetch_base(job: TrainingJob) -> None:
    """Have all files of a job's version on disk, and the separator if it is needed.

    No tensor is read.

    Args:
        job: what to train.

    Raises:
        AssetError: something is not there and cannot be fetched.
        WeightsError: a file is broken.
    """
    source = VERSIONS[job.version].source
    path = find_file(source, LM_FILE)
    checkpoint = read_checkpoint(path)
    cfg = check_config(checkpoint.name, checkpoint.cfg)
    with config_in_use(checkpoint.name):
        hears_stems = _hears_stems(cfg)
        text_encoders = [
            str(conditioner.t5.name)
            for conditioner in cfg.conditioners.values()
            if "t5" in conditioner
        ]
    codec = read_checkpoint(find_file(source, CODEC_FILE)).pretrained
    if codec == PARTS["encodec_32khz"][0]:
        fetch_folder(codec, PARTS["encodec_32khz"][1])
    if text_encoder_of(path) is None:
        for name in text_encoders:
            fetch_folder(f"google-t5/{name}", PARTS["t5-base"][1])
    if job.stems or hears_stems:
        htdemucs_files()


def _hears_stems(cfg: DictConfig) -> bool:
    """Whether melodies are separated before they are heard, see `builders`."""
    melody = cfg.conditioners.get("self_wav")
    return melody is not None and melody.chroma_stem.get("stems", "vocals+other") != "mix"


def _sizes(job: TrainingJob) -> tuple[int, int]:
    """Bytes of a checkpoint, and of the weights that are exported in 16 bit."""
    memory = memory_need(shape_of(job.version), job, Plan(), 1, gpu=False, bfloat16=False)
    # The average is a float32 number for each trained weight, and so is the weight itself.
    return 2 * memory.average + memory.optimizer, memory.average // 2


def training_need(job: TrainingJob) -> int:
    """Bytes that a training writes at most, besides its music; nothing need be on disk for that.

    Args:
        job: what to train.
    """
    checkpoint, export = _sizes(job)
    return _CHECKPOINTS * checkpoint + _EXPORTS * export


def check_disk(
    job: TrainingJob, work: Path, weights: Path, *, written: int = 0, dataset: int = 0
) -> None:
    """Refuse a job that the disk has no room for; nothing is written.

    Args:
        job: what to train.
        work: its folder, or the one where that will lie; it need not be there.
        weights: folder of the result; it need not be there.
        written: bytes of the job that are there already.
        dataset: bytes that preparing the music may write.

    Raises:
        AssetError: there is not enough, with need and have.
    """
    need = max(0, training_need(job) - written) + dataset
    check_space("This training", _existing(work), need)
    _, export = _sizes(job)
    check_space(_RESULT, _existing(weights), export)


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_writable(what: str, folder: Path) -> None:
    """Refuse a folder that may not be written to, as far as that shows before it is.

    Args:
        what: is to be written.
        folder: it need not be there; then the one above it counts.

    Raises:
        AssetError: it may not.
    """
    try:
        above = _existing(folder)
    except PermissionError as error:  # what is above may not even be looked into
        raise unwritable(what, folder, error.strerror) from error
    if not above.is_dir():
        raise unwritable(what, folder, os.strerror(errno.ENOTDIR))
    if not os.access(above, os.W_OK | os.X_OK):
        read_only = os.statvfs(above).f_flag & os.ST_RDONLY
        raise unwritable(what, folder, os.strerror(errno.EROFS if read_only else errno.EACCES))


def check_result_folder(weights: Path) -> None:
    """Refuse a folder that takes no result; it is made if missing.

    Args:
        weights: folder of the result.

    Raises:
        AssetError: it may not be written to.
    """
    try:
        weights.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=weights).close()
    except OSError as error:
        raise unwritable(_RESULT, weights, error.strerror) from error
