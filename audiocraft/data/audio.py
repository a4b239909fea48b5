"""Audio files: what they hold, reading, writing.

Content decides how a file is read, its name never does. soundfile reads what it reads exactly;
ffmpeg decodes the rest (m4a, mp4, webm, wma, mp3, ... and the sound of videos) to 32-bit floats, so
that peaks above full scale survive. A time in seconds is rounded to the nearest sample, and a piece
of a file equals the same piece of the whole file, in every format. To read a piece takes memory for
the piece alone, and what ffmpeg decodes of a small file that claims to last for ever is bounded.

A file that was cut off yields what is left where its decoder calls that a success, as those of WAV,
Ogg, MP3 and WebM do; FLAC and m4a are errors then. A WAV or CAF whose recorder died, so that its
header does not say how long it is, is read to its end. Damage inside a file is an error, but in Ogg
and MP3, which are made to go on after it: players do, and ffmpeg takes some tags of an MP3 for
damage. What ffmpeg had to say about a file that it read is logged as a warning.
"""

import errno
import io
import logging
import math
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from audiocraft.data.audio_export import export
from audiocraft.data.audio_utils import i16_pcm, normalize_audio
from audiocraft.errors import AudioEndError, AudioFileError, InputError

logger = logging.getLogger(__name__)

FORMATS: Final = ("wav", "mp3", "flac", "ogg")
LOUDEST: Final = 1e3
"""Peak, +60 dB of full scale; beyond are integers written as floating point, or damage."""
DEMUXERS: Final = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,loas,matroska,mov,mp3,mpc,mpc8,mpeg,"
    "mpegts,ogg,tak,tta,voc,w64,wav,wv"
)
"""Containers that hold their own sound, by ffmpeg's names.

It would also follow playlists (hls, concat, dash, sdp), which name other files of this machine.
"""

# Samples of all channels that are read at a time; a header's promise of more is not allocated
# before it is read.
_BLOCK: Final = 1 << 18
# Samples of all channels in one result: 4 GiB, 3.4 hours of stereo at 44.1 kHz.
_MOST_READ: Final = 1 << 30
# Samples of all channels that ffmpeg is let decode: a day of stereo at 48 kHz, minutes of work.
_MOST_DECODED: Final = 24 * 3600 * 48000 * 2
_LATEST: Final = 1e9  # seconds, 32 years
_AU_HEADER: Final = struct.Struct(">4s5I")  # magic, offset, size, encoding, sample rate, channels
_UNKNOWN_LENGTH: Final = (1 << 63) - 1  # libsndfile's SF_COUNT_MAX: a FLAC that was streamed
_EDGE: Final = 1 << 16  # bytes of a file's beginning or end; no page of Ogg has as many
_OPEN_CAF: Final = b"data" + 8 * b"\xff"  # a chunk up to the end of the file

# The suffix says nothing this way, and a name with a colon, a percent sign or a leading dash is
# safe. ffmpeg opens it as an ordinary file, so it can seek (a pipe can't be searched for the index
# that many m4a files have at their end).
_FFMPEG_INPUT: Final = "file:/dev/stdin"
_FFMPEG_PADDING: Final = ("Conversion failed!", "    Last message repeated")

_MP3_RATES: Final = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_STEREO: Final = 2


@dataclass(frozen=True)
class AudioFileInfo:
    """What an audio file holds.

    Attributes:
        sample_rate: Hz.
        duration: seconds.
        channels: how many.
    """

    sample_rate: int
    duration: float
    channels: int


@dataclass(frozen=True)
class _Header:
    """What libsndfile says of a file."""

    sample_rate: int
    channels: int
    frames: int
    is_ogg: bool
    is_mpeg: bool
    is_chained: bool

    @property
    def is_exact(self) -> bool:
        """Whether soundfile reads the file as it is meant.

        Not so an MP3: without a Xing header the length is an estimate, and libsndfile stops there
        (1.4 of 6.4 s of a measured one). Nor Ogg with more than two channels, which come in
        Vorbis's own order, or chained Ogg, of which it reads the first link; nor a FLAC of unknown
        length, in which libsndfile can't seek, nor a file that says that it has no samples.
        """
        reordered = self.is_ogg and self.channels > _STEREO
        unknown = self.frames in {0, _UNKNOWN_LENGTH}
        return not (self.is_mpeg or reordered or self.is_chained or unknown)


