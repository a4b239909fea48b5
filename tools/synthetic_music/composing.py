"""Notes for a piece: chords, bass, drums, and a melody whose motifs return and vary.

A piece begins with some of its parts or with all, has chords that set out from the tonic, and an
end: the dominant, then the tonic, held. The first beats count in where the bars do not fill the
piece's length. Its lead plays a riff over whatever chord, and all notes are short: what a small
model is to learn of music is heard again within seconds, and stands out.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from tools.synthetic_music.midi import DRUM_CHANNEL, TICKS, Note, midi_file
from tools.synthetic_music.patterns import LEADING, LOUDNESS, onsets, place
from tools.synthetic_music.pieces import Piece
from tools.synthetic_music.score import (
    BASS,
    COMP,
    FORM,
    LEAD,
    PHRASE,
    Chord,
    Score,
    instruments_of,
)

_DECIBELS: Final = {LEAD: 0.0, BASS: -4.0, COMP: -10.0}
_DRUM_VOLUME: Final = 88
_PANS: Final = {LEAD: 64, BASS: 64, COMP: 40}  # 64 is the middle
_VOLUME, _PAN = 7, 10  # controllers

_KICK, _SNARE, _HAT, _TOM, _CRASH = 36, 38, 42, 45, 49  # General MIDI
_PERHAPS: Final = 0.5
# Rhythms of a beat by its steps, and how many notes a second a melody should have.
_CELLS: Final = {
    4: ("x...", "x.x."),
    3: ("x..", "x.x"),
    2: ("x.", "xx"),
}
_DENSITY: Final = 2.4
_MOVES: Final = (-2, -1, -1, 0, 1, 1, 2)  # degrees from note to note of a motif
_REACH: Final = (-2, 5)  # degrees of the scale that a melody stays within


@dataclass(frozen=True)
class MelodyNote:
    """A note of the lead.

    Attributes:
        onset: seconds from the piece's beginning.
        duration: seconds.
        pitch: MIDI note.
    """

    onset: float
    duration: float
    pitch: int


@dataclass(frozen=True)
class Composition:
    """A piece in notes.

    Attributes:
        piece: what it is.
        notes: of all parts.
    """

    piece: Piece
    notes: tuple[Note, ...]

    @cached_property
    def melody(self) -> tuple[MelodyNote, ...]:
        """What the lead plays, in order."""
        tick = self.piece.beat / TICKS
        return tuple(
            MelodyNote(round(start * tick, 4), round(length * tick, 4), pitch)
            for start, channel, pitch, _, length in sorted(self.notes)
            if channel == LEAD
        )

    def midi(self, melody_only: bool = False, grid: int | None = None) -> bytes:
        """The piece as a standard MIDI file.

        Args:
            melody_only: leave the band out.
            grid: milliseconds; every note begins and ends at the nearest multiple of them, and a
                tick is a millisecond. Without it the file has the piece's own beats.
        """
        sounds = instruments_of(self.piece)
        programs = {part: sound.program for part, sound in sounds.items()}
        controls = [(part, _VOLUME, s.volume(_DECIBELS[part])) for part, s in sounds.items()]
        controls += [(part, _PAN, _PANS[part]) for part in sounds]
        controls.append((DRUM_CHANNEL, _VOLUME, _DRUM_VOLUME))
        notes = [note for note in self.notes if note[1] == LEAD or not melody_only]
        bpm = 60 / self.piece.beat
        if grid is not None:
            steps = round(1000 * self.piece.beat / grid)  # of the grid, in a beat
            bpm = 60_000 / TICKS
            notes = [_on_grid(note, steps, grid) for note in notes]
        return midi_file(notes, programs, bpm, controls)


def step_at(tick: int, steps: int) -> int:
    """The step nearest to a tick, where a beat has so many.

    Halves are rounded up, so that every beat is the same.
    """
    return (2 * tick * steps + TICKS) // (2 * TICKS)


def _on_grid(note: Note, steps: int, grid: int) -> Note:
    """A note in milliseconds that begins and ends on the grid, one step long at least."""
    tick, channel, pitch, velocity, length = note
    begin, end = step_at(tick, steps), step_at(tick + length, steps)
    return begin * grid, channel, pitch, velocity, max(1, end - begin) * grid


def compose(piece: Piece) -> Composition:
    """The notes of a piece; equal pieces get equal notes."""
    score = Score(piece)
    _play_count_in(score)
    _play_drums(score)
    _play_bass(score)
    _play_chords(score)
    _play_lead(score)
    _play_end(score)
    return Composition(piece, tuple(sorted(score.notes)))


def _play_count_in(score: Score) -> None:
    """The beats before the first bar."""
    for tick in range(0, score.start, TICKS):
        if score.piece.has_drums:
            score.add(tick, DRUM_CHANNEL, _HAT, LOUDNESS["x"], 60)
        else:
            for pitch in score.tonic_chord:
                score.add(tick, COMP, place(pitch, score.instruments[COMP].lowest), 78, 0.8 * TICKS)


def _play_drums(score: Score) -> None:
    if not score.piece.has_drums:
        return
    pattern, bar_ticks = score.pattern, score.pattern.beats * TICKS
    for number, bar in enumerate(score.bars):
        if score.intro == "chords" and bar < score.entry:
            continue
        fill = number % 4 == 3 or bar + bar_ticks >= score.end  # noqa: PLR2004 - the last of four
        fill = fill and _SNARE in pattern.drums
        late = min(bar + bar_ticks, score.end) - TICKS  # the last beat, for a fill
        for drum, marks in pattern.drums.items():
            for mark, tick, _ in onsets(pattern, marks):
                if (mark == "?" and score.random.random() < _PERHAPS) or (
                    fill and bar + tick >= late
                ):
                    continue
                score.add(bar + tick, DRUM_CHANNEL, drum, LOUDNESS[mark], 60)
        for step in range(pattern.steps if fill else 0):
            drum = _SNARE if step < pattern.steps / 2 else _TOM
            score.add(late + step * TICKS / pattern.steps, DRUM_CHANNEL, drum, 90, 60)
        if number % 4 == 0 and _SNARE in pattern.drums:
            score.add(bar, DRUM_CHANNEL, _CRASH, 84, 60)


def _play_bass(score: Score) -> None:
    pattern, lowest = score.pattern, score.instruments[BASS].lowest
    steps = onsets(pattern, pattern.bass)
    afters = [*(offset for _, offset, _ in steps[1:]), pattern.beats * TICKS]
    for bar in score.bars:
        if score.intro == "chords" and bar < score.entry:
            continue
        for (mark, offset, length), after in zip(steps, afters, strict=True):
            tick, chord = bar + offset, score.chord(bar + offset)
            begun = tick - (tick - score.start) % score.slot  # where the chord began
            root = place(chord[0], lowest)
            last = bar + after >= begun + score.slot
            if mark == "-":
                continue
            if mark == "w" and tick - begun >= TICKS:
                turn = int((tick - begun) // TICKS)
                pitch = place(chord[turn % len(chord)], lowest)
                if last:
                    pitch = place(score.chord(tick, 1)[0], lowest) + int(
                        score.random.choice([-1, 2])
                    )
            else:
                pitch = root + {"5": (chord[2] - chord[0]) % 12, "8": 12}.get(mark, 0)
            score.add(tick, BASS, pitch, 95, 0.9 * length)


def _play_chords(score: Score) -> None:
    pattern, lowest = score.pattern, score.instruments[COMP].lowest
    for bar in score.bars:
        if score.intro == "rhythm" and score.piece.has_drums and bar < score.entry:
            continue
        for mark, offset, length in onsets(pattern, pattern.comp):
            tick = bar + offset
            pitches = sorted(place(pitch, lowest) for pitch in score.chord(tick))
            if mark.isdigit():
                index = int(mark) - 1
                pitches = [pitches[index % len(pitches)] + 12 * (index // len(pitches))]
                held = 1.2 * length
            else:
                held = 0.95 * length if mark == "X" else 0.7 * TICKS / pattern.steps
            for pitch in pitches:
                score.add(tick, COMP, pitch, 88, held)


def _play_lead(score: Score) -> None:
    """A phrase is a motif, the same twice more, at times varied, and a close."""
    entry = score.start if score.intro == "lead" else score.entry
    motifs = {section: _motif(score) for section in "AB"}
    varied = [(offset, -contour) for offset, contour in motifs["A"]]
    for slot, chord in enumerate(score.chords):
        start = score.start + slot * score.slot
        if start < entry:
            continue
        phrase, part = divmod(slot, PHRASE)
        section = FORM[phrase % len(FORM)]
        high = 2 if section == "B" else 0
        if part == PHRASE - 1 or slot == len(score.chords) - 1:
            _play_close(score, start, chord)
            continue
        # Every second phrase answers the first with its motif upside down.
        motif = varied if section == "A" and phrase % 2 and part == PHRASE - 2 else motifs[section]
        for number, (offset, contour) in enumerate(motif):
            after = motif[number + 1][0] if number + 1 < len(motif) else score.slot
            pitch = _pitch(score, high + contour, score.tonic_chord, offset % TICKS == 0)
            score.add(start + offset, LEAD, pitch, 104, 0.92 * (after - offset))


def _motif(score: Score) -> list[tuple[float, int]]:
    """Ticks in a slot, and degrees above or below the tonic."""
    random, pattern = score.random, score.pattern
    cells = _CELLS[pattern.steps]
    beat = score.piece.beat
    density = np.array([cell.count("x") / beat for cell in cells])
    chances = np.exp(-(((density - _DENSITY) / 1.2) ** 2)) + 0.01
    contour, motif = 0, []
    for start in range(0, score.slot, TICKS):
        cell = random.choice(cells, p=chances / chances.sum())
        for index, mark in enumerate(cell):
            if mark == "x":
                swung = index + pattern.swing * (index % 2)
                motif.append((start + swung * TICKS / pattern.steps, contour))
                contour = int(np.clip(contour + random.choice(_MOVES), -3, 3))
    return motif


def _play_close(score: Score, start: int, chord: Chord) -> None:
    """A step down to the tonic, or to the fifth if the chord does not have it."""
    home = 0 if score.piece.tonic in chord else -3
    score.add(start, LEAD, _pitch(score, home + 1, chord, on_beat=False), 104, 0.92 * TICKS)
    length = 0.9 * (score.slot - TICKS)
    score.add(start + TICKS, LEAD, _pitch(score, home, chord, on_beat=True), 104, length)


def _pitch(score: Score, degree: int, chord: Chord, on_beat: bool) -> int:
    """The note of a degree of the scale: on the beat the nearest of the chord's."""
    degree = int(np.clip(degree, *_REACH))
    octave, step = divmod(degree, 7)
    semitones = score.scale[step] + 12 * octave
    tonic = place(score.piece.tonic, score.instruments[LEAD].lowest)
    if on_beat:
        return min(
            (tonic + semitones + away for away in (0, -1, 1, -2, 2, -3, 3)),
            key=lambda pitch: pitch % 12 not in chord,
        )
    if (score.piece.tonic + LEADING) % 12 in chord and semitones % 12 == LEADING - 1:
        semitones += 1
    return tonic + semitones


def _play_end(score: Score) -> None:
    """The tonic in all parts, held until the piece is over."""
    length = round(score.piece.seconds / score.piece.beat * TICKS) - score.end
    lowest = {part: sound.lowest for part, sound in score.instruments.items()}
    chord = score.tonic_chord
    last = [(LEAD, place(chord[0], lowest[LEAD])), (BASS, place(chord[0], lowest[BASS]))]
    last += [(COMP, place(pitch, lowest[COMP])) for pitch in chord]
    if score.piece.has_drums:
        last += [(DRUM_CHANNEL, _CRASH), (DRUM_CHANNEL, _KICK)]
    score.notes += [(score.end, part, pitch, 100, length) for part, pitch in last]
