"""What is computed once of each chunk: its codes, and the chroma of its melody."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from audiocraft.assets.tensors import read_safetensors
from audiocraft.data.audio_utils import convert_audio
from audiocraft.models.encodec import CompressionModel
from audiocraft.modules.conditioners import ChromaStemConditioner

_FRAMES: Final = "frames"
_SAMPLES: Final = "samples"


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk of music as training needs it; shorter ones are filled up with silence.

    Attributes:
        codes: (K, T), int16, T frames of the context.
        frames: of them that begin before the chunk's end.
        chroma: (T', n_chroma), float32, over the whole context; None without a melody.
        samples: of the melody before its end, at the rate of its chroma.
    """

    codes: Tensor
    frames: int
    chroma: Tensor | None = None
    samples: int = 0


@torch.no_grad()
def encode_chunk(
    codec: CompressionModel,
    wav: Tensor,
    sample_rate: int,
    context: float,
    conditioner: ChromaStemConditioner | None = None,
    melody: Tensor | None = None,
) -> EncodedChunk:
    """Encode a chunk.

    Args:
        codec: as the language model uses it, stereo where that is.
        wav: (C, T), what the model shall write; what exceeds the context is cut off.
        sample_rate: Hz, of `wav` and `melody`.
        context: seconds.
        conditioner: of a version that follows melodies.
        melody: (C, T), what it shall follow, stems separated already; `wav` if not given.
    """
    device = next(codec.parameters()).device
    audio = convert_audio(wav.to(device), sample_rate, codec.sample_rate, codec.channels)
    length = round(context * codec.sample_rate)
    audio = audio[..., :length]
    codes, _ = codec.encode(F.pad(audio, (0, length - audio.shape[-1]))[None])
    frames = math.ceil(audio.shape[-1] * codec.frame_rate / codec.sample_rate)
    encoded = codes[0].to("cpu", torch.int16)
    if conditioner is None:
        return EncodedChunk(encoded, frames)
    sung = wav if melody is None else melody
    rate = conditioner.sample_rate
    sung = convert_audio(sung.to(device), sample_rate, rate, 1)[..., : round(context * rate)]
    filled = F.pad(sung, (0, round(context * rate) - sung.shape[-1]))
    chroma = conditioner.chroma(filled[None])[0]
    return EncodedChunk(encoded, frames, chroma.float().cpu(), sung.shape[-1])


def save_encoded(path: Path, chunk: EncodedChunk) -> None:
    """Write an encoded chunk; it appears under its name when it is whole."""
    tensors = {"codes": chunk.codes.contiguous()}
    if chunk.chroma is not None:
        tensors["chroma"] = chunk.chroma.contiguous()
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        save_file(tensors, unfinished, {_FRAMES: str(chunk.frames), _SAMPLES: str(chunk.samples)})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_encoded(path: Path) -> EncodedChunk:
    """Read an encoded chunk.

    Raises:
        WeightsError: the file is broken.
    """
    tensors, said = read_safetensors(path)
    return EncodedChunk(
        tensors["codes"], int(said[_FRAMES]), tensors.get("chroma"), int(said[_SAMPLES])
    )
