"""Standard MIDI files and fluidsynth, which plays them with FluidR3."""

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from audiocraft.errors import AssetError

TICKS: Final = 480
"""Of a beat."""

DRUM_CHANNEL: Final = 9
"""Of General MIDI."""

SOUNDFONT: Final = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")

Note = tuple[int, int, int, int, int]
"""Tick, channel, pitch, velocity, ticks."""


def midi_file(
    notes: Sequence[Note],
    programs: dict[int, int],
    bpm: float,
    controls: Sequence[tuple[int, int, int]] = (),
) -> bytes:
    """A standard MIDI file of one track.

    Args:
        notes: in any order.
        programs: General MIDI programs by channel.
        bpm: beats a minute.
        controls: channel, controller and value, set before the first note.
    """
    events = [(0, 0, struct.pack("BB", 0xC0 | ch, program)) for ch, program in programs.items()]
    events += [(0, 0, struct.pack("BBB", 0xB0 | ch, what, value)) for ch, what, value in controls]
    for tick, channel, pitch, velocity, length in notes:
        events.append((tick, 2, struct.pack("BBB", 0x90 | channel, pitch, velocity)))
        events.append((tick + length, 1, struct.pack("BBB", 0x80 | channel, pitch, 0)))
    track = b"\x00\xff\x51\x03" + round(60e6 / bpm).to_bytes(3, "big")
    now = 0
    for tick, _, message in sorted(events):
        track += _variable(tick - now) + message
        now = tick
    track += b"\x00\xff\x2f\x00"
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, TICKS)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def _variable(number: int) -> bytes:
    """MIDI's numbers of variable length: seven bits a byte, the eighth set on all but the last."""
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(number & 0x7F | 0x80)
    return bytes(reversed(digits))


def missing() -> str | None:
    """What rendering lacks on this machine; None where it lacks nothing."""
    if shutil.which("fluidsynth") is None:
        return "fluidsynth"
    return None if SOUNDFONT.is_file() else str(SOUNDFONT)


def play(midi: Path, audio: Path, rate: int, *options: str) -> None:
    """Play a MIDI file into an audio file, stereo.

    Args:
        midi: to play.
        audio: to write.
        rate: Hz.
        options: of fluidsynth.

    Raises:
        AssetError: fluidsynth or the sound font is not installed.
        subprocess.CalledProcessError: fluidsynth fails.
    """
    if lacks := missing():
        raise AssetError(f"Music is not rendered, {lacks} is missing: run scripts/setup --render.")
    command = ["fluidsynth", "-ni", "-q", "-r", str(rate), "-F", str(audio), *options]
    subprocess.run([*command, str(SOUNDFONT), str(midi)], check=True)  # noqa: S603 - of our own
