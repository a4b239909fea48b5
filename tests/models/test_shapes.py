"""The versions' shapes against the official manifests and the bundled file."""

import json
import math

import pytest

from audiocraft.assets.store import BUNDLED, RELEASES
from audiocraft.errors import InputError
from audiocraft.models.loaders import load_lm_model
from audiocraft.models.shapes import shape_of
from audiocraft.modules.conditioners import ChromaStemConditioner, T5Conditioner
from tests.golden_data import GOLDEN


@pytest.mark.parametrize("version", RELEASES)
def test_releases(version):
    manifest = json.loads((GOLDEN / f"checkpoints/{version}.json").read_text())
    hyper, tensors = manifest["hyper"], manifest["state_dict"]
    shape = shape_of(version)
    assert shape.dim == hyper["dim"]
    assert shape.num_layers == hyper["num_layers"]
    assert shape.n_q == hyper["n_q"]
    assert shape.card == hyper["card"]
    assert shape.frames == 50 * hyper["segment_duration"]
    assert shape.cross_attention == any("cross_attention" in name for name in tensors)
    assert shape.chroma_frames == manifest.get("extra", {}).get("chroma_len", 0)
    # A melody version's file holds the window of its transform as well.
    buffers = sum(math.prod(tensors[name][0]) for name in manifest["buffers_in_state_dict"])
    assert shape.parameters == manifest["n_params_total"] - buffers


def test_tiny():
    lm = load_lm_model(BUNDLED / "tiny")
    shape = shape_of("tiny")
    assert shape.parameters == sum(weight.numel() for weight in lm.parameters())
    text = lm.condition_provider.conditioners["description"]
    melody = lm.condition_provider.conditioners["self_wav"]
    assert isinstance(text, T5Conditioner)
    assert isinstance(melody, ChromaStemConditioner)
    _, encoder = text.load()
    assert shape.text_encoder == sum(weight.numel() for weight in encoder.parameters())
    assert shape.chroma_frames == melody.chroma_len
    assert (shape.dim, shape.num_layers, shape.n_q) == (lm.dim, lm.config.num_layers, lm.n_q)
    assert shape.card == lm.card


def test_layers_add_up():
    lm = load_lm_model(BUNDLED / "tiny")
    layer = lm.transformer.layers[0]
    shape = shape_of("tiny")
    assert shape.layer == sum(weight.numel() for weight in layer.parameters())
    matrices = [tuple(weight.shape) for weight in layer.parameters() if weight.dim() > 1]
    assert sorted(shape.matrices) == sorted(matrices)


def test_other_names():
    with pytest.raises(InputError, match="model_version is 'huge', it must be one of small, "):
        shape_of("huge")
