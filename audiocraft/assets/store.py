"""Where files that are not code lie on disk, and how they get there."""

import os
from collections.abc import Sequence
from pathlib import Path

from audiocraft.errors import AssetError

BUNDLED = Path(__file__).parent
"""Assets that come with the package."""


def store_dir() -> Path:
    """The store: `$AUDIOCRAFT_CACHE_DIR`, or `~/.cache/audiocraft`."""
    given = os.environ.get("AUDIOCRAFT_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "audiocraft"


def fetch(repo_id: str, filename: str, cache_dir: str | Path | None = None) -> Path:
    """Path of a file of a hub repository; see `fetch_folder`."""
    return fetch_folder(repo_id, [filename], cache_dir) / filename


def fetch_folder(
    repo_id: str, filenames: Sequence[str], cache_dir: str | Path | None = None
) -> Path:
    """Folder that holds files of a hub repository: the store, the hub's own cache, or the network.

    Args:
        repo_id: such as `facebook/musicgen-small`.
        filenames: within the repository, at its top.
        cache_dir: a store other than the usual one.

    Raises:
        AssetError: a file is nowhere on disk and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    folder = Path(cache_dir or store_dir()) / repo_id
    missing = [name for name in filenames if not (folder / name).exists()]
    try:
        # The hub's cache serves only where it has all of them: they must lie in one folder.
        cached = [try_to_load_from_cache(repo_id, name) for name in filenames if missing]
        if cached and all(isinstance(path, str) for path in cached):
            return Path(str(cached[0])).parent
        for name in missing:
            hf_hub_download(repo_id, name, local_dir=folder)
    except HFValidationError as error:
        raise AssetError(
            f"{repo_id} is neither a file, a folder nor a hub id such as facebook/musicgen-small."
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise AssetError(
            f"{', '.join(missing)} of {repo_id} is not in {folder} and could not be downloaded "
            f"({type(error).__name__}); connect to the network once, or put it there."
        ) from error
    return folder
