"""MP3 and Ogg by pydub and ffmpeg, in a process of its own that can be ended.

pydub waits for ffmpeg in one piece, in which no cancelation is heard, and where it fails it leaves
its temporary files behind. So its process has a folder for them, and ends with ffmpeg as soon as
its caller does, or lets go of its standard input.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

_POLL_S: Final = 0.02
_FFMPEG_FAILED: Final = 3
_CODECS: Final = {"mp3": "libmp3lame", "ogg": "libvorbis"}


def export(
    pcm: memoryview,
    channels: int,
    sample_rate: int,
    container: str,
    bitrate: int | None,
    target: Path,
) -> str | None:
    """Write a compressed file.

    Whatever is raised here meanwhile, such as a cancelation, ends the encoder first.

    Args:
        pcm: samples (T, C), 16 bit.
        channels: how many.
        sample_rate: Hz.
        container: `mp3` or `ogg`.
        bitrate: kbit/s; None for the encoder's default quality.
        target: of the file, which stays as far as it came; what is temporary lies beside it and
            is removed.

    Returns:
        What ffmpeg said, if it failed.

    Raises:
        OSError: the samples cannot be written beside the file, or the process was ended by others.
    """
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=target.parent) as folder:
        source = Path(folder) / "pcm"
        source.write_bytes(pcm)
        rate = "" if bitrate is None else f"{bitrate}k"
        arguments = [source, target, container, rate, sample_rate, channels]
        with subprocess.Popen(  # noqa: S603 - our own interpreter and file
            # -P: what lies beside this file is none of the modules that pydub imports.
            [sys.executable, "-P", __file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            try:
                while process.poll() is None:
                    time.sleep(_POLL_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            said, status = process.stdout.read(), process.returncode
            if status in {0, _FFMPEG_FAILED}:
                return said if status else None
            raise OSError(said or f"the encoder ended with status {status}")


def main() -> int:
    """Does it, and returns the exit status; standard output says what went wrong."""
    source, target, container, rate, sample_rate, channels = sys.argv[1:]
    threading.Thread(target=_end_with_caller, daemon=True).start()
    tempfile.tempdir = str(Path(source).parent)  # a full disk would make TMPDIR be passed over
    from pydub import AudioSegment
    from pydub.exceptions import CouldntEncodeError

    segment = AudioSegment(
        data=Path(source).read_bytes(),
        sample_width=2,
        frame_rate=int(sample_rate),
        channels=int(channels),
    )
    try:
        segment.export(
            target,
            format=container,
            codec=_CODECS[container],
            bitrate=rate or None,
            # xerror: a disk that is full only at the end counts too; bitexact: no random Ogg serial
            # number, no version of the encoder
            parameters=["-v", "error", "-xerror", "-fflags", "+bitexact", "-flags:a", "+bitexact"],
        ).close()
    except CouldntEncodeError as error:
        sys.stdout.write(str(error)[-1000:])  # no more than fits the pipe until it is read
        return _FFMPEG_FAILED
    except OSError as error:
        sys.stdout.write(error.strerror or str(error))
        return 1
    return 0


def _end_with_caller() -> None:
    """The pipe closes when the caller lets go of it, or dies."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