def audio_info(filepath: str | Path) -> AudioFileInfo:
    """Sample rate, duration and channels of a file, as `audio_read` would return them.

    What ffmpeg reads is decoded for that (some 500 times faster than it plays): containers state
    durations that are rounded, estimated or missing. More than a day of stereo is refused.

    Args:
        filepath: any file that `audio_read` reads.

    Raises:
        AudioFileError: as for `audio_read`.
    """
    path = _existing_file(filepath)
    header = _soundfile_header(path)
    if header is not None and header.is_exact:
        return AudioFileInfo(
            header.sample_rate, header.frames / header.sample_rate, header.channels
        )
    # Counted and not kept: an hour of compressed sound is gigabytes of samples.
    sample_rate, channels, frames = 0, 0, 0
    for rate, block in _decoded(path, skip_damage=_skips_damage(path, header)):
        sample_rate, channels = rate, block.shape[1]
        frames += len(block)
    if not frames:
        raise _no_samples(path)
    return AudioFileInfo(sample_rate, frames / sample_rate, channels)


def audio_read(
    filepath: str | Path, seek_time: float = 0.0, duration: float = -1.0, pad: bool = False
) -> tuple[Tensor, int]:
    """Read a file or a piece of it.

    Args:
        filepath: audio, or a video, of which the first audio stream is read; the name's suffix does
            not matter.
        seek_time: seconds to leave out at the start.
        duration: seconds to read; 0 or less reads to the end. At the end of the file the result is
            shorter.
        pad: append silence where the result would be shorter than `duration`.

    Returns:
        Samples (C, T), float32, in [-1, 1] but for formats that hold more; and the sample rate, Hz.

    Raises:
        InputError: `seek_time` or `duration` is no usable number.
        AudioEndError: the file ends before `seek_time`.
        AudioFileError: the file is missing, empty, damaged or no audio; the piece takes more than
            4 GiB; or it takes ffmpeg to read it, which is not installed, or would decode more than
            a day of stereo.
    """
    if not (math.isfinite(seek_time) and seek_time >= 0):
        raise InputError(f"seek_time is {seek_time}; give 0 or more seconds.")
    if not math.isfinite(duration):
        raise InputError(f"duration is {duration}; give seconds, or -1 to read to the end.")
    path = _existing_file(filepath)
    # Beyond every file, and no number of samples that an integer or ffmpeg could not hold.
    seek_time, duration = min(seek_time, _LATEST), min(duration, _LATEST)
    header = _soundfile_header(path)
    if header is not None and header.is_exact:
        sample_rate = header.sample_rate
        samples = _read_soundfile(path, header, seek_time, duration)
    else:
        samples, sample_rate = _decode(
            path, seek_time, duration, skip_damage=_skips_damage(path, header)
        )
    wav = _as_tensor(path, samples)
    if pad and duration > 0:
        wav = F.pad(wav, (0, max(0, round(duration * sample_rate) - wav.shape[-1])))
    return wav, sample_rate


def audio_blocks(filepath: str | Path) -> Generator[tuple[Tensor, int]]:
    """Read a whole file in blocks of some seconds, in memory that its length does not matter to.

    Args:
        filepath: any file that `audio_read` reads.

    Yields:
        Samples (C, T), float32, which joined are those of `audio_read`; and the sample rate, Hz.

    Raises:
        AudioFileError: as for `audio_read`, which may show behind the last block; there is no
            limit of 4 GiB.
    """
    path = _existing_file(filepath)
    header = _soundfile_header(path)
    if header is not None and header.is_exact:
        for block in _soundfile_blocks(path, header, 0, header.frames):
            yield _as_tensor(path, block), header.sample_rate
        return
    empty = True
    decoded = _decoded(path, skip_damage=_skips_damage(path, header))
    with closing(decoded) as blocks:
        for sample_rate, samples in blocks:
            empty = empty and not len(samples)
            yield _as_tensor(path, samples.astype(np.float32)), sample_rate
    if empty:
        raise _no_samples(path)


