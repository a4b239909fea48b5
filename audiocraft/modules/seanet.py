"""SEANet: the convolutional encoder and decoder of EnCodec.

Golden test: `encodec_tiny`.
"""

import logging
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from audiocraft.modules.conv import PadMode, StreamableConv1d, StreamableConvTranspose1d
from audiocraft.modules.lstm import StreamableLSTM
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)

_CHUNK_FRAMES = 500
# A sample depends on less than 4 frames to either side in the released shape.
_CONTEXT_FRAMES = 16
_QUIET_S = 5.0


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


def _residuals(config: SEANetConfig, dim: int) -> list[nn.Module]:
    return [
        SEANetResnetBlock(config, dim, config.dilation_base**j)
        for j in range(config.n_residual_layers)
    ]


def _lstm(config: SEANetConfig, dim: int) -> list[nn.Module]:
    return [StreamableLSTM(dim, config.lstm)] if config.lstm else []


class SEANetEncoder(nn.Module):
    """Audio (B, channels, T) to latent (B, dimension, ceil(T / hop))."""

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        dim = config.n_filters
        layers: list[nn.Module] = [config.conv(config.channels, dim, config.kernel_size)]
        for ratio in reversed(config.ratios):
            layers += _residuals(config, dim)
            layers += [nn.ELU(), config.conv(dim, 2 * dim, 2 * ratio, stride=ratio)]
            dim *= 2
        layers += _lstm(config, dim)
        layers += [nn.ELU(), config.conv(dim, config.dimension, config.last_kernel_size)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        latent: Tensor = self.model(x)
        return latent


class SEANetDecoder(nn.Module):
    """Latent (B, dimension, T) to audio (B, channels, T * hop).

    Upsampling takes the memory: 80 MB per second of stereo at the released size. It is done in
    chunks, each with as many frames around it as its samples depend on, so that any length fits
    and nothing is heard of it.
    """

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
        hidden = self.model[: self.num_frame_layers](z)
        frames = hidden.shape[-1]
        pieces = []
        progress = ProgressLog(logger, "frames", "decoding", quiet_s=_QUIET_S)
        for start in range(0, frames, _CHUNK_FRAMES):
            stop = min(start + _CHUNK_FRAMES, frames)
            first = max(0, start - _CONTEXT_FRAMES)
            around = hidden[..., first : stop + _CONTEXT_FRAMES]
            wav = self.model[self.num_frame_layers :](around)
            pieces.append(
                wav[..., (start - first) * self.hop_length : (stop - first) * self.hop_length]
            )
            progress.update(stop, frames)
        return torch.cat(pieces, dim=-1)
