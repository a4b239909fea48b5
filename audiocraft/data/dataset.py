"""From the files of a dataset to what a model is trained on, in stages that are never done twice.

Files are decoded and cut into chunks, described, separated into stems, labelled and encoded. What a
stage makes lies in a folder that all jobs share, under a name that says what it was made from: the
file's content and the settings that matter to this stage. So another learning rate finds all of it,
a song that is added is the only one that is worked on, and other stems leave what was decoded in
place. Models are loaded once, and only if there is work for them.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from torch import Tensor

from audiocraft.assets.parts import is_full, is_leftover, read_json, try_lock, wait_lock, write_json
from audiocraft.data.archive import LeftOut
from audiocraft.data.chunks import Chunk, Clip, Cut, cut, each, longest_duration, read_chunks
from audiocraft.data.codes import Encoder, encode_chunk, load_encoder, save_encoded
from audiocraft.data.descriptions import ClipMetadata, describe, with_labels
from audiocraft.data.files import AudioFile, Found, group_songs
from audiocraft.data.labels import (
    LONGEST,
    LabelModels,
    Labels,
    Vocabularies,
    check_label_models,
    key_and_tempo,
    label_clip,
    load_label_models,
    models_key,
)
from audiocraft.data.report import ChunkLabels, DatasetReport, UsedFile, check_usable, make_report
from audiocraft.data.separate import (
    StemChoice,
    StemFile,
    Track,
    choose_stems,
    is_faint,
    read_peaks,
    separate,
)
from audiocraft.errors import AssetError
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.stems import htdemucs_key, load_htdemucs
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)

_DECODED, _STEMS, _SONGS, _LABELS, _CODES, _DONE = _FOLDERS = (
    *("decoded", "stems", "songs", "labels", "codes", "done"),
)
_DRUMS: Final = ("drums",)
_STEMS_BYTES: Final = 44100 * 2 * 4  # a second of what is kept,
_MELODY_BYTES: Final = 32000 * 4  # of the melody,
_CODES_BYTES: Final = 8 * 50 * 2 + 8 * 12 * 4  # of codes and chroma: 8 frames of 12 floats
_FILE_BYTES: Final = 100_000  # of a file: notes, labels, the codes that fill up its last chunk
_PARTS: Final = 1000  # of a file, for the progress
_SONG_WORKERS: Final = 2  # songs whose key and tempo are told at a time
_LENGTH_WORKERS: Final = 4  # files that are asked for their length at a time
_HASH: Final = 64  # digits of a SHA-256


@dataclass(frozen=True)
class DatasetSettings:
    """What of a job matters to its music.

    Attributes:
        one_same_description: for every clip, or None.
        vocabularies: of the automatic labels; None goes without them.
        stems: that are kept, summed; None keeps the music as it is.
    """

    one_same_description: str | None = None
    vocabularies: Vocabularies | None = None
    stems: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Example:
    """A chunk, ready for training.

    Attributes:
        key: hash of the file's content and of the place in it; equal content has an equal key.
        song: what is held out together, see `files.group_songs`.
        name: of the file, in the dataset.
        start: seconds in the file.
        duration: seconds.
        encoded: path of its codes, see `codes.load_encoded`.
        metadata: what is known of it in words, labels included.
    """

    key: str
    song: str
    name: str
    start: float
    duration: float
    encoded: Path
    metadata: ClipMetadata


@dataclass(frozen=True)
class Prepared:
    """A dataset, ready for training.

    Attributes:
        examples: chunks in the order of their files.
        report: the fate of every file.
        seconds: that each stage took just now, by the clock on the wall.
        hashes: of all files, those that are left out as well.
    """

    examples: tuple[Example, ...]
    report: DatasetReport
    seconds: dict[str, float]
    hashes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Shelf:
    """Where what is made of a file lies, or will.

    Attributes:
        folder: shared by all jobs.
        choice: of stems.
        melody_rate: Hz, of the melody, where that is a file of its own.
        separator: hash of it; empty where nothing is separated.
        labels: hash of what labels depend on besides the file; None goes without them.
        codes: hash of what codes depend on besides the file.
    """

    folder: Path
    choice: StemChoice
    melody_rate: int
    separator: str
    labels: str | None
    codes: str

    @classmethod
    def of(cls, folder: Path, encoder: Encoder, settings: DatasetSettings) -> "_Shelf":
        choice = choose_stems(settings.stems, encoder.melody_stems)
        separator = htdemucs_key()[:16] if choice.kept or choice.melody else ""
        labels = None
        if settings.vocabularies is not None:
            check_label_models()
            models = models_key(settings.vocabularies)
            labels = _digest(models, choice.kept, separator if choice.kept else "", encoder.context)
        return cls(
            folder,
            choice,
            encoder.chroma.sample_rate if encoder.chroma else 0,
            separator,
            labels,
            _digest(encoder.key, choice, separator),
        )

    def music(self, file: AudioFile) -> Path:
        """What is labelled and encoded: the user's own file, or stems of it."""
        return self._stems(file, "+".join(self.choice.kept)) if self.choice.kept else file.path

    def melody(self, file: AudioFile) -> Path | None:
        """What the melody is taken from; None takes it from the music."""
        if self.choice.melody is None:
            return None
        return self._stems(file, f"{'+'.join(self.choice.melody)}-{self.melody_rate}")

    def _stems(self, file: AudioFile, what: str) -> Path:
        return self.folder / _STEMS / f"{file.sha256}-{self.separator}-{what}.w64"

    def song_of(self, file: AudioFile) -> Path:
        """Its key and tempo."""
        return self.folder / _SONGS / f"{file.sha256}.json"

    def labels_of(self, file: AudioFile) -> Path:
        """The labels of its chunks."""
        return self.folder / _LABELS / f"{file.sha256}-{self.labels}.json"

    def codes_of(self, file: AudioFile, chunk: Chunk) -> Path:
        """The codes of a chunk."""
        name = f"{file.sha256}-{_digest(chunk.start, chunk.duration)}-{self.codes}.safetensors"
        return self.folder / _CODES / name

    def unencoded(self, clip: Clip) -> tuple[Chunk, ...]:
        """The chunks without codes."""
        return tuple(c for c in clip.chunks if not self.codes_of(clip.file, c).is_file())

    def is_unlabelled(self, clip: Clip) -> bool:
        """Whether labels of its chunks are asked for and not there; a clip of none has none."""
        wanted = self.labels is not None and bool(clip.chunks)
        return wanted and not self.labels_of(clip.file).is_file()


