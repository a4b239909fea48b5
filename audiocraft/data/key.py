"""The key of a clip, with its mode.

What sounds is told from what strikes by median filters (Fitzgerald, "Harmonic/Percussive Separation
using Median Filtering", 2010); the peaks of what sounds give the share of each of the twelve pitch
classes; and that is compared with the shares that each key is known for, as in Krumhansl's method.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from audiocraft.data.key_profiles import MAJOR, MINOR, MINOR_BIAS

RATE: Final = 11025
"""Hz of the audio that this module takes: the harmonics of interest lie below 5 kHz."""

SHORTEST: Final = 10.0
"""Seconds it takes: of rendered clips of 5 s four in ten come out wrong, of 10 s one in ten."""

LONGEST: Final = 120.0
"""Seconds that are used, from the middle of what is longer: it bounds time and memory."""

NAMES: Final = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")

_WINDOW: Final = 4096
_HOP: Final = 1024
_STEADY: Final = 9  # frames, 0.8 s
_BROAD: Final = 31  # bins, 83 Hz
_LOWEST, _HIGHEST = 28, 99  # MIDI notes, 41 Hz to 2.5 kHz
# Rendered music has a tonality of 0.38 and a contrast of 0.20 at the least. White and pink noise
# stay below 0.33 and 0.16, brown noise below 0.42 and 0.10, drums mostly below 0.17 and 0.18.
_TONAL: Final = 0.35
_CONTRAST: Final = 0.19
_CLEAR: Final = 0.5
_SOUNDING: Final = 0.1
_QUIET: Final = 0.003  # of the loudest frame: what is below counts less and less

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Key:
    """A key, and how sure it is that there is one.

    Attributes:
        name: such as `F# minor` or `Bb major`.
        chance: that it is this one of the 24, 0 to 1, of rendered music.
        tonality: share of the energy that is in steady tones, 0 to 1.
        contrast: standard deviation of the twelve pitch classes, the strongest being 1.
        third: the third strongest of them.
    """

    name: str
    chance: float
    tonality: float
    contrast: float
    third: float

    @property
    def is_tonal(self) -> bool:
        """Whether there are tones of some pitches rather than of all, or none."""
        return self.tonality >= _TONAL and self.contrast >= _CONTRAST

    @property
    def is_clear(self) -> bool:
        """Whether this key is likelier than all others together, of three notes or more."""
        return self.chance >= _CLEAR and self.third >= _SOUNDING


def find_key(mono: NDArray[np.float32]) -> Key:
    """Key of music.

    Args:
        mono: samples (T,) at `RATE`, two seconds or more; below `SHORTEST` it is often wrong.
    """
    surplus = len(mono) - round(LONGEST * RATE)
    if surplus > 0:
        mono = mono[surplus // 2 : len(mono) - (surplus + 1) // 2]
    chroma, tonality = chroma_of(mono)
    scores = key_features(chroma) @ np.array([*MAJOR, *MINOR, MINOR_BIAS])
    best = int(np.argmax(scores))
    minor, tonic = divmod(best, 12)
    return Key(
        f"{NAMES[tonic]} {'minor' if minor else 'major'}",
        float(1 / np.exp(scores - scores[best]).sum()),
        tonality,
        float(chroma.std()),
        float(np.sort(chroma)[-3]),
    )


def chroma_of(mono: NDArray[np.float32]) -> tuple[Floats, float]:
    """How much of each pitch class sounds, whatever the tuning.

    Args:
        mono: samples (T,) at `RATE`.

    Returns:
        (12,) from C, the most is 1; and the share of the energy that is in steady tones.
    """
    from scipy.ndimage import median_filter
    from scipy.signal import stft

    _, _, spectrum = stft(
        mono, RATE, nperseg=_WINDOW, noverlap=_WINDOW - _HOP, padded=False, boundary=None
    )
    power = np.abs(spectrum).astype(np.float64) ** 2
    magnitude = np.sqrt(power)
    steady = median_filter(magnitude, size=(1, _STEADY)) ** 2
    broad = median_filter(magnitude, size=(_BROAD, 1)) ** 2
    harmonic = magnitude * steady / np.maximum(steady + broad, 1e-20)
    inside = harmonic[1:-1]
    bins, frames = np.nonzero((inside > harmonic[:-2]) & (inside >= harmonic[2:]))
    bins += 1
    strength = harmonic[bins, frames]
    notes = 69 + 12 * np.log2(_between_bins(harmonic, bins, frames) * RATE / _WINDOW / 440)
    kept = (notes > _LOWEST - 0.5) & (notes < _HIGHEST + 0.5)
    notes, frames, strength = notes[kept], frames[kept], strength[kept]
    # Mistuning in semitones: the mean angle of the notes on a circle of one semitone.
    detune = float(np.angle((strength * np.exp(2j * np.pi * notes)).sum())) / (2 * math.pi)
    nearest = np.round(notes - detune)
    on_pitch = np.cos(np.pi * (notes - detune - nearest)) ** 2
    classes = np.zeros((12, magnitude.shape[1]))
    np.add.at(classes, (nearest.astype(int) % 12, frames), strength * on_pitch)
    floor = _QUIET * classes.sum(0).max()
    chroma = (classes / np.maximum(classes.max(0), max(floor, 1e-12))).mean(1)
    tonality = float((harmonic**2).sum() / max(power.sum(), 1e-20))
    return chroma / max(chroma.max(), 1e-12), tonality


def _between_bins(spectrum: Floats, bins: NDArray[np.intp], frames: NDArray[np.intp]) -> Floats:
    """Where each peak is: the top of the parabola through three bins' logarithms."""
    below, here, above = (np.log(spectrum[bins + shift, frames] + 1e-12) for shift in (-1, 0, 1))
    curve = below - 2 * here + above
    shift = 0.5 * (below - above) / np.minimum(curve, -1e-12)
    return np.asarray(bins + np.clip(shift, -0.5, 0.5))


def key_features(chroma: Floats) -> Floats:
    """What a key's score is linear in.

    Args:
        chroma: (12,) from C.

    Returns:
        (24, 25): for the majors from C and the minors from C, the chroma from their tonic in the
        first or the second twelve columns, and 1 in the last for minors.
    """
    features = np.zeros((24, 25))
    for key in range(24):
        minor, tonic = divmod(key, 12)
        features[key, 12 * minor : 12 * minor + 12] = np.roll(chroma - chroma.mean(), -tonic)
        features[key, 24] = minor
    return features
