"""The models: `MusicGen`, its codec, and `MultiBandDiffusion`, another decoder of its codes."""

from audiocraft.models.encodec import CompressionModel, EncodecModel
from audiocraft.models.lm import LMModel
from audiocraft.models.multibanddiffusion import MultiBandDiffusion
from audiocraft.models.musicgen import MusicGen

__all__ = ["CompressionModel", "EncodecModel", "LMModel", "MultiBandDiffusion", "MusicGen"]

_NOT_HERE = {"AudioGen", "MAGNeT", "JASCO"}


def __getattr__(name: str) -> object:
    if name in _NOT_HERE:
        raise ImportError(
            f"{name} is not part of this package, which makes music with MusicGen; import that."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
