"""EnCodec, the codec between audio and codes, and its stereo form.

Golden tests: `encodec_tiny`, `encodec_tiny_hf`, `encodec_stereo`.
"""

import logging
import math
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from audiocraft.errors import InputError
from audiocraft.modules.seanet import (
    BLOCK_FRAMES,
    DecoderStream,
    SEANetConfig,
    SEANetDecoder,
    SEANetEncoder,
    is_short,
)
from audiocraft.modules.streaming import Stream, collect, joined, records_gradients, rest, split
from audiocraft.progress import ProgressLog
from audiocraft.quantization.vq import ResidualVectorQuantizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

# Seconds before the log hears of it; chunks of a dataset, which has a log of its own, take less.
_QUIET_ENCODING_S = 30.0
_QUIET_DECODING_S = 5.0


@contextmanager
def exact() -> "Iterator[None]":
    """Convolutions and LSTMs in float32 on a GPU as well, where cuDNN would round to 10 bits.

    Pieces of a clip would not fit each other else, nor its codes those that a CPU finds. The
    settings are the process's; they are as they were afterwards.
    """
    if not torch.cuda.is_available():
        yield
        return
    cudnn: Any = torch.backends.cudnn
    exact: list[tuple[Any, str, bool | str]] = [(cudnn, "deterministic", True)]
    if hasattr(cudnn, "conv"):
        exact += [(part, "fp32_precision", "ieee") for part in (cudnn.conv, cudnn.rnn)]
    else:  # torch below 2.9
        exact.append((cudnn, "allow_tf32", False))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in exact]
    try:
        for owner, name, value in exact:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@dataclass(frozen=True)
class QuantizedResult:
    """A clip through the codec and back.

    Attributes:
        x: decoded audio [B, C, T].
        codes: [B, K, frames].
        bandwidth: kilobits per second.
    """

    x: Tensor
    codes: Tensor
    bandwidth: Tensor


