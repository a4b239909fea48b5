"""Where files that are not code lie on disk, and how they get there."""

import os
from pathlib import Path

from audiocraft.errors import AssetError

BUNDLED = Path(__file__).parent
"""Assets that come with the package."""


def store_dir() -> Path:
    """The store: `$AUDIOCRAFT_CACHE_DIR`, or `~/.cache/audiocraft`."""
    given = os.environ.get("AUDIOCRAFT_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "audiocraft"


def fetch(repo_id: str, filename: str, cache_dir: str | Path | None = None) -> Path:
    """Path of a file of a hub repository: from the store, the hub's own cache, or the network.

    Args:
        repo_id: such as `facebook/musicgen-small`.
        filename: within the repository.
        cache_dir: a store other than the usual one.

    Raises:
        AssetError: it is nowhere on disk and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    folder = Path(cache_dir or store_dir()) / repo_id
    stored = folder / filename
    if stored.exists():
        return stored
    try:
        cached = try_to_load_from_cache(repo_id, filename)
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(repo_id, filename, local_dir=folder))
    except HFValidationError as error:
        raise AssetError(
            f"{repo_id} is neither a file, a folder nor a hub id such as facebook/musicgen-small."
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise AssetError(
            f"{filename} of {repo_id} is not in {folder} and could not be downloaded "
            f"({type(error).__name__}); connect to the network once, or put the file there."
        ) from error


def fetch_folder(repo_id: str, filenames: tuple[str, ...]) -> Path:
    """Folder that holds several files of one hub repository; see `fetch`."""
    paths = [fetch(repo_id, filename) for filename in filenames]
    return paths[0].parent
