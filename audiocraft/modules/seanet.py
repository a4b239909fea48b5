"""SEANet: the convolutional encoder and decoder of EnCodec.

Golden test: `encodec_tiny`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from audiocraft.modules.conv import PadMode, StreamableConv1d, StreamableConvTranspose1d
from audiocraft.modules.lstm import StreamableLSTM
from audiocraft.modules.streaming import (
    Chain,
    Sum,
    chain,
    collect,
    records_gradients,
    run,
    split,
)

# The frame layers hear ten seconds at a time: each call of an LSTM packs its weights again.
BLOCK_FRAMES = 500
# The layers at higher rates take the memory and hear pieces of so many frames, all rows together;
# tensors of larger ones leave the caches of a CPU.
_PIECE_FRAMES = 100
_LEAST_PIECE = 5


@dataclass(frozen=True)
class SEANetConfig:
    """Shape of the encoder and of the decoder, its mirror.

    Attributes:
        channels: audio channels.
        dimension: channels of the latent.
        n_filters: channels of the outermost layer; they double with each ratio.
        n_residual_layers: residual blocks per ratio.
        ratios: upsampling ratios in the decoder's order; their product is the hop.
        kernel_size: taps of the first convolution.
        residual_kernel_size: taps in residual blocks.
        last_kernel_size: taps of the last convolution.
        dilation_base: dilation of residual block `j` is `dilation_base ** j`.
        causal: no sample depends on later ones.
        pad_mode: taken from the file always: releases differ, and codes with it.
        true_skip: residual blocks add their input itself, not a convolution of it.
        compress: how much narrower residual blocks are inside.
        lstm: LSTM layers.
        trim_right_ratio: for causal decoders.
    """

    channels: int = 1
    dimension: int = 128
    n_filters: int = 64
    n_residual_layers: int = 1
    ratios: tuple[int, ...] = (8, 5, 4, 4)
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 7
    dilation_base: int = 2
    causal: bool = False
    pad_mode: PadMode = "constant"
    true_skip: bool = True
    compress: int = 2
    lstm: int = 2
    trim_right_ratio: float = 1.0

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return prod(self.ratios)

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> StreamableConv1d:
        """A convolution with this configuration's padding."""
        return StreamableConv1d(
            in_channels, out_channels, kernel_size, stride, dilation, self.causal, self.pad_mode
        )


