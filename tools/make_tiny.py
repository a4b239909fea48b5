"""Make the bundled `tiny` release: a stereo melody MusicGen with random weights.

    python -m tools.make_tiny FOLDER

The weights come from a fixed seed and have learnt nothing: what tiny makes does not sound like
music. It has every part that a released version has, in the same files, and a text encoder of its
own in `t5/`; chroma is taken from the whole mix, since a stem separator can't be bundled.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from audiocraft import __version__
from audiocraft.models.builders import get_compression_model, get_lm_model
from audiocraft.models.encodec import EncodecModel
from metadata import genre_labels, instrument_classes, mood_theme_classes

SEED = 2036
SIZE_LIMIT = 8 * 2**20

CODEC: dict[str, Any] = {
    "compression_model": "encodec",
    "sample_rate": 32000,
    "channels": 1,
    "encodec": {
        "autoencoder": "seanet",
        "quantizer": "rvq",
        "sample_rate": 32000,
        "channels": 1,
        "causal": False,
        "renormalize": False,
    },
    "seanet": {
        "dimension": 64,
        "channels": 1,
        "causal": False,
        "n_filters": 8,
        "n_residual_layers": 1,
        "ratios": [8, 5, 4, 4],
        "activation": "ELU",
        "activation_params": {"alpha": 1.0},
        "norm": "weight_norm",
        "norm_params": {},
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 7,
        "dilation_base": 2,
        "pad_mode": "constant",
        "true_skip": True,
        "compress": 2,
        "lstm": 2,
        "disable_norm_outer_blocks": 0,
        "decoder": {
            "trim_right_ratio": 1.0,
            "final_activation": None,
            "final_activation_params": None,
        },
        "encoder": {},
    },
    "rvq": {
        "n_q": 4,
        "q_dropout": False,
        "bins": 256,
        "decay": 0.99,
        "kmeans_init": True,
        "kmeans_iters": 50,
        "threshold_ema_dead_code": 2,
        "orthogonal_reg_weight": 0.0,
        "orthogonal_reg_active_codes_only": False,
    },
}

LM: dict[str, Any] = {
    "sample_rate": 32000,
    "channels": 2,
    "compression_model_checkpoint": None,
    "compression_model_n_q": None,
    "interleave_stereo_codebooks": {"use": True, "per_timestep": False},
    "dataset": {"segment_duration": 30},
    "tokens": {"padding_with_special_token": False},
    "classifier_free_guidance": {"training_dropout": 0.2, "inference_coef": 3.0},
    "attribute_dropout": {
        "args": {"active_on_eval": False},
        "text": {},
        "wav": {"self_wav": 0.5},
    },
    "fuser": {
        "cross_attention_pos_emb": False,
        "cross_attention_pos_emb_scale": 1,
        "sum": [],
        "prepend": ["self_wav", "description"],
        "cross": [],
        "input_interpolate": [],
    },
    "conditioners": {
        "self_wav": {
            "model": "chroma_stem",
            "chroma_stem": {
                "sample_rate": 32000,
                "n_chroma": 12,
                "radix2_exp": 14,
                "argmax": True,
                "match_len_on_eval": False,
                "stems": "mix",
            },
        },
        "description": {
            "model": "t5",
            "t5": {"name": "t5", "finetune": False, "word_dropout": 0.2, "normalize_text": False},
        },
    },
    "lm_model": "transformer_lm",
    "codebooks_pattern": {
        "modeling": "delay",
        "delay": {"delays": [0, 0, 1, 1, 2, 2, 3, 3], "flatten_first": 0, "empty_initial": 0},
    },
    "transformer_lm": {
        "dim": 128,
        "num_heads": 2,
        "num_layers": 4,
        "hidden_scale": 4,
        "n_q": 8,
        "card": 256,
        "dropout": 0.0,
        "emb_lr": None,
        "activation": "gelu",
        "norm_first": True,
        "bias_ff": False,
        "bias_attn": False,
        "bias_proj": False,
        "past_context": None,
        "causal": True,
        "custom": False,
        "memory_efficient": True,
        "attention_as_float32": False,
        "layer_scale": None,
        "positional_embedding": "sin",
        "xpos": False,
        "checkpointing": "none",
        "weight_init": "gaussian",
        "depthwise_init": "current",
        "zero_bias_init": True,
        "norm": "layer_norm",
        "cross_attention": False,
        "qk_layer_norm": False,
        "qk_layer_norm_cross": False,
        "attention_dropout": None,
        "kv_repeat": 1,
        "two_step_cfg": False,
    },
}


def corpus() -> list[str]:
    """Words of music, for the tokenizer's vocabulary."""
    words = [label.replace("---", " ") for label in genre_labels]
    words += mood_theme_classes + instrument_classes
    keys = [f"{note}{sign}" for note in "ABCDEFG" for sign in ("", "#", "b")]
    lines = [f"{bpm} bpm {word.lower()}" for bpm, word in enumerate(words, start=60)]
    lines += [
        f"{word} in {key} {mode}"
        for key in keys
        for mode in ("major", "minor")
        for word in words[::20]
    ]
    return lines


