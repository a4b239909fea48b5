"""The configuration of the `tiny` release's language model."""

from dataclasses import dataclass
from typing import Any, Final

from tools.synthetic_music.rendering import RATE
from tools.tiny.dataset import CHROMA_EXPONENT

MELODY: Final = "self_wav"
"""The condition that is a melody."""

TEXT: Final = "description"
"""The condition that is a text."""

# The released stereo versions predict both sides of a codebook at once, neither knowing the other.
# Where half of the codes are the same on both, the sides of a small model then fall apart.
_DELAYS: Final = tuple(range(8))


@dataclass(frozen=True)
class Shape:
    """What is trained, and how; a run keeps it.

    Attributes:
        dim: width of the decoder.
        layers: of the decoder.
        heads: of its attention.
        batch_size: crops of an update.
        lr: of AdamW, at its highest.
    """

    dim: int = 256
    layers: int = 6
    heads: int = 4
    batch_size: int = 4
    lr: float = 2e-3


def lm_config(shape: Shape, context: float, card: int) -> dict[str, Any]:
    """The `xp.cfg`: the keys of released stereo melody versions.

    Args:
        shape: of the decoder.
        context: seconds.
        card: codes of a codebook.
    """
    return {
        "sample_rate": RATE,
        "channels": 2,
        "compression_model_checkpoint": None,
        "compression_model_n_q": None,
        "interleave_stereo_codebooks": {"use": True, "per_timestep": False},
        "dataset": {
            "segment_duration": context,
            "train": {"merge_text_p": 0.02, "drop_desc_p": 0.5, "drop_other_p": 0.5},
        },
        "tokens": {"padding_with_special_token": False},
        "classifier_free_guidance": {
            "training_dropout": 0.1,
            "inference_coef": 3.0,
            "null_as_generated": True,
        },
        "attribute_dropout": {
            "args": {"active_on_eval": False},
            "text": {TEXT: 0.1},
            "wav": {MELODY: 0.5},
        },
        "fuser": {
            "cross_attention_pos_emb": False,
            "cross_attention_pos_emb_scale": 1,
            "sum": [],
            "prepend": [MELODY, TEXT],
            "cross": [],
            "input_interpolate": [],
        },
        "conditioners": {
            MELODY: {
                "model": "chroma_stem",
                "chroma_stem": {
                    "sample_rate": RATE,
                    "n_chroma": 12,
                    "radix2_exp": CHROMA_EXPONENT,
                    "argmax": True,
                    "match_len_on_eval": False,
                    "stems": "mix",
                },
            },
            TEXT: {
                "model": "t5",
                "t5": {
                    "name": "t5",
                    "finetune": False,
                    "word_dropout": 0.1,
                    "normalize_text": False,
                },
            },
        },
        "lm_model": "transformer_lm",
        "codebooks_pattern": {
            "modeling": "delay",
            "delay": {
                "delays": list(_DELAYS),
                "flatten_first": 0,
                "empty_initial": 0,
            },
        },
        "transformer_lm": {
            "dim": shape.dim,
            "num_heads": shape.heads,
            "num_layers": shape.layers,
            "hidden_scale": 4,
            "n_q": 8,
            "card": card,
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
