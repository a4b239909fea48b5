"""What is known of a clip in words: its description and its metadata."""

import codecs
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from audiocraft.data.archive import split_name
from audiocraft.data.chunks import Clip
from audiocraft.data.labels import TAG_SEPARATORS, Labels, unique

logger = logging.getLogger(__name__)

_LONGEST_TEXT: Final = 1 << 16  # bytes that are looked at; T5 reads some 2000
_LONGEST_JSON: Final = 1 << 20


@dataclass(frozen=True)
class ClipMetadata:
    """The official record of a clip, as far as it is about music; None or empty is unknown.

    Attributes:
        title: of the song.
        artist: who plays it.
        key: such as `C# minor`.
        bpm: beats per minute.
        genre: one or more.
        moods: one or more.
        keywords: one or more.
        description: a sentence on it.
        name: of the file, without folder and suffix.
        instrument: one or more.
    """

    title: str | None = None
    artist: str | None = None
    key: str | None = None
    bpm: float | None = None
    genre: tuple[str, ...] = ()
    moods: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    description: str | None = None
    name: str | None = None
    instrument: tuple[str, ...] = ()


def describe(clip: Clip, one_same_description: str | None = None) -> ClipMetadata:
    """What is known of a clip before it is labelled; the same for each of its chunks.

    The description is the first of: `one_same_description`; the first line of the `.txt` beside the
    file; that in the `.json` beside it; the file's own comment. Title, artist and genre come from
    the `.json`, else from the file's tags, all else from the `.json` alone.

    Args:
        clip: a file that is used.
        one_same_description: for every clip.
    """
    tags, side = clip.tags, _read_metadata(clip.file.metadata)
    text = clip.file.text
    return ClipMetadata(
        title=one_line(side.get("title")) or one_line(tags.get("title")),
        artist=one_line(side.get("artist")) or one_line(tags.get("artist")),
        key=one_line(side.get("key")),
        bpm=_number(side.get("bpm")),
        genre=_list(side.get("genre"), ",") or _list(tags.get("genre"), TAG_SEPARATORS),
        moods=_list(side.get("moods"), ","),
        keywords=_list(side.get("keywords"), ","),
        description=one_line(one_same_description)
        or (read_first_line(text) if text else None)
        or one_line(side.get("description"))
        or one_line(tags.get("comment")),
        name=split_name(clip.file.name)[0],
        instrument=_list(side.get("instrument"), ","),
    )


def with_labels(metadata: ClipMetadata, labels: Labels) -> ClipMetadata:
    """What is known of a clip, with what was found by listening to it.

    What the user says of key and tempo stands, for there can be one of each. Genres, moods and
    instruments join the user's own, which come first; an equal one counts once.
    """
    return replace(
        metadata,
        key=metadata.key or labels.key,
        bpm=metadata.bpm or labels.bpm,
        genre=unique([*metadata.genre, *labels.genre]),
        moods=unique([*metadata.moods, *labels.moods]),
        instrument=unique([*metadata.instrument, *labels.instrument]),
    )


def read_first_line(path: Path) -> str | None:
    """The first line of a text that holds anything.

    Args:
        path: of a text in UTF-8 or, where that makes no sense, cp1252; in UTF-16 if it says so.

    Returns:
        The line, runs of spaces as one; None where there is none.
    """
    with path.open("rb") as file:
        data = file.read(_LONGEST_TEXT)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", errors="replace")
    else:
        try:
            # The last letter may be cut in two.
            decoder = codecs.getincrementaldecoder("utf-8-sig")()
            text = decoder.decode(data, final=len(data) < _LONGEST_TEXT)
        except UnicodeDecodeError:
            text = data.decode("cp1252", errors="replace")
    return next((line for line in map(one_line, text.splitlines()) if line), None)


def _read_metadata(path: Path | None) -> Mapping[str, Any]:
    """A `.json` as official audiocraft keeps it beside a file; empty where it is something else."""
    if path is None:
        return {}
    with path.open("rb") as file:
        data = file.read(_LONGEST_JSON)
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        logger.warning("%s is not used, it is no JSON (%s).", path.name, error)
        return {}
    return value if isinstance(value, dict) else {}


def one_line(value: Any) -> str | None:
    """A text in printable characters and single spaces; None where it has none or is no text."""
    if not isinstance(value, str):
        return None
    line = "".join(char if char.isprintable() else " " for char in value)
    return " ".join(line.split()) or None


def _list(value: Any, separator: str) -> tuple[str, ...]:
    values = re.split(f"[{separator}\0]", value) if isinstance(value, str) else value
    if not isinstance(values, list):
        return ()
    texts = (one_line(item) for item in values)
    return tuple(dict.fromkeys(text for text in texts if text))


def _number(value: Any) -> float | None:
    """A positive number, written as such or as a text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if 0 < number < float("inf") else None
