"""Small stand-ins for the released versions and for fine-tunes of them, in the official formats."""

import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from audiocraft.models.builders import get_lm_model
from audiocraft.models.finetunes import base_sha256, save_finetune
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.lora import LoraConfig
from tests.golden_data import GOLDEN

LORA = LoraConfig(4, 8.0, ("self_attn.in_proj_weight", "linear1.weight", "linear2.weight"))


def read_release(folder: Path) -> dict[str, Any]:
    """The package in a folder's `state_dict.bin`."""
    package: dict[str, Any] = torch.load(folder / "state_dict.bin", weights_only=True)
    return package


def varied(state: dict[str, Tensor], seed: int, amount: float = 0.5) -> dict[str, Tensor]:
    """The same names and shapes, with other weights."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value * (1 + amount * torch.randn(value.shape, generator=generator))
        if value.dim() > 1
        else value
        for key, value in state.items()
    }


def stand_in(
    store: Path, version: str, seed: int, stems: str = "mix", size: tuple[int, int] | None = None
) -> Path:
    """Puts a small model into a store under a released version's name.

    Args:
        store: what `AUDIOCRAFT_CACHE_DIR` will say.
        version: with its channels and conditions.
        seed: gives it weights of its own.
        stems: what a melody version hears.
        size: width and layers of a larger, random one.
    """
    kind = (
        "-".join(word for word in ("stereo", "melody") if getattr(VERSIONS[version], word))
        or "mono"
    )
    folder = store / VERSIONS[version].source
    shutil.copytree(GOLDEN / "tiny_release" / kind, folder)
    shutil.copytree(GOLDEN / "t5_tiny", folder / "t5")
    package = read_release(folder)
    cfg = OmegaConf.create(package["xp.cfg"])
    if VERSIONS[version].melody:
        cfg.conditioners.self_wav.chroma_stem.stems = stems
    state = varied(package["best_state"], seed)
    if size is not None:
        cfg.transformer_lm.dim, cfg.transformer_lm.num_layers = size
        torch.manual_seed(seed)
        state = get_lm_model(cfg, folder / "t5").half().state_dict()
    package |= {"best_state": state, "xp.cfg": OmegaConf.to_yaml(cfg)}
    torch.save(package, folder / "state_dict.bin")
    return folder


def full_finetune(store: Path, version: str, seed: int, path: Path) -> Path:
    """A full fine-tune of a stand-in, in our format."""
    package = read_release(store / VERSIONS[version].source)
    state = package["best_state"]
    save_finetune(
        path,
        varied(state, seed),
        OmegaConf.create(package["xp.cfg"]),
        base=version,
        base_sha256=base_sha256(state),
        license="cc-by-nc-4.0",
    )
    return path


def adapter(store: Path, version: str, seed: int, path: Path, **changes: Any) -> Path:
    """An adapter for a stand-in, in our format."""
    package = read_release(store / VERSIONS[version].source)
    state = package["best_state"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, weight in state.items():
        if key.endswith(LORA.targets):
            rows, columns = weight.shape
            tensors[f"{key}.lora_a"] = torch.randn(LORA.rank, columns, generator=generator)
            tensors[f"{key}.lora_b"] = torch.randn(rows, LORA.rank, generator=generator) / 8
    settings = {
        "base": version,
        "base_sha256": base_sha256(state),
        "license": "cc-by-nc-4.0",
        "lora": LORA,
        **changes,
    }
    save_finetune(path, tensors, OmegaConf.create(package["xp.cfg"]), **settings)
    return path
