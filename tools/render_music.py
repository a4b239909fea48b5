"""Compose and render short pieces whose key, mode and tempo are known.

    python -m tools.render_music FOLDER [--seed 1] [--pieces 24]

Writes `<name>.mid` and `<name>.wav` of each piece, and `truth.json`. Needs Debian's fluidsynth and
fluid-soundfont-gm. Keys go round all 24, tempi cover 60 to 180 bpm evenly, and a style is drawn
among those that are played at such a tempo. The beat is the one that a player of the style counts.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from tools.music_styles import PROGRESSIONS, STYLES, Style
from tools.synthetic_music.midi import DRUM_CHANNEL, TICKS, midi_file, play
from tools.synthetic_music.patterns import (
    LEADING,
    LOUDNESS,
    MAJOR,
    MINOR,
    onsets,
    place,
)

TONICS: Final = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
SLOWEST, FASTEST = 60.0, 180.0  # bpm
SECONDS = 30.0

_CRASH, _SNARE, _TOM = 49, 38, 45  # General MIDI
_BASS_PART, _COMP_PART, _PAD_PART, _LEAD_PART = range(4)  # also their channels
_LOW, _MIDDLE, _HIGH = 36, 55, 67  # lowest notes of bass, chords and melody
_RATE: Final = 44100
_LAST: Final = 7  # bar of eight
_LEAD_ENTRY: Final = 2  # bars
# How often things happen.
_PAUSES, _SEVENTHS, _FILLS, _PERHAPS, _FULL = 0.3, 0.4, 0.7, 0.5, 0.8


@dataclass(frozen=True)
class Piece:
    """A piece and the truth about it.

    Attributes:
        name: of its files, without a suffix.
        style: a key of `STYLES`.
        key: such as `F# minor`.
        bpm: beats a minute.
    """

    name: str
    style: str
    key: str
    bpm: float


@dataclass
class _Score:
    """Notes as (tick, channel, pitch, velocity, ticks)."""

    random: np.random.Generator
    jitter: float  # ticks
    notes: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def add(self, tick: float, channel: int, pitch: int, velocity: float, length: float) -> None:
        at = max(0, round(tick + self.random.normal(0, self.jitter)))
        loud = int(np.clip(velocity + self.random.normal(0, 5), 1, 127))
        self.notes.append((at, channel, pitch, loud, max(10, round(length))))


def plan(seed: int, count: int) -> list[Piece]:
    """What to compose.

    Args:
        seed: of every choice.
        count: how many pieces; with 24 or more all keys occur.
    """
    random = np.random.default_rng([seed, count])
    keys = [f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS]
    order = [*random.permutation(len(keys))] * (count // len(keys) + 1)
    # One tempo in each of `count` equal parts of the range, in any order.
    tempi = SLOWEST + (FASTEST - SLOWEST) * (np.arange(count) + random.random(count)) / count
    unused = dict.fromkeys(STYLES, 0)
    pieces = []
    for number, (index, bpm) in enumerate(zip(order, random.permutation(tempi), strict=False)):
        mode = keys[index].split()[1]
        fitting = [
            n for n, s in STYLES.items() if s.slowest <= bpm <= s.fastest and mode in s.modes
        ]
        fewest = min(unused[name] for name in fitting)
        style = str(random.choice([name for name in fitting if unused[name] == fewest]))
        unused[style] += 1
        tempo = round(float(bpm), 1)
        pieces.append(Piece(f"{seed:02}-{number:02}-{style}", style, keys[index], tempo))
    return pieces


def compose(piece: Piece, seconds: float = SECONDS) -> bytes:
    """A MIDI file of a piece, at least so long.

    Args:
        piece: what to compose; equal pieces give equal files.
        seconds: of music.
    """
    style = STYLES[piece.style]
    random = np.random.default_rng([*piece.name.encode()])
    beat = 60 / piece.bpm
    score = _Score(random, jitter=float(random.uniform(0.001, 0.008)) / beat * TICKS)
    bars = int(np.ceil(seconds / (beat * style.beats))) + 1
    chords = _chords(piece, style, bars, random)
    present = [bool(sounds) for sounds in style.sounds]
    # Songs begin without some of their parts, and pause them.
    entry = int(random.choice([0, 0, 2, 4]))
    pause = int(random.integers(6, 14)) if random.random() < _PAUSES else bars
    for bar in range(bars):
        start = bar * style.beats * TICKS
        following = chords[min(bar + 1, bars - 1)]
        if bar >= entry and bar not in {pause, pause + 1}:
            _play_drums(score, style, bar, start)
            if style.bass:
                _play_bass(score, style, chords[bar], following, start)
        if present[_COMP_PART]:
            _play_comp(score, style, chords[bar], start)
        if present[_PAD_PART] and bar % style.bars_per_chord == 0:
            length = style.beats * style.bars_per_chord * TICKS
            for pitch in chords[bar]:
                score.add(start, _PAD_PART, place(pitch, _MIDDLE), 60, length)
    _play_lead(score, style, piece, chords)
    programs = {part: int(random.choice(s)) for part, s in enumerate(style.sounds) if s}
    return midi_file(score.notes, programs, piece.bpm)


def _chords(
    piece: Piece, style: Style, bars: int, random: np.random.Generator
) -> list[tuple[int, ...]]:
    """Pitch classes of each bar's chord, root first."""
    tonic, mode = piece.key.split()
    scale = MAJOR if mode == "major" else MINOR
    choices = PROGRESSIONS[style.harmony, mode]
    sections = [str(random.choice(choices)).split() for _ in range(2)]
    # Eight bars of each: verse and chorus.
    chords = []
    for bar in range(bars):
        section = sections[bar // (8 * style.bars_per_chord) % 2]
        degree = section[bar // style.bars_per_chord % len(section)]
        dominant = degree == "D"
        root = 4 if dominant else int(degree)
        count = 4 if style.sevenths or (dominant and random.random() < _SEVENTHS) else 3
        notes = [scale[(root + 2 * third) % 7] for third in range(count)]
        if dominant:
            notes[1] = LEADING
        chords.append(tuple((TONICS.index(tonic) + note) % 12 for note in notes))
    return chords


def _play_drums(score: _Score, style: Style, bar: int, start: int) -> None:
    fill = bar % 8 == _LAST and score.random.random() < _FILLS and _SNARE in style.drums
    half = style.beats * TICKS / 2
    for drum, pattern in style.drums.items():
        for mark, tick, _ in onsets(style, pattern):
            if (mark == "?" and score.random.random() < _PERHAPS) or (fill and tick >= half):
                continue
            score.add(start + tick, DRUM_CHANNEL, drum, LOUDNESS[mark], 60)
    if fill:
        steps = style.beats * style.steps // 2
        for step in range(steps):
            if score.random.random() < _FULL:
                drum = _SNARE if step < steps // 2 else _TOM
                tick = start + half + step * TICKS / style.steps
                score.add(tick, DRUM_CHANNEL, drum, 85 + 2 * step, 60)
    if bar % 8 == 0 and _SNARE in style.drums:
        score.add(start, DRUM_CHANNEL, _CRASH, 95, 60)


def _play_bass(
    score: _Score, style: Style, chord: tuple[int, ...], following: tuple[int, ...], start: int
) -> None:
    root = place(chord[0], _LOW)
    target = place(following[0], _LOW)
    steps = onsets(style, style.bass)
    for number, (mark, tick, length) in enumerate(steps):
        if mark == "-":
            continue
        if mark == "w":
            left = len(steps) - number
            pitch = place(chord[number % len(chord)], _LOW) if number else root
            if left == 1:
                pitch = target + int(score.random.choice([-1, 1, 2, -2]))
        else:
            pitch = root + {"1": 0, "5": (chord[2] - chord[0]) % 12, "8": 12}[mark]
        score.add(start + tick, _BASS_PART, pitch, 95, 0.9 * length)


def _play_comp(score: _Score, style: Style, chord: tuple[int, ...], start: int) -> None:
    pitches = sorted(place(pitch, _MIDDLE) for pitch in chord)
    for mark, tick, length in onsets(style, style.comp):
        if mark in "Xx":
            held = 0.95 * length if mark == "X" else 0.7 * TICKS / style.steps
            for pitch in pitches:
                score.add(start + tick, _COMP_PART, pitch, 78, held)
        elif mark.isdigit():
            index = int(mark) - 1
            pitch = pitches[index % len(pitches)] + 12 * (index // len(pitches))
            score.add(start + tick, _COMP_PART, pitch, 76, 1.2 * length)


def _play_lead(
    score: _Score, style: Style, piece: Piece, chords: Sequence[tuple[int, ...]]
) -> None:
    """A melody in phrases of four bars: steps of the scale, the chord's notes on the beat."""
    random = score.random
    tonic, mode = piece.key.split()
    scale = MAJOR if mode == "major" else MINOR
    beat = 60 / piece.bpm
    cells = {
        4: ("x...", "x.x.", "x..x", "x.xx", "xxx.", "xxxx", "..x."),
        3: ("x..", "x.x", "xxx", "..x"),
        2: ("x.", "xx", ".x"),
    }[style.steps]
    # Three notes a second whatever the tempo, give or take.
    density = np.array([cell.count("x") / beat for cell in cells])
    chances = np.exp(-(((density - 3) / 1.5) ** 2)) + 0.02
    chances /= chances.sum()
    phrase = [random.choice(cells, p=chances) for _ in range(4 * style.beats)]
    degree = 0
    for bar, chord in enumerate(chords):
        if bar % 16 in {14, 15} or bar < _LEAD_ENTRY:
            continue  # breathes
        for number in range(style.beats):
            start = (bar * style.beats + number) * TICKS
            last = (bar + 1) % 4 == 0 and number >= style.beats // 2
            if last and number > style.beats // 2:
                continue
            cell = "x" if last else phrase[(bar % 4) * style.beats + number]
            for index, mark in enumerate(cell):
                if mark != "x":
                    continue
                degree = int(np.clip(degree + random.choice([-2, -1, -1, 0, 1, 1, 2]), -4, 8))
                pitch = TONICS.index(tonic) + scale[degree % 7] + 12 * (degree // 7)
                if index == 0:
                    near = np.array([p + 12 * octave for p in chord for octave in (-1, 0, 1)])
                    pitch = int(near[np.argmin(np.abs(near - pitch))])
                elif (
                    LEADING in {(p - TONICS.index(tonic)) % 12 for p in chord}
                    and scale[degree % 7] == LEADING - 1
                ):
                    pitch += 1
                if last and bar % 8 == _LAST and TONICS.index(tonic) in chord:
                    pitch = TONICS.index(tonic)
                length = 1.6 * TICKS if last else TICKS / style.steps * random.uniform(0.8, 1.5)
                tick = start + (index + style.swing * (index % 2)) * TICKS / style.steps
                score.add(tick, _LEAD_PART, _HIGH + pitch - 2, 88, length)


def render(midi: Path, wav: Path) -> None:
    """Play a MIDI file with FluidR3, 44.1 kHz stereo.

    Raises:
        AssetError: fluidsynth or the sound font is not installed.
        subprocess.CalledProcessError: fluidsynth fails.
    """
    play(midi, wav, _RATE, "-g", "0.5", "-T", "wav")


def render_set(folder: Path, seed: int, count: int, seconds: float = SECONDS) -> list[Piece]:
    """Compose and render what is missing in a folder.

    Args:
        folder: of the files.
        seed: see `plan`.
        count: how many pieces.
        seconds: of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = plan(seed, count)
    for piece in pieces:
        midi, wav = folder / f"{piece.name}.mid", folder / f"{piece.name}.wav"
        music = compose(piece, seconds)
        if not (wav.is_file() and midi.is_file() and midi.read_bytes() == music):
            midi.write_bytes(music)
            render(midi, wav)
    truth = json.dumps([asdict(piece) for piece in pieces], indent=1)
    (folder / "truth.json").write_text(truth)
    return pieces


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pieces", type=int, default=24)
    given = parser.parse_args()
    for made in render_set(given.folder, given.seed, given.pieces):
        print(made)
