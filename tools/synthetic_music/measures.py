"""What is heard in music whose truth is known: tempo, key, melody, stereo.

The lead instrument is told by `classifier.py`. Tempo and key are the library's own labels, which
were learnt from other music than this (see `tools/fit_labels.py`).
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from audiocraft.data import key, tempo
from audiocraft.data.labels import mono_at
from audiocraft.modules.chroma import ChromaExtractor
from tools.synthetic_music.composing import MelodyNote

TOLERANCE: Final = 0.04
"""Share of a tempo by which a right one may differ."""

_MULTIPLES: Final = (1.0, 2.0, 0.5)
_CHROMA_EXPONENT: Final = 14  # of the window, as in the melody versions' conditioner
_CLASSES: Final = 12


def bpm_of(wav: Tensor, sample_rate: int) -> float:
    """Beats a minute.

    Args:
        wav: (C, T) of 8 s or more, not silent.
        sample_rate: Hz.
    """
    return tempo.find_tempo(mono_at(wav, sample_rate, tempo.RATE)).bpm


def same_tempo(found: float, truth: float) -> bool:
    """Whether a tempo is the true one, its double or its half, within `TOLERANCE`."""
    return any(abs(found / (truth * multiple) - 1) <= TOLERANCE for multiple in _MULTIPLES)


def key_of(wav: Tensor, sample_rate: int) -> str:
    """Key with mode, one of `KEYS` in `pieces.py`.

    Args:
        wav: (C, T) of 8 s or more.
        sample_rate: Hz.
    """
    return key.find_key(mono_at(wav, sample_rate, key.RATE)).name


def stereo_width(wav: Tensor) -> float:
    """RMS of half the difference of the sides over that of their mean.

    Args:
        wav: (2, T), not silent.

    Returns:
        0 where both are equal; 1 where they have nothing in common and are equally loud.
    """
    side, middle = (wav[0] - wav[1]) / 2, (wav[0] + wav[1]) / 2
    return float(side.square().mean().sqrt() / middle.square().mean().sqrt())


def chroma_of(wav: Tensor, sample_rate: int) -> Tensor:
    """The strongest pitch class of each moment, as a melody is given to the model.

    Args:
        wav: (C, T).
        sample_rate: Hz.

    Returns:
        (frames, 12), one-hot, from C; silent moments are C.
    """
    chroma: Tensor = _extractor(sample_rate)(wav.mean(0, keepdim=True))
    return chroma[0]


def melody_chroma(melody: Sequence[MelodyNote], seconds: float, sample_rate: int) -> Tensor:
    """What `chroma_of` would be if only a melody's fundamentals were heard.

    Args:
        melody: one note at a time.
        seconds: of the piece.
        sample_rate: Hz.

    Returns:
        (frames, 12), one-hot for the note that sounds longest in a frame's window, 0 in pauses.
    """
    extractor = _extractor(sample_rate)
    frames = extractor.num_frames(round(seconds * sample_rate))
    middles = torch.arange(frames) * extractor.winhop / sample_rate
    half = extractor.winlen / 2 / sample_rate
    sounding = torch.zeros(frames, _CLASSES)
    for note in melody:
        begin = (middles - half).clamp(min=note.onset)
        end = (middles + half).clamp(max=note.onset + note.duration)
        sounding[:, note.pitch % _CLASSES] += (end - begin).clamp(min=0)
    longest = F.one_hot(sounding.argmax(1), _CLASSES).float()
    return longest * (sounding.sum(1, keepdim=True) > 0)


def chroma_similarity(chroma: Tensor, reference: Tensor) -> float:
    """Mean cosine of two chromas over the frames in which the reference has something.

    Args:
        chroma: (frames, 12).
        reference: (frames, 12); the longer one's end is left out.

    Returns:
        0 to 1; of one-hot chromas the share of frames that agree.
    """
    frames = min(len(chroma), len(reference))
    chroma, reference = chroma[:frames], reference[:frames]
    heard = reference.any(1)
    return float(F.cosine_similarity(chroma[heard], reference[heard], dim=1).mean())


def _extractor(sample_rate: int) -> ChromaExtractor:
    return ChromaExtractor(sample_rate, radix2_exp=_CHROMA_EXPONENT, argmax=True)
