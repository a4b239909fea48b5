"""What a training needs on disk: the files of its version, and room for its own."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from omegaconf import DictConfig
from torch import Tensor

from audiocraft.assets.download import check_space
from audiocraft.assets.store import PARTS, fetch, fetch_folder
from audiocraft.errors import AssetError
from audiocraft.models.loaders import (
    CODEC_FILE,
    LM_FILE,
    check_config,
    config_in_use,
    find_file,
    official_key,
    read_checkpoint,
    text_encoder_of,
)
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.lora import DEFAULT_TARGETS
from audiocraft.modules.stems import HTDEMUCS, separator_files
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.memory import OPTIMIZER_BYTES

_FLOAT32, _FLOAT16 = 4, 2  # bytes
_CHECKPOINTS: Final = 2  # the last one stays until the next is whole
_EXPORTS: Final = 3  # the best, the last, and the next


@dataclass(frozen=True)
class Base:
    """What a training begins from, on disk.

    Attributes:
        melody: whether it follows a melody.
        trained: how many weights are trained.
    """

    melody: bool
    trained: int


def fetch_base(job: TrainingJob) -> Base:
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
    check_config(checkpoint.name, checkpoint.cfg)
    cfg = checkpoint.cfg
    assert cfg is not None, "check_config refuses that"
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
        separator_files(partial(fetch, PARTS[HTDEMUCS][0]), HTDEMUCS)
    return Base("self_wav" in cfg.conditioners, _trained(checkpoint.state, job.lora_rank))


def _hears_stems(cfg: DictConfig) -> bool:
    """Whether melodies are separated before they are heard, see `builders`."""
    melody = cfg.conditioners.get("self_wav")
    return melody is not None and melody.chroma_stem.get("stems", "vocals+other") != "mix"


def _trained(state: Mapping[str, Tensor], rank: int) -> int:
    """Number of the trained weights."""
    if not rank:
        return sum(tensor.numel() for tensor in state.values())
    adapted = [
        tensor.shape for key, tensor in state.items() if official_key(key).endswith(DEFAULT_TARGETS)
    ]
    return sum(rank * sum(shape) for shape in adapted)


def check_disk(job: TrainingJob, base: Base, work: Path, weights: Path, dataset: int) -> None:
    """Refuse a job that the disk has no room for, or whose result has no place.

    Args:
        job: what to train.
        base: from `fetch_base`.
        work: its folder.
        weights: folder of the result.
        dataset: bytes that preparing the music may write.

    Raises:
        AssetError: there is not enough, with need and have; or it may not be written to.
    """
    state = 2 * _FLOAT32 + OPTIMIZER_BYTES[job.optimizer]  # weight, average, optimizer
    need = base.trained * (_CHECKPOINTS * state + _EXPORTS * _FLOAT16)
    used = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    check_space("This training", work, max(0, need - used) + dataset)
    try:
        weights.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=weights).close()
    except OSError as error:
        raise AssetError(
            f"The result of this training cannot be written to {weights} ({error.strerror}): have "
            "a folder there that may be written to."
        ) from error
    check_space("The result of this training", weights, base.trained * _FLOAT16)
