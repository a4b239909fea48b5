"""Where the result of a prediction goes: file names and the files themselves."""

import base64
import binascii
import mimetypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from audiocraft.errors import InputError

# mimetypes knows several of these under one of their names only, and that depends on the machine.
_EXTENSIONS: Final = {
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/mpeg": ".mp3",
    "audio/flac": ".flac",
    "audio/x-flac": ".flac",
    "audio/ogg": ".ogg",
    "application/ogg": ".ogg",
}
_DATA_URL: Final = re.compile(r"data:([^;,]*)(?:;[^;,]*)*;base64,")


def check_target(target: Path | None, *, stem: str = "output") -> Path:
    """The path that a result will be written to, but for an extension that is still open.

    Args:
        target: path from `-o`: a file, a file without its extension, or a folder; None for `stem`
            in the working folder.
        stem: name of the file where only a folder is known.

    Raises:
        InputError: nothing can be written there, said before anything is computed.
    """
    path = Path(stem) if target is None else target
    if path.is_dir():
        path /= stem
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"-o: there is no folder {str(folder)!r} to write {path.name!r} into.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"-o: {str(path)!r} must not be written to; choose another path.")
    return path


def files_of(output: object) -> list[str]:
    """The data URLs of an output that is a file or a list of files, else nothing."""
    items: list[object] = output if isinstance(output, list) else [output]
    urls = [item for item in items if isinstance(item, str) and _DATA_URL.match(item)]
    return urls if len(urls) == len(items) else []


def write_files(urls: Sequence[str], path: Path, *, number: bool) -> list[Path]:
    """Writes the content of data URLs.

    Args:
        urls: as `files_of` gives them.
        path: from `check_target`; the extension of the content is added where it has none.
        number: whether the output is a list: `take.wav` then becomes `take.0.wav`.

    Raises:
        InputError: a data URL is broken, or a file cannot be written.
    """
    written = []
    for index, url in enumerate(urls):
        match = _DATA_URL.match(url)
        assert match is not None
        extension = path.suffix or _EXTENSIONS.get(match[1]) or mimetypes.guess_extension(match[1])
        order = f".{index}" if number else ""
        file = path.with_name(f"{path.stem}{order}{extension or ''}")
        try:
            content = base64.b64decode(url[match.end() :], validate=True)
            file.write_bytes(content)
        except (OSError, binascii.Error) as error:
            if file.is_file():  # half a file is worse than none
                file.unlink()
            raise InputError(f"{str(file)!r} cannot be written: {error}.") from error
        written.append(file)
    return written
