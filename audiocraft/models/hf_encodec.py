"""EnCodec as transformers stores it (`facebook/encodec_32khz`), by name map into our own.

Golden test: `encodec_tiny_hf`.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from audiocraft.errors import WeightsError
from audiocraft.models.encodec import EncodecModel
from audiocraft.modules.seanet import SEANetConfig
from audiocraft.quantization.vq import ResidualVectorQuantizer


def hf_key(native: str) -> str:
    """Name in transformers' file (older form) of a tensor by its native name."""
    for ours, theirs in (
        (".model.", ".layers."),
        (".conv.conv.", ".conv."),
        (".convtr.convtr.", ".conv."),
        ("quantizer.vq.", "quantizer."),
        ("._codebook.", ".codebook."),
    ):
        native = native.replace(ours, theirs)
    return native


_NEWER_NAMES = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


def native_state(
    model: EncodecModel, state: Mapping[str, Tensor], name: str = "The codec's file"
) -> dict[str, Tensor]:
    """The tensors of a transformers file under the native names of `model`.

    `name` is what messages call the file.
    """
    native = {}
    for key in model.state_dict():
        older = hf_key(key)
        stem, _, last = older.rpartition(".")
        newer = f"{stem}.{_NEWER_NAMES.get(last, last)}"
        found = older if older in state else newer
        if found not in state:
            raise WeightsError(f"{name} lacks {older}; fetch it again.")
        native[key] = state[found]
    return native


def build(config: Mapping[str, Any]) -> EncodecModel:
    """The codec of transformers' `config.json`, with random weights.

    `pad_mode` is taken from the file: it changes the codes, and configurations differ in it.
    """
    if config.get("model_type") != "encodec" or config.get("norm_type") != "weight_norm":
        raise WeightsError(
            f"A codec of type {config.get('model_type')} with {config.get('norm_type')} is not "
            "supported; take facebook/encodec_32khz."
        )
    seanet = SEANetConfig(
        channels=config["audio_channels"],
        dimension=config["hidden_size"],
        n_filters=config["num_filters"],
        n_residual_layers=config["num_residual_layers"],
        ratios=tuple(config["upsampling_ratios"]),
        kernel_size=config["kernel_size"],
        residual_kernel_size=config["residual_kernel_size"],
        last_kernel_size=config["last_kernel_size"],
        dilation_base=config["dilation_growth_rate"],
        causal=config["use_causal_conv"],
        pad_mode=config["pad_mode"],
        true_skip=not config["use_conv_shortcut"],
        compress=config["compress"],
        lstm=config["num_lstm_layers"],
        trim_right_ratio=config["trim_right_ratio"],
    )
    frame_rate = math.ceil(config["sampling_rate"] / seanet.hop_length)
    bits = math.log2(config["codebook_size"])
    n_q = int(1000 * config["target_bandwidths"][-1] / (frame_rate * bits))
    quantizer = ResidualVectorQuantizer(config["codebook_dim"], n_q, config["codebook_size"])
    return EncodecModel(seanet, quantizer, config["sampling_rate"], config["normalize"])
