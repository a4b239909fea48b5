"""Zip archives of unknown origin: the standard library's reader, with its trust taken away.

It believes a table of contents of any length, knows no links, and says of an archive that is broken
whatever it stumbled over.
"""

import errno
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, Final, cast

from audiocraft.data.tarball import (
    BLOCK,
    FILE,
    FOLDER,
    ArchiveError,
    Member,
    broken,
    show_name,
)
from audiocraft.errors import InputError

MAGIC: Final = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
"""What a zip begins with: an entry, the end of an empty one, the first of several volumes."""

_LONGEST_READ: Final = 1 << 24  # bytes: the table of contents is read at once
_ENCRYPTED: Final = 0x1
_UTF8: Final = 0x800
_METHODS: Final = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}
_KINDS: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def open_zip(file: BinaryIO, archive: str) -> Iterator[zipfile.ZipFile]:
    """A zip, whose errors are sentences within the block.

    Args:
        file: open for reading.
        archive: its name.

    Raises:
        ArchiveError: it is broken, or its table of contents takes more than 16 MiB.
    """
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Bounded(file, archive))) as opened:
            yield opened
    except InputError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise broken(archive, "it refers to what is before its beginning") from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        ValueError,  # a name that is no UTF-8, for one
        OverflowError,
        IndexError,
        NotImplementedError,
    ) as error:
        reason = str(error) or "it ends in the middle of an entry"
        raise broken(archive, reason.removesuffix(".")) from error


def read_member(info: zipfile.ZipInfo) -> Member:
    """What a zip says of an entry."""
    mode = info.external_attr >> 16  # of Unix, or 0
    kind = _KINDS.get(stat.S_IFMT(mode), FOLDER if info.is_dir() else FILE)
    return Member(_name(info), kind, mode, info.file_size)


def check_readable(info: zipfile.ZipInfo, archive: str) -> None:
    """Refuse an entry that takes a password, or a method whose output can't be bounded.

    Raises:
        ArchiveError: it is one.
    """
    if info.flag_bits & _ENCRYPTED:
        raise ArchiveError(
            archive, f"is encrypted ({show_name(info.orig_filename)})", "pack it without a password"
        )
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        method = _METHODS.get(info.compress_type, f"number {info.compress_type}")
        raise ArchiveError(
            archive,
            f"is compressed by the method {method} ({show_name(info.orig_filename)})",
            "pack it as an ordinary zip (deflate)",
        )


def read_blocks(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """The bytes of an entry, checked against its checksum."""
    with opened.open(info) as data:
        yield from iter(lambda: data.read(BLOCK), b"")


def _name(info: zipfile.ZipInfo) -> str:
    """The name of an entry; many programs, macOS's among them, fail to mark it as UTF-8."""
    if not info.flag_bits & _UTF8:
        try:
            return info.orig_filename.encode("cp437").decode()
        except UnicodeDecodeError:
            pass
    return info.orig_filename


class _Bounded:
    """A file that gives no more at once than a table of contents may take."""

    def __init__(self, file: BinaryIO, archive: str) -> None:
        self._file = file
        self._archive = archive
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _LONGEST_READ:
            raise ArchiveError(
                self._archive,
                f"has a table of contents of more than {_LONGEST_READ >> 20} MiB",
                "pack the music alone, or give a folder",
            )
        return self._file.read(_LONGEST_READ if size < 0 else size)