def audio_write(
    stem_name: str | Path,
    wav: Tensor,
    sample_rate: int,
    format: str = "wav",  # noqa: A002 - the official name
    mp3_rate: int = 320,
    ogg_rate: int | None = None,
    normalize: bool = True,
    strategy: str = "peak",
    peak_clip_headroom_db: float = 1,
    rms_headroom_db: float = 18,
    loudness_headroom_db: float = 14,
    loudness_compressor: bool = False,
    log_clipping: bool = True,
    make_parent_dir: bool = True,
    add_suffix: bool = True,
) -> Path:
    """Set the level and write a file.

    The file appears under its name when it is whole. Equal input gives equal bytes.

    Args:
        stem_name: path without the suffix.
        wav: (T,) or (C, T), floating point, any device, full scale is 1.
        sample_rate: Hz.
        format: `wav` or `flac`, both 16 bit, `mp3` or `ogg` (Vorbis).
        mp3_rate: kbit/s.
        ogg_rate: kbit/s; None for Vorbis's default quality.
        normalize: as all arguments up to `log_clipping`, see `audio_utils.normalize_audio`. What
            exceeds full scale afterwards is cut off.
        strategy: `peak`, `rms`, `loudness` or `clip`.
        peak_clip_headroom_db: dB below full scale.
        rms_headroom_db: dB below full scale.
        loudness_headroom_db: LU below 0 LKFS.
        loudness_compressor: bend peaks softly below full scale.
        log_clipping: warn in the log where peaks are cut off.
        make_parent_dir: create the folder.
        add_suffix: append `.` and the format to `stem_name`.

    Returns:
        The path of the file.

    Raises:
        InputError: an argument that the format or the strategy does not take, or samples that are
            not numbers.
        AudioFileError: the file cannot be written, or ffmpeg is missing (mp3 and ogg).
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.")
    if not wav.is_floating_point():
        raise InputError(f"Audio is {wav.dtype}; give it as floating point.")
    if wav.dim() not in (1, 2) or not wav.numel():
        raise InputError(
            f"Audio has the shape {tuple(wav.shape)}; give it as (channels, samples), not empty."
        )
    wav = wav.detach().cpu().float().reshape(-1, wav.shape[-1])
    if not bool(wav.isfinite().all()):
        raise InputError(
            "Audio holds samples that are not numbers (NaN or infinite); give it without them."
        )
    if sample_rate <= 0 or sample_rate != int(sample_rate):
        raise InputError(f"sample_rate is {sample_rate} Hz; give a positive whole number.")
    if format == "mp3" and (sample_rate not in _MP3_RATES or len(wav) > _STEREO):
        raise InputError(
            f"MP3 takes up to {_STEREO} channels at {', '.join(map(str, _MP3_RATES))} Hz, "
            f"not {len(wav)} at {sample_rate} Hz: convert the audio or choose wav or flac."
        )
    path = Path(f"{stem_name}.{format}" if add_suffix else stem_name)
    wav = normalize_audio(
        wav,
        normalize,
        strategy,
        peak_clip_headroom_db,
        rms_headroom_db,
        loudness_headroom_db,
        loudness_compressor,
        log_clipping,
        sample_rate,
        str(stem_name),
    )
    pcm = np.ascontiguousarray(i16_pcm(wav).numpy().T)
    bitrate = {"mp3": mp3_rate, "ogg": ogg_rate}.get(format)
    try:
        if make_parent_dir:
            path.parent.mkdir(parents=True, exist_ok=True)
        with _whole_file(path) as file:
            if format in {"wav", "flac"}:
                _write_soundfile(file, pcm, int(sample_rate), format, path)
            else:
                _write_compressed(file, pcm, int(sample_rate), format, bitrate, path)
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from error
    return path


def _as_tensor(path: Path, samples: NDArray[np.float32]) -> Tensor:
    """(C, T) of samples (T, C), all of them numbers."""
    if not np.isfinite(samples).all():
        raise AudioFileError(
            f"{path.name} holds samples that are not numbers (NaN or infinite); export it again."
        )
    return torch.from_numpy(np.ascontiguousarray(samples.T))


def _existing_file(filepath: str | Path) -> Path:
    path = Path(filepath)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise _not_opened(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise AudioFileError(f"{path.name} is not a file; give the path of an audio file.")
    if not status.st_size:
        raise AudioFileError(f"{path.name} is empty (0 bytes); export or upload it again.")
    return path


def _soundfile_header(path: Path) -> _Header | None:
    """None where libsndfile does not know the format."""
    import soundfile

    try:
        # By descriptor, for soundfile takes a name's suffix into account.
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            is_ogg = sound.format == "OGG"
            return _Header(
                sample_rate=sound.samplerate,
                channels=sound.channels,
                frames=sound.frames,
                is_ogg=is_ogg,
                is_mpeg=sound.subtype.startswith("MPEG"),
                is_chained=is_ogg and _is_chained(file),
            )
    except OSError as error:
        raise _not_opened(path, error) from error
    except soundfile.LibsndfileError:
        return None


def _is_chained(file: BinaryIO) -> bool:
    """Whether an Ogg ends in another logical stream than it begins with (RFC 3533)."""
    serial = slice(14, 18)  # of a page's header
    file.seek(0)
    first = file.read(serial.stop)[serial]
    file.seek(max(0, file.seek(0, os.SEEK_END) - _EDGE))
    tail = file.read()
    last = tail.rfind(b"OggS", 0, max(0, len(tail) - serial.start))
    return last >= 0 and tail[last:][serial] != first


def _skips_damage(path: Path, header: _Header | None) -> bool:
    """Whether to go on after damage; ffmpeg takes the end of an unfinished recording for it."""
    if header is not None:
        return header.is_mpeg or not header.frames
    with path.open("rb") as file:
        head = file.read(_EDGE)
    return head.startswith(b"caff") and _OPEN_CAF in head


def _read_soundfile(
    path: Path, header: _Header, seek_time: float, duration: float
) -> NDArray[np.float32]:
    """Samples (T, C) of a piece of a file that libsndfile knows."""
    start, stop = _span(header.sample_rate, seek_time, duration)
    _check_start(path, start, header.frames, header.sample_rate, seek_time)
    missing = (header.frames if stop is None else min(stop, header.frames)) - start
    if missing * header.channels > _MOST_READ:
        raise _too_much_to_read(path, header.sample_rate, header.channels)
    return np.concatenate(list(_soundfile_blocks(path, header, start, missing)))


def _soundfile_blocks(
    path: Path, header: _Header, start: int, missing: int
) -> Generator[NDArray[np.float32]]:
    """So many samples (T, C) from a sample on, in blocks."""
    import soundfile

    try:
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            sound.seek(start)
            while missing:
                block = sound.read(
                    min(missing, _block_length(header.channels)), dtype="float32", always_2d=True
                )
                if not len(block):
                    raise _damaged(path, f"{missing / header.sample_rate:.2f} s are missing")
                yield block
                missing -= len(block)
    except soundfile.LibsndfileError as error:
        raise _damaged(path, _libsndfile_reason(error.error_string)) from error


def _decode(
    path: Path, seek_time: float, duration: float, *, skip_damage: bool
) -> tuple[NDArray[np.float32], int]:
    """Samples (T, C) of a piece, and sample rate, Hz, of what `_decoded` gives."""
    end = seek_time + duration if duration > 0 else None
    sample_rate, passed, kept = 1, 0, 0
    pieces = []
    with closing(_decoded(path, end=end, skip_damage=skip_damage)) as blocks:
        for sample_rate, block in blocks:
            start, stop = _span(sample_rate, seek_time, duration)
            # What lies before the piece is counted and let go.
            piece = block[max(0, start - passed) : None if stop is None else max(0, stop - passed)]
            passed += len(block)
            kept += piece.size
            if kept > _MOST_READ:
                raise _too_much_to_read(path, sample_rate, block.shape[1])
            if len(piece):
                pieces.append(piece.astype(np.float32))
    start, _ = _span(sample_rate, seek_time, duration)
    _check_start(path, start, passed, sample_rate, seek_time)
    return np.concatenate(pieces), sample_rate


def _decoded(
    path: Path, *, end: float | None = None, skip_damage: bool
) -> Generator[tuple[int, NDArray[np.float32]]]:
    """The first audio stream, decoded by ffmpeg, in blocks: sample rate, Hz, and samples (T, C).

    Always from the start: AAC and MP3 frames need their predecessors, so a decoder that starts in
    the middle gives other samples.

    Args:
        path: an existing file.
        end: seconds after which nothing is needed.
        skip_damage: whether to go on where something cannot be decoded.

    Raises:
        AudioFileError: behind the last block, where ffmpeg could not read the file; or there is no
            end to it.
    """
    command = [_ffmpeg(path), "-v", "error", "-nostdin", "-format_whitelist", DEMUXERS]
    command += [] if skip_damage else ["-xerror"]
    # Samples are counted (N): a video's sound may begin later than its picture, or have gaps.
    command += ["-i", _FFMPEG_INPUT, "-map", "0:a:0", "-af", "asetpts=N/SR/TB"]
    # A second more than is needed, so that no rounding matters.
    command += [] if end is None else ["-t", f"{end + 1:.6f}"]
    # AU names the offset of its samples and, in a pipe, no size; libsndfile ends a WAV at 4 GiB.
    command += ["-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with (
        path.open("rb") as file,
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(  # noqa: S603 - no shell, and nothing of a user's in the command
            command, stdin=file, stdout=subprocess.PIPE, stderr=stderr
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield from _au_blocks(path, process.stdout)
        except BaseException:  # too long, or no more of it is wanted
            process.kill()
            raise
        returncode = process.wait()
        stderr.seek(0)
        messages = stderr.read().decode(errors="replace")
    if "matches no streams" in messages:
        raise AudioFileError(f"{path.name} has no audio stream; choose a file with sound.")
    if returncode:
        raise AudioFileError(
            f"{path.name} cannot be read as audio (ffmpeg: {_reason(messages)}); check that it is "
            "whole and plays, or convert it to WAV."
        )
    if messages:
        logger.warning("%s was read, but its decoder reported: %s", path.name, _reason(messages))


def _au_blocks(path: Path, stream: IO[bytes]) -> Generator[tuple[int, NDArray[np.float32]]]:
    """Sample rate, Hz, and samples (T, C) of an AU file of big-endian 32-bit floats, in blocks."""
    head = stream.read(_AU_HEADER.size)
    if len(head) < _AU_HEADER.size:  # ffmpeg failed before it wrote anything
        return
    _, offset, _, _, sample_rate, channels = _AU_HEADER.unpack(head)
    stream.read(offset - _AU_HEADER.size)
    frame = 4 * channels
    size = 0
    while data := stream.read(_block_length(channels) * frame):
        size += len(data)
        if size > 4 * _MOST_DECODED:
            raise AudioFileError(
                f"{path.name} is longer than {_MOST_DECODED / channels / sample_rate:.6g} s, "
                f"which is what is decoded at most of {_channels(channels)} at {sample_rate} Hz; "
                "cut out the part that is needed."
            )
        whole = len(data) // frame * channels
        yield sample_rate, np.frombuffer(data, ">f4", count=whole).reshape(-1, channels)


def _block_length(channels: int) -> int:
    return max(1, _BLOCK // channels)


def _span(sample_rate: int, seek_time: float, duration: float) -> tuple[int, int | None]:
    """First sample of a piece and the one after its last; None is the end of the file."""
    start = round(seek_time * sample_rate)
    return start, start + max(1, round(duration * sample_rate)) if duration > 0 else None


def _check_start(path: Path, start: int, frames: int, sample_rate: int, seek_time: float) -> None:
    """Refuse a piece that begins after the end."""
    if not frames:
        raise _no_samples(path)
    if start >= frames:
        raise AudioEndError(
            f"{path.name} is {frames / sample_rate:.2f} s long, so nothing can be read from "
            f"{seek_time:g} s on; start earlier.",
            frames / sample_rate,
        )


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends, and that is gone where the block fails."""
    unfinished = path.with_name(f".{uuid.uuid4().hex}.part")
    with unfinished.open("xb+") as file:
        try:
            yield file
            file.close()  # a full disk may show only now
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink()
            raise


