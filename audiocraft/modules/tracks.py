"""Long activations, window by window.

Group normalisation takes its statistics from the whole clip, so a network with such layers cannot
be run on pieces of a clip by themselves. A `Track` is the activation of a whole clip of which
windows are computed when they are asked for. One sweep gathers the statistics of the next
normalisation, and keeps the activation where it is small enough; where it is not, its windows are
computed again when they are read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FEWEST_FRAMES = 512  # in a window: a convolution reads all its weights for each


class Track:
    """An activation (R, channels, frames) of a whole clip.

    Args:
        channels: of each frame.
        frames: of the clip.
        compute: gives the frames from a start to a stop, (R, channels, stop - start).
        held: the whole of it, if it is in memory.
    """

    def __init__(
        self,
        channels: int,
        frames: int,
        compute: Callable[[int, int], Tensor],
        held: Tensor | None = None,
    ) -> None:
        self.channels = channels
        self.frames = frames
        self.held = held
        self._compute = compute
        self._last: tuple[int, Tensor] = (0, torch.empty(0))

    @classmethod
    def of(cls, whole: Tensor) -> "Track":
        """From all of it."""
        return cls(
            whole.shape[1], whole.shape[2], lambda start, stop: whole[..., start:stop], whole
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Frames from `start` to `stop`; not to be written to.

        A residual block reads a window and then its inside, so the last one is remembered.
        """
        if self.held is not None:
            return self.held[..., start:stop]
        begin, window = self._last
        if not begin <= start < stop <= begin + window.shape[-1]:
            begin, window = start, self._compute(start, stop)
            self._last = begin, window
        return window[..., start - begin : stop - begin]

    def around(self, start: int, stop: int, halo: int) -> tuple[Tensor, int]:
        """Frames from `start` to `stop` and up to `halo` more on each side; where it begins."""
        begin = max(0, start - halo)
        return self.read(begin, min(self.frames, stop + halo)), begin


class Moments:
    """Mean and variance of each group of channels, piece by piece.

    Args:
        rows: R.
        groups: of the normalisation.
        device: of the pieces.
    """

    def __init__(self, rows: int, groups: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, rows, groups, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, piece: Tensor) -> None:
        """Take note of (R, channels, frames)."""
        norms = torch.linalg.vector_norm(piece, dim=-1, dtype=torch.float32).double()
        sums = piece.sum(dim=-1, dtype=torch.float32).double()
        rows, groups = self._sums.shape[1:]
        self._sums[0] += sums.view(rows, groups, -1).sum(dim=-1)
        self._sums[1] += norms.square_().view(rows, groups, -1).sum(dim=-1)
        self._count += piece.shape[1] // groups * piece.shape[2]

    def scale_and_shift(self, norm: nn.GroupNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a normalisation multiplies by and adds, each (R, channels, 1)."""
        mean, square = self._sums / self._count
        inverse = (square - mean**2).clamp_min(0).add_(norm.eps).rsqrt()
        width = norm.num_channels // norm.num_groups
        scale = inverse.repeat_interleave(width, dim=1) * norm.weight
        shift = norm.bias - mean.repeat_interleave(width, dim=1) * scale
        return scale[..., None].to(dtype), shift[..., None].to(dtype)


@dataclass(frozen=True)
class Sweep:
    """How activations of a clip are gone through.

    Attributes:
        rows: R, clips side by side.
        samples: of the audio in a window.
        most_bytes: of an activation that is kept.
    """

    rows: int
    samples: int
    most_bytes: int

    def keep(self, track: Track, hop: int, groups: int, into: Track | None = None) -> "Kept":
        """Go through a track once.

        Args:
            track: the activation.
            hop: samples of audio per frame.
            groups: of the normalisation that comes next.
            into: an activation of the same shape that is written over, if it is in memory, where
                `track` reads no frame of it but the one that is computed.

        Returns:
            It, kept if it is small enough, and its statistics.
        """
        whole = track.held if into is None else into.held
        moments: Moments | None = None
        for start, stop in self.windows(track.frames, hop):
            piece = track.read(start, stop)
            fits = self.fits(track, piece.dtype)
            if stop - start == track.frames and fits:
                return Kept(Track.of(piece), None)
            if moments is None:
                moments = Moments(self.rows, groups, piece.device)
                if whole is None and fits:
                    whole = piece.new_empty(self.rows, track.channels, track.frames)
            moments.add(piece)
            if whole is not None and whole is not track.held:
                whole[..., start:stop] = piece
        return Kept(track if whole is None else Track.of(whole), moments)

    def hold(self, track: Track, hop: int) -> Tensor:
        """All of a track, whatever its size."""
        if track.held is not None:
            return track.held
        pieces = [track.read(start, stop) for start, stop in self.windows(track.frames, hop)]
        return torch.cat(pieces, dim=-1)

    def windows(self, frames: int, hop: int) -> Iterator[tuple[int, int]]:
        """Where windows of a track start and stop."""
        size = max(_FEWEST_FRAMES, self.samples // hop)
        for start in range(0, frames, size):
            yield start, min(frames, start + size)

    def fits(self, track: Track, dtype: torch.dtype) -> bool:
        """Whether all of a track is kept."""
        return self.rows * track.channels * track.frames * dtype.itemsize <= self.most_bytes


@dataclass(frozen=True)
class Kept:
    """A track that was gone through.

    Attributes:
        track: the activation.
        moments: the statistics of its groups; None where it is in memory, in a single window.
    """

    track: Track
    moments: Moments | None

    def normalized(self, norm: nn.GroupNorm) -> Track:
        """ReLU of the normalised activation."""
        source = self.track
        if self.moments is None:
            whole = source.read(0, source.frames)
            return Track.of(F.relu_(norm(whole)))
        scale, shift = self.moments.scale_and_shift(norm, norm.weight.dtype)
        return Track(
            source.channels,
            source.frames,
            # On a CPU these are faster than `addcmul`, by half.
            lambda start, stop: (source.read(start, stop) * scale).add_(shift).relu_(),
        )
