"""The folder of a job, and what lies in it to go on from."""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from audiocraft.errors import InputError, TrainingError

_LOCK: Final = "lock"
_UNFINISHED: Final = ".unfinished"


def job_key(dataset: str, settings: Mapping[str, Any]) -> str:
    """Name of a job's folder: the same dataset and settings give the same.

    Args:
        dataset: hash of its content.
        settings: everything that changes the result; plain JSON values.

    Returns:
        16 hexadecimal digits.
    """
    text = json.dumps([dataset, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A folder that no other job uses until the block ends; it is made if missing.

    The lock is the kernel's: it ends with this process, however that ends.

    Raises:
        InputError: another job uses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise InputError(
                f"{folder} is in use by another training (process {lock.read().strip() or '?'}): "
                "wait for its end, stop it, or change the settings."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for left in folder.rglob(f"*{_UNFINISHED}"):  # by a process that was killed
            left.unlink()
        yield folder


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one before stays whole until this one is on the disk.

    Args:
        path: of the file.
        state: tensors, numbers, texts, and dictionaries and lists of these.
    """
    unfinished = path.with_name(f"{path.name}{_UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint on the CPU; None where there is none.

    Raises:
        TrainingError: it is broken.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise TrainingError(
            f"The checkpoint {path} is broken ({type(error).__name__}): remove it, or begin again "
            "with --fresh."
        ) from error
    return state
