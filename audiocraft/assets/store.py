"""Where files that are not code lie on disk, and how they get there."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from audiocraft.assets.remote import Digest, Remote, show_url
from audiocraft.errors import AssetError, DownloadError, InputError, UnreachableError

if TYPE_CHECKING:
    from audiocraft.assets.exchange import Answer

BUNDLED = Path(__file__).parent
"""Assets that come with the package."""

RELEASES: Final = (
    "small",
    "medium",
    "large",
    "melody",
    "melody-large",
    "stereo-small",
    "stereo-medium",
    "stereo-large",
    "stereo-melody",
    "stereo-melody-large",
)
"""Versions that lie on the hub, as `facebook/musicgen-<version>`."""

PARTS: Final = {
    "t5-base": ("google-t5/t5-base", ("config.json", "model.safetensors", "tokenizer.json")),
    "encodec_32khz": ("facebook/encodec_32khz", ("config.json", "model.safetensors")),
    "htdemucs": ("adefossez/HTDemucs", ("htdemucs.yaml",)),  # which names the others
    "mbd": ("facebook/multiband-diffusion", ("mbd_musicgen_32khz.th",)),
}
"""What versions share, by name: hub repository, and its files that lie in one folder."""

LABEL_MODELS_URL: Final = "https://essentia.upf.edu/models"
LABEL_MODELS: Final = (
    "feature-extractors/discogs-effnet/discogs-effnet-bs64-1",
    "classification-heads/genre_discogs400/genre_discogs400-discogs-effnet-1",
    "classification-heads/mtg_jamendo_moodtheme/mtg_jamendo_moodtheme-discogs-effnet-1",
    "classification-heads/mtg_jamendo_instrument/mtg_jamendo_instrument-discogs-effnet-1",
)
"""Models that label music, `.pb` with `.json` each; they lie in `essentia` in the store."""

_KNOWN: Final = {f"facebook/musicgen-{name}": name for name in RELEASES} | {
    repo_id: name for name, (repo_id, _) in PARTS.items()
}


def project_dir() -> Path | None:
    """The project's folder, if this package lies in it and not among installed ones."""
    folder = Path(__file__).resolve().parents[2]
    here = (folder / "cog.yaml").is_file() and (folder / "predict.py").is_file()
    return folder if here else None


def store_dir() -> Path:
    """The store: `$AUDIOCRAFT_CACHE_DIR`, else `models` in the project's folder.

    Where there is no such folder, it is `~/.cache/audiocraft`.

    Raises:
        InputError: see `store_path`.
    """
    given = os.environ.get("AUDIOCRAFT_CACHE_DIR")
    if given:
        return store_path(given)
    project = project_dir()
    return project / "models" if project else Path.home() / ".cache" / "audiocraft"


def store_path(given: str) -> Path:
    """The folder that `AUDIOCRAFT_CACHE_DIR` names, which may begin with a home.

    Raises:
        InputError: with that of nobody.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"AUDIOCRAFT_CACHE_DIR is {given!r}, and there is no such home: give a whole path."
        ) from error


def fetch(repo_id: str, filename: str) -> Path:
    """Path of a file of a hub repository; see `fetch_folder`."""
    return fetch_folder(repo_id, [filename]) / filename


def fetch_folder(
    repo_id: str, filenames: Sequence[str], cache_dir: str | Path | None = None
) -> Path:
    """Folder that holds files of a hub repository: the store, the hub's own cache, or the network.

    Args:
        repo_id: such as `facebook/musicgen-small`.
        filenames: within the repository, at its top.
        cache_dir: a store other than the usual one.

    Raises:
        AssetError: a file is nowhere on disk and cannot be downloaded; within 10 s where there is
            no network.
    """
    found = find_folder(repo_id, filenames, cache_dir)
    if found is not None:
        return found
    folder = Path(cache_dir or store_dir()) / repo_id
    for name in filenames:
        if not (folder / name).is_file():
            fetch_remote(hub_file(repo_id, name, folder), folder / name, short_name(repo_id))
    return folder


def fetch_first(
    repo_id: str, filenames: Sequence[str], cache_dir: str | Path | None = None
) -> Path:
    """Path of the first of several files: what is on disk wins, then what the hub has.

    Args:
        repo_id: such as `facebook/musicgen-small`.
        filenames: alternatives, the preferred one first.
        cache_dir: a store other than the usual one.

    Raises:
        AssetError: none of them is to be had.
    """
    found = find_first(repo_id, filenames, cache_dir)
    if found is not None:
        return found
    folder = Path(cache_dir or store_dir()) / repo_id
    name, remote = first_hub_file(repo_id, filenames, folder)
    return fetch_remote(remote, folder / name, short_name(repo_id))


def find_folder(
    repo_id: str, filenames: Sequence[str], cache_dir: str | Path | None = None
) -> Path | None:
    """`fetch_folder` without the network."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(cache_dir or store_dir()) / repo_id
    if all((folder / name).is_file() for name in filenames):
        return folder
    _check_repo_id(repo_id)
    # Official programs fetch a T5 by the name that it had before the hub gave it an owner.
    for known_as in (repo_id, repo_id.removeprefix("google-t5/")):
        # The hub's cache serves only where it has all of them: they must lie in one folder.
        cached = [try_to_load_from_cache(known_as, name) for name in filenames]
        if all(isinstance(path, str) for path in cached):
            return Path(str(cached[0])).parent
    return None


