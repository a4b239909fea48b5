"""A random HTDemucs in the form in which demucs publishes its models."""

import json

import torch
import yaml
from demucs.htdemucs import HTDemucs
from safetensors.torch import save_file

from audiocraft.assets.store import PARTS

SOURCES = ["drums", "bass", "other", "vocals"]
SMALL = {
    "channels": 4,
    "growth": 1,
    "depth": 4,
    "nfft": 4096,
    "t_layers": 1,
    "t_heads": 1,
    "bottom_channels": 0,
    "t_hidden_scale": 1,
    "dconv_comp": 4,
    "dconv_mode": 0,
    "rewrite": False,
}
SIGNATURE = "12345678"


def save_model(folder, model, kwargs, segment, klass="demucs.htdemucs.HTDemucs"):
    """Write a model's file; `segment` is a fraction of seconds, as (numerator, denominator)."""
    fraction = {"_type": "fraction", "numerator": segment[0], "denominator": segment[1]}
    metadata = {
        "klass": klass,
        "args": "[]",
        "kwargs": json.dumps({"sources": SOURCES, **kwargs, "segment": fraction}),
    }
    save_file(model.state_dict(), folder / f"{SIGNATURE}.safetensors", metadata)


def put_htdemucs(store, seed=0, kwargs=SMALL, segment=(4, 1)):
    """Put a model into a store; it and its folder are returned."""
    torch.manual_seed(seed)
    model = HTDemucs(SOURCES, **kwargs, segment=segment[0] / segment[1])
    folder = store / PARTS["htdemucs"][0]
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, kwargs, segment)
    (folder / "htdemucs.yaml").write_text(yaml.safe_dump({"models": [SIGNATURE]}))
    return model.eval(), folder
