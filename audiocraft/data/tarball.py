"""Tar archives of unknown origin, read once from front to back in bounded memory.

The standard library's reader takes the lengths of names and of extended headers on trust, expands
sparse files and ends in silence at a broken header. This one knows the formats that tar programs
write (POSIX.1-2001: ustar and pax; GNU; before them v7), says what each entry is, and makes
nothing.
"""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from audiocraft.errors import InputError

FILE: Final = "file"
FOLDER: Final = "folder"
BLOCK: Final = 1 << 18
"""Bytes that are read or expanded at a time."""
HEADER: Final = 512
"""Bytes of a tar header, and what the sizes in a tar are rounded up to."""

_READ: Final = 1 << 14  # compressed bytes at a time; one of them may make a thousand
_XZ_MEMORY: Final = 1 << 29  # xz -9 takes 65 MiB
_SHOWN: Final = 80  # characters of an entry's name in a message
_LONGEST_EXTENSION: Final = 1 << 20  # macOS keeps attributes of a file there
_ALL_EXTENSIONS: Final = 1 << 27
_EXTENSIONS: Final = (b"L", b"K", b"x", b"X", b"g")
_KINDS: Final = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": FOLDER,
    b"6": "a named pipe",
    b"S": "a sparse file",
    b"D": FOLDER,
    b"M": "a part of a file of several volumes",
}
OTHER: Final = "an entry of unknown kind"
_COMPRESSIONS: Final = ((b"\x1f\x8b", "gz"), (b"BZh", "bz2"), (b"\xfd7zXZ\0", "xz"))


class ArchiveError(InputError):
    """An archive cannot be unpacked, or must not be.

    Args:
        archive: its name.
        reason: what is wrong, a clause that the name begins.
        remedy: what to do about it.
    """

    def __init__(self, archive: str, reason: str, remedy: str) -> None:
        super().__init__(f"{archive} {reason}; {remedy}.")


def show_name(name: str) -> str:
    """A name for a message: control characters are escaped, and it ends somewhere."""
    return repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")


def broken(archive: str, reason: str) -> ArchiveError:
    """For an archive that is not as its format wants it, or ends early."""
    return ArchiveError(
        archive, f"is broken or cut off ({reason})", "download it again, or pack it again"
    )


@dataclass(frozen=True)
class Member:
    """What a tar says of an entry.

    Attributes:
        name: as in the archive.
        kind: FILE, FOLDER, or another in words.
        mode: permissions and the bits above them.
        size: bytes that follow, for whatever is no folder.
    """

    name: str
    kind: str
    mode: int
    size: int


class Stream:
    """Bytes that come in blocks, read forwards.

    Args:
        blocks: of bytes.
        archive: its name, for errors.
        most: bytes after which it is a bomb.
    """

    def __init__(self, blocks: Iterator[bytes], archive: str, most: int) -> None:
        self.archive = archive
        self.position = 0
        self._blocks = blocks
        self._block = b""
        self._begin = 0
        self._most = most
        self._received = 0

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        while len(self._block) - self._begin < size and (block := self._next()):
            self._block = self._block[self._begin :] + block
            self._begin = 0
        return self._block[self._begin : self._begin + size]

    def read(self, size: int) -> bytes:
        """As many bytes as asked for.

        Raises:
            ArchiveError: there are fewer.
        """
        data = self.peek(size)
        if len(data) < size:
            raise broken(self.archive, "it ends in the middle of an entry")
        self._pass(size)
        return data

    def take(self, size: int) -> Iterator[bytes]:
        """The next bytes in blocks.

        Raises:
            ArchiveError: there are fewer.
        """
        while size:
            data = self.read(min(size, max(1, len(self._block) - self._begin)))
            size -= len(data)
            yield data

    def rest(self) -> Iterator[bytes]:
        """All bytes that are left, in blocks."""
        while data := self.peek(1) and self._block[self._begin :]:
            self._pass(len(data))
            yield data

    def _pass(self, size: int) -> None:
        self._begin += size
        self.position += size

    def _next(self) -> bytes:
        block = next(self._blocks, b"")
        self._received += len(block)
        if self._received > self._most:
            raise bomb(self.archive, self._most)
        return block


def bomb(archive: str, most: int) -> ArchiveError:
    """For an archive that holds more than one of its size may."""
    return ArchiveError(
        archive,
        f"expands to more than {most // 10**6} MB, which is what an archive of its size is let "
        "expand to (it may be a bomb)",
        "pack the music alone, or give a folder",
    )


def compression(head: bytes) -> str | None:
    """The compression that a file begins with: gz, bz2, xz or None."""
    return next((name for magic, name in _COMPRESSIONS if head.startswith(magic)), None)


def is_tar(head: bytes) -> bool:
    """Whether bytes are the first header of a tar."""
    return len(head) >= HEADER and _checksum_fits(head[:HEADER])


def expand(file: BinaryIO, archive: str) -> Iterator[bytes]:
    """A file's bytes in blocks of at most `BLOCK`, decompressed where it is compressed.

    Raises:
        ArchiveError: the compression is damaged or ends early.
    """
    head = file.read(HEADER)
    file.seek(0)
    kind = None if is_tar(head) else compression(head)
    if kind is None:
        yield from iter(lambda: file.read(BLOCK), b"")
        return
    try:
        yield from _decompress(file, kind)
    except (zlib.error, lzma.LZMAError, OSError) as error:
        raise broken(archive, str(error).lower()) from error
    except EOFError as error:
        raise broken(archive, f"its {kind} compression has no end") from error


