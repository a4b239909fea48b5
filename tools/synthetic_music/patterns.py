"""What patterns and scales mean in notes."""

from typing import Final

from tools.music_styles import Style
from tools.synthetic_music.midi import TICKS

MAJOR: Final = (0, 2, 4, 5, 7, 9, 11)
"""Semitones above the tonic."""

MINOR: Final = (0, 2, 3, 5, 7, 8, 10)
"""The natural one."""

LEADING: Final = 11
"""Semitones from the tonic to its leading note."""

LOUDNESS: Final = {"X": 112, "x": 92, "o": 62, "?": 72}
"""Velocities of the marks of a drum pattern; ? is played half the time."""


def place(pitch_class: int, lowest: int) -> int:
    """The first such note from `lowest` upwards."""
    return lowest + (pitch_class - lowest) % 12


def onsets(style: Style, pattern: str) -> list[tuple[str, float, float]]:
    """Each struck step: its character, its tick in the bar, and ticks until the next character."""
    step = TICKS / style.steps
    struck = [index for index, mark in enumerate(pattern) if mark != "."]
    ends = [*struck[1:], len(pattern)]
    return [
        (pattern[i], (i + style.swing * (i % 2)) * step, (end - i) * step)
        for i, end in zip(struck, ends, strict=True)
    ]