class SEANetResnetBlock(nn.Module):
    """Residual block: two convolutions, each behind an ELU."""

    def __init__(self, config: SEANetConfig, dim: int, dilation: int) -> None:
        super().__init__()
        hidden = dim // config.compress
        self.block = nn.Sequential(
            nn.ELU(),
            config.conv(dim, hidden, config.residual_kernel_size, dilation=dilation),
            nn.ELU(),
            config.conv(hidden, dim, 1),
        )
        self.shortcut = nn.Identity() if config.true_skip else config.conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, T) to (B, dim, T)."""
        out: Tensor = self.shortcut(x) + self.block(x)
        return out

    def stream(self) -> Sum:
        """The block at the beginning of an input."""
        return Sum(chain([self.shortcut]), chain(self.block))


def _residuals(config: SEANetConfig, dim: int) -> list[nn.Module]:
    return [
        SEANetResnetBlock(config, dim, config.dilation_base**j)
        for j in range(config.n_residual_layers)
    ]


def _lstm(config: SEANetConfig, dim: int) -> list[nn.Module]:
    return [StreamableLSTM(dim, config.lstm)] if config.lstm else []


def _piece_frames(rows: int) -> int:
    """Frames that the layers at higher rates hear at a time."""
    return max(_LEAST_PIECE, _PIECE_FRAMES // rows)


def is_short(rows: int, frames: int) -> bool:
    """Whether a clip is one piece, and computed as a whole."""
    return frames <= _piece_frames(rows)


class SEANetEncoder(nn.Module):
    """Audio (B, channels, T) to latent (B, dimension, ceil(T / hop)), in bounded memory.

    The first layers take the memory: 80 MB per second of stereo at the released size. Beyond a few
    seconds they hear audio piece by piece, as do those behind them; training is not so.
    """

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        self.hop_length = config.hop_length
        dim = config.n_filters
        layers: list[nn.Module] = [config.conv(config.channels, dim, config.kernel_size)]
        for ratio in reversed(config.ratios):
            layers += _residuals(config, dim)
            layers += [nn.ELU(), config.conv(dim, 2 * dim, 2 * ratio, stride=ratio)]
            dim *= 2
        self.num_sample_layers = len(layers)
        layers += _lstm(config, dim)
        layers += [nn.ELU(), config.conv(dim, config.dimension, config.last_kernel_size)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        if records_gradients(self, x):
            latent: Tensor = self.model(x)
            return latent
        return collect(self.pieces(x), -(-x.shape[-1] // self.hop_length))

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """The latent, piece by piece."""
        if is_short(len(x), -(-x.shape[-1] // self.hop_length)):
            return iter([self.model(x)])
        return run(self.stream(), x, BLOCK_FRAMES * self.hop_length)

    def stream(self) -> "EncoderStream":
        """The encoder at the beginning of a clip, for inference."""
        return EncoderStream(
            chain(list(self.model)[: self.num_sample_layers]),
            chain(list(self.model)[self.num_sample_layers :]),
            self.hop_length,
        )


class SEANetDecoder(nn.Module):
    """Latent (B, dimension, T) to audio (B, channels, T * hop), in bounded memory as encoding."""

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        self.hop_length = config.hop_length
        dim = config.n_filters * 2 ** len(config.ratios)
        layers: list[nn.Module] = [config.conv(config.dimension, dim, config.kernel_size)]
        layers += _lstm(config, dim)
        self.num_frame_layers = len(layers)
        for ratio in config.ratios:
            upsample = StreamableConvTranspose1d(
                dim, dim // 2, 2 * ratio, ratio, config.causal, config.trim_right_ratio
            )
            layers += [nn.ELU(), upsample]
            dim //= 2
            layers += _residuals(config, dim)
        layers += [nn.ELU(), config.conv(dim, config.channels, config.last_kernel_size)]
        self.model = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Decode."""
        if is_short(len(z), z.shape[-1]) or records_gradients(self, z):
            audio: Tensor = self.model(z)
            return audio
        return collect(run(self.stream(), z, BLOCK_FRAMES), z.shape[-1] * self.hop_length)

    def stream(self) -> "DecoderStream":
        """The decoder at the beginning of a clip, for inference."""
        return DecoderStream(
            chain(list(self.model)[: self.num_frame_layers]),
            chain(list(self.model)[self.num_frame_layers :]),
        )


@dataclass
class EncoderStream:
    """An encoder on its way through one clip.

    Attributes:
        samples: the layers that hear audio.
        frames: those behind them, at the frame rate.
        hop_length: samples per frame.
    """

    samples: Chain
    frames: Chain
    hop_length: int

    def push(self, x: Tensor, last: bool) -> Tensor:
        """Hear the next piece of audio; see `Stream`."""
        hidden = [
            self.samples.push(piece, last and end)
            for piece, end in split(x, _piece_frames(len(x)) * self.hop_length)
        ]
        return self.frames.push(torch.cat(hidden, dim=-1), last)


@dataclass
class DecoderStream:
    """A decoder on its way through one latent.

    Attributes:
        frames: the layers at the frame rate.
        samples: those behind them, which upsample.
    """

    frames: Chain
    samples: Chain

    def push(self, x: Tensor, last: bool) -> Tensor:
        """Hear the next piece of the latent; see `Stream`."""
        hidden = self.frames.push(x, last)
        audio = [
            self.samples.push(piece, last and end)
            for piece, end in split(hidden, _piece_frames(len(x)))
        ]
        return torch.cat(audio, dim=-1)