def find_first(
    repo_id: str, filenames: Sequence[str], cache_dir: str | Path | None = None
) -> Path | None:
    """`fetch_first` without the network."""
    for name in filenames:
        folder = find_folder(repo_id, [name], cache_dir)
        if folder is not None:
            return folder / name
    return None


def first_hub_file(repo_id: str, filenames: Sequence[str], folder: Path) -> tuple[str, Remote]:
    """The first of several files that the hub has, and its name; see `hub_file`.

    Raises:
        AssetError: it has none of them.
    """
    alternatives = " or ".join(filenames)
    for name in filenames:
        remote = _look_up(repo_id, name, folder, alternatives)
        if remote is not None:
            return name, remote
    raise _missing(repo_id, alternatives)


def hub_file(repo_id: str, filename: str, folder: Path) -> Remote:
    """What the hub says about a file.

    Args:
        repo_id: such as `facebook/musicgen-small`.
        filename: within the repository.
        folder: where it is looked for, for messages.

    Raises:
        AssetError: there is no such file, no right to read it, or no network.
    """
    remote = _look_up(repo_id, filename, folder)
    if remote is None:
        raise _missing(repo_id, filename)
    return remote


def plain_file(url: str, folder: Path, name: str | None) -> Remote:
    """What a plain web server says about a file; see `fetch_remote`.

    Raises:
        AssetError: there is no such file, or no network.
    """
    from audiocraft.assets.download import probe

    remote = Remote(url, url.rpartition("/")[2])
    with _explained(remote, folder, name):
        headers = probe(remote)
    size = headers.get("Content-Length", "")
    return replace(remote, size=int(size) if size.isdecimal() else None, answered=True)


def fetch_remote(remote: Remote, target: Path, name: str | None) -> Path:
    """Download a file into the store.

    Args:
        remote: the file.
        target: its path there.
        name: what fetches it when given to `scripts/download`, if anything does.

    Raises:
        AssetError: it cannot be had.
    """
    from audiocraft.assets.download import download

    with _explained(remote, target.parent, name):
        return download(remote, target, keep_partial=True)


def short_name(repo_id: str) -> str | None:
    """What `scripts/download` calls a hub repository, if it knows it."""
    return _KNOWN.get(repo_id)


def command(arguments: str) -> str:
    """How to run `scripts/download` from where this package lies."""
    program = "scripts/download" if project_dir() else "python -m audiocraft.serving.download"
    return f"{program} {arguments}"


def _look_up(
    repo_id: str, filename: str, folder: Path, alternatives: str | None = None
) -> Remote | None:
    """`hub_file`; None where there is no such file.

    Args:
        repo_id: such as `facebook/musicgen-small`.
        filename: within the repository.
        folder: where it is looked for, for messages.
        alternatives: the files of which one will do, for messages.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    from audiocraft.assets.download import probe

    _check_repo_id(repo_id)
    remote = Remote(hf_hub_url(repo_id, filename), f"{filename} of {repo_id}", build_hf_headers())
    wanted = replace(remote, what=f"{alternatives or filename} of {repo_id}")
    try:
        with _explained(wanted, folder, short_name(repo_id)):
            headers = probe(wanted, follow=_within_hub)
    except DownloadError as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return None
        raise
    moved = "Location" in headers  # large files lie elsewhere, which has a length of its own
    size = headers.get("X-Linked-Size") or ("" if moved else headers.get("Content-Length", ""))
    etag = headers.get("X-Linked-Etag") or (None if moved else headers.get("ETag"))
    return replace(
        remote,
        size=int(size) if size.isdecimal() else None,
        digest=Digest.of_hub(etag),
        answered=True,
    )


def _within_hub(answer: "Answer", target: str) -> bool:
    """Follow a repository that was renamed, but not a file to where its bytes are."""
    same_host = urlsplit(answer.url).netloc == urlsplit(target).netloc
    return same_host and "X-Linked-Etag" not in answer.headers


@contextmanager
def _explained(remote: Remote, folder: Path, name: str | None) -> Iterator[None]:
    """Adds to an error what the user can do about it.

    Args:
        remote: what is fetched.
        folder: where it is looked for.
        name: see `fetch_remote`.
    """
    from huggingface_hub import constants

    get = f"run {command(name)}" if name else "try again"
    gone = f"{remote.what} is not in {folder} and"
    if constants.HF_HUB_OFFLINE:
        raise AssetError(
            f"{gone} HF_HUB_OFFLINE forbids fetching it: unset that and {get}, or put it there."
        )
    try:
        yield
    except UnreachableError as error:
        raise AssetError(
            f"{gone} {error.reason}: connect to the network and {get}, or put it there."
        ) from error
    except DownloadError as error:
        closed = error.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
        if closed and remote.host == _hub():
            raise AssetError(
                f"{gone} {remote.host} does not let it be read: the repository is private, gated "
                "or misspelt; set HF_TOKEN to a token that may read it."
            ) from error
        if error.status is None:
            raise
        raise DownloadError(
            f"{gone} {error.reason}: {get} later, or put it there.", error.reason, error.status
        ) from error


def _hub() -> str:
    """Host of the hub."""
    from huggingface_hub import constants

    return show_url(constants.ENDPOINT).split("/")[2]


def _missing(repo_id: str, filenames: str) -> AssetError:
    return AssetError(f"{_hub()} has no {filenames} of {repo_id}; check the name.")


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise AssetError(
            f"{repo_id} is neither a file, a folder nor a hub id such as facebook/musicgen-small; "
            "check the name."
        ) from error
