"""A piece as it is being written: its plan in time, its chords, its notes."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tools.music_styles import Style as Pattern
from tools.synthetic_music.instruments import BASSES, CHORDS, LEADS, Instrument
from tools.synthetic_music.midi import TICKS, Note
from tools.synthetic_music.patterns import LEADING, MAJOR, MINOR
from tools.synthetic_music.pieces import Piece
from tools.synthetic_music.styles import STYLES

Chord = tuple[int, ...]
"""Pitch classes, root first."""

LEAD, BASS, COMP = range(3)
"""Parts, which are also their channels: the melody, the lowest, the chords' rhythm."""

PHRASE: Final = 4
"""Slots."""

FORM: Final = "AABA"
"""Of phrases."""

_PARTS: Final = {LEAD: LEADS, BASS: BASSES, COMP: CHORDS}
# Roots as degrees of the scale from 0; D is the dominant of a minor key with its leading note. Half
# of the time is the tonic's, and the fourth degree comes with the dominant: that tells a key from
# its relatives.
_PROGRESSIONS: Final = {
    "major": ("0 3 4 0", "0 3 0 4", "0 1 4 0", "0 5 3 0", "0 4 3 0"),
    "minor": ("0 3 D 0", "0 3 0 D", "0 5 D 0", "0 5 3 0", "0 D 3 0"),
}
_DOMINANTS: Final = {"major": "4", "minor": "D"}

_HELD: Final = 2  # slots of a chord

# Seconds of a note: silence is learnt in no time, and what begins after it is heard.
_LONGEST: Final = {LEAD: 0.22, BASS: 0.18, COMP: 0.12}

_TAIL: Final = 1.0  # seconds at least that the last chord is held
_LONG_BAR: Final = 2.6  # seconds from which a bar holds two chords
_LEAST_INTRO: Final = 2.0  # seconds
_LONG_PIECE: Final = 20.0  # seconds from which it may begin without drums


def instruments_of(piece: Piece) -> dict[int, Instrument]:
    """Who plays each part."""
    return {
        part: sound
        for part, sounds in _PARTS.items()
        for name, sound in sounds.items()
        if name == piece.lead or name in piece.band
    }


@dataclass
class Score:
    """A piece as it is written, and its plan in time.

    A slot is the time of the lead's motif: a bar, or half a bar where bars are long. A chord lasts
    two.

    Attributes:
        piece: what it is.
        notes: so far.
    """

    piece: Piece
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        piece, pattern = self.piece, self.pattern
        self.random = np.random.default_rng([piece.seed, piece.number, 1])
        self.instruments = instruments_of(piece)
        beat = piece.beat
        beats = int((piece.seconds - _TAIL) / beat)
        halved = pattern.beats % 4 == 0 and pattern.beats * beat > _LONG_BAR
        slot_beats = pattern.beats // 2 if halved else pattern.beats
        # In ticks: what is counted in, where the last chord begins, and how long a slot is.
        self.start = beats % min(pattern.beats, 4) * TICKS
        self.end = beats * TICKS
        self.slot = slot_beats * TICKS
        self.chords = self._make_chords(-(-(self.end - self.start) // self.slot))
        self.entry = self.start + self.slot * max(1, round(_LEAST_INTRO / (slot_beats * beat)))
        # Who begins: all but the lead, bass and drums, all, or the chords alone.
        intros = ["band", "rhythm", "lead"]
        if piece.seconds >= _LONG_PIECE and piece.has_drums:
            intros.append("chords")
        self.intro = str(self.random.choice(intros))

    @property
    def pattern(self) -> Pattern:
        """Of a bar."""
        return STYLES[self.piece.style].pattern

    @property
    def scale(self) -> tuple[int, ...]:
        """Semitones above the tonic."""
        return MAJOR if self.piece.mode == "major" else MINOR

    @property
    def bars(self) -> range:
        """Where bars begin."""
        return range(self.start, self.end, self.pattern.beats * TICKS)

    def add(self, tick: float, channel: int, pitch: int, velocity: int, length: float) -> None:
        """Write a note, short and unless it would begin when all is over."""
        if channel in _LONGEST:
            length = min(length, _LONGEST[channel] / self.piece.beat * TICKS)
        if tick < self.end:
            self.notes.append((
                round(tick),
                channel,
                pitch,
                velocity,
                max(10, round(min(length, self.end - tick))),
            ))  # fmt: skip

    def chord(self, tick: float, later: int = 0) -> Chord:
        """What is heard at a time, or some slots later; after the last slot the tonic."""
        slot = int(tick - self.start) // self.slot + later
        return self.chords[slot] if slot < len(self.chords) else self.tonic_chord

    @property
    def tonic_chord(self) -> Chord:
        """Where it all ends."""
        return self._chord_on("0")

    def _make_chords(self, count: int) -> list[Chord]:
        choices = self.random.permutation(_PROGRESSIONS[self.piece.mode])
        phrases = {"A": str(choices[0]).split(), "B": str(choices[1]).split()}
        degrees = [
            phrases[FORM[slot // PHRASE % len(FORM)]][slot // _HELD % 4] for slot in range(count)
        ]
        degrees[-1] = _DOMINANTS[self.piece.mode]
        return [self._chord_on(degree) for degree in degrees]

    def _chord_on(self, degree: str) -> Chord:
        root = 4 if degree == "D" else int(degree)
        # The dominant's seventh is not in the dominant's own scale; others would blur the key.
        count = 4 if degree == _DOMINANTS[self.piece.mode] else 3
        notes = [self.scale[(root + 2 * third) % 7] for third in range(count)]
        if degree == "D":
            notes[1] = LEADING
        return tuple((self.piece.tonic + note) % 12 for note in notes)
