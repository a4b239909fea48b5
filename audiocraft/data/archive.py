"""Archives from users: hostile until shown otherwise, and plain files afterwards.

Content decides what a file is. Nothing that an archive says is taken on trust: entries get names of
this module's own in one flat folder, links and devices are never made, and what comes out is
counted while it comes. An archive that an honest packer would not make is refused as a whole, with
the entry that gave it away; what is merely of no use, such as pictures, is left out and noted.
"""

import hashlib
import logging
import os
import shutil
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from audiocraft.assets.download import check_space
from audiocraft.assets.parts import is_full, open_part, read_json, try_lock, write_json
from audiocraft.data import tarball, zipball
from audiocraft.data.tarball import ArchiveError, Member, Stream, bomb, broken, show_name
from audiocraft.errors import AssetError, InputError
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)

AUDIO: Final = frozenset(
    {".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".asf", ".au", ".avi"}
    | {".caf", ".flac", ".flv", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp2", ".mp3"}
    | {".mp4", ".mpc", ".mpeg", ".mpg", ".oga", ".ogg", ".opus", ".snd", ".tta", ".w64", ".wav"}
    | {".webm", ".wma", ".wv"}
)
"""Suffixes of files that may hold music, videos among them."""
SIDE: Final = frozenset({".txt", ".json"})
"""Suffixes of what may stand beside a file of music."""

_ARCHIVES: Final = frozenset({".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"})
_FOREIGN: Final = (
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "RAR"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x1f\x9d", "compress (.Z)"),
)
_FREE_EXPANSION: Final = 32 * 10**6  # bytes: three minutes of silence expand a thousandfold
_WATCH: Final = 1 << 26  # bytes between two looks at the disk
_LONGEST_NAME: Final = 4096  # bytes, Linux's PATH_MAX
_LONGEST_STEM: Final = 100  # bytes of a name that are kept
_ALL_NAMES: Final = 1 << 24  # characters
_MB: Final = 1_000_000
_INDEX: Final = "entries.json"


@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Attributes:
        entries: files, folders and all else.
        size: bytes of what comes out of it.
        ratio: times that it may expand, beyond 32 MB; music hardly does.
    """

    entries: int = 50_000
    size: int = 200 * 10**9
    ratio: int = 100


LIMITS: Final = Limits()


@dataclass(frozen=True)
class SourceFile:
    """A file of a dataset.

    Attributes:
        name: its path in the archive or in the folder, parts separated by `/`.
        path: where it lies.
        sha256: of its bytes.
    """

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class LeftOut:
    """What is of no use in a dataset.

    Attributes:
        name: as in `SourceFile`.
        reason: a clause.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Unpacked:
    """What an archive held.

    Attributes:
        files: music, texts and JSON, in the archive's order.
        left_out: every other entry but folders.
    """

    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...]


def unpack(source: Path, folder: Path, limits: Limits = LIMITS) -> Unpacked | None:
    """Unpack a zip, a tar (also as gz, bz2 or xz) or a single compressed file.

    What comes out lies in `folder`, under the archive's SHA-256, whole or not at all; a second call
    with an equal archive finds it there. Memory does not depend on the archive's size.

    Args:
        source: a file, which is only read.
        folder: of the job, made if missing.
        limits: for archives that must not be trusted.

    Returns:
        What was in it; None where `source` is no archive.

    Raises:
        InputError: there is no such file, or it cannot be read.
        ArchiveError: the archive is broken, encrypted, hostile or beyond the limits.
        AssetError: the disk has too little free.
    """
    try:
        if not source.is_file():
            raise InputError(f"{source} is not a file; give the path of an archive.")
        with source.open("rb") as file:
            kind = _kind(file, source.name)
            if kind is None:
                return None
            before = os.fstat(file.fileno())
            file.seek(0)
            name = hashlib.file_digest(file, "sha256").hexdigest()
            target = folder / name
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            with open_part(folder / f"{name}.part", source.name, done=lambda: _is_done(target)) as (
                part
            ):
                if part is not None:
                    _unpack_new(file, kind, source.name, target, limits)
                after = os.fstat(file.fileno())
                has_changed = _state(after) != _state(before)
                if has_changed and part is not None:
                    shutil.rmtree(target)
    except OSError as error:
        if is_full(error):
            raise AssetError(
                f"What is in {source.name} does not fit on the disk of {folder}; free some of it."
            ) from error
        raise InputError(
            f"{source} cannot be unpacked to {folder} ({error.strerror or error}); check that the "
            "one is readable and the other writable."
        ) from error
    if has_changed:
        raise InputError(f"{source} changed while it was unpacked; try again when it is whole.")
    return _read_index(target)


def _kind(file: BinaryIO, name: str) -> str | None:
    """How to unpack a file: zip, tar or single; None for what is no archive."""
    head = file.read(tarball.HEADER)
    file.seek(0)
    if head.startswith(zipball.MAGIC):
        return "zip"
    if tarball.is_tar(head):  # first, for the name that it begins with may be like a compression
        return "tar"
    if tarball.compression(head):
        # As much as is looked at cannot be a bomb: less than a header, and then a block.
        most = tarball.HEADER + tarball.BLOCK
        first = Stream(tarball.expand(file, name), name, most).peek(tarball.HEADER)
        empty = len(first) == tarball.HEADER and not first.strip(b"\0")
        return "tar" if tarball.is_tar(first) or empty else "single"
    for magic, foreign in _FOREIGN:
        if head.startswith(magic):
            raise ArchiveError(name, f"is a {foreign} archive, which is not read", "send a .zip")
    return None


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed while they unpacked."""
    for path in folder.glob("*.part"):
        held = try_lock(path, create=False)
        if held is not None:
            with held:
                new = path.with_suffix(".new")
                if new.exists():
                    shutil.rmtree(new)
                path.unlink(missing_ok=True)


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _unpack_new(file: BinaryIO, kind: str, name: str, target: Path, limits: Limits) -> None:
    new = target.with_name(f"{target.name}.new")
    for old in (new, target):
        if old.exists():
            shutil.rmtree(old)
    new.mkdir()
    try:
        size = os.fstat(file.fileno()).st_size
        output = _Output(name, new, limits, size)
        file.seek(0)
        if kind == "zip":
            _unpack_zip(file, output)
        else:
            stream = Stream(tarball.expand(file, name), name, output.most)
            if kind == "tar":
                _unpack_tar(stream, output, file, size)
            else:
                output.expect(0)
                output.write(_without_suffix(name), stream.rest(), always=True)
        write_json(new / _INDEX, output.index())
        new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _is_done(target: Path) -> bool:
    index = read_json(target / _INDEX)
    return bool(index) and all(
        (target / file["path"]).is_file() and (target / file["path"]).stat().st_size == file["size"]
        for file in index["files"]
    )


def _read_index(target: Path) -> Unpacked:
    index = read_json(target / _INDEX)
    return Unpacked(
        tuple(
            SourceFile(file["name"], target / file["path"], file["sha256"])
            for file in index["files"]
        ),
        tuple(LeftOut(**entry) for entry in index["left_out"]),
    )


class _Output:
    """What has come out of an archive.

    Attributes:
        most: bytes that may.
    """

    def __init__(self, archive: str, folder: Path, limits: Limits, size: int) -> None:
        self.archive = archive
        self.limits = limits
        self.most = min(limits.size, max(_FREE_EXPANSION, limits.ratio * size))
        self._folder = folder
        self._files: dict[str, dict[str, str | int]] = {}
        self._left_out: list[LeftOut] = []
        self._entries = self._names = 0
        self._number = self._written = self._watched = 0

    def index(self) -> dict[str, list[dict[str, str | int]]]:
        """What `entries.json` says."""
        left_out = sorted(self._left_out, key=lambda entry: (entry.name, entry.reason))
        return {"files": list(self._files.values()), "left_out": [asdict(e) for e in left_out]}

    def expect(self, size: int) -> None:
        """Refuse what says already that it is too much."""
        if size > self.most:
            raise bomb(self.archive, self.most)
        check_space(f"Unpacking {self.archive}", self._folder, size)

    def wants(self, member: Member) -> str | None:
        """The name of an entry, with separators of one kind; None where it is not needed.

        Raises:
            ArchiveError: the entry is hostile, or one too many.
        """
        self._entries += 1
        self._names += len(member.name)
        if self._entries > self.limits.entries:
            raise self._beyond(f"{self.limits.entries} entries")
        if self._names > _ALL_NAMES:
            raise self._beyond(f"{_ALL_NAMES >> 20} MiB of names")
        clean = self._checked_name(member.name)
        if member.kind == tarball.FOLDER:
            return None
        shown = show_name(member.name)
        if member.kind not in {tarball.FILE, tarball.OTHER}:
            raise self._hostile(f"{member.kind}, {shown}", "pack the files themselves")
        if member.mode & (stat.S_ISUID | stat.S_ISGID):
            raise self._hostile(f"{shown} with a set-id bit", "remove that bit (chmod ug-s)")
        reason = "of unknown kind" if member.kind == tarball.OTHER else unwanted(clean)
        if reason is not None:
            self._left_out.append(LeftOut(clean, reason))
        return clean if reason is None else None

    def write(
        self,
        name: str,
        blocks: Iterable[bytes],
        declared: int | None = None,
        *,
        always: bool = False,
    ) -> None:
        """Write a file.

        Args:
            name: from `wants`.
            blocks: its bytes.
            declared: how many the archive says there are.
            always: whether its suffix does not matter.
        """
        path, file = self._new_file(name, always=always)
        digest, size = hashlib.sha256(), 0
        with file:
            for block in blocks:
                size += len(block)
                self._written += len(block)
                if self._written > self.most:
                    raise bomb(self.archive, self.most)
                if declared is not None and size > declared:
                    break
                if self._written - self._watched > _WATCH:
                    self._watched = self._written
                    check_space(f"Unpacking {self.archive}", self._folder, _WATCH)
                digest.update(block)
                file.write(block)
        if declared is not None and size != declared:
            raise broken(
                self.archive,
                f"{show_name(name)} is not of the {declared} bytes that its header says",
            )
        if name in self._files:  # as with every unpacker, the last one counts
            (self._folder / str(self._files.pop(name)["path"])).unlink()
            self._left_out.append(LeftOut(name, "a later entry has the same name"))
        self._files[name] = {
            "name": name,
            "path": path.name,
            "size": size,
            "sha256": digest.hexdigest(),
        }

    def _new_file(self, name: str, *, always: bool) -> tuple[Path, BinaryIO]:
        stem, suffix = split_name(name)
        if always and suffix not in AUDIO | SIDE:
            stem, suffix = name, ""
        self._number += 1
        number = f"{self._number:06d}"
        try:
            path = self._folder / f"{number} {_safe(stem)}{suffix}"
            return path, path.open("xb")
        except (UnicodeError, OSError) as error:
            # A file system, or a locale, that does not know these characters.
            logger.debug(
                "%s: %s is written as %s", self.archive, show_name(name), number, exc_info=error
            )
            path = self._folder / f"{number}{suffix}"
            return path, path.open("xb")

    def _checked_name(self, name: str) -> str:
        if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
            raise self._hostile(f"a name of {len(name)} characters", "shorten it")
        unified = name.replace("\\", "/")
        parts = [part for part in unified.split("/") if part not in {"", "."}]
        if unified.startswith("/") or unified[1:3] == ":/":
            raise self._hostile(f"the absolute path {show_name(name)}", "pack a folder by its name")
        if ".." in parts:
            raise self._hostile(
                f"{show_name(name)}, which leads out of its folder", "pack from the folder above"
            )
        return "/".join(parts)

    def _hostile(self, what: str, remedy: str) -> ArchiveError:
        return ArchiveError(self.archive, f"holds {what}", remedy)

    def _beyond(self, what: str) -> ArchiveError:
        return ArchiveError(
            self.archive, f"holds more than {what}", "pack the music alone, or give a folder"
        )


def unwanted(name: str) -> str | None:
    """Why a file is of no use by its name; None where it may be of use."""
    *folders, last = name.split("/")
    if "__MACOSX" in folders or last.startswith("._") or last == ".DS_Store":
        return "housekeeping of macOS"
    suffix = split_name(name)[1]
    if suffix in AUDIO | SIDE:
        return None
    if suffix in _ARCHIVES:
        return "an archive within the dataset; unpack it first"
    return "not a file of music by its name"


def _unpack_tar(stream: Stream, output: _Output, file: BinaryIO, size: int) -> None:
    output.expect(0)
    progress = _progress(output)
    for member in tarball.members(stream, 4 * output.limits.entries):
        name = output.wants(member)
        if name is not None:
            output.write(name, stream.take(member.size))
        progress.update(file.tell(), size)
    # The checksums of a compressed file stand at its end.
    for _ in stream.rest():
        pass


def _unpack_zip(file: BinaryIO, output: _Output) -> None:
    with zipball.open_zip(file, output.archive) as opened:
        chosen = []
        for info in opened.infolist():
            name = output.wants(zipball.read_member(info))
            zipball.check_readable(info, output.archive)
            if name is not None:
                chosen.append((name, info))
        done, total = 0, sum(info.file_size for _, info in chosen)
        output.expect(total)
        progress = _progress(output)
        for name, info in chosen:
            output.write(name, zipball.read_blocks(opened, info), info.file_size)
            done += info.file_size
            progress.update(done, max(1, total))


def _progress(output: _Output) -> ProgressLog:
    return ProgressLog(logger, "MB", f"unpacking {output.archive}", _MB, quiet_s=5)


def split_name(name: str) -> tuple[str, str]:
    """Stem and suffix, in lower case, of the last part of a name."""
    last = PurePosixPath(name.rsplit("/", 1)[-1])
    return last.stem, last.suffix.lower()


def _safe(stem: str) -> str:
    """A stem that no file system and no program takes for anything but a name."""
    text = "".join(
        char if char.isprintable() and char not in '/\\:*?"<>|%' else "_"
        for char in unicodedata.normalize("NFC", stem)
    )
    return text.encode()[:_LONGEST_STEM].decode(errors="ignore")


def _without_suffix(name: str) -> str:
    known = (".gz", ".bz2", ".xz")
    return next((name[: -len(s)] for s in known if name.lower().endswith(s)), name) or name
