"""What is in a dataset: files of music, each with the texts beside it, in an order of their own.

A folder of the user's, an archive and a single file look alike afterwards. Nothing is decoded here:
a suffix makes a candidate, and its content decides later.
"""

import hashlib
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from audiocraft.assets.parts import file_sha256
from audiocraft.data.archive import (
    LIMITS,
    SIDE,
    LeftOut,
    Limits,
    SourceFile,
    split_name,
    unpack,
    unwanted,
)
from audiocraft.errors import InputError
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)

_CHUNK: Final = "_chunk"  # as older fine-tuners name the pieces that they cut themselves
_PIECE: Final = re.compile(rf"{_CHUNK}\d*$")


@dataclass(frozen=True)
class AudioFile:
    """A file that may hold music.

    Attributes:
        name: its path in the dataset, parts separated by `/`.
        path: where it lies.
        sha256: of its bytes. Equal ones are the same song, whatever their names.
        text: the `.txt` beside it.
        metadata: the `.json` beside it.
    """

    name: str
    path: Path
    sha256: str
    text: Path | None = None
    metadata: Path | None = None


@dataclass(frozen=True)
class Found:
    """What a dataset holds.

    Attributes:
        files: by name.
        left_out: every other file, by name.
        key: SHA-256 in hex of all that matters of it: names and contents of music and texts. The
            name of a single file is none of it: one that comes by URL bears another each time.
    """

    files: tuple[AudioFile, ...]
    left_out: tuple[LeftOut, ...]
    key: str


def find(source: Path, folder: Path, limits: Limits = LIMITS) -> Found:
    """Look through a dataset.

    Args:
        source: an archive, a folder or one file of music, which is only read.
        folder: where an archive is unpacked to; see `archive.unpack`.
        limits: for archives; a folder is held to the number of entries.

    Returns:
        The same for the same content, whatever order a file system gives.

    Raises:
        InputError: there is no such file or folder, or it cannot be read; `ArchiveError` among
            them.
        AssetError: the disk has too little free for what is in the archive.
    """
    if source.is_dir():
        return _sort_out(*_read_folder(source, limits))
    unpacked = unpack(source, folder, limits)
    if unpacked is not None:
        return _sort_out(unpacked.files, unpacked.left_out)
    sides = (source.with_suffix(suffix) for suffix in sorted(SIDE))
    paths = [source, *(side for side in sides if side != source and side.is_file())]
    try:
        files = [SourceFile(_printable(p.name), p, file_sha256(p)) for p in paths]
    except OSError as error:
        raise InputError(
            f"{source} cannot be read ({error.strerror}); check its permissions."
        ) from error
    return _sort_out(files, [], named=False)


def _sort_out(
    files: Sequence[SourceFile], left_out: Sequence[LeftOut], *, named: bool = True
) -> Found:
    """Join music and texts; what is not a text is music, whose names are in the key if `named`."""
    files = sorted(files, key=lambda file: file.name)
    texts = [file for file in files if split_name(file.name)[1] in SIDE]
    sides = {_place(file.name): file for file in texts}
    music = [file for file in files if split_name(file.name)[1] not in SIDE]
    digest = hashlib.sha256()
    found, used = [], set()
    for file in music:
        text, metadata = (_beside(sides, file.name, suffix) for suffix in (".txt", ".json"))
        used |= {side.path for side in (text, metadata) if side}
        found.append(
            AudioFile(
                file.name,
                file.path,
                file.sha256,
                text.path if text else None,
                metadata.path if metadata else None,
            )
        )
        hashes = [file.sha256, *(side.sha256 if side else "" for side in (text, metadata))]
        digest.update("\0".join((file.name if named else "", *hashes, "")).encode())
    unused = [
        LeftOut(
            file.name,
            "no music beside it has its name"
            if sides[_place(file.name)] is file
            else "another beside it has its name",
        )
        for file in texts
        if file.path not in used
    ]
    ordered = sorted((*left_out, *unused), key=lambda entry: (entry.name, entry.reason))
    return Found(tuple(found), tuple(ordered), digest.hexdigest())


