"""Which pieces of which files a model is trained on.

Each file is decoded once, whole, to learn that it can be, how long it is and where it is silent;
what was learnt is kept, so that a second run decodes nothing. A chunk stays a reference: a file, a
start and a length. Nothing is cut or rounded on disk, the user's own files serve in place, and a
later stage that makes a new file of each (without vocals, say) points the same chunks at it.
To decode again is hundreds of times faster than what those stages do with the samples.
"""

import json
import logging
import math
import os
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from audiocraft.assets.exchange import start_thread
from audiocraft.assets.parts import read_json, write_json
from audiocraft.data.archive import LeftOut
from audiocraft.data.audio import DEMUXERS, LOUDEST, audio_blocks
from audiocraft.data.files import AudioFile
from audiocraft.errors import AudioFileError
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_R = TypeVar("_R")

CONTEXT_S: Final = 30.0
"""Seconds that a released model is trained on at a time."""
SHORTEST_S: Final = 5.0
"""Seconds below which a file, or what is left of one, is of no use."""
SILENCE: Final = 1e-4
"""Peak, -80 dB of full scale, that 16-bit dither stays below."""

_POLL_S: Final = 0.1
_LEAST_RATE: Final = 8000  # bytes of a second of compressed music, 64 kbit/s
_MARGIN: Final = 1.1  # containers round and estimate the durations that they state
_LONGEST_S: Final = 86400  # a day, beyond which a stated duration is taken for damage
_MOST_FRAMES: Final = 10_000  # in a byte of a lossless file; of silence it has some 4000
_LOWEST_RATE: Final = 1000  # Hz; what damage makes of it, such as 1, would be gigabytes at 44100


@dataclass(frozen=True)
class Chunk:
    """A piece of a file, to be read by `audio_read(path, start, duration)`.

    Attributes:
        path: of the file.
        start: seconds.
        duration: seconds, of at least `shortest`.
    """

    path: Path
    start: float
    duration: float

    def span(self, sample_rate: int) -> slice:
        """Its samples within the whole file at a rate, Hz."""
        begin = round(self.start * sample_rate)
        return slice(begin, begin + round(self.duration * sample_rate))


@dataclass(frozen=True)
class Clip:
    """A file that is used.

    Attributes:
        file: as it was found.
        sample_rate: Hz.
        channels: how many.
        duration: seconds.
        tags: the file's own, by lower-case name, such as title, artist, genre and comment.
        chunks: in order.
        silent: how many more were left out, because nothing is heard in them.
    """

    file: AudioFile
    sample_rate: int
    channels: int
    duration: float
    tags: Mapping[str, str]
    chunks: tuple[Chunk, ...]
    silent: int


