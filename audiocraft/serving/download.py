"""The command that fetches what versions need: `scripts/download`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from audiocraft.assets import store
from audiocraft.assets.download import check_space, partial_path
from audiocraft.assets.parts import writing
from audiocraft.assets.remote import Remote, show_size
from audiocraft.errors import AudiocraftError, InputError
from audiocraft.serving.command import Parser, run, say
from audiocraft.serving.worker import log_to_stderr

_BUNDLED: Final = "tiny"
_SUFFIXES: Final = (".safetensors", ".bin")
_LARGEST_POINTER: Final = 1_000_000  # bytes; a codec has some 236 million
_NAMES: Final = (*store.RELEASES, _BUNDLED, *store.PARTS)


def main(
    arguments: Sequence[str] | None = None, *, labels_url: str = store.LABEL_MODELS_URL
) -> int:
    """Fetches what is missing of the named versions.

    Args:
        arguments: names and flags; those of the process by default.
        labels_url: folder of the label models on the network.

    Returns:
        The exit status: 0, 1 after an error, 130 when interrupted.
    """

    def command() -> None:
        given = _parser().parse_args(arguments)
        _check_names(given.names)
        log_to_stderr()
        _fetch(_Plan(labels_url), given.names, train=given.train)

    return run(command, "Stopped; the same command goes on from here.")


def _parser() -> Parser:
    parser = Parser(
        prog="scripts/download",
        description="Fetches what versions of MusicGen need, so that they run without a network.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "names", nargs="*", metavar="VERSION", help=f"what to fetch: {', '.join(_NAMES)}"
    )
    parser.add_argument(
        "--train", action="store_true", help="with what fine-tuning needs: separator, label models"
    )
    return parser


def _check_names(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in _NAMES]
    if unknown or not names:
        what = f"There is no version {unknown[0]}" if unknown else "A version is missing"
        raise InputError(f"{what}; give one or several of {', '.join(_NAMES)}.")


def _fetch(plan: "_Plan", names: Sequence[str], *, train: bool) -> None:
    for name in names:
        plan.add(name, train=train)
        plan.show(f"{name} with --train" if train else name)
    folder = store.store_dir()
    missing = plan.missing.values()
    if not missing:
        say("Everything is there.")
        return
    unknown = any(item.remote.size is None for item in missing)
    total = sum((item.remote.size or 0) for item in missing)
    say(
        f"To fetch: {'at least ' if unknown else ''}{show_size(total)}, into {folder}",
    )
    with writing("What is missing", folder):
        begun = sum(_size(partial_path(item.target)) for item in missing)
        check_space("What is missing", folder, total - begun)
    for item in missing:
        store.fetch_remote(item.remote, item.target, item.name)
    say("Everything is there now.")


@dataclass(frozen=True)
class _Missing:
    """A file to fetch.

    Attributes:
        remote: where it is.
        target: where it goes.
        name: what this command calls it.
    """

    remote: Remote
    target: Path
    name: str | None


@dataclass
class _Plan:
    """What is needed, file by file.

    Attributes:
        labels_url: folder of the label models on the network.
        missing: what is to be fetched, by its path.
    """

    labels_url: str
    missing: dict[Path, _Missing] = field(default_factory=dict)
    _lines: dict[str, str] = field(default_factory=dict)
    _total: int = 0

    def add(self, name: str, *, train: bool) -> None:
        """A version or a part, and with `train` what its fine-tuning needs."""
        if name in store.PARTS:
            self._add_part(name)
        elif name != _BUNDLED:
            repo_id = f"facebook/musicgen-{name}"
            self._add_first(repo_id, "state_dict")
            self._add_codec(repo_id)
            self._add_part("t5-base")
            if "melody" in name:
                self._add_part("htdemucs")
        if train:
            self._add_part("htdemucs")
            self._add_label_models()

    def show(self, name: str) -> None:
        """Print what was added since the last time."""
        if not self._lines:
            say(f"{name} comes with this package and needs nothing more.")
            return
        say(f"{name} needs {show_size(self._total)}:")
        for file, state in self._lines.items():
            say(f"  {file}: {state}")
        self._lines, self._total = {}, 0

    def _add_part(self, name: str) -> None:
        repo_id, files = store.PARTS[name]
        self._add_folder(repo_id, files)
        if name == "htdemucs":
            listed = self._get_now(repo_id, files[0])
            self._add_signatures(repo_id, listed)

    def _add_signatures(self, repo_id: str, listed: Path) -> None:
        """The models that a separator's list names."""
        import yaml

        try:
            signatures = yaml.safe_load(listed.read_text())["models"]
            files = [f"{signature}.safetensors" for signature in signatures]
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise AudiocraftError(
                f"{listed} lists no models; remove it, and fetch it again."
            ) from error
        for file in files:
            self._add_folder(repo_id, [file])

    def _add_codec(self, repo_id: str) -> None:
        """The codec of a release: its file, and the other repository that this may point to."""
        file, size = self._add_first(repo_id, "compression_state_dict")
        if size is None or size > _LARGEST_POINTER:
            return
        from audiocraft.models.loaders import read_checkpoint

        target = read_checkpoint(self._get_now(repo_id, file)).pretrained
        if target is not None and target.startswith("facebook/encodec"):
            self._add_folder(target, store.PARTS["encodec_32khz"][1])

    def _add_label_models(self) -> None:
        folder = store.store_dir() / "essentia"
        name = f"{_BUNDLED} --train"
        for model in store.LABEL_MODELS:
            for suffix in (".pb", ".json"):
                url = f"{self.labels_url}/{model}{suffix}"
                target = folder / url.rpartition("/")[2]
                if target.is_file():
                    self._note(f"essentia/{target.name}", target)
                elif target in self.missing:
                    self._note(f"essentia/{target.name}", self.missing[target])
                else:
                    remote = store.plain_file(url, folder, name)
                    self._note(f"essentia/{target.name}", _Missing(remote, target, name))

    def _add_folder(self, repo_id: str, files: Sequence[str]) -> None:
        """Files that lie in one folder."""
        found = store.find_folder(repo_id, files)
        folder = found or store.store_dir() / repo_id
        for file in files:
            target = folder / file
            if target.is_file():
                self._note(f"{repo_id}/{file}", target)
            elif target in self.missing:
                self._note(f"{repo_id}/{file}", self.missing[target])
            else:
                remote = store.hub_file(repo_id, file, folder)
                missing = _Missing(remote, target, store.short_name(repo_id))
                self._note(f"{repo_id}/{file}", missing)

    def _add_first(self, repo_id: str, stem: str) -> tuple[str, int | None]:
        """A file of a release, in the form that is there; its name and its size."""
        names = [stem + suffix for suffix in _SUFFIXES]
        found = store.find_first(repo_id, names)
        if found is not None:
            self._note(f"{repo_id}/{found.name}", found)
            return found.name, _size(found)
        folder = store.store_dir() / repo_id
        name, remote = store.first_hub_file(repo_id, names, folder)
        missing = _Missing(remote, folder / name, store.short_name(repo_id))
        self._note(f"{repo_id}/{name}", missing)
        return name, remote.size

    def _get_now(self, repo_id: str, file: str) -> Path:
        """Path of a small file that says what else is needed."""
        item = self.missing.pop(store.store_dir() / repo_id / file, None)
        if item is not None:
            return store.fetch_remote(item.remote, item.target, item.name)
        return store.fetch(repo_id, file)

    def _note(self, label: str, file: Path | _Missing) -> None:
        if label in self._lines:
            return
        if isinstance(file, Path):
            size: int | None = _size(file)
            state = "here"
        else:
            self.missing[file.target] = file
            size = file.remote.size
            state = "to fetch"
        self._total += size or 0
        self._lines[label] = f"{'size unknown' if size is None else show_size(size)}, {state}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


if __name__ == "__main__":
    sys.exit(main())
