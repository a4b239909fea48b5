"""The folder of a job, and what lies in it to go on from.

A checkpoint is a folder named by its update: one file of state for each process that has a part of
its own, and the notes. It is filled under another name and renamed when it is whole and on the
disk, and it loses that name before it is removed, so what has such a name is whole.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from audiocraft.assets.parts import SPARE, UNFINISHED, is_full, is_leftover
from audiocraft.assets.remote import show_size
from audiocraft.errors import AssetError, InputError, TrainingError

_CHECKPOINTS: Final = "checkpoints"
_LOCK: Final = "lock"
_NOTES: Final = "notes.json"


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


def unwritable(what: str, folder: Path, reason: str | None) -> AssetError:
    """The error that a folder may not be written to, and what helps."""
    return AssetError(
        f"{what} cannot be written to {folder} ({reason}): have a folder there that may be written "
        "to."
    )


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A folder that no other job uses until the block ends; it is made if missing.

    The lock is the kernel's: it ends with this process, however that ends. What a job that was
    killed has left goes: files that are not whole, and checkpoints before the last one.

    Args:
        folder: the folder.

    Raises:
        InputError: another job uses it.
        AssetError: it may not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / _LOCK).open("a+")
    except OSError as error:
        if is_full(error):
            raise
        raise unwritable("This training", folder, error.strerror) from error
    with opened as lock:
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
        for path in list(folder.rglob("*")):
            if is_leftover(path.name):
                _remove(path)
        if updates := _updates(folder):
            _keep_alone(folder, max(updates))
        yield folder


def clear(folder: Path) -> None:
    """Remove all that a job has in its folder, which it holds."""
    if (folder / _CHECKPOINTS).is_dir():  # first: the rest is nothing without it
        (folder / _CHECKPOINTS).replace(folder / f"{_CHECKPOINTS}{UNFINISHED}")
    for path in folder.iterdir():
        if path.name != _LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _keep_alone(folder: Path, update: int) -> None:
    """Remove all checkpoints but one, whose name is on the disk before these lose theirs."""
    above = folder / _CHECKPOINTS
    _sync(above)
    for other in _updates(folder):
        if other != update:
            old = above / f"{other}{UNFINISHED}"
            (above / str(other)).replace(old)
            shutil.rmtree(old)


@contextlib.contextmanager
def disk_of(folder: Path, what: str) -> Iterator[None]:
    """Say it in a sentence where the disk gets full.

    Args:
        folder: where it is written, if the error does not name another.
        what: is written.

    Raises:
        TrainingError: it is full.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_full(error):
            raise
        named = getattr(error, "filename", None)
        where = Path(named).parent if isinstance(named, str) else folder
        raise TrainingError(
            f"The disk of {where} is full before {what} is written: free some of it and start the "
            "training again, which goes on from there."
        ) from error


def save_checkpoint(
    folder: Path,
    update: int,
    state: Mapping[str, Any] | None,
    notes: Mapping[str, Any],
    *,
    rank: int = 0,
    parts: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> None:
    """Write a checkpoint; those before stay until it is whole and on the disk, and go then.

    Every process of the job calls it. Where the first one fails, the others wait for their end.

    Args:
        folder: of the job.
        update: that it was made after.
        state: of this process: tensors, numbers, texts, and dictionaries and lists of these. None
            for a process that has no part of its own, or where nothing goes on from it.
        notes: what to know of it without loading it; JSON values.
        rank: of this process; the first one writes the notes.
        parts: processes that have a part, the first ones.
        barrier: waits for all processes.

    Raises:
        TrainingError: the disk has too little free.
    """
    above = folder / _CHECKPOINTS
    unfinished, whole = above / f"{update}{UNFINISHED}", above / str(update)
    with disk_of(folder, f"the checkpoint of update {update}"):
        unfinished.mkdir(parents=True, exist_ok=True)
        if state is not None and rank == 0:
            _check_room(folder, update, _size(state) * parts)
        barrier()  # before any of them takes of the room
        if state is not None:
            _write(_part(unfinished, rank), lambda file: torch.save(dict(state), file))
        barrier()
        if rank == 0:
            text = json.dumps(dict(notes)).encode()
            _write(unfinished / _NOTES, lambda file: file.write(text))
            _sync(unfinished)
            unfinished.replace(whole)
            _keep_alone(folder, update)
        barrier()


def find_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a job's folder; None where there is none."""
    updates = _updates(folder)
    return folder / _CHECKPOINTS / str(max(updates)) if updates else None


def read_notes(checkpoint: Path) -> dict[str, Any]:
    """The notes of a checkpoint.

    Raises:
        TrainingError: they are broken.
    """
    try:
        notes: dict[str, Any] = json.loads((checkpoint / _NOTES).read_bytes())
    except (OSError, ValueError) as error:
        raise _broken(checkpoint, error) from error
    return notes


def load_state(checkpoint: Path, part: int = 0, *, mapped: bool = False) -> dict[str, Any]:
    """The state of a process in a checkpoint, on the CPU.

    Args:
        checkpoint: from `find_checkpoint`.
        part: rank of the process; 0 where all have the same.
        mapped: leave tensors in the file until they are copied, so that several processes on one
            machine do not have it all in memory.

    Raises:
        TrainingError: it is broken.
    """
    try:
        state: dict[str, Any] = torch.load(
            _part(checkpoint, part), map_location="cpu", weights_only=True, mmap=mapped
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise _broken(checkpoint, error) from error
    return state


def _broken(checkpoint: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"The checkpoint {checkpoint} is broken ({type(error).__name__}): remove it, or begin "
        "again with --fresh."
    )


def _part(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"state-{rank}.pt"


def _updates(folder: Path) -> list[int]:
    return [int(path.name) for path in (folder / _CHECKPOINTS).glob("*") if path.name.isdecimal()]


def _write(path: Path, write: Callable[[Any], object]) -> None:
    try:
        with path.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)  # so that a full disk takes the words that say so
        raise


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(state: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(_size, state.values()))
    return sum(map(_size, state)) if isinstance(state, list | tuple) else 0


def _check_room(folder: Path, update: int, need: int) -> None:
    free = shutil.disk_usage(folder).free - SPARE
    if free < need:
        raise TrainingError(
            f"The checkpoint of update {update} needs {show_size(need)} on the disk of {folder}, "
            f"which has {show_size(max(0, free))}: free some, and start the training again, which "
            "goes on from the checkpoint before."
        )
