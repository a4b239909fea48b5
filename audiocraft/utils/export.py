"""Release files from training checkpoints, as the official package writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from audiocraft import __version__
from audiocraft.errors import WeightsError
from audiocraft.models.loaders import read_checkpoint


def export_lm(checkpoint_path: Path | str, out_file: Path | str) -> Path:
    """Write the language model of a training checkpoint as `state_dict.bin`.

    Args:
        checkpoint_path: training checkpoint or any other weights file with a configuration.
        out_file: file to write.

    Returns:
        The file.

    Raises:
        WeightsError: the checkpoint has no configuration or no state.
    """
    return _export(checkpoint_path, out_file)


def export_encodec(checkpoint_path: Path | str, out_file: Path | str) -> Path:
    """Write the codec of a training checkpoint as `compression_state_dict.bin`; see `export_lm`."""
    return _export(checkpoint_path, out_file)


def export_pretrained_compression_model(pretrained_encodec: str, out_file: Path | str) -> Path:
    """Write a pointer to a codec, such as `facebook/encodec_32khz`, instead of its weights."""
    return _write({"pretrained": pretrained_encodec}, out_file)


def _export(checkpoint_path: Path | str, out_file: Path | str) -> Path:
    path = Path(checkpoint_path)
    checkpoint = read_checkpoint(path)
    if checkpoint.cfg is None or not checkpoint.state:
        raise WeightsError(f"{path.name} has no xp.cfg or no state; give a training checkpoint.")
    return _write(
        {"best_state": dict(checkpoint.state), "xp.cfg": OmegaConf.to_yaml(checkpoint.cfg)},
        out_file,
    )


def _write(package: Mapping[str, Any], out_file: Path | str) -> Path:
    """Save under a temporary name first, so that the file is whole or not there."""
    out = Path(out_file)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        torch.save({**package, "version": __version__, "exported": True}, unfinished)
        unfinished.rename(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return out
