"""From a resolved `xp.cfg` to modules. Every builder also works under `torch.device("meta")`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from audiocraft.assets.store import BUNDLED, PARTS, fetch_folder
from audiocraft.errors import InputError
from audiocraft.models.encodec import (
    CompressionModel,
    EncodecModel,
    InterleaveStereoCompressionModel,
)
from audiocraft.models.lm import LMModel
from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
from audiocraft.modules.conditioners import (
    ChromaStemConditioner,
    ConditionFuser,
    ConditioningProvider,
    T5Conditioner,
)
from audiocraft.modules.seanet import SEANetConfig
from audiocraft.modules.stems import StemSeparator, load_htdemucs
from audiocraft.modules.transformer import TransformerConfig
from audiocraft.quantization.vq import ResidualVectorQuantizer

T5_DIMS = {"t5-small": 512, "t5-base": 768, "t5-large": 1024, "t5-3b": 1024, "t5-11b": 1024}

# Settings of the official configuration that no release uses otherwise, with what is implemented.
_LM_SETTINGS = {
    "lm_model": "transformer_lm",
    "codebooks_pattern.modeling": "delay",
    "transformer_lm.activation": "gelu",
    "transformer_lm.norm_first": True,
    "transformer_lm.causal": True,
    "transformer_lm.past_context": None,
    "transformer_lm.layer_scale": None,
    "transformer_lm.positional_embedding": "sin",
    "transformer_lm.norm": "layer_norm",
    "transformer_lm.qk_layer_norm": False,
    "transformer_lm.qk_layer_norm_cross": False,
    "transformer_lm.kv_repeat": 1,
    "fuser.cross_attention_pos_emb": False,
}
_CODEC_SETTINGS = {
    "compression_model": "encodec",
    "encodec.autoencoder": "seanet",
    "encodec.quantizer": "rvq",
    "seanet.activation": "ELU",
    "seanet.norm": "weight_norm",
    "seanet.disable_norm_outer_blocks": 0,
    "seanet.decoder.final_activation": None,
}


def _check_settings(cfg: DictConfig, settings: dict[str, Any]) -> None:
    for key, expected in settings.items():
        value = OmegaConf.select(cfg, key, default=expected)
        if value != expected:
            raise InputError(f"{key} is {value}, only {expected} is supported.")


def _t5(cfg: DictConfig, dim: int, folder: Path | None) -> T5Conditioner:
    """A T5 conditioner; `folder` wins over the encoder's name, which may be a folder too."""
    if cfg.finetune or cfg.get("normalize_text", False):
        raise InputError("t5.finetune or t5.normalize_text is on, only off is supported.")
    if folder is None and Path(cfg.name).is_dir():
        folder = Path(cfg.name)
    if folder is not None:
        width = json.loads((folder / "config.json").read_text())["d_model"]
        return T5Conditioner(partial(Path, folder), width, dim)
    if cfg.name not in T5_DIMS:
        raise InputError(f"t5.name is {cfg.name}, it must be one of {', '.join(T5_DIMS)}.")
    source = partial(fetch_folder, f"google-t5/{cfg.name}", PARTS["t5-base"][1])
    return T5Conditioner(source, T5_DIMS[cfg.name], dim)


def _chroma_stem(cfg: DictConfig, dim: int, duration: float) -> ChromaStemConditioner:
    stems = cfg.get("stems", "vocals+other")
    separators: dict[str, Callable[[torch.device], StemSeparator] | None] = {
        "vocals+other": load_htdemucs,
        "mix": None,
    }
    if stems not in separators:
        raise InputError(f"chroma_stem.stems is {stems}, it must be {' or '.join(separators)}.")
    return ChromaStemConditioner(
        dim,
        cfg.sample_rate,
        cfg.n_chroma,
        cfg.radix2_exp,
        duration,
        argmax=cfg.argmax,
        match_len_on_eval=cfg.match_len_on_eval,
        use_masking=True,
        separator=separators[stems],
    )


def get_conditioner_provider(
    dim: int, cfg: DictConfig, text_encoder: Path | None = None
) -> ConditioningProvider:
    """The conditioners of an `xp.cfg`.

    Args:
        dim: width of the language model.
        cfg: the whole resolved configuration.
        text_encoder: folder of the text encoder, instead of the name in `cfg`.
    """
    conditioners: dict[str, T5Conditioner | ChromaStemConditioner] = {}
    for name, settings in cfg.conditioners.items():
        if name == "args":  # older configurations
            continue
        match settings.model:
            case "t5":
                conditioners[name] = _t5(settings.t5, dim, text_encoder)
            case "chroma_stem":
                duration = cfg.dataset.segment_duration
                conditioners[name] = _chroma_stem(settings.chroma_stem, dim, duration)
            case other:
                raise InputError(
                    f"conditioners.{name}.model is {other}, it must be t5 or chroma_stem."
                )
    return ConditioningProvider(conditioners)