def _stem(name: str) -> str:
    """Folder and stem, in one of the forms that Unicode knows for the same letters."""
    folder = name.rpartition("/")[0]
    return unicodedata.normalize("NFC", f"{folder}/{split_name(name)[0]}")


def _place(name: str) -> tuple[str, str]:
    """What a text is found by: its stem and its suffix."""
    return _stem(name), split_name(name)[1]


def _beside(sides: dict[tuple[str, str], SourceFile], name: str, suffix: str) -> SourceFile | None:
    """What stands beside a file by its own stem, or by that of what it is a chunk of."""
    folder, _, stem = _stem(name).rpartition("/")
    while stem:
        side = sides.get((f"{folder}/{stem}", suffix))
        if side is not None:
            return side
        stem = stem.rpartition(_CHUNK)[0]
    return None


def group_songs(files: Sequence[AudioFile]) -> dict[str, str]:
    """Which files are one song, as far as it can be known without listening.

    Equal files are, and so are pieces of a song as older fine-tuners name them (`song_chunk1.wav`),
    the song itself, and files of one folder whose names differ in their suffix alone.

    Returns:
        For each file's name the hash of its song.
    """
    leader: dict[str, str] = {}

    def find_leader(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for file in files:
        # Hashes have no slash in them, and these names always do.
        one, other = find_leader(file.sha256), find_leader(_PIECE.sub("", f"/{_stem(file.name)}"))
        leader[max(one, other)] = min(one, other)
    members: dict[str, list[str]] = {}
    for file in files:
        members.setdefault(find_leader(file.sha256), []).append(file.sha256)
    return {file.name: min(members[find_leader(file.sha256)]) for file in files}


def _read_folder(folder: Path, limits: Limits) -> tuple[list[SourceFile], list[LeftOut]]:
    """Files of use and others below a folder."""
    root = folder.resolve()
    paths = list(islice(_walk(root, "", root, frozenset({root})), limits.entries + 1))
    if len(paths) > limits.entries:
        raise InputError(
            f"{folder} holds more than {limits.entries} files; give a folder of music alone."
        )
    progress = ProgressLog(logger, "files", f"reading {folder.name}", quiet_s=5)
    files, left_out = [], []
    for done, (name, path) in enumerate(paths, 1):
        reason = _unusable(name, path, root)
        if reason is None:
            try:
                files.append(SourceFile(name, path, file_sha256(path)))
            except OSError as error:
                reason = f"cannot be read ({error.strerror})"
        if reason is not None:
            left_out.append(LeftOut(name, reason))
        progress.update(done, len(paths))
    return files, left_out


def _walk(
    folder: Path, prefix: str, root: Path, above: frozenset[Path]
) -> Iterator[tuple[str, Path]]:
    """Names and paths of all that is no folder; links to folders are followed inside of `root`."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read ({error.strerror}); check its permissions."
        ) from error
    for entry in entries:
        name, path = f"{prefix}{_printable(entry.name)}", Path(entry.path)
        real = path.resolve() if path.is_dir() else None
        if real is None or not real.is_relative_to(root):
            yield name, path
        elif real not in above:  # a link upwards would lead round and round
            yield from _walk(path, f"{name}/", root, above | {real})


def _unusable(name: str, path: Path, root: Path) -> str | None:
    """Why a file of a folder is not read."""
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root):
            return "a link out of the folder"
        reason = unwanted(name)
        if reason is None and not stat.S_ISREG(real.stat().st_mode):
            reason = "not a plain file"
    except (OSError, RuntimeError):  # RuntimeError: round and round
        return "a link that leads nowhere"
    return reason


def _printable(name: str) -> str:
    """A name in characters, whatever bytes it has on disk."""
    return os.fsencode(name).decode(errors="replace")
