"""What a prediction and a training ask of the process that they run in: its log, and its files."""

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from audiocraft.errors import InputError

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def is_url(source: str) -> bool:
    """Whether a text is a URL, as Cog has it, and no path."""
    return _URL.match(source) is not None


def log_to_stderr() -> None:
    """Show this package's messages; what goes to stderr reaches Cog's logs."""
    package = logging.getLogger("audiocraft")
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)


def local_files_allowed() -> bool:
    """Whether a request may name any path of this machine."""
    return os.environ.get("ALLOW_LOCAL_FILES") == "1"


@contextmanager
def temporary_folder_needed() -> Iterator[None]:
    """Turns what the temporary folder refuses into a sentence."""
    try:
        yield
    except OSError as error:
        folder = "" if tempfile.tempdir is None else f" {tempfile.tempdir}"
        raise InputError(
            f"The temporary folder{folder} cannot be written ({error.strerror}): free some of its "
            "disk, or set TMPDIR to another."
        ) from error


def checked_path(path: Path, name: str) -> Path:
    """Refuse files of the server that a client has no business with.

    Cog downloads URLs to the temporary folder, but hands plain path strings through.

    Args:
        path: from the request.
        name: of its input.

    Returns:
        The absolute path, links followed.

    Raises:
        InputError: the path leads elsewhere, or nowhere; or there is no temporary folder.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{name} is no path that can be followed ({reason}); check the path."
        ) from error
    if local_files_allowed():
        return resolved
    with temporary_folder_needed():
        own = (Path.cwd(), Path(tempfile.gettempdir()))
    if any(resolved.is_relative_to(folder.resolve()) for folder in own):
        return resolved
    raise InputError(
        f"{name} is a path on the server, which is not allowed: give a URL, or start the server "
        "with ALLOW_LOCAL_FILES=1."
    )
