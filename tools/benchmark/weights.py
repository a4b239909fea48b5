"""Random weights in the official formats: what is measured needs no download.

Speed does not depend on the numbers, if only they stay finite: matrices are normal with 1 over the
root of their width, norms do nothing.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from audiocraft.models.builders import get_compression_model, get_lm_model
from tools.benchmark.shapes import CODEC, PIECES, PUBLISHED

_T5_LAYERS: Final = 12
_REVISION: Final = "0" * 40


def write_text_encoder(folder: Path, layers: int = _T5_LAYERS) -> None:
    """A T5 encoder of t5-base's shape, with a tokenizer that knows the description's words.

    Args:
        folder: is made.
        layers: fewer are quicker to write.
    """
    from transformers import T5Config, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    folder.mkdir(parents=True)
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=layers, num_heads=12)
    T5EncoderModel(config).save_pretrained(folder)
    special = ["<pad>", "</s>", "<unk>"]
    template = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
    words = [[piece, 0.0] for piece in special] + [[word, -1.0] for word in PIECES]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, piece in enumerate(special)
        ],
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": words, "byte_fallback": False},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def link_into_hub_cache(hub: Path, name: str, folder: Path) -> None:
    """Puts a folder where a peer finds it by the name of its hub repository, without a network."""
    repository = hub / f"models--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs/main").write_text(_REVISION)
    (repository / "snapshots" / _REVISION).symlink_to(folder)


def write_release(
    folder: Path,
    version: str,
    text_encoder: Path,
    shapes: Path = PUBLISHED,
    *,
    full_size: bool = False,
) -> None:
    """An official release folder with its text encoder beside it.

    Args:
        folder: is made.
        version: whose shape it has.
        text_encoder: folder that it points to.
        shapes: configurations of the versions and of their codec.
        full_size: write all numbers, as a release has them; without it all tensors share one
            block of numbers, so that the file is small, and whoever reads it copies them.
    """
    folder.mkdir(parents=True)
    cfg = _config(version, shapes)
    with torch.device("meta"):
        lm = get_lm_model(cfg, text_encoder)
    state = random_state({key: value.shape for key, value in lm.state_dict().items()})
    if full_size:
        state = {key: value.clone() for key, value in state.items()}
    _write_export(folder / "state_dict.bin", state, cfg)
    write_codec(folder, shapes)
    (folder / "t5").symlink_to(text_encoder)


def write_codec(folder: Path, shapes: Path = PUBLISHED) -> None:
    """The file of the versions' codec.

    Args:
        folder: that it is put into.
        shapes: configurations of the versions and of their codec.
    """
    cfg = _config(CODEC, shapes)
    torch.manual_seed(0)
    codec = get_compression_model(cfg)
    _write_export(folder / "compression_state_dict.bin", codec.state_dict(), cfg)


def _write_export(path: Path, state: Mapping[str, Tensor], cfg: DictConfig) -> None:
    package: dict[str, Any] = {
        "best_state": dict(state),
        "xp.cfg": OmegaConf.to_yaml(cfg),
        "version": "1.3.0",
        "exported": True,
    }
    torch.save(package, path)


def _config(name: str, shapes: Path) -> DictConfig:
    cfg = OmegaConf.load(shapes / f"{name}.xp_cfg.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


def random_state(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors by name, in 16 bits as they are released, which share their numbers."""
    generator = torch.Generator().manual_seed(0)
    largest = max(shape.numel() for shape in shapes.values())
    block = torch.randn(largest, generator=generator)
    scaled: dict[int, Tensor] = {}
    state = {}
    for key, shape in shapes.items():
        if key.endswith("spec.window"):
            state[key] = torch.hann_window(shape[0])
        elif len(shape) == 1:
            state[key] = torch.full(shape, float(key.endswith("weight")), dtype=torch.float16)
        else:
            width = shape[1]
            if width not in scaled:
                scaled[width] = (block / math.sqrt(width)).half()
            state[key] = scaled[width][: shape.numel()].view(shape)
    return state
