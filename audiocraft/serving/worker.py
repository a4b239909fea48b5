"""What a prediction and a training ask of the process that they run in: its log, and its files."""

import logging
import os
import tempfile
from pathlib import Path

from audiocraft.errors import InputError


def log_to_stderr() -> None:
    """Show this package's messages; what goes to stderr reaches Cog's logs."""
    package = logging.getLogger("audiocraft")
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)


def checked_path(path: Path, name: str) -> Path:
    """Refuse files of the server that a client has no business with.

    Cog downloads URLs to the temporary folder, but hands plain path strings through.

    Args:
        path: from the request.
        name: of its input.

    Returns:
        The absolute path, links followed.

    Raises:
        InputError: the path leads elsewhere, or nowhere.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{name} is no path that can be followed ({reason}); check the path."
        ) from error
    own = (Path.cwd(), Path(tempfile.gettempdir()))
    if os.environ.get("ALLOW_LOCAL_FILES") == "1" or any(
        resolved.is_relative_to(folder.resolve()) for folder in own
    ):
        return resolved
    raise InputError(
        f"{name} is a path on the server, which is not allowed: give a URL, or start the server "
        "with ALLOW_LOCAL_FILES=1."
    )
