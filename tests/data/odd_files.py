"""Files that are cut off, long, or made to look so."""

import struct

from tests.data.signals import convert, ffmpeg, tones, write_source

_LONGEST = 65535  # samples in a frame of FLAC


def cut(path, target, share=0.5):
    target.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return target


def three_hours(folder, name, rate, channels, *arguments):
    """A quiet tone of 440 Hz, and in the last minute 660 Hz."""
    pieces = []
    for frequency in (440, 660):
        wav = 0.1 * tones(rate, 60, (frequency,) * channels).sign()
        piece = convert(
            write_source(folder / f"{frequency}.wav", wav, rate),
            folder / f"{frequency}-{name}",
            *arguments,
        )
        pieces.append(piece.name)
    playlist = folder / "pieces.txt"
    playlist.write_text("".join(f"file {name}\n" for name in [pieces[0]] * 179 + [pieces[1]]))
    ffmpeg("-f", "concat", "-i", playlist, "-c", "copy", folder / name)
    return folder / name


def silent_flac(path, seconds, rate=48000):
    """Stereo FLAC (RFC 9639), 45 KB for an hour, that does not say how long it is."""
    # Longest and shortest frame, their bytes (unknown), then in 64 bits the rate, channels - 1,
    # bits - 1, and 0: no length; and no checksum.
    layout = struct.pack(">HH6xQ16x", _LONGEST, _LONGEST, rate << 44 | 1 << 41 | 15 << 36)
    with path.open("wb") as file:
        file.write(b"fLaC" + struct.pack(">I", 0x80 << 24 | len(layout)) + layout)
        for number in range(-(-seconds * rate // _LONGEST)):
            # Length in 16 bits, rate of the stream, two channels, 16 bits.
            head = (
                b"\xff\xf8\x70\x18"
                + chr(number).encode("utf-8", "surrogatepass")
                + struct.pack(">H", _LONGEST - 1)
            )
            frame = head + bytes([_crc(head, 0x107, 8)]) + 2 * b"\0\0\0"  # constant, of value 0
            file.write(frame + struct.pack(">H", _crc(frame, 0x18005, 16)))
    return path


def state_samples(path, samples):
    """Have a FLAC say that it has so many samples; 0, as of one that was streamed, says nothing."""
    data = bytearray(path.read_bytes())
    # Behind four bytes of name, four of the block's head and ten of frames: 64 bits, the last 36.
    layout = int.from_bytes(data[18:26], "big")
    data[18:26] = (layout >> 36 << 36 | samples).to_bytes(8, "big")
    path.write_bytes(data)
    return path


def leave_open(path):
    """Have a WAV look like a recording that was never finished: its header says 0 bytes."""
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = bytes(4)
    path.write_bytes(data)
    return path


def _crc(data, polynomial, bits):
    remainder = 0
    for byte in data:
        remainder ^= byte << bits - 8
        for _ in range(8):
            remainder <<= 1
            if remainder >> bits:
                remainder ^= polynomial
    return remainder
