"""What is computed once of each chunk: its codes, and the chroma of its melody."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from audiocraft.assets.parts import whole_file
from audiocraft.assets.tensors import read_safetensors
from audiocraft.data.audio_utils import convert_audio
from audiocraft.models.builders import get_conditioner_provider, get_wrapped_compression_model
from audiocraft.models.encodec import CompressionModel, exact
from audiocraft.models.finetunes import base_sha256
from audiocraft.models.loaders import (
    LM_FILE,
    check_config,
    config_in_use,
    find_file,
    load_compression_model,
    read_checkpoint,
    text_encoder_of,
)
from audiocraft.models.versions import resolve_source
from audiocraft.modules.chroma import ChromaExtractor
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


@dataclass(frozen=True)
class Encoder:
    """What chunks are encoded with for a version.

    Attributes:
        key: SHA-256 in hex over all that codes and chroma depend on besides the music.
        context: seconds that the version hears at once.
        codec: as its language model uses it.
        chroma: of the melody that it follows; None where it follows none.
        melody_stems: that a melody is taken from; None takes it from the whole mix.
    """

    key: str
    context: float
    codec: CompressionModel
    chroma: ChromaExtractor | None = None
    melody_stems: tuple[str, ...] | None = None

    def to(self, device: torch.device | str) -> None:
        """Move the models."""
        self.codec.to(device)
        if self.chroma is not None:
            self.chroma.to(device)


def load_encoder(version: str) -> Encoder:
    """The encoder of a version, on the CPU; of the language model only its configuration is read.

    Args:
        version: its short name, a hub id or a release folder.

    Raises:
        AssetError: its files are nowhere on disk and cannot be downloaded.
        WeightsError: they are not those of a MusicGen.
    """
    source = resolve_source(version)
    path = find_file(source, LM_FILE)
    checkpoint = read_checkpoint(path)
    cfg = check_config(checkpoint.name, checkpoint.cfg)
    codec = load_compression_model(source)
    codec_key = base_sha256(codec.state_dict())
    with config_in_use(checkpoint.name):
        codec = get_wrapped_compression_model(codec, cfg)
        context = float(cfg.dataset.segment_duration)
        provider = get_conditioner_provider(cfg.transformer_lm.dim, cfg, text_encoder_of(path))
    names = provider.wav_conditions
    layout: list[object] = [codec_key, codec.channels, codec.num_codebooks, codec.frame_rate]
    layout += [codec.sample_rate, context]
    chroma, stems = None, None
    if names:
        melody = cast("ChromaStemConditioner", provider.conditioners[names[0]])
        chroma, stems = melody.chroma, melody.stems if melody.separates else None
        layout += [chroma.sample_rate, chroma.n_chroma, chroma.nfft, chroma.winlen, chroma.winhop]
        layout += [chroma.argmax, chroma.norm, stems]
    key = hashlib.sha256(repr(layout).encode()).hexdigest()
    return Encoder(key, context, codec.eval(), chroma, stems)


@torch.no_grad()
def encode_chunk(
    codec: CompressionModel,
    wav: Tensor,
    sample_rate: int,
    context: float,
    chroma: ChromaExtractor | None = None,
    melody: tuple[Tensor, int] | None = None,
) -> EncodedChunk:
    """Encode a chunk.

    Args:
        codec: as the language model uses it, stereo where that is.
        wav: (C, T), what the model shall write; what exceeds the context is cut off.
        sample_rate: Hz.
        context: seconds.
        chroma: of the conditioner of a version that follows melodies.
        melody: (C, T), what it shall follow, stems separated already, and its own rate, Hz; `wav`
            if not given.
    """
    device = next(codec.parameters()).device
    with exact():
        audio = convert_audio(wav.to(device), sample_rate, codec.sample_rate, codec.channels)
    length = round(context * codec.sample_rate)
    audio = audio[..., :length]
    codes, _ = codec.encode(F.pad(audio, (0, length - audio.shape[-1]))[None])
    frames = math.ceil(audio.shape[-1] * codec.frame_rate / codec.sample_rate)
    encoded = codes[0].to("cpu", torch.int16)
    if chroma is None:
        return EncodedChunk(encoded, frames)
    sung, sung_rate = melody or (wav, sample_rate)
    rate = chroma.sample_rate
    sung = convert_audio(sung.to(device), sung_rate, rate, 1)[..., : round(context * rate)]
    filled = F.pad(sung, (0, round(context * rate) - sung.shape[-1]))
    return EncodedChunk(encoded, frames, chroma(filled[None])[0].float().cpu(), sung.shape[-1])


def save_encoded(path: Path, chunk: EncodedChunk) -> None:
    """Write an encoded chunk; it appears under its name when it is whole."""
    tensors = {"codes": chunk.codes.contiguous()}
    if chunk.chroma is not None:
        tensors["chroma"] = chunk.chroma.contiguous()
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, {_FRAMES: str(chunk.frames), _SAMPLES: str(chunk.samples)})


def load_encoded(path: Path) -> EncodedChunk:
    """Read an encoded chunk.

    Raises:
        WeightsError: the file is broken.
    """
    tensors, said = read_safetensors(path)
    return EncodedChunk(
        tensors["codes"], int(said[_FRAMES]), tensors.get("chroma"), int(said[_SAMPLES])
    )
