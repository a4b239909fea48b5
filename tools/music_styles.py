"""How the music of `render_music.py` is played: patterns of many styles, and chords."""

from dataclasses import dataclass
from typing import Final

# Roots as degrees of the scale from 0; those of a minor key have the dominant with its leading note
# where it is written D.
PROGRESSIONS: Final = {
    ("pop", "major"): ("0 4 5 3", "0 5 3 4", "0 3 4 3", "0 3 0 4", "0 2 3 4", "0 3 5 4"),
    ("pop", "minor"): ("0 5 3 D", "0 3 D 0", "0 6 5 D", "0 5 6 0", "0 3 6 0", "0 6 3 0"),
    ("jazz", "major"): ("0 5 1 4", "1 4 0 0", "0 3 1 4", "0 5 3 4"),
    ("jazz", "minor"): ("0 3 D 0", "0 5 1 D", "3 D 0 0", "0 5 3 D"),
    ("old", "major"): ("0 4 0 3 1 4 0 0", "0 3 4 0", "0 5 1 4 0 3 4 0", "0 1 4 0"),
    ("old", "minor"): ("0 D 0 3 1 D 0 0", "0 3 D 0", "0 5 1 D 0 3 D 0", "0 1 D 0"),
}


@dataclass(frozen=True)
class Style:
    """How a kind of music is played; patterns are bars with a character for each step.

    Attributes:
        slowest: bpm.
        fastest: bpm.
        drums: patterns by General MIDI key: X loud, x, o soft, ? perhaps.
        bass: 1 root, 5 fifth, 8 octave, w a step on the way to the next chord; each lasts until the
            next, and - ends it.
        comp: X a chord held until the next, x a short one, 1 to 4 its notes.
        sounds: General MIDI programs to draw from, of bass, comp, pad and lead; an empty tuple
            leaves the part out.
        beats: in a bar.
        steps: in a beat.
        swing: by how much of a step every second one is late.
        harmony: family of chord progressions.
        sevenths: whether chords have four notes.
        bars_per_chord: how long a chord lasts.
        modes: which it is played in.
    """

    slowest: float
    fastest: float
    drums: dict[int, str]
    bass: str
    comp: str
    sounds: tuple[tuple[int, ...], ...]
    beats: int = 4
    steps: int = 4
    swing: float = 0.0
    harmony: str = "pop"
    sevenths: bool = False
    bars_per_chord: int = 1
    modes: tuple[str, ...] = ("major", "minor")


_BACKBEAT: Final = "....X.......X..."
_EIGHTHS: Final = "x.o.x.o.x.o.x.o."
_FLOOR: Final = "X...X...X...X..."
_KEYS, _STRINGS = (0, 1, 4, 5), (48, 49, 50)