def get_lm_model(cfg: DictConfig, text_encoder: Path | None = None) -> LMModel:
    """The language model of a resolved `xp.cfg`, with random weights.

    Args:
        cfg: the whole resolved configuration.
        text_encoder: folder of the text encoder, instead of the name in `cfg`.

    Raises:
        InputError: the configuration is not one of a MusicGen.
    """
    _check_settings(cfg, _LM_SETTINGS)
    lm = cfg.transformer_lm
    fuse2cond = {
        way: list(names) for way, names in cfg.fuser.items() if not way.startswith("cross_att")
    }
    config = TransformerConfig(
        lm.dim,
        lm.num_heads,
        lm.num_layers,
        hidden_scale=lm.hidden_scale,
        cross_attention=bool(fuse2cond.get("cross")),
        bias_attn=lm.bias_attn,
        bias_ff=lm.bias_ff,
    )
    model = LMModel(
        config,
        DelayedPatternProvider(lm.n_q, **cfg.codebooks_pattern.delay),
        get_conditioner_provider(lm.dim, cfg, text_encoder),
        ConditionFuser(fuse2cond),
        card=lm.card,
        bias_proj=lm.bias_proj,
        cfg_coef=cfg.classifier_free_guidance.inference_coef,
        two_step_cfg=lm.get("two_step_cfg", False),
    )
    model.cfg = cfg
    return model


def get_compression_model(cfg: DictConfig) -> CompressionModel:
    """The codec of a resolved `xp.cfg`, with random weights."""
    _check_settings(cfg, _CODEC_SETTINGS)
    seanet = cfg.seanet
    config = SEANetConfig(
        channels=seanet.channels,
        dimension=seanet.dimension,
        n_filters=seanet.n_filters,
        n_residual_layers=seanet.n_residual_layers,
        ratios=tuple(seanet.ratios),
        kernel_size=seanet.kernel_size,
        residual_kernel_size=seanet.residual_kernel_size,
        last_kernel_size=seanet.last_kernel_size,
        dilation_base=seanet.dilation_base,
        causal=seanet.causal,
        pad_mode=seanet.pad_mode,
        true_skip=seanet.true_skip,
        compress=seanet.compress,
        lstm=seanet.lstm,
        trim_right_ratio=seanet.decoder.trim_right_ratio,
    )
    quantizer = ResidualVectorQuantizer(seanet.dimension, cfg.rvq.n_q, cfg.rvq.bins)
    return EncodecModel(config, quantizer, cfg.sample_rate, renormalize=cfg.encodec.renormalize)


def get_wrapped_compression_model(model: CompressionModel, cfg: DictConfig) -> CompressionModel:
    """The codec as the language model of `cfg` uses it: stereo, and with fewer codebooks.

    One that is so already is returned as it is.
    """
    interleave = cfg.get("interleave_stereo_codebooks")
    wrapped = isinstance(model, InterleaveStereoCompressionModel)
    if interleave is not None and interleave.use and not wrapped:
        model = InterleaveStereoCompressionModel(model, interleave.get("per_timestep", False))
    if cfg.get("compression_model_n_q") is not None:
        model.set_num_codebooks(cfg.compression_model_n_q)
    return model


def get_debug_compression_model(device: torch.device | str = "cpu") -> CompressionModel:
    """A small random mono codec: 32 kHz, 25 Hz frames, 4 codebooks of 400."""
    config = SEANetConfig(n_filters=4, dimension=32, ratios=(10, 8, 16))
    return EncodecModel(config, ResidualVectorQuantizer(32, 4, 400), 32000).to(device).eval()


def get_debug_lm_model(device: torch.device | str = "cpu") -> LMModel:
    """A small random text model for the debug codec, with the text encoder of `tiny`."""
    folder = BUNDLED / "tiny" / "t5"
    width = json.loads((folder / "config.json").read_text())["d_model"]
    text = T5Conditioner(partial(Path, folder), width, 16)
    model = LMModel(
        TransformerConfig(dim=16, num_heads=2, num_layers=2, cross_attention=True),
        DelayedPatternProvider(4),
        ConditioningProvider({"description": text}),
        ConditionFuser({"cross": ["description"]}),
        card=400,
    )
    return model.to(device).eval()
