"""Pieces as sound."""

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tools.synthetic_music.composing import Composition, compose
from tools.synthetic_music.midi import play
from tools.synthetic_music.pieces import FRAME, Piece

RATE: Final = 32000
"""Hz, of the codec."""

PEAK: Final = 0.94
"""What no sample exceeds."""

# Milliseconds of a frame of the codec. A note that begins with a frame has the same codes wherever
# it is played, as far as it is heard alone, and what repeats in music repeats in them.
_GRID: Final = round(1000 * FRAME)

_OPTIONS: Final = (
    # A note is as loud in all pieces: 48 of them have -19 to -15 LKFS, and hardly one comes near
    # full scale.
    *("-T", "raw", "-O", "float", "-g", "1.3"),
    *("-C", "0"),  # the chorus costs a quarter of the time
    # A tail on all that follows would hide from the codes that a note is heard again.
    *("-R", "0"),
    # Only the samples that a piece uses are read: 10 s take 0.12 s instead of 0.3.
    *("-o", "synth.dynamic-sample-loading=1"),
)
_FADE: Final = 0.3  # seconds, of what still sounds at the end
_AHEAD: Final = 2  # pieces that wait for the consumer, for each job


def render(composition: Composition, melody_only: bool = False) -> Tensor:
    """A piece as sound.

    Args:
        composition: what is played.
        melody_only: leave the band out.

    Returns:
        (2, T), float32 at `RATE`, within `PEAK`.

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
    return torch.from_numpy(wav * min(1.0, PEAK / float(np.abs(wav).max())))


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
