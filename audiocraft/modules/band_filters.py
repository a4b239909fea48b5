"""Frequency bands of audio of any length, in bounded memory.

Bands are differences of low-pass filters, as `julius.SplitBands` makes them. A weighted sum of
bands is one filter, so no band of a whole clip is ever held. Golden test: `mbd_tiny`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 2**18
"""Samples that are filtered at once."""


def low_pass_filters(sample_rate: int, n_bands: int, device: torch.device) -> Tensor:
    """Filters (n_bands - 1, 1, taps) at cut-offs that are evenly spaced in mel.

    Args:
        sample_rate: Hz.
        n_bands: bands, at least 2.
        device: where they will be used.
    """
    from julius.bands import SplitBands

    filters = SplitBands(sample_rate, n_bands=n_bands).lowpass.filters
    assert isinstance(filters, Tensor)
    return filters.to(device)


def band_stds(wav: Tensor, filters: Tensor) -> Tensor:
    """Standard deviation of each band, over all of a batch.

    Args:
        wav: [B, C, T].
        filters: (n_bands - 1, 1, taps), from `low_pass_filters`.

    Returns:
        (n_bands,), float64.
    """
    shape = (len(filters) + 1,)
    sums = torch.zeros(shape, dtype=torch.float64, device=wav.device)
    squares = torch.zeros_like(sums)
    for row in wav.reshape(-1, 1, 1, wav.shape[-1]).unbind():
        for start, low in _filtered(row, filters):
            piece = row[..., start : start + low.shape[-1]]
            bands = torch.cat([low, piece], dim=1)[0].diff(
                dim=0, prepend=torch.zeros_like(piece)[0]
            )
            sums += bands.sum(dim=-1)
            squares += torch.linalg.vector_norm(bands, dim=-1).double() ** 2
    count = wav.numel()
    return ((squares - sums**2 / count) / (count - 1)).clamp_min(0).sqrt()


def weighted_bands(wav: Tensor, filters: Tensor, gains: Tensor) -> Tensor:
    """Sum of bands, each times its gain.

    Args:
        wav: [B, C, T].
        filters: (n_bands - 1, 1, taps), from `low_pass_filters`.
        gains: (n_bands,).

    Returns:
        [B, C, T].
    """
    # Band i is low-pass i less low-pass i - 1, and the last is the audio less the last low-pass.
    weights = (gains[:-1] - gains[1:]).double()
    combined = (weights[:, None, None] * filters.double()).sum(dim=0, keepdim=True).float()
    out = wav * gains[-1].to(wav.dtype)
    for row, result in zip(
        wav.reshape(-1, 1, 1, wav.shape[-1]), out.view(-1, 1, 1, wav.shape[-1]), strict=True
    ):
        for start, low in _filtered(row, combined):
            result[..., start : start + low.shape[-1]] += low
    return out


def _filtered(row: Tensor, filters: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Where each chunk begins, and (1, F, chunk) through each filter; the ends are continued."""
    from julius.fftconv import fft_conv1d

    half, length = filters.shape[-1] // 2, row.shape[-1]
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        low, high = max(0, start - half), min(length, stop + half)
        missing = (low - (start - half), (stop + half) - high)
        yield start, fft_conv1d(F.pad(row[..., low:high], missing, "replicate"), filters)