class CompressionModel(ABC, nn.Module):
    """Audio to codes and back."""

    channels: int
    sample_rate: int
    frame_rate: float
    cardinality: int

    @property
    @abstractmethod
    def num_codebooks(self) -> int:
        """Codebooks in use."""

    @property
    @abstractmethod
    def total_codebooks(self) -> int:
        """Codebooks that there are."""

    @abstractmethod
    def set_num_codebooks(self, n: int) -> None:
        """Use only the first `n` codebooks."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes [B, K, frames] and scale [B, 1] (if any) of audio [B, C, T]."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        """Audio [B, C, frames * hop] of codes and scale."""

    @abstractmethod
    def stream(self, scale: Tensor | None = None) -> Stream:
        """A decoder for codes [B, K, frames] that come piece by piece, giving audio [B, C, n].

        However they are cut, the pieces of audio together are what `decode` gives.
        """

    @abstractmethod
    def decode_latent(self, codes: Tensor) -> Tensor:
        """Latent (B, dimension, frames) of codes."""

    @staticmethod
    def get_pretrained(
        name: "str | Path", device: torch.device | str = "cpu"
    ) -> "CompressionModel":
        """Load a codec by hub id, folder or file; see `audiocraft.models.loaders`."""
        from audiocraft.models.loaders import load_compression_model

        return load_compression_model(name, device=device)


class EncodecModel(CompressionModel):
    """SEANet with a residual vector quantiser.

    Args:
        config: shape of encoder and decoder.
        quantizer: the codebooks.
        sample_rate: Hz.
        renormalize: divide a clip by its volume before encoding; the scale undoes it.
    """

    def __init__(
        self,
        config: SEANetConfig,
        quantizer: ResidualVectorQuantizer,
        sample_rate: int,
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = SEANetEncoder(config)
        self.decoder = SEANetDecoder(config)
        self.quantizer = quantizer
        self.channels = config.channels
        self.sample_rate = sample_rate
        # Official code computes ceil(sample_rate / hop), a whole number in every release.
        self.frame_rate = math.ceil(sample_rate / config.hop_length)
        self.cardinality = quantizer.bins
        self.renormalize = renormalize

    @property
    def num_codebooks(self) -> int:
        """Codebooks in use."""
        return self.quantizer.num_codebooks

    @property
    def total_codebooks(self) -> int:
        """Codebooks that the file holds."""
        return self.quantizer.total_codebooks

    def set_num_codebooks(self, n: int) -> None:
        """Use only the first `n` codebooks."""
        if not 1 <= n <= self.total_codebooks:
            raise InputError(
                f"{n} codebooks asked for, this codec has 1 to {self.total_codebooks}."
            )
        self.quantizer.n_q = n

    @exact()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes [B, K, frames] and scale [B, 1] (if it renormalises) of audio [B, C, T]."""
        self._check(x)
        x, scale = self._normalize(x)
        frames = -(-x.shape[-1] // self.encoder.hop_length)
        progress = ProgressLog(logger, "frames", "encoding audio", quiet_s=_QUIET_ENCODING_S)
        return collect(_reported(self._codes(x), frames, progress), frames), scale

    @torch.no_grad()  # codes have no gradient
    def _codes(self, x: Tensor) -> "Iterator[Tensor]":
        """Codes, piece by piece: the distances to all vectors take memory too."""
        for latent in self.encoder.pieces(x):
            yield self.quantizer.encode(latent)

    @exact()
    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        """Audio [B, C, frames * hop] of codes and scale; not trimmed."""
        rows, _, frames = codes.shape
        if is_short(rows, frames) or records_gradients(self, codes):
            out: Tensor = self.decoder(self.decode_latent(codes))
            return out if scale is None else out * scale[:, :, None]
        stream = self.stream(scale)
        pieces = (stream.push(piece, last) for piece, last in split(codes, BLOCK_FRAMES))
        hop = self.encoder.hop_length
        progress = ProgressLog(logger, "frames", "decoding", scale=hop, quiet_s=_QUIET_DECODING_S)
        return collect(_reported(pieces, frames * hop, progress), frames * hop)

    @torch.no_grad()
    def stream(self, scale: Tensor | None = None) -> "EncodecStreamingDecoder":
        """A decoder for codes that come piece by piece."""
        return EncodecStreamingDecoder(self, self.decoder.stream(), scale)

    def decode_latent(self, codes: Tensor) -> Tensor:
        """Latent (B, dimension, frames) of codes."""
        return self.quantizer.decode(codes)

    def forward(self, x: Tensor) -> QuantizedResult:
        """Through the codec and back, trimmed to the input's length."""
        codes, scale = self.encode(x)
        bits = self.num_codebooks * math.log2(self.cardinality)
        bandwidth = torch.tensor(bits * self.frame_rate / 1000)
        return QuantizedResult(self.decode(codes, scale)[..., : x.shape[-1]], codes, bandwidth)

    def _normalize(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.renormalize:
            return x, None
        volume = x.mean(dim=1, keepdim=True).square().mean(dim=2, keepdim=True).sqrt() + 1e-8
        return x / volume, volume[:, :, 0]

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[1] != self.channels or x.shape[2] == 0:  # noqa: PLR2004
            raise InputError(
                f"Audio has the shape {list(x.shape)}, this codec needs [B, {self.channels}, T]."
            )


def _reported(pieces: "Iterator[Tensor]", total: int, progress: ProgressLog) -> "Iterator[Tensor]":
    """The same pieces, which the log hears of."""
    done = 0
    for piece in pieces:
        done += piece.shape[-1]
        progress.update(done, total)
        yield piece


@dataclass
class EncodecStreamingDecoder:
    """EnCodec's decoder on its way through one clip.

    Attributes:
        codec: the codec.
        decoder: the state of its decoder.
        scale: [B, 1], or None.
    """

    codec: EncodecModel
    decoder: DecoderStream
    scale: Tensor | None

    @torch.no_grad()
    @exact()
    def push(self, codes: Tensor, last: bool) -> Tensor:
        """Take the next codes [B, K, frames] and give all audio that is final."""
        audio = [
            self.decoder.push(self.codec.decode_latent(piece), last and end)
            for piece, end in split(codes, BLOCK_FRAMES)
        ]
        out = torch.cat(audio, dim=-1)
        return out if self.scale is None else out * self.scale[:, :, None]


class InterleaveStereoCompressionModel(CompressionModel):
    """Stereo from a mono codec: left and right are coded apart and their codebooks interleaved.

    Args:
        model: mono codec.
        per_timestep: alternate left and right in time (twice the frame rate) rather than in
            codebooks [L0, R0, L1, R1, ...]; no release does.
    """

    def __init__(self, model: CompressionModel, per_timestep: bool = False) -> None:
        super().__init__()
        if model.channels != 1:
            raise InputError(
                f"Stereo is made of a mono codec, but this one has {model.channels} channels; give "
                "a mono one."
            )
        self.model = model
        self.per_timestep = per_timestep
        self.channels = 2
        self.sample_rate = model.sample_rate
        self.cardinality = model.cardinality
        self.frame_rate = model.frame_rate * self.num_virtual_steps

    @property
    def num_virtual_steps(self) -> int:
        """Steps of the codes per frame of the mono codec."""
        return 2 if self.per_timestep else 1

    @property
    def num_codebooks(self) -> int:
        """Codebooks in use, both channels together."""
        return self.model.num_codebooks * (1 if self.per_timestep else 2)

    @property
    def total_codebooks(self) -> int:
        """Codebooks of the mono codec, as the official wrapper counts them."""
        return self.model.total_codebooks

    def set_num_codebooks(self, n: int) -> None:
        """Use only `n` codebooks, counted as `num_codebooks` does."""
        self.model.set_num_codebooks(n if self.per_timestep else n // 2)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes and scale [B, 2] (if the codec renormalises) of stereo audio [B, 2, T]."""
        if x.dim() != 3 or x.shape[1] != 2:  # noqa: PLR2004
            raise InputError(f"Audio has the shape {list(x.shape)}, this codec needs [B, 2, T].")
        codes, scale = self.model.encode(x.flatten(0, 1)[:, None])
        codes = codes.view(-1, 2, *codes.shape[1:])  # (B, C, K, T)
        if self.per_timestep:
            codes = codes.permute(0, 2, 3, 1).flatten(2)
        else:
            codes = codes.transpose(1, 2).flatten(1, 2)
        return codes, None if scale is None else scale.view(-1, 2)

    def get_left_right_codes(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the left and of the right channel, as the mono codec has them."""
        if self.per_timestep:
            return codes[..., 0::2], codes[..., 1::2]
        return codes[:, 0::2], codes[:, 1::2]

    def stacked(self, codes: Tensor) -> Tensor:
        """Codes of both channels as rows [L, R, L, R, ...] of the mono codec."""
        return torch.stack(self.get_left_right_codes(codes), dim=1).flatten(0, 1)

    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        """Stereo audio [B, 2, T] of codes and scale [B, 2]."""
        both = self.stacked(codes)
        wav = self.model.decode(both, None if scale is None else scale.reshape(-1, 1))
        return wav.view(-1, 2, wav.shape[-1])

    def stream(self, scale: Tensor | None = None) -> "StereoStreamingDecoder":
        """A decoder for codes that come piece by piece."""
        mono = self.model.stream(None if scale is None else scale.reshape(-1, 1))
        return StereoStreamingDecoder(self, mono)

    def decode_latent(self, codes: Tensor) -> Tensor:  # noqa: ARG002 - the base class has it
        """Refused: the two channels have no common latent."""
        raise InputError("Stereo codes have no single latent; split them and decode each channel.")


@dataclass
class StereoStreamingDecoder:
    """Stereo on its way through one clip: the channels are rows of a mono decoder.

    Attributes:
        codec: the stereo codec.
        mono: the mono codec's decoder.
        held: steps of codes that are half a frame, where channels alternate in time.
    """

    codec: InterleaveStereoCompressionModel
    mono: Stream
    held: Tensor | None = None

    def push(self, codes: Tensor, last: bool) -> Tensor:
        """Take the next codes [B, K, steps] and give all audio that is final."""
        codes = joined(self.held, codes)
        whole = codes.shape[-1] - codes.shape[-1] % self.codec.num_virtual_steps
        self.held = rest(codes, whole)
        wav = self.mono.push(self.codec.stacked(codes[..., :whole]), last)
        return wav.reshape(len(wav) // 2, 2, wav.shape[-1])
