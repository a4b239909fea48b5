"""Release files from training checkpoints and fine-tunes, as the official package writes them."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from audiocraft import __version__
from audiocraft.errors import InputError, WeightsError
from audiocraft.models.finetunes import FineTune, check_base, merged_state, read_finetune
from audiocraft.models.loaders import (
    CODEC_FILE,
    LM_FILE,
    check_codec_config,
    find_file,
    official_key,
    read_checkpoint,
    text_encoder_of,
)
from audiocraft.models.versions import VERSIONS


def export_lm(checkpoint_path: Path | str, out_file: Path | str) -> Path:
    """Write the language model of a training checkpoint as `state_dict.bin`.

    Args:
        checkpoint_path: training checkpoint or any other weights file with a configuration.
        out_file: file to write.

    Returns:
        The file.

    Raises:
        WeightsError: the checkpoint has no configuration or no state.
        InputError: the file cannot be written.
    """
    return _write(_package(checkpoint_path), out_file)


def export_encodec(checkpoint_path: Path | str, out_file: Path | str) -> Path:
    """Write the codec of a training checkpoint as `compression_state_dict.bin`; see `export_lm`."""
    return _write(_package(checkpoint_path), out_file)


def export_pretrained_compression_model(
    pretrained_encodec: Path | str, out_file: Path | str
) -> Path:
    """Write the codec of a release whose language model was trained on an existing one.

    Args:
        pretrained_encodec: name of a codec, such as `facebook/encodec_32khz`, to which a pointer is
            written instead of its weights; or file of an exported one, which is copied.
        out_file: file to write.

    Returns:
        The file.

    Raises:
        WeightsError: the file to copy is not one of a codec.
        InputError: the file cannot be written.
    """
    path = Path(pretrained_encodec)
    package = _codec_package(path) if path.is_file() else {"pretrained": str(pretrained_encodec)}
    return _write(package, out_file)


def export_release(weights: Path | str, folder: Path | str, version: str | None = None) -> Path:
    """Write a fine-tune as a release folder, which the official package loads as well.

    Args:
        weights: file of fine-tuned weights; an adapter is merged into its base.
        folder: to write; it must not be there, or be empty.
        version: base of weights that name none, which gives codec and text encoder.

    Returns:
        The folder, with `state_dict.bin` in 16 bit, `compression_state_dict.bin`, and the base's
        text encoder where that carries one of its own.

    Raises:
        InputError: the folder holds something or cannot be written, the file cannot be read, or
            its base is not known.
        WeightsError: the file holds no fine-tuned MusicGen, or one for another base.
        AssetError: a file of the base cannot be fetched.
    """
    out = Path(folder)
    with _writing(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is there already; name a folder that is not, or an empty one.")
        above = next(path for path in out.absolute().parents if path.exists())
        tempfile.TemporaryFile(dir=above).close()  # before anything is fetched and merged
    path = Path(weights)
    try:
        if not path.is_file():
            raise InputError(f"There is no file {path}; give a file of fine-tuned weights.")
        path.open("rb").close()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); give a file of fine-tuned weights."
        ) from error
    tuned = read_finetune(path)
    base = tuned.base or version
    if base not in VERSIONS:
        said = "does not name its base" if base is None else f"cannot be based on {base}"
        raise InputError(f"{path.name} {said}: give --version, one of {', '.join(VERSIONS)}.")
    codec = find_file(VERSIONS[base].source, CODEC_FILE)
    state, cfg = _whole(tuned, base)
    half = {key: tensor.to(torch.float16) for key, tensor in state.items()}
    compression = _codec_package(codec)
    text_encoder = text_encoder_of(codec)
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as unfinished:
            new = Path(unfinished) / "release"
            new.mkdir()
            _save({"best_state": half, "xp.cfg": cfg}, new / f"{LM_FILE}.bin")
            _save(compression, new / f"{CODEC_FILE}.bin")
            if text_encoder is not None:
                shutil.copytree(text_encoder, new / text_encoder.name)
            new.rename(out)  # also in the place of an empty folder
    return out


def _whole(tuned: FineTune, base: str) -> tuple[Mapping[str, Tensor], str]:
    """All tensors of the language model, and its configuration as YAML."""
    state, cfg = tuned.checkpoint.state, tuned.cfg
    if tuned.lora is not None or cfg is None:
        checkpoint = read_checkpoint(find_file(VERSIONS[base].source, LM_FILE))
        cfg = checkpoint.cfg
        if tuned.lora is not None:
            check_base(tuned)
            state = merged_state(checkpoint.state, tuned)
    return {official_key(key): tensor for key, tensor in state.items()}, OmegaConf.to_yaml(cfg)


def _package(checkpoint_path: Path | str) -> dict[str, Any]:
    path = Path(checkpoint_path)
    checkpoint = read_checkpoint(path)
    if checkpoint.cfg is None or not checkpoint.state:
        raise WeightsError(f"{path.name} has no xp.cfg or no state; give a training checkpoint.")
    return {"best_state": dict(checkpoint.state), "xp.cfg": OmegaConf.to_yaml(checkpoint.cfg)}


def _codec_package(path: Path) -> dict[str, Any]:
    """A codec's file as an export; a pointer stays one."""
    checkpoint = read_checkpoint(path)
    if checkpoint.pretrained is not None:
        return {"pretrained": checkpoint.pretrained}
    check_codec_config(checkpoint.name, checkpoint.cfg)
    return _package(path)


def _write(package: Mapping[str, Any], out_file: Path | str) -> Path:
    """Save under a temporary name first, so that the file is whole or not there."""
    out = Path(out_file)
    unfinished = out.with_name(f".{out.name}.unfinished")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            _save(package, unfinished)
            unfinished.rename(out)
        finally:
            unfinished.unlink(missing_ok=True)
    return out


def _save(package: Mapping[str, Any], path: Path) -> None:
    # By a file of ours: one that torch opens says nothing where the last bytes find no room.
    with path.open("wb") as file:
        torch.save({**package, "version": __version__, "exported": True}, file)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns what the disk of a target refuses into a sentence; folders made for it go again."""
    missing: list[Path] = []
    try:
        missing = [path for path in target.absolute().parents if not path.exists()]
        yield
    except (OSError, RuntimeError) as error:  # the latter is torch's, which hides the former
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None)
        raise InputError(
            f"{target} cannot be written{f' ({reason})' if reason else ''}: make "
            f"{target.absolute().parent} a folder that may be written to, with room on its disk, "
            "or name another."
        ) from error
