"""Chromagram of a melody: which of the twelve pitch classes sounds in each frame.

Golden test: `chroma`.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _PowerSpectrogram(nn.Module):
    """Power spectrogram over a periodic Hann window, divided by the window's energy.

    The window is a persistent buffer because official checkpoints hold it.
    """

    window: Tensor

    def __init__(self, n_fft: int, win_length: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.register_buffer("window", torch.hann_window(win_length))

    def forward(self, wav: Tensor) -> Tensor:
        """Spectrogram (B, n_fft / 2 + 1, frames) of (B, T) with T >= n_fft."""
        window = self.window.float()
        spectrum = torch.stft(
            wav,
            self.n_fft,
            self.hop_length,
            win_length=window.shape[0],
            window=window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        return spectrum.abs().square() / window.square().sum()


@cache
def _filter_bank(sample_rate: int, nfft: int, n_chroma: int) -> Tensor:
    from librosa import filters  # only where there is a melody: it takes a second

    bank = filters.chroma(sr=sample_rate, n_fft=nfft, tuning=0, n_chroma=n_chroma)
    return torch.from_numpy(bank).float()


class ChromaExtractor(nn.Module):
    """Chroma features, or with `argmax` a one-hot choice of the strongest pitch class.

    Args:
        sample_rate: Hz of the input.
        n_chroma: number of pitch classes.
        radix2_exp: the transform has `2 ** radix2_exp` samples.
        nfft: transform size in samples, if not that.
        winlen: window in samples; the transform's size if not given.
        winhop: hop in samples; a quarter of the window if not given.
        argmax: one-hot instead of intensities.
        norm: order of the norm that each frame is divided by.
    """

    def __init__(
        self,
        sample_rate: int,
        n_chroma: int = 12,
        radix2_exp: int = 12,
        nfft: int | None = None,
        winlen: int | None = None,
        winhop: int | None = None,
        argmax: bool = False,
        norm: float = math.inf,
    ) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.n_chroma = n_chroma
        self.nfft = nfft or 2**radix2_exp
        self.winlen = winlen or self.nfft
        self.winhop = winhop or self.winlen // 4
        self.argmax = argmax
        self.norm = norm
        self.spec = _PowerSpectrogram(self.nfft, self.winlen, self.winhop)

    @property
    def fbanks(self) -> Tensor:
        """Share of each frequency in each pitch class, (n_chroma, nfft / 2 + 1)."""
        bank = _filter_bank(self.sample_rate, self.nfft, self.n_chroma)
        return bank.to(self.spec.window.device)

    def num_frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples; short clips are padded to one transform."""
        return 1 + max(samples, self.nfft) // self.winhop

    def forward(self, wav: Tensor) -> Tensor:
        """Chroma (B, frames, n_chroma), float32, of mono audio (B, T) or (B, 1, T)."""
        wav = wav.flatten(0, -2).float()
        missing = self.nfft - wav.shape[-1]
        if missing > 0:
            wav = F.pad(wav, (missing // 2, missing - missing // 2))
        chroma = self.fbanks @ self.spec(wav)
        chroma = F.normalize(chroma, p=self.norm, dim=1, eps=1e-6).transpose(1, 2)
        if self.argmax:
            strongest = chroma.argmax(dim=-1, keepdim=True)
            chroma = torch.zeros_like(chroma).scatter_(-1, strongest, 1.0)
        return chroma
