"""What pieces there are: their key, tempo, style and instruments."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from audiocraft.data.key import NAMES
from audiocraft.errors import InputError
from tools.synthetic_music.instruments import DRUMS, LEADS
from tools.synthetic_music.styles import STYLES

SHORTEST, LONGEST = 10.0, 60.0  # seconds

FRAME: Final = 0.02
"""Seconds of a frame of the codec."""

# Neighbours are 8 to 13 % apart, so a small model needs to tell few of them.
BEATS: Final = (50, 45, 40, 36, 33, 30, 27, 25, 23, 21, 19, 17)
"""Frames of a beat, of each tempo."""

TEMPI: Final = tuple(round(60 / (frames * FRAME)) for frames in BEATS)
"""Beats a minute, of beats that last whole frames: what repeats in music repeats in its codes."""

KEYS: Final = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in NAMES)
"""The 24, such as `Eb minor`, named as the labels of the library."""

_ROUND: Final = 24  # pieces in which every key occurs once, and every lead and tempo twice
_LIKED: Final = 4.0  # how much oftener a style is played with a lead that it likes


@dataclass(frozen=True)
class Piece:
    """A piece, as far as it is known before it is composed; equal pieces sound equal.

    Attributes:
        seed: of the set that it belongs to.
        number: in that set.
        seconds: from the first sample to the last.
        key: one of `KEYS`.
        bpm: one of `TEMPI`.
        style: a key of `STYLES`.
        lead: a key of `LEADS`.
        band: what else plays, the bass first; drums last, where there are any.
    """

    seed: int
    number: int
    seconds: float
    key: str
    bpm: int
    style: str
    lead: str
    band: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its files, without a suffix."""
        return f"{self.seed:03}-{self.number:06}"

    @property
    def beat(self) -> float:
        """Seconds of a beat as it is played, within 1 % of its `bpm`: whole frames of the codec."""
        return BEATS[TEMPI.index(self.bpm)] * FRAME

    @property
    def tonic(self) -> int:
        """Semitones above C, 0 to 11."""
        return KEYS.index(self.key) % len(NAMES)

    @property
    def mode(self) -> str:
        """`major` or `minor`."""
        return self.key.split()[1]

    @property
    def has_drums(self) -> bool:
        """Whether there are drums."""
        return DRUMS in self.band


def plan(
    seed: int, count: int, seconds: float = 30.0, exclude_style: str | None = None
) -> Iterator[Piece]:
    """What to compose. The first pieces of a longer plan are those of a shorter one.

    Keys, leads and tempi are drawn evenly, each apart from the others; then a style that is played
    at such a tempo.

    Args:
        seed: of every choice.
        count: how many pieces; in 24 every key occurs once.
        seconds: of each, 10 to 60.
        exclude_style: a key of `STYLES` that does not occur; nothing else changes in pieces that
            would not have had it.

    Raises:
        InputError: a length out of range, or no such style.
    """
    if not SHORTEST <= seconds <= LONGEST:
        raise InputError(f"seconds is {seconds:g}; give {SHORTEST:g} to {LONGEST:g}.")
    if exclude_style is not None and exclude_style not in STYLES:
        raise InputError(
            f"There is no style {exclude_style!r} to exclude; give one of {', '.join(STYLES)}."
        )
    for start in range(0, count, _ROUND):
        random = np.random.default_rng([seed, start // _ROUND])
        keys = random.permutation(_ROUND)
        leads = np.concatenate([random.permutation(len(LEADS)) for _ in range(2)])
        tempi = np.concatenate([random.permutation(len(TEMPI)) for _ in range(2)])
        for index in range(min(_ROUND, count - start)):
            bpm = TEMPI[tempi[index]]
            lead = list(LEADS)[leads[index]]
            style = _style(random, bpm, lead, exclude_style)
            yield Piece(
                seed,
                start + index,
                seconds,
                KEYS[keys[index]],
                bpm,
                style,
                lead,
                _band(random, style),
            )


def _style(random: np.random.Generator, bpm: int, lead: str, excluded: str | None) -> str:
    fitting = [name for name, s in STYLES.items() if s.slowest <= bpm <= s.fastest]
    # After Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006): each has a
    # number of its own, excluded or not, and the greatest wins, so that without one style the
    # others stay.
    ranks = {}
    for name in fitting:
        style = STYLES[name]
        # Those with few tempi are played at these the oftener.
        weight = (_LIKED if lead in style.leads else 1.0) / (style.fastest - style.slowest)
        ranks[name] = math.log(random.random()) / weight
    ranks.pop(excluded or "", None)
    return max(ranks, key=lambda name: ranks[name])


def _band(random: np.random.Generator, name: str) -> tuple[str, ...]:
    style = STYLES[name]
    draws = random.random(2)  # as many for every style, so that the next pieces are the same
    parts = [
        choices[int(draw * len(choices))]
        for choices, draw in zip((style.bass, style.chords), draws, strict=True)
    ]
    return (*parts, *([DRUMS] if style.pattern.drums else []))
