"""The styles of the synthetic music: the patterns of `tools/music_styles.py`, played by its bands.

A style has its own rhythm, tempi and band, and every lead plays in every style, some more often.
"""

from dataclasses import dataclass, replace
from typing import Final

from tools.music_styles import STYLES as PATTERNS
from tools.music_styles import Style as Pattern


@dataclass(frozen=True)
class Style:
    """A kind of music.

    Attributes:
        pattern: of a bar.
        slowest: bpm.
        fastest: bpm.
        bass: that it is played with, one of these.
        chords: likewise.
        leads: that it likes.
        names: that descriptions use.
    """

    pattern: Pattern
    slowest: int
    fastest: int
    bass: tuple[str, ...]
    chords: tuple[str, ...]
    leads: tuple[str, ...]
    names: tuple[str, ...]


STYLES: Final = {
    "ballad": Style(
        PATTERNS["ballad"],
        60,
        95,
        ("bass guitar",),
        ("electric piano", "harp"),
        ("piano", "violin", "acoustic guitar", "choir"),
        ("ballad", "slow ballad"),
    ),
    "hip hop": Style(
        PATTERNS["hiphop"],
        68,
        108,
        ("synth bass",),
        ("electric piano", "clavinet"),
        ("vibraphone", "flute", "synth", "piano"),
        ("hip hop", "hip hop beat"),
    ),
    "reggae": Style(
        PATTERNS["reggae"],
        60,
        96,
        ("bass guitar",),
        ("clean guitar", "synth brass"),
        ("organ", "trumpet", "saxophone"),
        ("reggae",),
    ),
    "funk": Style(
        PATTERNS["funk"],
        84,
        124,
        ("bass guitar",),
        ("clavinet", "clean guitar"),
        ("saxophone", "trumpet", "organ"),
        ("funk",),
    ),
    "rock": Style(
        PATTERNS["rock"],
        92,
        172,
        ("bass guitar",),
        ("clean guitar",),
        ("electric guitar", "organ", "synth"),
        ("rock", "rock song"),
    ),
    "house": Style(
        PATTERNS["house"],
        108,
        142,
        ("synth bass",),
        ("synth brass", "electric piano"),
        ("synth", "piano", "vibraphone"),
        ("house", "house track"),
    ),
    "disco": Style(
        PATTERNS["disco"],
        100,
        136,
        ("bass guitar", "synth bass"),
        ("clean guitar", "brass"),
        ("violin", "trumpet", "synth", "flute"),
        ("disco",),
    ),
    "drum and bass": Style(
        PATTERNS["dnb"],
        150,
        180,
        ("synth bass",),
        ("electric piano",),
        ("synth", "choir", "vibraphone"),
        ("drum and bass", "drum and bass track"),
    ),
    "bossa nova": Style(
        replace(PATTERNS["bossa"], bass="1..11..51..11..5"),
        112,
        168,
        ("double bass",),
        ("clean guitar", "electric piano"),
        ("flute", "saxophone", "acoustic guitar", "vibraphone"),
        ("bossa nova",),
    ),
    "swing": Style(
        PATTERNS["swing"],
        96,
        180,
        ("double bass",),
        ("electric piano", "clean guitar"),
        ("saxophone", "trumpet", "piano", "vibraphone"),
        ("swing", "jazz swing"),
    ),
    "waltz": Style(
        PATTERNS["waltz"],
        80,
        180,
        ("double bass", "tuba"),
        ("harp", "harpsichord"),
        ("accordion", "violin", "piano", "flute"),
        ("waltz",),
    ),
    "polka": Style(
        replace(PATTERNS["march"], bass="1.......1...5..."),
        92,
        150,
        ("tuba",),
        ("brass", "banjo"),
        ("accordion", "trumpet", "flute"),
        ("polka",),
    ),
    "cumbia": Style(
        PATTERNS["cumbia"],
        76,
        112,
        ("bass guitar",),
        ("marimba", "brass"),
        ("accordion", "flute", "trumpet"),
        ("cumbia", "latin cumbia"),
    ),
    "classical": Style(
        replace(PATTERNS["alberti"], bass="1.......5......."),
        60,
        150,
        ("double bass",),
        ("harpsichord", "harp"),
        ("violin", "flute", "piano", "choir", "organ"),
        ("classical piece", "classical"),
    ),
    "folk": Style(
        PATTERNS["folk"],
        60,
        132,
        ("double bass",),
        ("banjo", "clean guitar"),
        ("acoustic guitar", "violin", "accordion", "flute"),
        ("folk", "folk song"),
    ),
}
"""By the name that the truth has."""