def prepare(
    found: Found,
    source: str,
    folder: Path,
    version: str,
    settings: DatasetSettings,
    device: str,
) -> Prepared:
    """Do what is done once with the music of a dataset, as far as it is not done yet.

    Args:
        found: from `files.find`.
        source: the dataset's name, for messages and the report.
        folder: shared by all jobs, which take turns in it; made if missing.
        version: that is trained, see `models.versions`.
        settings: see `DatasetSettings`.
        device: where stems are separated and codes are made.

    Raises:
        InputError: there is no music that can be used, with the reasons.
        AssetError: a model is missing, or the disk is full.
        WeightsError: a model is damaged.
    """
    encoder = load_encoder(version)
    seconds: dict[str, float] = {}
    with _disk(folder), _alone(folder):
        shelf = _Shelf.of(folder, encoder, settings)
        with _timed("decode", seconds):
            clips = cut(found.files, folder / _DECODED, context=encoder.context)
        _check(source, found, clips)
        # Before hours of separation, which a damaged model would waste.
        models = _load_label_models(shelf, clips, settings)
        with _timed("separate", seconds):
            _separate(shelf, _unique(clips.clips), device)
        clips = _leave_out_faint(shelf, clips)
        _check(source, found, clips)
        with _timed("label", seconds):
            if settings.vocabularies is not None:
                _find_keys(shelf, _unique(clips.clips))
                _label(shelf, _unique(clips.clips), models)
        with _timed("encode", seconds):
            _encode(shelf, _unique(clips.clips), encoder, device)
        metadata = [_describe(shelf, clip, settings) for clip in clips.clips]
        hashes = tuple(sorted({file.sha256 for file in found.files}))
        for made in (settings, replace(settings, vocabularies=None)):
            done = _done(folder, version, made)
            write_json(done, {"files": sorted({*hashes, *read_json(done).get("files", ())})})
    songs = group_songs([clip.file for clip in clips.clips])
    examples = tuple(
        Example(
            _digest(clip.file.sha256, chunk.start, chunk.duration),
            songs[clip.file.name],
            clip.file.name,
            chunk.start,
            chunk.duration,
            shelf.codes_of(clip.file, chunk),
            known,
        )
        for clip, words in zip(clips.clips, metadata, strict=True)
        for chunk, known in zip(clip.chunks, words, strict=True)
    )
    return Prepared(examples, make_report(source, found, clips, metadata), seconds, hashes)