@dataclass(frozen=True)
class Cut:
    """Files that were cut into chunks.

    Attributes:
        clips: what is used, in the order of the files.
        left_out: what is not.
    """

    clips: tuple[Clip, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class _Decoded:
    """What is kept of a decoded file: samples per second, their number, tags, peak by chunk."""

    sample_rate: int
    channels: int
    frames: int
    tags: dict[str, str]
    peaks: list[float]


class PeakMeter:
    """The greatest sample in each stretch of a signal that comes in blocks.

    Attributes:
        step: samples of a stretch.
        samples: that have come.
        peaks: one for each stretch that has begun.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.samples = 0
        self.peaks: list[float] = []

    def add(self, block: Tensor) -> None:
        """Take in the next samples, (C, T)."""
        while block.shape[1]:
            within = self.samples % self.step
            piece, block = block.tensor_split([self.step - within], dim=1)
            peak = float(piece.abs().max())
            if within:
                self.peaks[-1] = max(self.peaks[-1], peak)
            else:
                self.peaks.append(peak)
            self.samples += piece.shape[1]


def cut(
    files: Sequence[AudioFile],
    folder: Path,
    *,
    context: float = CONTEXT_S,
    shortest: float = SHORTEST_S,
    workers: int | None = None,
) -> Cut:
    """Decode files and cut them into chunks.

    Args:
        files: candidates.
        folder: of the job, made if missing; what was learnt of each file lies there by its hash.
        context: seconds of a chunk.
        shortest: seconds; shorter files, and what is left of longer ones, are left out.
        workers: files that are decoded at a time; as many as there are processors by default, up
            to 4.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {file.sha256: _read(_note(folder, file, context)) for file in files}
    # Equal files are decoded once.
    missing = list({file.sha256: file for file in files if not known[file.sha256]}.values())
    reasons: dict[str, str] = {}
    progress = ProgressLog(logger, "files", "decoding the dataset")
    workers = workers or min(4, os.cpu_count() or 1)
    results = each(lambda file: _decode(file, context), missing, workers)
    for done, (file, result) in enumerate(results, 1):
        if isinstance(result, _Decoded):
            write_json(_note(folder, file, context), asdict(result))
            known[file.sha256] = result
        else:
            reasons[file.sha256] = result
        progress.update(done, len(missing))
    clips, left_out = [], []
    for file in files:
        decoded = known[file.sha256]
        clip = (
            reasons[file.sha256] if decoded is None else _cut_file(file, decoded, context, shortest)
        )
        if isinstance(clip, Clip):
            clips.append(clip)
        else:
            logger.warning("%s is left out: it %s.", file.name, clip)
            left_out.append(LeftOut(file.name, clip))
    return Cut(tuple(clips), tuple(left_out))


def _cut_file(file: AudioFile, decoded: _Decoded, context: float, shortest: float) -> Clip | str:
    """A file's chunks, or why it has none."""
    rate, frames = decoded.sample_rate, decoded.frames
    if rate < _LOWEST_RATE:
        return f"has a sample rate below {_LOWEST_RATE} Hz ({rate} Hz); export it again"
    if frames < shortest * rate:
        return f"is shorter than {shortest:g} s ({frames / rate:.2f} s)"
    peak = max(decoded.peaks)
    if peak > LOUDEST:
        return f"peaks above {LOUDEST:g} times full scale ({peak:.4g}); export it again"
    chunks, silent = [], 0
    step = round(context * rate)
    for start, peak in zip(range(0, frames, step), decoded.peaks, strict=True):
        length = min(step, frames - start)
        if length < shortest * rate and length < step:
            continue
        if peak < SILENCE:
            silent += 1
        else:
            chunks.append(Chunk(file.path, start / rate, length / rate))
    if not chunks:
        return "is silent"
    return Clip(file, rate, decoded.channels, frames / rate, decoded.tags, tuple(chunks), silent)


def _decode(file: AudioFile, context: float) -> _Decoded | str:
    """What a file holds, or why it is of no use."""
    rate, channels, meter = 0, 0, PeakMeter(0)
    try:
        with closing(audio_blocks(file.path)) as blocks:
            for block, rate in blocks:
                channels, meter.step = len(block), round(context * rate)
                meter.add(block)
                if rate < _LOWEST_RATE:  # it is left out
                    break
    except AudioFileError as error:
        # The file bears a name of its own here, the report gives the user's.
        return str(error).removeprefix(file.path.name).strip(" .")
    return _Decoded(rate, channels, meter.samples, read_tags(file.path), meter.peaks)


def read_chunks(path: Path, chunks: Sequence[Chunk]) -> Iterator[tuple[Tensor, int]]:
    """The samples of chunks of a file, which is decoded once, in memory for one of them.

    Args:
        path: of the file they were cut from, or of another that lasts as long.
        chunks: in the order of their starts, none over another.

    Yields:
        For each chunk its samples (C, T), fewer where the file is a little shorter, and the sample
        rate, Hz.
    """
    kept: list[Tensor] = []
    passed = rate = 0
    todo = deque(chunks)
    with closing(audio_blocks(path)) as blocks:
        for block, rate in blocks:
            end = passed + block.shape[1]
            while todo and (span := todo[0].span(rate)).start < end:
                kept.append(block[:, max(0, span.start - passed) : span.stop - passed])
                if span.stop > end:
                    break
                yield torch.cat(kept, dim=1), rate
                kept = []
                todo.popleft()
            if not todo:
                return
            passed = end
    if kept:
        yield torch.cat(kept, dim=1), rate


def _note(folder: Path, file: AudioFile, context: float) -> Path:
    return folder / f"{file.sha256}-{context:g}s.json"


def _read(note: Path) -> _Decoded | None:
    value = read_json(note)
    return _Decoded(**value) if value else None


def read_tags(path: Path) -> dict[str, str]:
    """A file's own tags, by lower-case name.

    Containers keep them for all of the file or for a stream; those of the music come first, and
    those of pictures and films do not count.

    Args:
        path: a file that was decoded.

    Returns:
        Nothing where there are none, or no ffprobe to read them.
    """
    answer = _probe(path, "format_tags:stream_tags")
    if answer is None:
        logger.warning("ffprobe is not installed, so the tags of %s are not read.", path.name)
        return {}
    sections = [answer.get("format", {}), *answer.get("streams", [])]
    return {
        name.lower(): value.strip()
        for section in sections
        for name, value in section.get("tags", {}).items()
        if value.strip()
    }


def stated_duration(path: Path) -> float | None:
    """How long a file says that it is; it need not be true.

    Args:
        path: any file.

    Returns:
        Seconds, above 0; None where it does not say, is no container of music, or there is no
        ffprobe to read it.
    """
    answer = _probe(path, "format=duration") or {}
    try:
        seconds = float(answer["format"]["duration"])
    except (KeyError, ValueError):
        return None
    return seconds if 0 < seconds < math.inf else None


def header_duration(path: Path, *, exact: bool = False) -> float | None:
    """Seconds of music by a file's header; nothing is decoded.

    Args:
        path: any file; what is no plain one is not opened.
        exact: without the lengths that are estimates, those of MP3 files.

    Returns:
        Above 0; None where libsndfile does not read it, or where it states none or one that cannot
        be.
    """
    import soundfile

    try:
        if not path.is_file():  # a pipe would wait for somebody to write
            return None
        most = _MOST_FRAMES * path.stat().st_size
        # By descriptor, for soundfile takes a name's suffix into account, and only names in UTF-8.
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            is_counted = not (exact and sound.subtype.startswith("MPEG"))
            # A FLAC that was streamed states none, and a recording that was never finished 0.
            if is_counted and 0 < sound.frames <= most:
                return float(sound.frames / sound.samplerate)
    except (OSError, soundfile.LibsndfileError):
        pass
    return None


def longest_duration(path: Path) -> float:
    """Seconds that a file of music may last, from its header and its size."""
    seconds = header_duration(path, exact=True)
    if seconds is not None:
        return seconds
    stated = stated_duration(path)
    if stated is None or stated > _LONGEST_S:
        return path.stat().st_size / _LEAST_RATE
    return _MARGIN * stated


def _probe(path: Path, entries: str) -> dict[str, Any] | None:
    """What ffprobe says of a file and its first stream of sound.

    Args:
        path: any file.
        entries: that are asked for, in the form of `-show_entries`.

    Returns:
        By section; empty where it cannot be read, None where there is no ffprobe.
    """
    ffprobe = shutil.which("ffprobe")
    if ffprobe is None:
        return None
    command = [ffprobe, "-v", "error", "-format_whitelist", DEMUXERS, "-select_streams", "a:0"]
    command += ["-show_entries", entries, "-of", "json", "file:/dev/stdin"]
    with path.open("rb") as file:
        done = subprocess.run(  # noqa: S603 - no shell, and nothing of a user's in the command
            command, stdin=file, capture_output=True, check=False
        )
    if done.returncode:  # no container of these, such as a raw format
        message = done.stderr.decode(errors="replace").strip()
        logger.debug("ffprobe does not read %s: %s", path.name, message)
        return {}
    answer: dict[str, Any] = json.loads(done.stdout.decode(errors="replace"))
    return answer


def each(
    function: Callable[[_T], _R], items: Sequence[_T], workers: int
) -> Iterator[tuple[_T, _R]]:
    """Items with their results, as they come from threads.

    Whoever leaves early, canceled or not, does not wait: each thread ends after its item.

    Args:
        function: of one item; what it raises is raised here.
        items: in the order in which they are begun.
        workers: how many threads.
    """
    todo: SimpleQueue[_T] = SimpleQueue()
    done: SimpleQueue[tuple[_T, _R] | BaseException] = SimpleQueue()
    left = threading.Event()
    for item in items:
        todo.put(item)

    def work() -> None:
        try:
            while not left.is_set():
                try:
                    item = todo.get_nowait()
                except Empty:
                    return
                done.put((item, function(item)))
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            done.put(error)

    try:
        for _ in range(min(workers, len(items))):
            start_thread(work)
        for _ in items:
            yield _next(done)
    finally:
        left.set()


def _next(done: SimpleQueue[tuple[_T, _R] | BaseException]) -> tuple[_T, _R]:
    """The next result; waiting in steps, between which a cancelation gets through."""
    while True:
        with suppress(Empty):
            result = done.get(timeout=_POLL_S)
            if isinstance(result, BaseException):
                raise result
            return result
