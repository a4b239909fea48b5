"""What became of each file of a dataset."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from audiocraft.assets.parts import whole_file
from audiocraft.data.archive import LeftOut
from audiocraft.data.chunks import Clip, Cut
from audiocraft.data.descriptions import ClipMetadata
from audiocraft.data.files import Found
from audiocraft.errors import InputError

_REASONS: Final = 8  # in a message or a summary
_LONGEST_REASON: Final = 160  # characters


@dataclass(frozen=True)
class ChunkLabels:
    """What is known of a chunk in words: said by the user, and found by listening.

    Attributes:
        start: seconds in the file.
        duration: seconds.
        genre: one or more.
        moods: one or more.
        instrument: one or more.
    """

    start: float
    duration: float
    genre: tuple[str, ...]
    moods: tuple[str, ...]
    instrument: tuple[str, ...]


@dataclass(frozen=True)
class UsedFile:
    """A file that is trained on.

    Attributes:
        name: its path in the dataset.
        sha256: of its bytes.
        sample_rate: Hz.
        channels: how many.
        duration: seconds.
        chunks: how many are used.
        silent_chunks: how many are not.
        description: of all its chunks, before labels are merged in.
        key: such as `C# minor`.
        bpm: beats per minute.
        labels: of each chunk that is used, in order.
    """

    name: str
    sha256: str
    sample_rate: int
    channels: int
    duration: float
    chunks: int
    silent_chunks: int
    description: str | None
    key: str | None = None
    bpm: float | None = None
    labels: tuple[ChunkLabels, ...] = ()


@dataclass(frozen=True)
class DatasetReport:
    """The fate of everything in a dataset.

    Attributes:
        source: the name of the archive, folder or file.
        key: of its content, see `files.Found`.
        used: files that are trained on.
        left_out: files of music that are not.
        others: what is no music, or no use to any: the rest of an archive or a folder.
    """

    source: str
    key: str
    used: tuple[UsedFile, ...]
    left_out: tuple[LeftOut, ...]
    others: tuple[LeftOut, ...]


def make_report(
    source: str, found: Found, cut: Cut, metadata: Sequence[Sequence[ClipMetadata]]
) -> DatasetReport:
    """Put together what the stages found.

    Args:
        source: the name of the dataset.
        found: from `files.find`.
        cut: from `chunks.cut`.
        metadata: for each clip of `cut`, of each of its chunks.
    """
    used = [_used(clip, chunks) for clip, chunks in zip(cut.clips, metadata, strict=True)]
    return DatasetReport(source, found.key, tuple(used), cut.left_out, found.left_out)


def _used(clip: Clip, metadata: Sequence[ClipMetadata]) -> UsedFile:
    return UsedFile(
        clip.file.name,
        clip.file.sha256,
        clip.sample_rate,
        clip.channels,
        round(clip.duration, 3),
        len(clip.chunks),
        clip.silent,
        metadata[0].description,
        metadata[0].key,
        metadata[0].bpm,
        tuple(
            ChunkLabels(
                round(chunk.start, 3),
                round(chunk.duration, 3),
                known.genre,
                known.moods,
                known.instrument,
            )
            for chunk, known in zip(clip.chunks, metadata, strict=True)
        ),
    )


def check_usable(report: DatasetReport) -> None:
    """Refuse a dataset of which nothing is left.

    Raises:
        InputError: with the reasons, the most frequent first.
    """
    if report.used:
        return
    reasons = _count_reasons((*report.left_out, *report.others))
    shown = [f"{count} x {reason}" for reason, count in reasons.most_common(_REASONS)]
    if len(reasons) > _REASONS:
        shown.append(f"{len(reasons) - _REASONS} other reasons")
    because = f" ({'; '.join(shown)})" if shown else ", because it is empty"
    raise InputError(
        f"{report.source} holds no music that can be used{because}: give files of music that play "
        "and last 5 s or more."
    )


def summarize(report: DatasetReport) -> dict[str, Any]:
    """What a weights file says of its dataset: numbers and reasons, no names of files."""
    reasons = _count_reasons(report.left_out)
    return {
        "key": report.key,
        "files": len(report.used),
        "chunks": sum(file.chunks for file in report.used),
        "seconds": round(sum(file.duration for file in report.used), 1),
        "described_files": sum(file.description is not None for file in report.used),
        "left_out_files": len(report.left_out),
        "left_out_reasons": dict(reasons.most_common(_REASONS)),
        "other_files": len(report.others),
    }


def write_report(report: DatasetReport, path: Path, more: Mapping[str, Any] | None = None) -> None:
    """Write `report.json` in one step.

    Args:
        report: what became of the dataset.
        path: of the file; its folder exists.
        more: what other stages add, by name.
    """
    value = {"dataset": asdict(report), "summary": summarize(report), **(more or {})}
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _count_reasons(entries: Sequence[LeftOut]) -> Counter[str]:
    """How often each reason was given; what differs from file to file stands in brackets."""
    counts: Counter[str] = Counter()
    for entry in sorted(entries, key=lambda entry: entry.name):
        counts[entry.reason.split(" (")[0].split(";")[0][:_LONGEST_REASON]] += 1
    return counts