def _write_soundfile(
    file: BinaryIO, pcm: NDArray[np.int16], sample_rate: int, container: str, path: Path
) -> None:
    import soundfile

    content = io.BytesIO()  # of a disk that is full libsndfile would not say so
    try:
        soundfile.write(content, pcm, sample_rate, subtype="PCM_16", format=container.upper())
    except soundfile.LibsndfileError as error:
        raise _not_written(path, _libsndfile_reason(error.error_string)) from error
    file.write(content.getbuffer())


def _write_compressed(
    file: BinaryIO,
    pcm: NDArray[np.int16],
    sample_rate: int,
    container: str,
    bitrate: int | None,
    path: Path,
) -> None:
    _ffmpeg(path)  # pydub would fail without a name
    said = export(pcm.data, pcm.shape[1], sample_rate, container, bitrate, Path(file.name))
    if said is not None:
        raise _not_written(path, f"ffmpeg: {_reason(said)}")


def _ffmpeg(path: Path) -> str:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise AudioFileError(
            f"{path.name} needs ffmpeg, which is not installed; install it, or use WAV or FLAC."
        )
    return ffmpeg


def _reason(messages: str) -> str:
    """The last line of what ffmpeg said that tells anything."""
    if "not on whitelist" in messages:
        return "no container of audio or video"
    lines = [
        re.sub(r"^\[[^]]* @ 0x[0-9a-f]+\] ", "", line).removeprefix(f"{_FFMPEG_INPUT}: ")
        for line in messages.splitlines()
        if line and not line.startswith(_FFMPEG_PADDING)
    ]
    return lines[-1].removesuffix(".") if lines else "no reason given"