def _check(source: str, found: Found, clips: Cut) -> None:
    nothing = [[ClipMetadata()] * len(clip.chunks) for clip in clips.clips]
    check_usable(make_report(source, found, clips, nothing))


def _unique(clips: Iterable[Clip]) -> list[Clip]:
    """One clip of each content."""
    return list({clip.file.sha256: clip for clip in reversed(list(clips))}.values())[::-1]


def _separate(shelf: _Shelf, clips: Sequence[Clip], device: str) -> None:
    """Make the stems that labels and codes are still to be made from."""
    tracks = []
    for clip in clips:
        files = _missing_stems(shelf, clip)
        if files:
            tracks.append(Track(clip.file.path, clip.duration, tuple(files)))
    if not tracks:
        return
    logger.info("Separating stems of %d files with demucs on %s.", len(tracks), device)
    separate(tracks, load_htdemucs(device))


def _missing_stems(shelf: _Shelf, clip: Clip) -> list[StemFile]:
    """Stems of a file that have to be made."""
    music, melody, choice = shelf.music(clip.file), shelf.melody(clip.file), shelf.choice
    files = []
    unknown = choice.kept is not None and read_peaks(music) is None
    clip = _audible(shelf, clip)
    unencoded = unknown or bool(shelf.unencoded(clip))
    if choice.kept and (unencoded or shelf.is_unlabelled(clip)) and not music.is_file():
        files.append(StemFile(music, choice.kept))
    if choice.melody and melody and unencoded and not melody.is_file():
        files.append(StemFile(melody, choice.melody, shelf.melody_rate))
    return files


def _audible(shelf: _Shelf, clip: Clip) -> Clip:
    """A clip without the chunks in which, as far as is known, nothing of the kept stems is left."""
    peaks = read_peaks(shelf.music(clip.file)) if shelf.choice.kept else None
    if peaks is None:
        return clip
    left = tuple(chunk for chunk in clip.chunks if not is_faint(chunk, peaks))
    return replace(clip, chunks=left, silent=clip.silent + len(clip.chunks) - len(left))


def _leave_out_faint(shelf: _Shelf, clips: Cut) -> Cut:
    """The files and chunks in which something is left."""
    if shelf.choice.kept is None:
        return clips
    used, left_out = [], list(clips.left_out)
    for clip in clips.clips:
        audible = _audible(shelf, clip)
        if audible.chunks:
            used.append(audible)
        else:
            reason = f"is silent but for what is removed (kept: {', '.join(shelf.choice.kept)})"
            logger.warning("%s is left out: it %s.", clip.file.name, reason)
            left_out.append(LeftOut(clip.file.name, reason))
    return Cut(tuple(used), tuple(sorted(left_out, key=lambda entry: entry.name)))


def _load_label_models(shelf: _Shelf, clips: Cut, settings: DatasetSettings) -> LabelModels | None:
    """The models, if they are needed."""
    audible = (_audible(shelf, clip) for clip in clips.clips)
    if settings.vocabularies is None or not any(map(shelf.is_unlabelled, audible)):
        return None
    return load_label_models(settings.vocabularies)


def _find_keys(shelf: _Shelf, clips: Sequence[Clip]) -> None:
    """Key and tempo of whole songs, as they are: no stem tells them better than all together."""
    todo = [clip for clip in clips if not shelf.song_of(clip.file).is_file()]
    progress = ProgressLog(logger, "files", "finding key and tempo")
    for done, (clip, (key, bpm)) in enumerate(each(_key_and_tempo, todo, _SONG_WORKERS), 1):
        write_json(shelf.song_of(clip.file), {"key": key, "bpm": bpm})
        progress.update(done, len(todo))


