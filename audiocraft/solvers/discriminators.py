"""What tells decoded audio from real: networks on complex spectra, and the losses of both sides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

_DILATIONS = (1, 2, 4)  # over time, of the layers that halve the frequencies
_SLOPE = 0.2  # of the activations below zero
_EXPONENT, _LEAST = 0.3, 1e-4  # of the magnitudes that are heard, and below which they are silence


@dataclass(frozen=True)
class DiscriminatorSettings:
    """Shape of the discriminators.

    Attributes:
        windows: samples of each one's spectrum; the hop is a quarter.
        filters: channels of their layers.
        lowest: Hz, below which they do not listen. Where a codec reproduces the waveform itself,
            errors of time and spectra say more than they could.
    """

    windows: tuple[int, ...] = (2048, 1024, 512)
    filters: int = 16
    lowest: float = 0.0


@dataclass(frozen=True)
class Judgement:
    """What a discriminator makes of audio.

    Attributes:
        scores: (B, 1, frames, bands), high where the audio seems real.
        features: what each layer but the last gives, (B, filters, frames, bands) each.
    """

    scores: Tensor
    features: tuple[Tensor, ...]


class SpectrumDiscriminator(nn.Module):
    """Convolutions over time and frequency on the complex spectrum of one window.

    Source: the multi-scale STFT discriminator of EnCodec (Defossez et al. 2022, arXiv 2210.13438,
    section 3.4): real and imaginary part are channels, layers dilated in time halve the
    frequencies.

    Args:
        sample_rate: Hz.
        window: samples.
        settings: shape.
    """

    window: Tensor

    def __init__(self, sample_rate: int, window: int, settings: DiscriminatorSettings) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self._first = math.ceil(settings.lowest * window / sample_rate)
        filters = settings.filters
        layers = [_conv(2, filters, (3, 9))]
        layers += [_conv(filters, filters, (3, 9), 2, dilation) for dilation in _DILATIONS]
        layers += [_conv(filters, filters, (3, 3))]
        self.layers = nn.ModuleList(layers)
        self.last = _conv(filters, 1, (3, 3))

    def forward(self, wav: Tensor) -> Judgement:
        """Judge audio (B, T)."""
        size = len(self.window)
        spectrum = torch.stft(
            wav.float(), size, size // 4, window=self.window, return_complex=True
        )[:, self._first :]
        x = torch.view_as_real(_compressed(spectrum / self.window.norm())).permute(0, 3, 2, 1)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return Judgement(self.last(x), tuple(features))


class Discriminators(nn.Module):
    """A discriminator for each window.

    Args:
        sample_rate: Hz.
        settings: shape.
    """

    def __init__(self, sample_rate: int, settings: DiscriminatorSettings) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            SpectrumDiscriminator(sample_rate, window, settings) for window in settings.windows
        )

    def forward(self, wav: Tensor) -> list[Judgement]:
        """Judge audio (B, T)."""
        return [scale(wav) for scale in self.scales]


def discriminator_loss(real: Sequence[Judgement], decoded: Sequence[Judgement]) -> Tensor:
    """Hinge loss of the discriminators: real audio should score 1 or more, decoded -1 or less."""
    losses = [
        F.relu(1 - one.scores.float()).mean() + F.relu(1 + other.scores.float()).mean()
        for one, other in zip(real, decoded, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(decoded: Sequence[Judgement]) -> Tensor:
    """Hinge loss of the codec: what it decodes should score 1 or more."""
    return torch.stack([F.relu(1 - one.scores.float()).mean() for one in decoded]).mean()


def feature_loss(real: Sequence[Judgement], decoded: Sequence[Judgement]) -> Tensor:
    """L1 of the features relative to those of the real audio, which get no gradient."""
    losses = []
    for one, other in zip(real, decoded, strict=True):
        for theirs, ours in zip(one.features, other.features, strict=True):
            target = theirs.detach().float()
            losses.append(F.l1_loss(ours.float(), target) / target.abs().mean().clamp(min=1e-8))
    return torch.stack(losses).mean()


def _compressed(spectrum: Tensor) -> Tensor:
    """A spectrum with its phases and a power of its magnitudes.

    The highest harmonics are a thousandth of the lowest: of spectra as they are, a discriminator
    could not tell anything after 200 updates, and of these after 30.
    """
    power = torch.view_as_real(spectrum).square().sum(-1) + _LEAST**2
    return spectrum * power ** ((_EXPONENT - 1) / 2)


def _conv(
    inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, dilation: int = 1
) -> nn.Module:
    """A convolution over (time, frequency) that keeps the frames."""
    padding = (dilation * (kernel[0] // 2), kernel[1] // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, (1, stride), padding, (dilation, 1))
    nn.init.kaiming_normal_(conv.weight, _SLOPE)  # activations keep their size
    normalized: nn.Module = weight_norm(conv)
    return normalized