def make_text_encoder(folder: Path) -> None:
    """A small random T5 encoder with a unigram tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(fast), d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2
    )
    encoder: Any = T5EncoderModel(config)
    encoder.eval().save_pretrained(folder)


@torch.no_grad()
def calibrate(codec: EncodecModel) -> None:
    """Let the random codec at least respond: codebooks from what it encodes, a level to hear.

    Codebooks are random residuals of encoded tones and noise; the last convolution is scaled and
    shifted so that random codes decode to audio with an RMS of 0.1 around zero.
    """
    seconds, pitches = 20, 50 * 80 ** torch.rand(40)
    phase = torch.cumsum(pitches.repeat_interleave(seconds * 800) / codec.sample_rate, dim=0)
    wav = 0.3 * torch.sin(2 * torch.pi * phase) + 0.1 * torch.randn_like(phase)
    residual = codec.encoder(wav[None, None]).transpose(1, 2)
    for codebook in codec.quantizer.codebooks:
        vectors = residual[0, torch.randperm(residual.shape[1])[: codec.cardinality]]
        codebook.embed.copy_(vectors)
        codebook.embed_avg.copy_(vectors)
        index = codebook.encode(residual[0])
        residual = residual - codebook.decode(index)[None]
    codes = torch.randint(codec.cardinality, (1, codec.num_codebooks, 500))
    audio = codec.decode(codes)
    last: Any = codec.decoder.model[-1]
    last = last.conv["conv"]
    gain = 0.1 / audio.std()
    last.weight_g.mul_(gain)
    last.bias.copy_((last.bias - audio.mean()) * gain)


def save(model: torch.nn.Module, cfg: dict[str, Any], path: Path, dtype: torch.dtype) -> None:
    """An export in safetensors: official keys, `xp.cfg` in the metadata."""
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"xp.cfg": OmegaConf.to_yaml(cfg), "version": __version__, "exported": "true"}
    save_file(state, path, metadata)


def main(folder: Path) -> None:
    """Write the release folder."""
    folder.mkdir(parents=True, exist_ok=True)
    make_text_encoder(folder / "t5")
    # Training a tokenizer is not repeatable to the letter; the rest does not depend on it.
    torch.manual_seed(SEED)
    codec = get_compression_model(OmegaConf.create(CODEC))
    assert isinstance(codec, EncodecModel)
    calibrate(codec)
    lm = get_lm_model(OmegaConf.create(LM), text_encoder=folder / "t5")
    save(codec, CODEC, folder / "compression_state_dict.safetensors", torch.float32)
    save(lm, LM, folder / "state_dict.safetensors", torch.float16)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > SIZE_LIMIT:
        raise SystemExit(f"tiny has {size / 2**20:.1f} MB, the limit is {SIZE_LIMIT / 2**20:.0f}.")
    print(f"tiny: {size / 2**20:.1f} MB in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