def _key_and_tempo(clip: Clip) -> tuple[str | None, float | None]:
    path, start = clip.file.path, max(0.0, (clip.duration - LONGEST) / 2)
    middle = Chunk(path, start, min(LONGEST, clip.duration))
    ((wav, rate),) = read_chunks(path, [middle])
    return key_and_tempo(wav, rate)


def _label(shelf: _Shelf, clips: Sequence[Clip], models: LabelModels | None) -> None:
    """Labels of each chunk of what is kept."""
    todo = [clip for clip in clips if shelf.is_unlabelled(clip)]
    progress = ProgressLog(logger, "files", "labelling", _PARTS)
    for index, clip in enumerate(todo):
        assert models is not None, "they are loaded where a clip is unlabelled"
        labels: list[dict[str, Any]] = []
        for wav, rate in read_chunks(shelf.music(clip.file), clip.chunks):
            found = label_clip(models, wav, rate, clip.tags.get("genre"))
            labels.append(asdict(replace(found, key=None, bpm=None)))
            share = len(labels) / len(clip.chunks)
            progress.update(round(_PARTS * (index + share)), _PARTS * len(todo))
        write_json(shelf.labels_of(clip.file), {"chunks": labels})


def _describe(shelf: _Shelf, clip: Clip, settings: DatasetSettings) -> list[ClipMetadata]:
    """What is known of each chunk in words."""
    said = describe(clip, settings.one_same_description)
    if shelf.labels is None:
        return [said] * len(clip.chunks)
    song = read_json(shelf.song_of(clip.file))
    # Drums alone are in no key, whatever the rest of the song was.
    key = None if shelf.choice.kept == _DRUMS else song["key"]
    return [
        with_labels(
            said,
            Labels(
                tuple(heard["genre"]),
                tuple(heard["moods"]),
                tuple(heard["instrument"]),
                key,
                song["bpm"],
            ),
        )
        for heard in read_json(shelf.labels_of(clip.file))["chunks"]
    ]


