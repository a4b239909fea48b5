"""Stems of a dataset's files: what is kept of the music, and the melody that is followed.

A file is separated as a whole, in overlapping segments that are faded into each other, so that
neither chunks nor blocks leave a seam; it runs through in blocks, so its length costs time and disk
alone. One separation serves both purposes. What is written has the file's own time, so the chunks
that were cut from the file fit it: the kept music in stereo at the separator's rate, the melody in
mono at that of its chroma. Both are W64 of 32-bit floats: nothing is rounded, peaks above full
scale survive, and there is no limit of 4 GB.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

from audiocraft.assets.parts import UNFINISHED, give_name, read_json, write_json
from audiocraft.data.audio import audio_blocks
from audiocraft.data.audio_utils import convert_audio_channels
from audiocraft.data.chunks import Chunk, PeakMeter
from audiocraft.errors import AssetError, AudioFileError, InputError
from audiocraft.modules.stems import StemPart, StemSeparator
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)

STEMS: Final = ("drums", "bass", "other", "vocals")
"""What htdemucs separates."""
FAINT: Final = 1e-3
"""Peak, -60 dB of full scale, that is left where a stem is not there."""

_SEGMENT_MEMORY: Final = 2 * 10**9  # bytes of a GPU that one segment of htdemucs is given
_MOST_SEGMENTS: Final = 16
_PARTS: Final = 1000  # of a file, for the progress


@dataclass(frozen=True)
class StemChoice:
    """Which stems are needed of a file.

    Attributes:
        kept: are summed to the music; None takes it as it is.
        melody: are summed to the melody; None takes what is kept.
    """

    kept: tuple[str, ...] | None = None
    melody: tuple[str, ...] | None = None


def choose_stems(
    stems: Sequence[str] | None, melody_stems: Sequence[str] | None = None
) -> StemChoice:
    """What must be separated.

    Args:
        stems: that are kept; None keeps the music as it is.
        melody_stems: that a version's melody is taken from; None where it follows no melody, or the
            whole mix.

    Returns:
        The melody is what is kept of its stems; where nothing of them is, it is all that is kept.

    Raises:
        InputError: there is no such stem.
    """
    unknown = sorted({*(stems or ()), *(melody_stems or ())} - {*STEMS})
    if unknown or (stems is not None and not stems):
        raise InputError(
            f"The stems to keep are {', '.join(stems or ()) or 'none'}; choose among "
            f"{', '.join(STEMS)}."
        )
    # In one order, so that the same stems have the same name.
    kept = None if stems is None else tuple(stem for stem in STEMS if stem in stems)
    melody = tuple(stem for stem in kept or STEMS if stem in (melody_stems or ()))
    return StemChoice(kept, melody if melody and melody != kept else None)


@dataclass(frozen=True)
class StemFile:
    """A file to be made of a track.

    Attributes:
        path: of the file.
        stems: that are summed.
        mono_rate: Hz, of one channel; None: as the separator gives it, with a note of its peaks.
    """

    path: Path
    stems: tuple[str, ...]
    mono_rate: int | None = None


@dataclass(frozen=True)
class Track:
    """A file to be separated.

    Attributes:
        path: of the file.
        duration: seconds.
        files: that are made of it.
    """

    path: Path
    duration: float
    files: tuple[StemFile, ...]


def separate(tracks: Sequence[Track], separator: StemSeparator) -> None:
    """Write stems of files; each appears under its name when it is whole.

    Args:
        tracks: files that can be decoded; what their stems were before is overwritten.
        separator: on the device where it shall run.

    Raises:
        AssetError: the disk is full.
        AudioFileError: the separator makes no numbers of a file.
    """
    blocks = (_blocks_at(track.path, separator.sample_rate) for track in tracks)
    progress = ProgressLog(logger, "files", "separating stems", _PARTS)
    parts = separator.separate_tracks(blocks, _batch(separator.device))
    for index, track in enumerate(tracks):
        done = 0
        with ExitStack() as stack:
            name = track.path.name
            files = [stack.enter_context(_Writer(file, name, separator)) for file in track.files]
            for part in parts:
                for file in files:
                    file.write(part)
                done += part.stems.shape[-1]
                share = min(1.0, done / separator.sample_rate / track.duration)
                progress.update(round(_PARTS * (index + share)), _PARTS * len(tracks))
                if part.last:
                    break
            for file in files:
                file.finish()


def _batch(device: torch.device) -> int:
    """Segments at once. On a CPU they are no faster together, see `tools/benchmark_dataset.py`."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(_MOST_SEGMENTS, free // _SEGMENT_MEMORY))


def _blocks_at(path: Path, rate: int) -> Iterator[Tensor]:
    """A file in stereo at a rate, Hz, in blocks (2, T)."""
    import soxr

    stream: soxr.ResampleStream | None = None
    for block, found in audio_blocks(path):
        stereo = convert_audio_channels(block)
        if found == rate:
            yield stereo
            continue
        stream = stream or soxr.ResampleStream(found, rate, len(stereo))
        yield torch.from_numpy(stream.resample_chunk(stereo.T.numpy())).T
    if stream is not None:
        rest = stream.resample_chunk(np.zeros((0, 2), np.float32), last=True)
        yield torch.from_numpy(rest).T


class _Writer:
    """A file of stems that is being written."""

    def __init__(self, file: StemFile, name: str, separator: StemSeparator) -> None:
        import soundfile
        import soxr

        self._file = file
        self._name = name  # of the track
        self._index = [separator.sources.index(stem) for stem in file.stems]
        self._meter = PeakMeter(separator.sample_rate)
        self._stream: soxr.ResampleStream | None = None
        rate, channels = separator.sample_rate, separator.channels
        if file.mono_rate is not None:
            self._stream = soxr.ResampleStream(rate, file.mono_rate, 1)
            rate, channels = file.mono_rate, 1
        self._unfinished = file.path.with_name(f"{file.path.name}{UNFINISHED}")
        self._sound = soundfile.SoundFile(
            self._unfinished, "w", rate, channels, format="W64", subtype="FLOAT"
        )

    def write(self, part: StemPart) -> None:
        import soundfile

        wav = part.stems[self._index].sum(dim=0).cpu()
        if not bool(wav.isfinite().all()):
            raise AudioFileError(
                f"The stems of {self._name} are not numbers (NaN or infinite); export it again, or "
                "leave it out."
            )
        if self._stream is None:
            self._meter.add(wav)
            samples = wav.T.numpy()
        else:
            samples = self._stream.resample_chunk(wav.mean(dim=0).numpy(), last=part.last)
        try:
            self._sound.write(samples)
        except soundfile.LibsndfileError as error:
            raise AssetError(
                f"The stems of the music cannot be written to {self._file.path.parent} "
                f"({error.error_string.strip(' .')}): free some of its disk."
            ) from error

    def finish(self) -> None:
        self._sound.close()
        if self._stream is None:
            write_json(_note(self._file.path), {"peaks": self._meter.peaks})
        give_name(self._unfinished, self._file.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sound.close()
        self._unfinished.unlink(missing_ok=True)


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def read_peaks(path: Path) -> list[float] | None:
    """The greatest sample of each second of a stereo `StemFile`, which itself may be gone since.

    Returns:
        None where it was never written.
    """
    peaks: list[float] | None = read_json(_note(path)).get("peaks")
    return peaks


def is_faint(chunk: Chunk, peaks: Sequence[float]) -> bool:
    """Whether the stems that are kept are not there in a chunk."""
    end = chunk.start + chunk.duration
    return max(peaks[int(chunk.start) : max(int(chunk.start) + 1, round(end))], default=0) < FAINT
