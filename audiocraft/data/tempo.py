"""The tempo of a clip.

Candidates are the peaks of the spectrum of its onsets, which are right to a fraction of a percent.
Which of them is the beat, and not half or twice of it, is a matter of evidence, as in Percival and
Tzanetakis, "Streamlined Tempo Estimation Based on Autocorrelation and Cross-correlation with
Pulses" (2014): how much the lows, the middle and the highs repeat after fractions and multiples of
the beat, and how the highs answer the lows. `tools/fit_labels.py` learnt the weights.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from audiocraft.data.tempo_weights import WEIGHTS

RATE: Final = 22050
"""Hz of the audio that this module takes."""

SHORTEST: Final = 8.0
"""Seconds that it takes: of rendered clips of 5 s one in eight came out wrong, of 8 s one in 24."""

LONGEST: Final = 120.0
"""Seconds that are used, from the middle of what is longer: tempi drift."""

_HOP: Final = 256
_WINDOW: Final = 1024
_FRAMES: Final = RATE / _HOP  # a second
_MELS: Final = 80
# Bands in Hz: kick and bass, chords, melody and snare, cymbals and hats.
_BANDS: Final = ((20, 160), (160, 800), (800, 4000), (4000, RATE // 2))
_LOW, _HIGH, _ALL = 0, 2, 4  # rows of the envelopes; the last is of the whole range
_LOUDEST: Final = 1e4  # the loudest bin over the level from which compression is logarithmic

_SLOWEST, _FASTEST = 50.0, 220.0  # bpm
_STEP: Final = 0.0005  # of the natural logarithm of the tempo
_CANDIDATES: Final = 12
_HARMONICS: Final = ((1, 1.0), (2, 1.0), (3, 0.5), (4, 0.7))  # of the beat, and their weights
_LAGS: Final = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 1, 3 / 2, 2, 3, 4)  # beats
_ANSWERS: Final = (1 / 2, 1, 2, 3)  # beats from low to high onsets
_TOLERANCE: Final = 0.02  # of a lag: beats are played, not counted
_USUAL: Final = 110.0  # bpm
_REGULAR: Final = 5.5  # strength: of noise at most 5.1, of rendered clips of 5 s at least 6.1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tempo:
    """A tempo, and how sure it is that there is one.

    Attributes:
        bpm: beats a minute, 50 to 220.
        strength: of the pulse: the autocorrelation of the onsets at one, two or four beats,
            whichever is most, over what noise of this length would show (its standard deviation).
    """

    bpm: float
    strength: float

    @property
    def is_regular(self) -> bool:
        """Whether there is a pulse at all."""
        return self.strength >= _REGULAR


def find_tempo(mono: NDArray[np.float32]) -> Tempo:
    """Tempo of music.

    Args:
        mono: samples (T,) at `RATE`, two seconds or more; below `SHORTEST` it is often wrong.
    """
    envelopes = onset_envelopes(mono)
    if not envelopes.any():
        return Tempo(_USUAL, 0.0)
    tempi, features = tempo_features(envelopes)
    best = int(np.argmax(features @ np.array(WEIGHTS)))
    lags = [_ALL * len(_LAGS) + _LAGS.index(lag) for lag in (1, 2, 4)]
    strength = float(features[best, lags].max()) * math.sqrt(envelopes.shape[1])
    return Tempo(float(tempi[best]), strength)


def onset_envelopes(mono: NDArray[np.float32]) -> Floats:
    """How much begins at each moment, around a mean of 0.

    Args:
        mono: samples (T,) at `RATE`.

    Returns:
        (5, frames): the bands from low to high and all of them, 86 frames a second.
    """
    import librosa
    from scipy.ndimage import gaussian_filter1d, uniform_filter1d

    surplus = len(mono) - round(LONGEST * RATE)
    if surplus > 0:
        mono = mono[surplus // 2 : len(mono) - (surplus + 1) // 2]
    power = librosa.feature.melspectrogram(
        y=mono, sr=RATE, n_fft=_WINDOW, hop_length=_HOP, n_mels=_MELS, fmin=20, fmax=RATE / 2
    )
    level = np.log1p(_LOUDEST * power / max(float(power.max()), 1e-20))
    rise = np.maximum(0, np.diff(level, axis=1, prepend=level[:, :1]))
    centres = librosa.mel_frequencies(_MELS + 2, fmin=20, fmax=RATE / 2)[1:-1]
    bands = [rise[(centres >= low) & (centres < high)].mean(0) for low, high in _BANDS]
    envelopes = gaussian_filter1d(np.stack([*bands, rise.mean(0)]).astype(np.float64), 1.0, axis=1)
    return np.asarray(envelopes - uniform_filter1d(envelopes, round(2 * _FRAMES), axis=1))


def tempo_features(envelopes: Floats) -> tuple[Floats, Floats]:
    """Candidates and the evidence for each.

    Args:
        envelopes: see `onset_envelopes`; not all 0.

    Returns:
        Beats a minute (n,), and features (n, 52), of which `WEIGHTS` makes the score.
    """
    tempi, salience = _candidates(envelopes[_ALL])
    longest = round(_FRAMES * 60 / _SLOWEST * (max(_LAGS) + 0.2))
    energy = np.maximum((envelopes**2).sum(1), 1e-12)
    # (5, lags) how each band repeats, and (lags,) how the highs follow the lows.
    repeats = np.stack([_correlate(row, row, longest) for row in envelopes]) / energy[:, None]
    answers = _correlate(envelopes[_LOW], envelopes[_HIGH], longest)
    answers /= math.sqrt(energy[_LOW] * energy[_HIGH])
    rows = []
    for tempo, share in zip(tempi, salience, strict=True):
        beat = _FRAMES * 60 / tempo
        row = [_peak_near(band, beat * lag) for band in repeats for lag in _LAGS]
        row += [_peak_near(answers, beat * lag) for lag in _ANSWERS]
        octaves = math.log2(tempo / _USUAL)
        rows.append([*row, octaves, octaves**2, share])
    return tempi, np.array(rows)


def _candidates(envelope: Floats) -> tuple[Floats, Floats]:
    """The strongest tempi of an envelope, and their share of the strongest one's strength."""
    size = 1 << max(18, math.ceil(math.log2(4 * len(envelope))))
    spectrum = np.abs(np.fft.rfft(envelope * np.hanning(len(envelope)), size))
    grid = np.exp(np.arange(math.log(_SLOWEST), math.log(_FASTEST), _STEP))
    bins = grid / 60 / _FRAMES * size
    positions = np.arange(len(spectrum))
    salience = np.zeros_like(grid)
    for harmonic, weight in _HARMONICS:
        salience += weight * np.interp(bins * harmonic, positions, spectrum)
    inside = salience[1:-1]
    peaks = 1 + np.flatnonzero((inside > salience[:-2]) & (inside >= salience[2:]))
    if not len(peaks):
        peaks = np.array([int(np.argmax(salience))])
    best = peaks[np.argsort(-salience[peaks], kind="stable")][:_CANDIDATES]
    return grid[best], salience[best] / salience[best[0]]


def _correlate(first: Floats, second: Floats, lags: int) -> Floats:
    """Correlation of `second` with an earlier `first` by lag, each as if of the whole length."""
    length = len(first)
    size = 1 << math.ceil(math.log2(2 * length))
    product = np.fft.rfft(first, size).conj() * np.fft.rfft(second, size)
    lags = min(lags, length // 2)
    overlap = (length - np.arange(lags)) / length
    return np.asarray(np.fft.irfft(product, size)[:lags] / overlap)


def _peak_near(curve: Floats, position: float) -> float:
    """The highest value near a position; 0 beyond the curve's end."""
    reach = max(1.0, _TOLERANCE * position)
    if position + reach > len(curve) - 1:
        return 0.0
    where = np.linspace(position - reach, position + reach, 9)
    return float(np.interp(where, np.arange(len(curve)), curve).max())
