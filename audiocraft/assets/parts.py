"""Files that are not whole yet: locked while they are written, and never left half under a name."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from audiocraft.errors import AssetError

logger = logging.getLogger(__name__)

UNFINISHED: Final = ".unfinished"
"""What the name of a file ends with that is not whole."""

SPARE: Final = 64 * 2**20
"""Bytes of a disk that nothing takes."""

_POLL_S: Final = 0.1
_FULL: Final = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_SAFETENSORS: Final = re.compile(r"\.tmp\w{6}")  # what safetensors writes before it renames


class Part:
    """A file that is being written, by this process alone.

    Args:
        path: of the file; whoever makes it whole renames it.
        file: open for reading and writing, and locked.
        keep: whether it outlives a failure, with notes beside it about what it is part of.
    """

    def __init__(self, path: Path, file: BinaryIO, *, keep: bool) -> None:
        self.path = path
        self.file = file
        self._keep = keep
        self._notes = path.with_name(f"{path.name}.json")

    @property
    def size(self) -> int:
        """Bytes so far; writing goes on there."""
        return self.file.seek(0, os.SEEK_END)

    def reset(self) -> None:
        """Forget what has come."""
        self._notes.unlink(missing_ok=True)
        self.file.seek(0)
        self.file.truncate()

    def note(self, notes: dict[str, Any]) -> None:
        """Write down what this is part of, before it begins."""
        if self._keep:
            write_json(self._notes, notes)

    def notes(self) -> dict[str, Any]:
        """What was written down; nothing where an earlier process was killed while it wrote."""
        return read_json(self._notes)

    def move(self, target: Path) -> None:
        """Give the whole file its name; it stays locked."""
        self.file.flush()
        give_name(self.path, target)

    def close(self, *, failed: bool) -> None:
        """Let go of it; only part of a file that failed, and may be kept, stays."""
        try:
            unnamed = is_at(self.file, self.path)
            if not (unnamed and self._keep and failed and self.size > 0):
                if unnamed:
                    self.path.unlink()
                self._notes.unlink(missing_ok=True)
        finally:
            self.file.close()


@contextlib.contextmanager
def open_part(
    path: Path, what: str, *, keep: bool = False, done: Callable[[], bool] = lambda: False
) -> Iterator[Part | None]:
    """Hold a part file while other processes wait for it.

    Args:
        path: of the file.
        what: is fetched, for the log.
        keep: whether it stays if the block fails.
        done: whether another process has made it whole meanwhile: then nothing is held.
    """
    part: Part | None = None
    failed = True
    try:
        part = _wait_for(path, what, keep=keep, done=done)
        # Whoever held it until now may have been the one to make it whole.
        yield None if done() else part
        failed = False
    finally:
        if part is None and failed:  # it was stopped on its way here, perhaps with the file made
            part = _try_part(path, keep=keep)
        if part is not None:
            part.close(failed=failed)


def _wait_for(path: Path, what: str, *, keep: bool, done: Callable[[], bool]) -> Part | None:
    waiting = False
    while not done():
        part = _try_part(path, keep=keep)
        if part is not None:
            return part
        if not waiting:
            logger.info("Another process is fetching %s; waiting for it.", what)
        waiting = True
        time.sleep(_POLL_S)
    return None


def _try_part(path: Path, *, keep: bool) -> Part | None:
    file = try_lock(path)
    if file is None:
        return None
    try:
        return Part(path, file, keep=keep)
    except BaseException:
        file.close()
        raise


def try_lock(path: Path, *, create: bool = True) -> BinaryIO | None:
    """Open and lock a file; None where another holds it or takes it away.

    Args:
        path: of the file.
        create: make it if missing; else that is None too.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | create * os.O_CREAT, 0o666), "r+b")
    except FileNotFoundError:
        if create:
            raise
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(file, path):
            return file
    except BlockingIOError:
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def wait_lock(path: Path, waits: Callable[[], object]) -> BinaryIO:
    """Open and lock a file, made if missing, once nobody else has it; polled, see `share_lock`.

    Args:
        path: of the file.
        waits: called once, if another has it.
    """
    file = try_lock(path)
    if file is None:
        waits()
    while file is None:
        time.sleep(_POLL_S)
        file = try_lock(path)
    return file


def share_lock(file: BinaryIO) -> None:
    """Lock a file together with others, once nobody has it alone.

    It is polled: what is raised in a thread that waits is heard only when the wait is over.
    """
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL_S)
        else:
            return


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still bears its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A dictionary from a small file; empty where there is none or it is broken."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small file in one step."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value))


def is_leftover(name: str) -> bool:
    """Whether a file that nobody writes any more has the name of one that is not whole."""
    return name.endswith(UNFINISHED) or _SAFETENSORS.fullmatch(name) is not None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Have a file appear under its name when the block ends; if that fails, nothing is left.

    Args:
        path: of the file; its folder exists.

    Yields:
        Where to write it: beside it, under a name of this process's own that `is_leftover` knows.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield unfinished
        give_name(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def give_name(whole: Path, path: Path) -> None:
    """Rename a file that is whole, once its content is on the disk.

    Without that, a power cut may leave an empty file under the name.
    """
    with whole.open("rb") as file:
        os.fsync(file.fileno())
    whole.replace(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that the disk is full, or the one during which it came.

    safetensors and torch have no kind of error for that, and `torch.save` its own last word.
    """
    if error is None:
        return False
    return any(reason in str(error) for reason in _FULL) or is_full(error.__context__)


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Make a folder, and turn errors of its disk into sentences.

    Raises:
        AssetError: the disk is full, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if is_full(error):
            raise AssetError(
                f"{what} does not fit on the disk of {folder}; free some of it."
            ) from error
        raise AssetError(
            f"{what} cannot be kept in {folder} ({error.strerror or error}); make it writable, or "
            "set AUDIOCRAFT_CACHE_DIR to another folder."
        ) from error
