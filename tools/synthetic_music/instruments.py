"""The instruments of the synthetic music, by the names that descriptions give them."""

from dataclasses import dataclass
from typing import Final

_REFERENCE: Final = -35.0  # LKFS: no lead is softer at full volume


@dataclass(frozen=True)
class Instrument:
    """One sound of FluidR3.

    Attributes:
        program: of General MIDI.
        level: its loudness, LKFS: of a tune in its register at velocity 90 and a gain of 0.3, as
            measured; the volumes make all instruments of a part equally loud.
        lowest: MIDI note from which it plays melodies up to two octaves higher, or chords, or bass.
    """

    program: int
    level: float
    lowest: int

    def volume(self, decibels: float) -> int:
        """The value of controller 7, whose square is the amplitude.

        Args:
            decibels: relative to the level that every lead can play at.
        """
        return min(127, round(127 * 10 ** ((_REFERENCE + decibels - self.level) / 40)))


# No accompaniment sounds like a lead: where a piano is heard, it leads. Each plays where its first
# harmonic is not drowned by its third, so that its chroma is its melody's.
LEADS: Final = {
    "piano": Instrument(0, -33.4, 64),
    "acoustic guitar": Instrument(25, -31.1, 57),
    "electric guitar": Instrument(30, -25.6, 67),
    "organ": Instrument(16, -33.5, 60),
    "accordion": Instrument(21, -34.2, 62),
    "violin": Instrument(40, -32.5, 67),
    "choir": Instrument(53, -28.7, 60),
    "trumpet": Instrument(56, -30.3, 69),
    "saxophone": Instrument(65, -28.5, 58),
    "flute": Instrument(73, -30.5, 69),
    "vibraphone": Instrument(11, -34.6, 62),
    "synth": Instrument(81, -32.6, 62),
}
"""What leads a piece."""

CHORDS: Final = {
    "electric piano": Instrument(4, -29.5, 52),
    "harpsichord": Instrument(6, -30.4, 55),
    "clavinet": Instrument(7, -31.3, 52),
    "marimba": Instrument(12, -30.6, 55),
    "clean guitar": Instrument(27, -31.8, 52),
    "harp": Instrument(46, -29.2, 52),
    "brass": Instrument(61, -32.5, 52),
    "synth brass": Instrument(62, -31.0, 52),
    "banjo": Instrument(105, -32.2, 55),
}
"""What plays the chords' rhythm."""

BASSES: Final = {
    "double bass": Instrument(32, -30.3, 36),
    "bass guitar": Instrument(33, -30.8, 36),
    "synth bass": Instrument(38, -30.8, 36),
    "tuba": Instrument(58, -30.0, 36),
}
"""What plays the lowest part."""

DRUMS: Final = "drums"