def _libsndfile_reason(message: str) -> str:
    return message.removeprefix("Error : ").removesuffix(".")


def _not_opened(path: Path, error: OSError | ValueError) -> AudioFileError:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return AudioFileError(f"{path.name} cannot be opened ({reason}); check the path.")


def _no_samples(path: Path) -> AudioFileError:
    return AudioFileError(f"{path.name} holds no audio samples; export it again.")


def _too_much_to_read(path: Path, sample_rate: int, channels: int) -> AudioFileError:
    return AudioFileError(
        f"{path.name} is longer than {_MOST_READ / channels / sample_rate:.6g} s, which is what "
        f"is read at once of {_channels(channels)} at {sample_rate} Hz; read or cut out a piece."
    )


def _channels(count: int) -> str:
    return "1 channel" if count == 1 else f"{count} channels"


def _damaged(path: Path, reason: str) -> AudioFileError:
    return AudioFileError(
        f"{path.name} is damaged or cut off ({reason}); export or download it again."
    )


def _not_written(path: Path, reason: str) -> AudioFileError:
    # ffmpeg gives the system's words, no number.
    if any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT)):
        return AudioFileError(
            f"{path.name} does not fit on the disk of {path.parent}; free some of it."
        )
    return AudioFileError(
        f"{path.name} cannot be written ({reason}); choose another path or format."
    )