def _encode(shelf: _Shelf, clips: Sequence[Clip], encoder: Encoder, device: str) -> None:
    """Codes of each chunk of what is kept, and the chroma of its melody."""
    todo = [clip for clip in clips if shelf.unencoded(clip)]
    if todo:
        encoder.to(device)
    progress = ProgressLog(logger, "files", "encoding", _PARTS)
    for index, clip in enumerate(todo):
        chunks = shelf.unencoded(clip)
        melody = shelf.melody(clip.file)
        melodies: Iterable[tuple[Tensor, int] | None] = (
            repeat(None, len(chunks)) if melody is None else read_chunks(melody, chunks)
        )
        pieces = zip(chunks, read_chunks(shelf.music(clip.file), chunks), melodies, strict=True)
        for done, (chunk, (wav, rate), sung) in enumerate(pieces, 1):
            encoded = encode_chunk(encoder.codec, wav, rate, encoder.context, encoder.chroma, sung)
            save_encoded(shelf.codes_of(clip.file, chunk), encoded)
            share = done / len(chunks)
            progress.update(round(_PARTS * (index + share)), _PARTS * len(todo))


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - begin
    logger.info("Stage %s took %.1f s.", stage, seconds[stage])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, for this process until the block ends; what others were killed in is removed."""
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    text = "Another job prepares its music in %s; waiting for it."
    with wait_lock(folder / "lock", lambda: logger.info(text, folder)):
        for name in _FOLDERS:
            for left in (folder / name).iterdir():
                if is_leftover(left.name):
                    left.unlink()
        yield


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Say it in a sentence where the disk gets full; safetensors has no kind of error for that."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        raise AssetError(
            f"The disk of {folder} is full before the music is prepared: free some of it and start "
            "the training again, which goes on from there."
        ) from error


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _done(folder: Path, version: str, settings: DatasetSettings) -> Path:
    """Where the hashes stand of files of which all is made; their stems may be gone since."""
    alike = replace(VERSIONS[version], name="", source="")  # of all sizes codes are the same
    kept = choose_stems(settings.stems).kept
    return folder / _DONE / f"{_digest(alike, kept, settings.vocabularies)}.json"


def disk_need(found: Found, folder: Path, version: str, settings: DatasetSettings) -> int:
    """Bytes that `prepare` may write at most, from headers and sizes; nothing is decoded.

    What is there already does not count: neither a file that was prepared before, nor what an
    earlier start has made of one. Files that state less than they hold take more, up to the disk's
    end, where `prepare` stops.

    Args:
        found: from `files.find`.
        folder: see `prepare`; it need not be there.
        version: see `prepare`.
        settings: see `DatasetSettings`.
    """
    melody = VERSIONS[version].melody
    per_second = _CODES_BYTES + (_STEMS_BYTES if settings.stems else 0)
    per_second += _MELODY_BYTES if melody else 0
    prepared = {*read_json(_done(folder, version, settings)).get("files", ())}
    files = {file.sha256: file.path for file in found.files if file.sha256 not in prepared}
    there = _there(folder, settings, melody=melody)
    progress = ProgressLog(logger, "files", "adding up the music", quiet_s=5)
    need = 0
    lengths = each(lambda sha256: longest_duration(files[sha256]), list(files), _LENGTH_WORKERS)
    for done, (sha256, seconds) in enumerate(lengths, 1):
        need += max(0, _FILE_BYTES + round(per_second * seconds) - there[sha256])
        progress.update(done, len(files))
    return need


def _there(folder: Path, settings: DatasetSettings, *, melody: bool) -> Counter[str]:
    """Bytes of what was made of files, by their hashes; stems of other choices do not count."""
    kept = "+".join(choose_stems(settings.stems).kept or ())
    sizes: Counter[str] = Counter()
    for path in folder.glob("*/*"):
        # As in `_Shelf`: the hash of the file, that of the separator, the stems, a melody's rate.
        stems = path.name.split("-", 2)[-1]
        is_wanted = melody if "-" in stems else stems.startswith(f"{kept}.")
        if is_wanted or path.parent.name != _STEMS:
            with suppress(FileNotFoundError):  # another job removes its own
                sizes[path.name[:_HASH]] += path.stat().st_size
    return sizes


def remove_intermediates(folder: Path, prepared: Prepared) -> None:
    """Remove the stems of a dataset, which are large; codes and labels stay.

    While another job prepares its music, which may take hours, they stay as well.

    Args:
        folder: that was given to `prepare`.
        prepared: what it returned.
    """
    lock = try_lock(folder / "lock")
    if lock is None:
        logger.info("Another job prepares its music in %s: the stems there stay.", folder)
        return
    with lock:
        for sha256 in {*prepared.hashes, *(file.sha256 for file in prepared.report.used)}:
            for path in (folder / _STEMS).glob(f"{sha256}-*.w64"):
                path.unlink()


def save_prepared(path: Path, prepared: Prepared) -> None:
    """Write a prepared dataset; it appears under its name when it is whole."""
    value = asdict(prepared)
    for example in value["examples"]:
        example["encoded"] = str(example["encoded"])
    write_json(path, value)


def load_prepared(path: Path) -> Prepared:
    """Read a prepared dataset."""
    value = read_json(path)
    report = value["report"]
    return Prepared(
        tuple(
            Example(
                **{
                    **example,
                    "encoded": Path(example["encoded"]),
                    "metadata": ClipMetadata(**_tuples(example["metadata"])),
                }
            )
            for example in value["examples"]
        ),
        DatasetReport(
            report["source"],
            report["key"],
            tuple(
                UsedFile(
                    **{**file, "labels": tuple(ChunkLabels(**_tuples(it)) for it in file["labels"])}
                )
                for file in report["used"]
            ),
            *(tuple(LeftOut(**entry) for entry in report[name]) for name in ("left_out", "others")),
        ),
        value["seconds"],
        tuple(value.get("hashes", ())),
    )


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(it) if isinstance(it, list) else it for name, it in value.items()}
