"""How far audio is from what it should be: in time, and in spectra at several scales."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MELS_PER_SAMPLE = 1 / 8  # of the window: more filters than this have no bin of their own
_FLOOR = 1e-5  # of magnitudes, below which the measure does not look
# And the loss. What is softer is heard by nobody, but it would have most of the gradient: a decoder
# trained on for two minutes came from 5.53 dB of log-mel distance to 5.11, and to 5.48 with the
# measure's.
_LEAST = 1e-3
_DECIBELS = 20.0


class MelSpectrogram(nn.Module):
    """Magnitudes in mel bands, of a spectrum normalised by its window's energy.

    Args:
        sample_rate: Hz.
        window: samples, a power of two; the hop is a quarter of it.
        mels: bands, at most an eighth of the window.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, window: int, mels: int = 64) -> None:
        super().__init__()
        from librosa.filters import mel

        mels = min(mels, int(window * _MELS_PER_SAMPLE))
        filters = mel(sr=sample_rate, n_fft=window, n_mels=mels, norm=None)
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        """(B, T) to (B, mels, frames), float32."""
        size = len(self.window)
        spectrum = torch.stft(
            wav.float(), size, size // 4, window=self.window, return_complex=True, normalized=False
        )
        bands: Tensor = self.filters @ (spectrum.abs() / self.window.norm())
        return bands


class MultiScaleMelLoss(nn.Module):
    """L1 of magnitudes and L2 of their logarithms in mel bands, each a mean over some windows.

    Source: the reconstruction loss in frequency of EnCodec (Defossez et al. 2022, section 3.4, with
    all alpha at 1), whose second term is of logarithms as in Gritsenko et al. 2020
    (arXiv 2008.01160, equation 8). Both terms are means over bands and frames, so windows count
    alike. Short windows get fewer bands than 64, which would have no bin of their own.

    Args:
        sample_rate: Hz.
        windows: samples of each.
    """

    def __init__(self, sample_rate: int, windows: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(MelSpectrogram(sample_rate, window) for window in windows)

    def forward(self, decoded: Tensor, wav: Tensor) -> Tensor:
        """A scalar, >= 0, of audio (B, T) that should be another's."""
        loss = decoded.new_zeros(())
        for mel in self.scales:
            ours, theirs = mel(decoded), mel(wav)
            log_ours, log_theirs = (torch.log(_LEAST + value) for value in (ours, theirs))
            distance = (log_ours - log_theirs).square().mean(dim=1)  # over the bands
            loss = loss + F.l1_loss(ours, theirs) + (distance + _FLOOR).sqrt().mean()
        return loss / len(self.scales)


def si_sdr(decoded: Tensor, wav: Tensor) -> Tensor:
    """Scale-invariant ratio of signal to distortion.

    Source: Le Roux et al. 2019 (arXiv 1811.02508, equation 3).

    Args:
        decoded: (B, T).
        wav: (B, T), what it should be.

    Returns:
        (B,), decibels.
    """
    decoded, wav = decoded.double(), wav.double()
    energy = wav.square().sum(-1, keepdim=True).clamp(min=torch.finfo(wav.dtype).tiny)
    target = (decoded * wav).sum(-1, keepdim=True) / energy * wav
    rest = (decoded - target).square().sum(-1).clamp(min=torch.finfo(wav.dtype).tiny)
    return 10 * torch.log10(target.square().sum(-1) / rest)


@dataclass(frozen=True)
class LogMelDistance:
    """Mean distance of two mel spectra in decibels, as a measure for reports.

    Attributes:
        mel: the spectrum.
        floor: decibels under the loudest band of the audio that should be, below which all is
            silence.
    """

    mel: MelSpectrogram
    floor: float = 80.0

    def __call__(self, decoded: Tensor, wav: Tensor) -> Tensor:
        """(B,), decibels, of audio (B, T) that should be another's."""
        ours, theirs = self.mel(decoded), self.mel(wav)
        least = theirs.amax(dim=(1, 2), keepdim=True).clamp(min=_FLOOR)
        least = least * 10 ** (-self.floor / _DECIBELS)
        ours, theirs = (torch.log10(torch.maximum(value, least)) for value in (ours, theirs))
        return _DECIBELS * (ours - theirs).abs().mean(dim=(1, 2))