def _decompress(file: BinaryIO, kind: str) -> Iterator[bytes]:
    decompressor, data = _decompressor(kind), b""
    while True:
        if decompressor.eof:
            # Another may follow, as parallel packers write them; zeros fill up a tape's block.
            data = decompressor.unused_data.lstrip(b"\0")
            while not data:
                more = file.read(_READ)
                if not more:
                    return
                data = more.lstrip(b"\0")
            decompressor = _decompressor(kind)
        block = decompressor.decompress(data, BLOCK)
        data = b""
        if block:
            yield block
        elif not decompressor.eof:
            data = file.read(_READ)
            if not data:
                raise EOFError


def _decompressor(kind: str) -> "_Gzip | bz2.BZ2Decompressor | lzma.LZMADecompressor":
    if kind == "gz":
        return _Gzip()
    if kind == "bz2":
        return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


class _Gzip:
    """zlib with the interface of the other two; it checks gzip's checksum as well."""

    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decompressor.decompress(self._decompressor.unconsumed_tail + data, max_length)


def members(stream: Stream, most: int) -> Iterator[Member]:
    """The entries of a tar; between two of them the stream may be read, up to the entry's size.

    Args:
        stream: at its beginning.
        most: headers of all kinds.

    Raises:
        ArchiveError: it is no whole tar, or has more headers.
    """
    extension: dict[bytes, bytes] = {}
    extended = 0
    for count in range(1, most + 1):
        header = stream.read(HEADER) if stream.peek(1) else b""
        if not header:
            raise broken(stream.archive, "its end is missing")
        if not header.strip(b"\0"):
            return
        if not _checksum_fits(header):
            raise broken(stream.archive, f"header {count} is damaged")
        kind = header[156:157]
        try:
            if kind in _EXTENSIONS:
                size = _checked_size(_number(header[124:136]))
                extended += size
                if extended > _ALL_EXTENSIONS:
                    raise _too_many(stream.archive, f"{_ALL_EXTENSIONS >> 20} MiB of extensions")
                extension |= _extension(stream.read(size), kind)
                left = -size % HEADER
            else:
                member = _member(header, extension)
                left = 0 if kind == b"5" else -(-member.size // HEADER) * HEADER
        except ArchiveError:
            raise
        except ValueError as error:
            raise broken(stream.archive, f"header {count}: {error}") from error
        end = stream.position + left
        if kind not in _EXTENSIONS:
            extension = {}
            yield member
        for _ in stream.take(end - stream.position):
            pass
    raise _too_many(stream.archive, f"{most} headers")


def _too_many(archive: str, what: str) -> ArchiveError:
    return ArchiveError(archive, f"holds more than {what}", "pack the music alone")


def _checked_size(size: int) -> int:
    if not 0 <= size <= _LONGEST_EXTENSION:
        raise ValueError(f"an extension of {size} bytes")
    return size


def _member(header: bytes, extension: dict[bytes, bytes]) -> Member:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU's own format keeps times where this has a prefix
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    name = extension.get(b"path", name)
    kind = _KINDS.get(header[156:157], OTHER)
    if kind == FILE and name.endswith(b"/"):  # v7 has no kind for folders
        kind = FOLDER
    if any(key.startswith(b"GNU.sparse.") for key in extension):
        kind = _KINDS[b"S"]
    # pax gives a size that the header has no room for.
    size = int(extension.get(b"size", b"0")) or _number(header[124:136])
    if size < 0:
        raise ValueError("a negative size")
    return Member(decode_name(name), kind, _number(header[100:108]), size)


def decode_name(name: bytes) -> str:
    """A name as UTF-8, or as Latin-1, in which every name means something."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")


def _extension(data: bytes, kind: bytes) -> dict[bytes, bytes]:
    """What a header says of the next one."""
    if kind == b"L":
        return {b"path": data.rstrip(b"\0")}
    # Nothing is needed of where a link leads (K), nor of what holds for all entries (g).
    return _pax(data) if kind in {b"x", b"X"} else {}


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Records of a length, which counts all of it, a space, key=value and a line's end."""
    records = {}
    begin = 0
    while begin < len(data):
        space = data.index(b" ", begin, begin + 20)
        end = begin + int(data[begin:space])
        if not space < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError("a pax record that does not end")
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        if key in {b"path", b"size"} or key.startswith(b"GNU.sparse."):
            records[key] = value
        begin = end
    return records


def _number(field: bytes) -> int:
    """A number in octal digits, or in binary where the first bit says so (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits else 0


def _checksum_fits(header: bytes) -> bool:
    try:
        stated = _number(header[148:156])
    except ValueError:
        return False
    unsigned = sum(b" " * 8) + sum(header[:148]) + sum(header[156:])
    if stated == unsigned:
        return True
    # Some old programs added up signed bytes.
    high = sum(byte >> 7 for byte in header[:148] + header[156:])
    return stated == unsigned - 256 * high
