"""Pieces as sound."""

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audiocraft.data.audio_utils import measure_loudness
from tools.synthetic_music.composing import Composition, compose
from tools.synthetic_music.midi import play
from tools.synthetic_music.pieces import Piece

RATE: Final = 32000
"""Hz, of the codec."""

LOUDNESS: Final = -16.0
"""LKFS of every piece, before its peaks are lowered."""

PEAK: Final = 0.94
"""What no sample exceeds."""

# Milliseconds of a frame of the codec. A note that begins with a frame has the same codes wherever
# it is played, as far as it is heard alone, and what repeats in music repeats in them.
_GRID: Final = 20

_OPTIONS: Final = (
    *("-T", "raw", "-O", "float", "-g", "0.3"),
    *("-C", "0"),  # the chorus costs a quarter of the time
    *("-o", "synth.reverb.room-size=0.3", "-o", "synth.reverb.level=0.5"),
    # Only the samples that a piece uses are read: 10 s take 0.12 s instead of 0.3.
    *("-o", "synth.dynamic-sample-loading=1"),
)
_FADE: Final = 0.3  # seconds, of what still sounds at the end
_LOOK: Final = 0.003  # seconds by which a peak is seen before and after
_AHEAD: Final = 2  # pieces that wait for the consumer, for each job


def render(composition: Composition, melody_only: bool = False) -> Tensor:
    """A piece as sound.

    Args:
        composition: what is played.
        melody_only: leave the band out.

    Returns:
        (2, T), float32 at `RATE`, as loud as all others, within `PEAK`.

    Raises:
        AssetError: fluidsynth or the sound font is not installed.
        subprocess.CalledProcessError: fluidsynth fails.
    """
    with tempfile.TemporaryDirectory(prefix="synthetic_music-") as folder:
        midi, audio = Path(folder, "piece.mid"), Path(folder, "piece.raw")
        midi.write_bytes(composition.midi(melody_only, _GRID))
        play(midi, audio, RATE, *_OPTIONS)
        played = np.fromfile(audio, np.float32).reshape(-1, 2).T
    length = round(composition.piece.seconds * RATE)
    wav = np.zeros((2, length), np.float32)
    wav[:, : played.shape[1]] = played[:, :length]
    fade = round(_FADE * RATE)
    wav[:, -fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    # Measured softly, since the measure cuts what exceeds full scale.
    wav *= 0.25 / np.abs(wav).max()
    wav *= 10 ** ((LOUDNESS - measure_loudness(torch.from_numpy(wav), RATE)) / 20)
    return torch.from_numpy(_limit(wav))


def rendered(pieces: Iterable[Piece], jobs: int = 1) -> Iterator[tuple[Composition, Tensor]]:
    """Compose and render pieces, a few ahead of their consumer.

    Args:
        pieces: what to render.
        jobs: how many at a time.

    Yields:
        In order, each piece in notes and, see `render`, as sound.
    """
    with ThreadPoolExecutor(jobs) as pool:
        waiting: deque[Future[tuple[Composition, Tensor]]] = deque()
        for piece in pieces:
            waiting.append(pool.submit(_perform, piece))
            if len(waiting) > _AHEAD * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _perform(piece: Piece) -> tuple[Composition, Tensor]:
    composition = compose(piece)
    return composition, render(composition)


def _limit(wav: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lower the level around peaks, smoothly.

    Each sample's gain is the mean of the least gains that are needed within `_LOOK` of those within
    `_LOOK` of it: it is never more than the sample itself needs.
    """
    from scipy.ndimage import minimum_filter1d, uniform_filter1d

    peaks = np.abs(wav).max(0).astype(np.float64)
    if peaks.max() <= PEAK:
        return wav
    width = 2 * round(_LOOK * RATE) + 1
    needed = minimum_filter1d(np.minimum(1, PEAK / np.maximum(peaks, 1e-9)), width)
    return np.asarray(wav * uniform_filter1d(needed, width), np.float32).clip(-PEAK, PEAK)