STYLES: Final = {
    "ballad": Style(
        60,
        82,
        {36: "X.......x.....?.", 38: _BACKBEAT, 42: _EIGHTHS},
        "1.......1.....5.",
        "1.2.3.4.3.2.1.2.",
        ((32, 33), _KEYS, _STRINGS, (73, 65, 40)),
    ),
    "soul": Style(
        62,
        98,
        {36: "X..x....x.x.....", 38: _BACKBEAT, 42: "xoxoxoxoxoxoxoxo"},
        "1..1..5.1.....8.",
        "X.....x.X.......",
        ((33,), (4, 16), (), (65, 66, 56)),
    ),
    "hiphop": Style(
        76,
        104,
        {36: "X..?..x...x..?..", 38: _BACKBEAT, 42: _EIGHTHS},
        "1.....1.-.5...8.",
        "X.......x..x....",
        ((32, 38), (4, 5), (89,), (11, 73)),
        swing=0.3,
    ),
    "reggae": Style(
        64,
        92,
        {37: _BACKBEAT, 36: _BACKBEAT, 42: "x.x.x.x.x.x.x.x."},
        "1..1-.5.8...5...",
        "..x...x...x...x.",
        ((33,), (16, 27), (), (56, 57)),
    ),
    "rock": Style(
        88,
        152,
        {36: "X.......x.x.....", 38: _BACKBEAT, 42: "x.x.x.x.x.x.x.x."},
        "1.1.1.1.1.1.1.5.",
        "X.....x.X...x...",
        ((33, 34), (29, 27), (), (30, 29, 80)),
    ),
    "punk": Style(
        148,
        180,
        {36: "X.....x.X.x.....", 38: _BACKBEAT, 42: "x.x.x.x.x.x.x.x."},
        "1.1.1.1.1.1.1.1.",
        "x.x.x.x.x.x.x.x.",
        ((34,), (29, 30), (), (30, 81)),
    ),
    "metal": Style(
        104,
        172,
        {36: "XxxxX.xxXxxxX.xx", 38: _BACKBEAT, 51: "x.x.x.x.x.x.x.x."},
        "1111..1.1111..5.",
        "xxx.X...xxx.X...",
        ((34,), (30,), (), (30,)),
        modes=("minor",),
    ),
    "house": Style(
        114,
        132,
        {36: _FLOOR, 39: "....x.......x...", 46: "..x...x...x...x."},
        "..1...1...1...8.",
        "x..x..x...x..x..",
        ((38, 39), (0, 4, 81), (89, 90), (80, 11)),
    ),
    "techno": Style(
        122,
        146,
        {36: _FLOOR, 42: "o.xoo.xoo.xoo.xo", 39: "............x..."},
        "1.11..1.1.11..8.",
        "1232123212341232",
        ((38, 87), (80, 81), (), (81,)),
        modes=("minor",),
    ),
    "disco": Style(
        104,
        130,
        {36: _FLOOR, 38: _BACKBEAT, 46: "..x...x...x...x."},
        "1.8.1.8.1.8.1.8.",
        "..x..xx...x..xx.",
        ((33, 36), (27, 28), (48, 49), (56, 61)),
    ),
    "trance": Style(
        128,
        148,
        {36: _FLOOR, 39: "....x.......x...", 46: "..X...X...X...X."},
        "-.11-.11-.11-.11",
        "1324132413241324",
        ((38,), (81, 80), (90, 89), (81, 80)),
    ),
    "dnb": Style(
        160,
        180,
        {36: "X.........X.....", 38: _BACKBEAT, 42: "x.x.x.xox.x.x.xo"},
        "1.........1...5.",
        "X...............",
        ((38, 39), (4, 89), (89,), (80, 11)),
        bars_per_chord=2,
    ),
    "funk": Style(
        88,
        118,
        {36: "X..x..x...x..x..", 38: "....X..o.o..X..o", 42: "xoxxxoxxxoxxxoxx"},
        "1..8..11..5.8.1.",
        "..xx..x...xx..x.",
        ((36, 33), (27, 7), (), (65, 61)),
        sevenths=True,
    ),
    "bossa": Style(
        108,
        152,
        {36: "X..xX..xX..xX..x", 37: "x..x..x...x..x..", 42: "oooooooooooooooo"},
        "1..55..11..55..1",
        "x..x..x...x..x..",
        ((32,), (24,), (), (73, 66, 11)),
        beats=8,
        steps=2,
        harmony="jazz",
        sevenths=True,
    ),
    "swing": Style(
        104,
        180,
        {51: "x..x.xx..x.x", 44: "...x.....x..", 36: "o..o..o..o.."},
        "w..w..w..w..",
        "x....x......",
        ((32,), (0, 26), (), (65, 66, 56)),
        steps=3,
        harmony="jazz",
        sevenths=True,
    ),
    "shuffle": Style(
        84,
        144,
        {36: "X.....x.....", 38: "...X.....X..", 42: "x.xx.xx.xx.x"},
        "1.15.51.15.5",
        "x.xx.xx.xx.x",
        ((33, 32), (0, 26), (), (22, 65)),
        steps=3,
        modes=("major",),
    ),
    "waltz": Style(
        84,
        174,
        {36: "o...........", 42: "....o...o..."},
        "1...-.......",
        "....x...x...",
        ((32, 43), (21, 0, 48), (), (40, 71, 21)),
        beats=3,
        harmony="old",
    ),
    "jig": Style(
        88,
        132,
        {36: "X..x..", 54: "xooxoo"},
        "1..5..",
        "x.xx.x",
        ((32,), (25, 24), (), (73, 72, 40)),
        beats=2,
        steps=3,
        harmony="old",
    ),
    "march": Style(
        98,
        128,
        {36: "X...X...X...X...", 38: "x.xxx.x.x.xxxxxx", 49: "o..............."},
        "1...5...1...5...",
        "..x...x...x...x.",
        ((58,), (60, 61), (), (56, 72)),
        harmony="old",
        modes=("major",),
    ),
    "alberti": Style(66, 144, {}, "", "1.3.2.3.1.3.2.3.", ((), (0, 6), (), (0, 6)), harmony="old"),
    "baroque": Style(
        62,
        112,
        {},
        "w.w.w.w.w.w.w.w.",
        "x...x...x...x...",
        ((43, 42), (6, 19), (), (40, 73, 68)),
        harmony="old",
    ),
    "folk": Style(
        76, 132, {}, "1.......5.......", "1.3.2.4.1.3.2.3.", ((32,), (24, 25), (), (73, 105, 22))
    ),
    "cumbia": Style(
        82,
        108,
        {36: "X...x...X...x...", 37: "..x...x...x...x.", 70: "x.xxx.xxx.xxx.xx"},
        "1...5.5.1...5.5.",
        "..x...x...x...x.",
        ((33,), (21, 24), (), (21, 73)),
        harmony="old",
    ),
    "synthpop": Style(
        98,
        132,
        {36: "X.....x.X.......", 38: _BACKBEAT, 42: "xxxxxxxxxxxxxxxx"},
        "1.1.8.1.1.1.8.1.",
        "1.2.3.1.2.3.2.3.",
        ((38, 39), (81, 80, 62), (50, 90), (80, 11)),
    ),
}
