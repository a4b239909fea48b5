"""Fine-tuned weights on disk, by the SHA-256 of their bytes."""

import base64
import binascii
import hashlib
import logging
import os
import re
import shutil
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote_to_bytes

from audiocraft.assets.download import check_space, transfer
from audiocraft.assets.exchange import check_url
from audiocraft.assets.parts import (
    Part,
    is_at,
    open_part,
    read_json,
    share_lock,
    try_lock,
    write_json,
    writing,
)
from audiocraft.assets.remote import Remote, Validators, show_size, show_url
from audiocraft.assets.store import store_dir
from audiocraft.errors import AssetError, InputError

logger = logging.getLogger(__name__)

KEEP_FREE: Final = 10 * 2**30
_CACHE: Final = "The cache of fine-tuned weights"
_NAME: Final = re.compile("[0-9a-f]{64}")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?")
_OLD_ENOUGH_S: Final = 2.0  # a later change may bear the same time


@dataclass(frozen=True)
class StoredFile:
    """A file of weights, which stays on disk until it is released.

    Attributes:
        path: where it lies; its name says nothing about its form.
        sha256: of its bytes.
    """

    path: Path
    sha256: str
    _lock: BinaryIO | None = field(default=None, repr=False, compare=False)


class FineTuneStore:
    """The cache of fine-tuned weights.

    Args:
        folder: where it lies; `fine-tunes` in the store by default.
        keep_free: bytes of its disk that it leaves to others. Where a file comes in, those used
            longest ago make room. A file that does not leave so much even then still serves its
            request, as long as it fits at all: it is removed when it is released. Pinned files
            are no cache and stay.
    """

    def __init__(self, folder: Path | None = None, keep_free: int = KEEP_FREE) -> None:
        self._folder = folder or store_dir() / "fine-tunes"
        self._keep_free = keep_free
        self._pinned: list[StoredFile] = []
        # By path and everything that changes with the content.
        self._hashes: dict[tuple[str | int, ...], str] = {}
        # Checked in this process: inode and size by name.
        self._checked: dict[str, tuple[int, int]] = {}

    def get(self, source: str) -> StoredFile:
        """The file behind a source, held until `release` or until the result is dropped.

        Args:
            source: http(s) URL, of which each call asks whether it has changed; `data:` URL in
                base64; or path of a local file, which is used where it is.

        Raises:
            InputError: the source is none of these, or there is no such file.
            AssetError: it cannot be fetched or kept.
        """
        scheme = _SCHEME.match(source)
        kind = scheme[1].lower() if scheme else ""
        if kind == "data":
            stored = self._get_data(source)
        elif kind in {"http", "https"}:
            stored = self._get_url(source)
        elif scheme and scheme[2]:
            raise InputError(f"{kind}:// is not supported; give an http(s) URL or a path.")
        else:
            return self._get_local(Path(source))
        try:
            with writing(_CACHE, self._folder):
                self._evict()
        except BaseException:
            self._let_go(stored)
            raise
        return stored

    def pin(self, stored: StoredFile) -> None:
        """Keep a file for as long as this store lives, whatever the disk has free."""
        self._pinned.append(stored)

    def release(self, stored: StoredFile) -> None:
        """Let a file go, which is not used any more or is in memory.

        It stays in the cache if its disk has enough free.
        """
        if stored._lock is not None and not any(stored is other for other in self._pinned):  # noqa: SLF001 - one module
            self._let_go(stored)
            with writing(_CACHE, self._folder):
                self._evict()

    def _get_local(self, path: Path) -> StoredFile:
        path = path.absolute()
        try:
            with path.open("rb") as file:
                before = os.fstat(file.fileno())
                key = (str(path), before.st_ino, *_state(before))
                if key in self._hashes:
                    return StoredFile(path, self._hashes[key])
                began = time.time()
                value = hashlib.file_digest(file, "sha256").hexdigest()
                after = os.fstat(file.fileno())
        except (OSError, ValueError) as error:  # a ValueError: a zero byte in the path
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{path} cannot be read ({reason}); give the path of a file of weights."
            ) from error
        if _state(after) != _state(before):
            raise InputError(f"{path} is being written; try again when it is whole.")
        # As git does with its index: a change within the same tick may bear the same times.
        if began - max(before.st_mtime, before.st_ctime) >= _OLD_ENOUGH_S:
            self._hashes[key] = value
        return StoredFile(path, value)

    def _get_data(self, url: str) -> StoredFile:
        header, comma, text = url.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise InputError("This data: URL is not in base64; give data:...;base64,...")
        try:
            content = base64.b64decode(unquote_to_bytes(text), validate=True)
        except binascii.Error as error:
            raise InputError("The base64 of this data: URL is broken; send it again.") from error
        name = hashlib.sha256(content).hexdigest()
        what = "The content of the data: URL"
        with (
            writing(what, self._incoming),
            open_part(self._incoming / f"{name}.part", what) as part,
        ):
            assert part is not None, "nobody else makes it whole"
            held = self._hold(name)
            if held is None:
                self._evict(len(content))
                check_space(what, self._folder, len(content))
                part.file.write(content)
                held = self._adopt(part, name)
        return held

    def _get_url(self, url: str) -> StoredFile:
        check_url(url)
        key = hashlib.sha256(url.encode()).hexdigest()
        mapping = self._folder / "urls" / f"{key}.json"
        remote = Remote(url, show_url(url))
        with (
            writing(remote.what, mapping.parent),
            writing(remote.what, self._incoming),
            open_part(self._incoming / f"{key}.part", remote.what) as part,
        ):
            assert part is not None, "nobody else makes it whole"
            self._remove_leftovers()
            known = read_json(mapping)
            validators = Validators(_text(known.get("etag")), _text(known.get("last_modified")))
            held = self._hold(_text(known.get("sha256")) or "") if validators else None

            def make_room(need: int) -> None:
                self._let_go(held)  # it has changed, and may make room as well
                self._evict(need)

            try:
                received = transfer(
                    remote, part, known=validators if held else None, make_room=make_room
                )
            except BaseException:
                self._let_go(held)
                raise
            if received is None:
                assert held is not None, "only then was the question whether it has changed"
                return held
            self._let_go(held)
            # First: whoever waits for the part goes on as soon as the part has its name.
            write_json(mapping, {"sha256": received.hash, **asdict(received.validators)})
            return self._hold(received.hash) or self._adopt(part, received.hash)

    @property
    def _incoming(self) -> Path:
        return self._folder / "incoming"

    def _adopt(self, part: Part, name: str) -> StoredFile:
        """A part that is whole becomes a file of the cache."""
        path = self._folder / name
        part.move(path)
        share_lock(part.file)
        stat = os.fstat(part.file.fileno())
        self._checked[name] = (stat.st_ino, stat.st_size)
        stored = self._hold(name)
        if stored is None:
            raise AssetError(f"{path} has disappeared; try again.")
        return stored

    def _hold(self, name: str) -> StoredFile | None:
        """A file of the cache, locked; None where it is missing, just removed or broken."""
        path = self._folder / name
        if not _NAME.fullmatch(name):
            return None
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        try:
            share_lock(file)  # whoever adopts or removes it has it for a moment only
            if is_at(file, path):
                stat = os.fstat(file.fileno())
                state = (stat.st_ino, stat.st_size)
                if self._checked.get(name) != state:
                    if hashlib.file_digest(file, "sha256").hexdigest() != name:
                        logger.warning("%s is broken and is removed.", path)
                        if is_at(file, path):  # another process may have been first
                            path.unlink(missing_ok=True)
                        file.close()
                        return None
                    self._checked[name] = state
                os.utime(path)
                return StoredFile(path, name, file)
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def _let_go(self, stored: StoredFile | None) -> None:
        if stored is not None and stored._lock is not None:  # noqa: SLF001 - one module
            stored._lock.close()  # noqa: SLF001

    def _evict(self, need: int = 0) -> None:
        """Remove files, the one used longest ago first, until enough of the disk is free.

        Args:
            need: bytes of a file that comes in; where it does not fit even without all others that
                are not in use, none is removed.
        """
        free, removed = shutil.disk_usage(self._folder).free, {}
        with ExitStack() as locks:
            for path, stat in self._files().items():
                if free >= need + self._keep_free:
                    break
                file = try_lock(path, create=False)
                if file is not None:  # else it is in use
                    locks.enter_context(file)
                    removed[path] = stat.st_size
                    free += stat.st_size
            for path, size in removed.items() if free >= need else ():
                path.unlink(missing_ok=True)
                for mapping in (self._folder / "urls").glob("*.json"):
                    if read_json(mapping).get("sha256") == path.name:
                        mapping.unlink(missing_ok=True)
                logger.info("Removed %s of fine-tuned weights to free the disk.", show_size(size))

    def _files(self) -> dict[Path, os.stat_result]:
        """Files of the cache, the one used longest ago first."""
        files = {}
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):  # another process has removed it
                    files[path] = path.stat()
        return dict(sorted(files.items(), key=lambda item: item[1].st_mtime_ns))

    def _remove_leftovers(self) -> None:
        """Remove what processes left that were killed while they fetched."""
        for path in self._incoming.glob("*.part"):
            file = try_lock(path, create=False)
            if file is not None:
                with file:
                    path.unlink(missing_ok=True)


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
