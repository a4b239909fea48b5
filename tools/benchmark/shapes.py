"""The published shapes, and what one step of them reads from memory.

Read as plain YAML, so that a peer's process can do it too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
PUBLISHED: Final = ROOT / "tests/golden/checkpoints"
"""Configurations of the released versions and of their codec."""

CODEC: Final = "encodec_32khz_native"
FRAME_RATE: Final = 50
SAMPLES_PER_FRAME: Final = 640
GUIDANCE: Final = 3.0
TOP_K: Final = 250
DESCRIPTION: Final = (
    "lo-fi hip hop with a warm Rhodes piano, soft drums and a calm, slightly sad melody"
)
PIECES: Final = (
    *("▁lo", "-", "fi", "▁hip", "▁hop", "▁with", "▁a", "▁warm", "▁Rhodes", "▁piano", ","),
    *("▁soft", "▁drums", "▁and", "▁calm", "▁slightly", "▁sad", "▁melody"),
)
"""The description's tokens, each once."""

TEXT_TOKENS: Final = 21
"""Of the description, its end included."""

DIFFUSION_STEPS: Final = 20
"""Evaluations of each network of MultiBand Diffusion, by its own list of steps."""

_BRANCHES: Final = 2  # with the conditions and without them
_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def read_config(name: str, shapes: Path = PUBLISHED) -> dict[str, Any]:
    """The resolved `xp.cfg` of a version, or of `CODEC`."""
    config: dict[str, Any] = yaml.safe_load((shapes / f"{name}.xp_cfg.yaml").read_text())
    return config


@dataclass(frozen=True)
class Shape:
    """What of a language model's shape its speed depends on.

    Attributes:
        dim: width.
        layers: number of layers.
        hidden: width of the feed-forward layers.
        codebooks: K.
        card: codes in a codebook.
        max_delay: steps that the last codebook is behind the first.
        cross_attention: whether the description is attended to, or put in front.
        melody_frames: positions in front that a melody has, heard or not.
    """

    dim: int
    layers: int
    hidden: int
    codebooks: int
    card: int
    max_delay: int
    cross_attention: bool
    melody_frames: int

    @classmethod
    def of(cls, version: str, shapes: Path = PUBLISHED) -> "Shape":
        """That of a version."""
        cfg = read_config(version, shapes)
        lm = cfg["transformer_lm"]
        chroma = cfg["conditioners"].get("self_wav", {}).get("chroma_stem")
        frames = 0
        if chroma:
            samples = cfg["dataset"]["segment_duration"] * chroma["sample_rate"]
            frames = 1 + samples // (2 ** chroma["radix2_exp"] // 4)
        return cls(
            dim=lm["dim"],
            layers=lm["num_layers"],
            hidden=lm["hidden_scale"] * lm["dim"],
            codebooks=lm["n_q"],
            card=lm["card"],
            max_delay=max(cfg["codebooks_pattern"]["delay"]["delays"]),
            cross_attention=bool(cfg["fuser"]["cross"]),
            melody_frames=frames,
        )

    def weight_bytes(self, precision: str) -> int:
        """Bytes of the matrices that one step reads, once for all rows.

        Of cross-attention these are the projections of queries and output: keys and values of the
        description do not change. Embeddings and norms are left out, they are below 0.1 %.
        """
        attention = 4 * self.dim**2 + (2 * self.dim**2 if self.cross_attention else 0)
        layer = attention + 2 * self.dim * self.hidden
        return _BYTES[precision] * (self.layers * layer + self.codebooks * self.card * self.dim)

    def cache_bytes(self, precision: str, batch: int, positions: float) -> int:
        """Bytes of keys and values, which have no fewer than 16 bits.

        Args:
            precision: of the weights.
            batch: items, each of which is two rows.
            positions: of the sequence, what stands in front and what is attended to counted.
        """
        size = max(2, _BYTES[precision])
        return round(2 * size * self.layers * _BRANCHES * batch * self.dim * positions)

    def positions(self, frames: int, text_tokens: int) -> int:
        """Positions after the last step of a generation of T frames."""
        return self.melody_frames + text_tokens + frames + self.max_delay

    def step_bytes(self, precision: str, batch: int, frames: int, text_tokens: int) -> int:
        """Bytes of weights and of keys and values that a step reads, averaged over a generation.

        Args:
            precision: of the weights.
            batch: items, each of which is two rows.
            frames: T.
            text_tokens: of the description, its end included.
        """
        steps = frames + self.max_delay
        average = self.positions(frames, text_tokens) - (steps - 1) / 2
        return self.weight_bytes(precision) + self.cache_bytes(precision, batch, average)
