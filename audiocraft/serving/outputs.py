"""Where a result goes: file names and the files themselves."""

import base64
import binascii
import mimetypes
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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
WEIGHTS_EXTENSION: Final = ".safetensors"
AUDIO_EXTENSIONS: Final = frozenset(_EXTENSIONS.values())
_COPIED_AT_ONCE: Final = 1 << 24  # bytes
_DATA_URL: Final = re.compile(r"data:([^;,]*)(?:;[^;,]*)*;base64,")


@dataclass(frozen=True)
class Target:
    """Where a result goes.

    Attributes:
        path: of `-o`, or its stand-in: the file, its extension still open where it has none.
        named: whether `-o` was given; what is no file is printed otherwise.
        as_response: whether the whole response is the result, as `--json` asks for; its files
            then lie beside `path`, without its `.json`.
    """

    path: Path
    named: bool
    as_response: bool = False

    @property
    def has_json_name(self) -> bool:
        """Whether the name is one that a file of JSON should have."""
        return self.path.suffix == ".json"

    def file(self, extension: str, order: str = "") -> Path:
        """The path of one file of the result.

        Args:
            extension: that belongs to its content, with the dot.
            order: its place in a list, such as `.0`.
        """
        if not self.as_response:
            return self.path.with_name(f"{self.path.stem}{order}{self.path.suffix or extension}")
        stem = self.path.stem if self.has_json_name else self.path.name
        # Never the name of the response itself.
        return self.path.with_name(f"{stem}{order}{extension or '.bin'}")


def find_target(
    text: str | None,
    *,
    as_response: bool = False,
    stem: str = "output",
    extensions: Collection[str] = AUDIO_EXTENSIONS,
) -> Target:
    """The place that a result will be written to.

    Args:
        text: from `-o`: a file, a file without its extension, or a folder; a leading `@` is
            dropped. None for `stem` in the working folder.
        as_response: see `Target`.
        stem: name of the file where only a folder is known.
        extensions: that the result may have.

    Raises:
        InputError: nothing can be written there, said before anything is computed.
    """
    text = (text or "").removeprefix("@")
    default = f"{stem}.json" if as_response else stem
    try:
        path = Path(text).expanduser() if text else Path(default)
        if text and path.is_dir():
            path /= default
        elif text.endswith("/"):
            raise InputError(f"-o: there is no folder {text!r}; make it, or choose another path.")
        target = Target(path, named=bool(text), as_response=as_response)
        folder = path.parent
        if not folder.is_dir():
            raise InputError(
                f"-o: there is no folder {str(folder)!r} to write {path.name!r} into; make it, or "
                "choose another path."
            )
        files = {target.file(extension) for extension in extensions}
        for file in sorted({path, *files} if target.named else files):
            if file.is_dir():
                raise InputError(f"-o: {str(file)!r} is a folder; choose another path.")
            if not os.access(file if file.exists() else folder, os.W_OK):
                raise InputError(f"-o: {str(file)!r} must not be written to; choose another path.")
    except (OSError, RuntimeError) as error:  # too long, forbidden, no such user's home
        raise InputError(
            f"-o: {text!r} cannot be used ({_reason(error)}); choose another path."
        ) from error
    return target


def files_of(output: object) -> list[str]:
    """The data URLs of an output that is a file or a list of files, else nothing."""
    items: list[object] = output if isinstance(output, list) else [output]
    urls = [item for item in items if isinstance(item, str) and _DATA_URL.match(item)]
    return urls if len(urls) == len(items) else []


def write_files(urls: Sequence[str], target: Target, *, number: bool) -> list[Path]:
    """Writes the content of data URLs.

    Args:
        urls: as `files_of` gives them.
        target: from `find_target`; the extension of the content is added where it has none.
        number: whether the output is a list: `take.wav` then becomes `take.0.wav`.

    Raises:
        InputError: a data URL is broken, or a file cannot be written; the message then says where
            it and those behind it were put instead.
    """
    files = []
    for index, url in enumerate(urls):
        match = _DATA_URL.match(url)
        assert match is not None
        extension = _EXTENSIONS.get(match[1]) or mimetypes.guess_extension(match[1]) or ""
        file = target.file(extension, f".{index}" if number else "")
        try:
            content = base64.b64decode(url[match.end() :], validate=True)
        except binascii.Error as error:
            raise InputError(
                f"The content of {str(file)!r} did not arrive whole ({error}); try again."
            ) from error
        files.append((file, content))
    for index, (file, content) in enumerate(files):
        try:
            write_file(file, content)
        except InputError as error:
            kept = _keep(files[index:])
            if kept is None:
                raise
            text = str(error).removesuffix(".")
            raise InputError(f"{text}, or take the result from {kept}.") from error
    return [file for file, _ in files]


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that is whole from the moment at which it is there under its name.

    Raises:
        InputError: it cannot be written; what was there before is as it was.
    """
    _put(path, lambda file: file.write_bytes(content))


def put_file(path: Path, source: Path) -> None:
    """Puts a file that lies elsewhere under a name too, by a link where that is possible.

    Args:
        path: as for `write_file`.
        source: stays where it is. Nobody may write into it from then on.

    Raises:
        InputError: it cannot be written; what was there before is as it was.
    """

    def make(file: Path) -> None:
        if file.exists() and file.samefile(source):  # which is emptied before it would be copied
            return
        try:
            file.hardlink_to(source)
        except OSError:  # another file system, or one without links; or there is a pipe
            with source.open("rb") as content, file.open("wb") as copy:
                shutil.copyfileobj(content, copy, _COPIED_AT_ONCE)

    _put(path, make)


def _keep(files: Sequence[tuple[Path, bytes]]) -> Path | None:
    """Puts what could not be written into a temporary folder, which stays.

    Returns:
        The file, or the folder of several; None where there is no room for them either.
    """
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="musicgen-"))
        for file, content in files:
            (folder / file.name).write_bytes(content)
    except OSError:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return None
    return folder / files[0][0].name if len(files) == 1 else folder


def _put(path: Path, make: Callable[[Path], object]) -> None:
    """Has a file made under another name first, and renames it."""
    try:
        # A pipe or a device, and a file in a folder that takes no other, can only be written into.
        if path.exists() and not (path.is_file() and os.access(path.parent, os.W_OK)):
            make(path)
            return
        final = path.resolve()
        partial = final.with_name(f".musicgen-{secrets.token_hex(8)}")
        try:
            make(partial)
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written ({_reason(error)}); choose another path."
        ) from error


def _reason(error: OSError | RuntimeError) -> str:
    """The system's own words, without the path that they repeat."""
    return str(getattr(error, "strerror", None) or error).removesuffix(".")
