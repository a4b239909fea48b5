"""How large each version is, known before anything of it is on disk."""

from dataclasses import dataclass
from functools import cache

from omegaconf import OmegaConf

from audiocraft.assets.store import BUNDLED
from audiocraft.assets.tensors import read_safetensors
from audiocraft.errors import InputError
from audiocraft.models.versions import VERSIONS

_FRAME_RATE = 50  # Hz, of every release's codec and of the bundled one


@dataclass(frozen=True)
class Shape:
    """Shape of a language model and of what conditions it.

    Attributes:
        dim: width of the decoder.
        num_layers: its layers.
        n_q: K, codebooks.
        cross_attention: whether the layers attend to the text; otherwise it stands in front.
        chroma_frames: of a melody in front of the sequence; 0 for versions without.
        card: codes of a codebook.
        frames: T, of the context.
        n_chroma: pitch classes of the melody.
        text_dim: width of the text encoder.
        text_encoder: number of its weights, which are no part of the language model.
    """

    dim: int
    num_layers: int
    n_q: int
    cross_attention: bool
    chroma_frames: int
    card: int = 2048
    frames: int = 1500
    n_chroma: int = 12
    text_dim: int = 768
    text_encoder: int = 109_628_544  # t5-base, as in every release

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of each matrix of one layer: attention in and out, feed-forward."""
        attention = [(3 * self.dim, self.dim), (self.dim, self.dim)]
        hidden = 4 * self.dim
        return [
            *attention,
            *(attention if self.cross_attention else []),
            (hidden, self.dim),
            (self.dim, hidden),
        ]

    @property
    def layer(self) -> int:
        """Number of weights of one layer."""
        norms = 3 if self.cross_attention else 2
        return sum(rows * columns for rows, columns in self.matrices) + norms * 2 * self.dim

    @property
    def parameters(self) -> int:
        """Number of weights."""
        codes = self.n_q * (2 * self.card + 1) * self.dim  # embeddings and heads
        text = (self.text_dim + 1) * self.dim
        melody = (self.n_chroma + 1) * self.dim if self.chroma_frames else 0
        return codes + self.num_layers * self.layer + 2 * self.dim + text + melody


_SCALES = {"small": (1024, 24), "medium": (1536, 48), "large": (2048, 48)}  # dim, num_layers


def shape_of(version: str) -> Shape:
    """Shape of a version.

    Args:
        version: a short name.

    Raises:
        InputError: there is no such version.
    """
    if version not in VERSIONS:
        raise InputError(f"model_version is {version!r}, it must be one of {', '.join(VERSIONS)}.")
    if version == "tiny":
        return _bundled_shape()
    melody, stereo = VERSIONS[version].melody, VERSIONS[version].stereo
    scale = version.rpartition("-")[2]
    dim, num_layers = _SCALES["medium" if scale == "melody" else scale]
    return Shape(dim, num_layers, 8 if stereo else 4, not melody, 235 if melody else 0)


@cache
def _bundled_shape() -> Shape:
    folder = BUNDLED / "tiny"
    _, metadata = read_safetensors(folder / "state_dict.safetensors")
    encoder, _ = read_safetensors(folder / "t5" / "model.safetensors")
    cfg = OmegaConf.create(metadata["xp.cfg"])
    chroma = cfg.conditioners.self_wav.chroma_stem
    seconds = cfg.dataset.segment_duration
    return Shape(
        cfg.transformer_lm.dim,
        cfg.transformer_lm.num_layers,
        cfg.transformer_lm.n_q,
        bool(cfg.fuser.cross),
        1 + int(seconds * chroma.sample_rate) // 2 ** (chroma.radix2_exp - 2),
        card=cfg.transformer_lm.card,
        frames=int(seconds * _FRAME_RATE),
        n_chroma=chroma.n_chroma,
        text_dim=encoder["shared.weight"].shape[1],
        text_encoder=sum(tensor.numel() for tensor in encoder.values()),
    )
