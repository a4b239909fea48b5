"""Files become what is trained on, each stage once: real demucs, essentia and codec, all small."""

import errno
import json
import logging
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demucs.apply import apply_model
from safetensors import SafetensorError

from audiocraft.assets.parts import write_json
from audiocraft.data import chunks, dataset
from audiocraft.data.audio import audio_read
from audiocraft.data.audio_utils import convert_audio
from audiocraft.data.chunks import longest_duration
from audiocraft.data.codes import encode_chunk, load_encoded, load_encoder
from audiocraft.data.dataset import (
    DatasetSettings,
    disk_need,
    load_prepared,
    prepare,
    remove_intermediates,
    save_prepared,
)
from audiocraft.data.files import find
from audiocraft.data.labels import MODELS_FOLDER, Vocabularies
from audiocraft.errors import AssetError, WeightsError
from metadata import genre_labels, instrument_classes, mood_theme_classes
from tests.data.graphs import CLASSES, write_models
from tests.data.odd_files import leave_open
from tests.data.signals import convert, sentence, tones, write_source
from tests.releases import stand_in
from tests.separators import SOURCES, put_htdemucs

SONG = Path(__file__).parent.parent / "audio" / "real_song.ogg"
RATE = 44100
KEPT = ("drums", "bass", "other")
VOCABULARIES = Vocabularies(
    tuple(genre_labels), tuple(mood_theme_classes), tuple(instrument_classes)
)
LABELLED = DatasetSettings(vocabularies=VOCABULARIES, stems=KEPT)
STAGES = ("decoded", "stems", "songs", "labels", "codes")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Stand-ins for a melody and a text version, a separator and label models."""
    folder = tmp_path_factory.mktemp("store")
    stand_in(folder, "stereo-melody", 1, "vocals+other")
    stand_in(folder, "small", 2)
    put_htdemucs(folder)
    gains = {field: np.zeros(number) for field, number in CLASSES.items()}
    biases = {field: np.full(number, -20.0) for field, number in CLASSES.items()}
    for bias in biases.values():
        bias[3] = 20.0
    write_models(folder / MODELS_FOLDER, gains, biases)
    return folder


@pytest.fixture(autouse=True)
def _in_store(store, monkeypatch):
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(store))


@pytest.fixture
def music(tmp_path):
    return put_music(tmp_path / "music")


def put_music(folder):
    """Two songs, one with a text and one with metadata."""
    folder.mkdir()
    song, _ = audio_read(SONG)
    write_source(folder / "a.wav", song[:, : 6 * RATE], RATE)
    write_source(folder / "b.wav", song.flip(1)[:, : 7 * RATE], RATE)
    (folder / "a.txt").write_text("metal guitar")
    (folder / "b.json").write_text(json.dumps({"key": "D minor", "genre": ["Own"], "bpm": 99}))
    return folder


@pytest.fixture(scope="module")
def done(store, tmp_path_factory):
    """The two songs without vocals, labelled, for a melody version; and their folder."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUDIOCRAFT_CACHE_DIR", str(store))
        music = put_music(folder / "music")
        return run(music, folder / "work"), music


def run(music, work, settings=LABELLED, version="stereo-melody"):
    return prepare(find(music, work / "unpacked"), music.name, work, version, settings, "cpu")


def made(work):
    """Everything that the stages have made, with the time when."""
    return {
        path.relative_to(work).as_posix(): path.stat().st_mtime_ns
        for stage in STAGES
        for path in (work / stage).iterdir()
    }


def new(work, before):
    """How many files of each stage are new or were made again."""
    names = [name for name, time in made(work).items() if before.get(name) != time]
    return {stage: sum(name.startswith(f"{stage}/") for name in names) for stage in STAGES}


def separated(path, store):
    """Stems of a file by name (2, T), by demucs itself."""
    model, _ = put_htdemucs(store)
    wav, rate = audio_read(path)
    assert rate == RATE
    stems = apply_model(model, convert_audio(wav, RATE, RATE, 2)[None], shifts=0)[0]
    return dict(zip(SOURCES, stems, strict=True))


def test_codes_are_of_the_kept_stems_and_chroma_of_the_melody(done, store):
    prepared, music = done
    assert [example.name for example in prepared.examples] == ["a.wav", "b.wav"]
    encoder = load_encoder("stereo-melody")
    for example in prepared.examples:
        stems = separated(music / example.name, store)
        kept = stems["drums"] + stems["bass"] + stems["other"]
        expected = encode_chunk(encoder.codec, kept, RATE, 30.0, encoder.chroma)
        melody = encode_chunk(
            encoder.codec, kept, RATE, 30.0, encoder.chroma, (stems["other"], RATE)
        )
        ours = load_encoded(example.encoded)
        assert ours.codes.shape == (8, 1500)
        assert ours.frames == expected.frames == round(50 * example.duration)
        # Sums in another order: a sample in the last bit, which may tip a rare code.
        assert (ours.codes == expected.codes).float().mean() > 0.999
        assert torch.equal(ours.codes[:, 400:], expected.codes[:, 400:])
        same = (ours.chroma == melody.chroma).all(dim=1).float().mean()
        assert (same, ours.samples) == (1, melody.samples)
        assert not torch.equal(ours.chroma, expected.chroma)


def test_labels_join_what_the_user_says(done):
    prepared, _ = done
    first, second = (example.metadata for example in prepared.examples)
    assert first.description == "metal guitar"
    assert first.genre == tuple(genre_labels[3].split("---"))
    assert (first.moods, first.instrument) == ((mood_theme_classes[3],), (instrument_classes[3],))
    assert second.description is None
    assert (second.key, second.bpm) == ("D minor", 99)
    assert second.genre == ("Own", *genre_labels[3].split("---"))
    used = prepared.report.used
    assert [(file.key, file.bpm) for file in used] == [(it.key, it.bpm) for it in (first, second)]
    assert used[1].labels[0].genre == second.genre
    assert used[1].labels[0].duration == 7.0


def test_what_is_written_down_comes_back(done, tmp_path):
    prepared, _ = done
    save_prepared(tmp_path / "dataset.json", prepared)
    assert load_prepared(tmp_path / "dataset.json") == prepared
    assert set(prepared.seconds) == {"decode", "separate", "label", "encode"}


@pytest.mark.slow
def test_each_stage_does_what_is_missing_alone(music, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    work = tmp_path / "work"
    first = run(music, work)
    begun = made(work)
    assert new(work, {}) == {"decoded": 2, "stems": 6, "songs": 2, "labels": 2, "codes": 2}
    assert "separating stems: 100 %, 2 of 2 files, 0 s left" in caplog.text
    for stage in ("decoding the dataset", "labelling", "encoding"):
        assert f"{stage}: 100 %, 2 of 2 files" in caplog.text

    def again(settings=LABELLED, version="stereo-melody"):
        before = made(work)
        caplog.clear()
        prepared = run(music, work, settings, version)
        return prepared, new(work, before)

    nothing = dict.fromkeys(STAGES, 0)
    second, made_again = again()
    assert (second.examples, second.report) == (first.examples, first.report)
    assert made_again == nothing
    assert "100 %" not in caplog.text

    # Another description changes words alone.
    other, done = again(replace(LABELLED, one_same_description="x"))
    assert done == nothing
    assert {example.metadata.description for example in other.examples} == {"x"}

    # A text version has codes of its own, of the same stems and labels.
    _, done = again(version="small")
    assert done == {**nothing, "codes": 2}

    # A song that is added, and one that has another name now.
    write_source(music / "c.wav", tones(RATE, 5), RATE)
    (music / "b.wav").rename(music / "d.wav")
    prepared, done = again()
    assert done == {"decoded": 1, "stems": 3, "songs": 1, "labels": 1, "codes": 1}
    assert [example.name for example in prepared.examples] == ["a.wav", "c.wav", "d.wav"]
    assert prepared.examples[2].key == first.examples[1].key
    assert "2 of 2 files" not in caplog.text

    # Other stems leave decoded files, keys and tempi.
    prepared, done = again(replace(LABELLED, stems=("vocals",)))
    assert done == {"decoded": 0, "stems": 6, "songs": 0, "labels": 3, "codes": 3}
    assert not {e.encoded for e in prepared.examples} & {e.encoded for e in first.examples}
    assert [e.key for e in prepared.examples if e.name == "a.wav"] == [first.examples[0].key]
    assert begun.items() <= made(work).items()


def test_equal_files_are_encoded_once(music, tmp_path):
    shutil.copy(music / "a.wav", music / "z.wav")
    prepared = run(music, tmp_path / "work", DatasetSettings(), "small")
    first, _, last = prepared.examples
    assert (first.key, first.song, first.encoded) == (last.key, last.song, last.encoded)
    assert (first.metadata.description, last.metadata.description) == ("metal guitar", None)
    assert new(tmp_path / "work", {})["codes"] == 2


def test_music_as_it_is_needs_no_separator(music, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "load_htdemucs", None)
    monkeypatch.setattr(dataset, "htdemucs_key", None)
    prepared = run(music, tmp_path / "work", DatasetSettings(), "small")
    encoder = load_encoder("small")
    for example in prepared.examples:
        expected = encode_chunk(encoder.codec, *audio_read(music / example.name), 30.0)
        assert torch.equal(load_encoded(example.encoded).codes, expected.codes)
        assert load_encoded(example.encoded).chroma is None


def test_music_as_it_is_with_a_melody(music, store, tmp_path):
    """Codes are of the mix, chroma of its stems."""
    (music / "b.wav").unlink()
    (example,) = run(music, tmp_path / "work", DatasetSettings()).examples
    encoder = load_encoder("stereo-melody")
    wav, rate = audio_read(music / "a.wav")
    stems = separated(music / "a.wav", store)
    melody = (stems["vocals"] + stems["other"], RATE)
    expected = encode_chunk(encoder.codec, wav, rate, 30.0, encoder.chroma, melody)
    ours = load_encoded(example.encoded)
    assert torch.equal(ours.codes, expected.codes)
    assert torch.equal(ours.chroma, expected.chroma)


@pytest.mark.slow
def test_drums_alone_have_no_key_and_are_their_own_melody(music, store, tmp_path):
    prepared = run(music, tmp_path / "work", replace(LABELLED, stems=("drums",)))
    assert [e.metadata.key for e in prepared.examples] == [None, "D minor"]
    encoder = load_encoder("stereo-melody")
    drums = separated(music / "a.wav", store)["drums"]
    expected = encode_chunk(encoder.codec, drums, RATE, 30.0, encoder.chroma)
    ours = load_encoded(prepared.examples[0].encoded)
    assert (ours.chroma == expected.chroma).all(dim=1).float().mean() == 1
    assert new(tmp_path / "work", {})["stems"] == 4  # and their peaks


@pytest.mark.slow
def test_the_stems_can_go_and_nothing_is_done_again(music, tmp_path):
    work = tmp_path / "work"
    prepared = run(music, work)
    kept = {path for path in (work / "stems").iterdir() if path.suffix == ".w64"}
    assert len(kept) == 4
    (work / "stems" / "other-song.w64").write_text("x")
    remove_intermediates(work, prepared)
    assert {path.name for path in (work / "stems").glob("*.w64")} == {"other-song.w64"}
    before = made(work)
    assert run(music, work).examples == prepared.examples
    assert made(work) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["separate", "label_clip", "encode_chunk"])
def test_a_job_that_is_stopped_goes_on(music, tmp_path, monkeypatch, stage):
    """What a killed process leaves unfinished is removed."""
    work = tmp_path / "work"
    real, calls = getattr(dataset, stage), []

    def stop(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2 or stage == "separate":
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            run(music, work)
    before = made(work)
    done = {"separate": (0, 0, 0), "label_clip": (6, 1, 0), "encode_chunk": (6, 2, 1)}[stage]
    assert tuple(new(work, {})[name] for name in ("stems", "labels", "codes")) == done
    (work / "stems" / "rest.w64.unfinished").write_text("x")
    prepared = run(music, work)
    assert before.items() <= made(work).items()
    assert not list(work.rglob("*.unfinished"))
    whole = run(music, tmp_path / "elsewhere")
    for one, other in zip(prepared.examples, whole.examples, strict=True):
        assert torch.equal(load_encoded(one.encoded).codes, load_encoded(other.encoded).codes)
        assert one.metadata == other.metadata


@pytest.mark.slow
def test_what_is_silent_without_the_rest_is_left_out(tmp_path):
    """A chunk and a file in which nothing is left of the stems that are kept."""
    folder = tmp_path / "music"
    folder.mkdir()
    # Loud enough to be cut, too faint to have stems; the tone is out of reach of a segment.
    faint = 4e-4 * tones(8000, 33)[:1]
    write_source(folder / "long.wav", torch.cat([faint, tones(8000, 6)[:1]], 1), 8000)
    write_source(folder / "faint.wav", faint[:, : 10 * 8000], 8000)
    work = tmp_path / "work"
    prepared = run(folder, work, LABELLED)
    assert [(e.name, e.start) for e in prepared.examples] == [("long.wav", 30)]
    (used,) = prepared.report.used
    assert (used.chunks, used.silent_chunks) == (1, 1)
    assert [(left.name, left.reason) for left in prepared.report.left_out] == [
        ("faint.wav", "is silent but for what is removed (kept: drums, bass, other)")
    ]
    remove_intermediates(work, prepared)
    assert not list((work / "stems").glob("*.w64"))
    before = made(work)
    assert run(folder, work, LABELLED).report == prepared.report
    assert made(work) == before


def test_what_is_known_to_be_silent_is_not_separated_again(tmp_path, monkeypatch):
    folder, work = tmp_path / "music", tmp_path / "work"
    folder.mkdir()
    write_source(folder / "faint.wav", tones(8000, 6)[:1], 8000)
    (file,) = find(folder, work).files
    stems = dataset._Shelf.of(work, load_encoder("small"), LABELLED).music(file)
    stems.parent.mkdir(parents=True)
    write_json(stems.with_suffix(".json"), {"peaks": 6 * [0.0]})
    for name in ("separate", "load_label_models"):
        monkeypatch.setattr(dataset, name, None)
    message = sentence(run, folder, work, LABELLED, "small")
    assert message.startswith(
        "music holds no music that can be used (1 x is silent but for what is removed): give"
    )


def test_a_missing_stem_is_refused_before_anything_is_done(music, tmp_path):
    message = sentence(run, music, tmp_path / "work", DatasetSettings(stems=("choir",)))
    assert message == ("The stems to keep are choir; choose among drums, bass, other, vocals.")


def test_a_damaged_label_model_is_found_before_the_separation(music, store, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "separate", None)
    own = tmp_path / "store"
    shutil.copytree(store, own)
    next((own / MODELS_FOLDER).glob("genre*.pb")).write_bytes(b"x")
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(own))
    with pytest.raises(WeightsError, match="it is damaged or another model"):
        run(music, tmp_path / "work")


@pytest.mark.slow
def test_a_messy_zip_is_accounted_for(tmp_path):
    """Nested folders, equal names, odd letters, odd formats, rubbish: each file has its fate."""
    folder = tmp_path / "music"
    for name in ("a/deep/er", "b", "__MACOSX"):
        (folder / name).mkdir(parents=True)
    song, _ = audio_read(SONG)
    piece = write_source(tmp_path / "piece.wav", song[:, : 7 * RATE], RATE)
    shutil.copy(SONG, folder / "a" / "Lied ä.ogg")
    (folder / "a" / "Lied ä.txt").write_text("Metal, schnell")
    convert(piece, folder / "b" / "Lied ä.flac")
    convert(piece, folder / "b" / "tagged.mp3", "-metadata", "genre=Polka/Own", "-b:a", "128k")
    convert(piece, folder / "b" / "曲.m4a", "-af", "volume=2")
    convert(piece, folder / "a" / "deep" / "er" / "mono.wav", "-ac", "1", "-ar", "8000")
    convert(piece, folder / "surround.flac", "-af", "pan=5.1|FL=FL|FR=FR|FC=FL|BL=FR|BR=FL")
    convert(piece, folder / "high.wav", "-ar", "192000", "-c:a", "pcm_s24le")
    convert(piece, folder / "song_chunk1.wav")
    convert(piece, folder / "song_chunk2.wav", "-af", "volume=0.7")
    (folder / "song.txt").write_text("two pieces")
    shutil.copy(folder / "high.wav", folder / "b" / "same.wav")
    (folder / "broken.mp3").write_bytes(b"\xff\xfb" + bytes(1000))
    convert(piece, folder / "short.wav", "-t", "3")
    (folder / "cover.jpg").write_text("x")
    (folder / "__MACOSX" / "._high.wav").write_text("x")
    packed = tmp_path / "music.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder))

    prepared = run(packed, tmp_path / "work")
    report = prepared.report
    assert [(file.name, file.sample_rate, file.channels) for file in report.used] == [
        ("a/Lied ä.ogg", 44100, 2),
        ("a/deep/er/mono.wav", 8000, 1),
        ("b/Lied ä.flac", 44100, 2),
        ("b/same.wav", 192000, 2),
        ("b/tagged.mp3", 44100, 2),
        ("b/曲.m4a", 44100, 2),
        ("high.wav", 192000, 2),
        ("song_chunk1.wav", 44100, 2),
        ("song_chunk2.wav", 44100, 2),
        ("surround.flac", 44100, 6),
    ]
    assert [left.name for left in report.left_out] == ["broken.mp3", "short.wav"]
    assert [left.name for left in report.others] == ["__MACOSX/._high.wav", "cover.jpg"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    told = {entry.name for entry in (*report.used, *report.left_out, *report.others)}
    assert names - told == {"a/Lied ä.txt", "song.txt"}

    examples = {example.name: example for example in prepared.examples}
    assert len(examples) == len(prepared.examples) == 10
    assert len({example.key for example in examples.values()}) == 9
    assert len({example.song for example in examples.values()}) == 8
    assert examples["high.wav"].key == examples["b/same.wav"].key
    assert examples["song_chunk1.wav"].song == examples["song_chunk2.wav"].song
    assert examples["song_chunk2.wav"].metadata.description == "two pieces"
    assert examples["a/Lied ä.ogg"].metadata.description == "Metal, schnell"
    assert examples["b/Lied ä.flac"].metadata.description is None
    own = ("Polka", "Own")
    assert examples["b/tagged.mp3"].metadata.genre == (*own, *genre_labels[3].split("---"))
    for example in examples.values():
        encoded = load_encoded(example.encoded)
        assert encoded.frames == pytest.approx(50 * example.duration, abs=1)
        assert encoded.codes.shape == (8, 1500)
        assert encoded.chroma.shape == (235, 12)
        assert len(encoded.codes.unique()) > 4
    found = find(packed, tmp_path / "work" / "unpacked")
    assert disk_need(found, tmp_path / "new", "stereo-melody", LABELLED) > sum(
        path.stat().st_size for stage in STAGES for path in (tmp_path / "work" / stage).iterdir()
    )
    assert disk_need(found, tmp_path / "work", "stereo-melody", LABELLED) == 0


VIDEO = (
    *("-f", "lavfi", "-i", "nullsrc=size=160x120:rate=10,geq=random(1)*255:128:128"),
    *("-map", "0:a", "-map", "1:v", "-shortest", "-c:v", "mpeg4", "-q:v", "1"),
)
"""A picture of noise, 2 MB for 8 s."""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.flac", ()),
        ("a.mp3", ("-b:a", "320k")),
        ("a.mp3", ("-b:a", "320k", "-write_xing", "0")),
        ("a.m4a", ()),
        ("a.wma", ()),
        ("a.mp4", VIDEO),
        ("a.mkv", VIDEO),
        ("a.mpg", ()),
        ("a.ac3", ()),
    ],
)
def test_the_disk_that_is_needed_is_known_before(tmp_path, name, arguments):
    """That of the music, whatever the size of its file."""
    folder = tmp_path / "music"
    folder.mkdir()
    convert(SONG, folder / name, *arguments)
    shutil.copy(folder / name, folder / f"copy of {name}")
    found = find(folder, tmp_path / "work")
    stems = 8.0 * (44100 * 8 + 32000 * 4)
    need = disk_need(found, tmp_path / "work", "stereo-melody", DatasetSettings(stems=KEPT))
    assert stems < need < 1.2 * stems
    assert disk_need(found, tmp_path / "work", "small", DatasetSettings()) < 200_000


def test_the_needs_of_files_add_up(tmp_path):
    folder = tmp_path / "music"
    folder.mkdir()
    needs = []
    for seconds in (5, 6, 7):
        path = write_source(folder / f"{seconds}.wav", tones(8000, seconds), 8000)
        found = find(path, tmp_path / "work")
        needs.append(disk_need(found, tmp_path / "work", "stereo-melody", LABELLED))
    assert len(set(needs)) == 3
    found = find(folder, tmp_path / "work")
    assert disk_need(found, tmp_path / "work", "stereo-melody", LABELLED) == sum(needs)


def test_what_was_prepared_needs_no_more_of_the_disk(done, tmp_path):
    """Not even where its stems are gone; with other settings it does."""
    music, work = (
        shutil.copytree(done[1].parent / name, tmp_path / name) for name in ("music", "work")
    )
    for path in (work / "stems").glob("*.w64"):
        path.unlink()
    found = find(music, work)
    whole = disk_need(found, tmp_path / "new", "stereo-melody", LABELLED)
    assert disk_need(found, work, "stereo-melody", LABELLED) == 0
    described = replace(LABELLED, one_same_description="x", stems=KEPT[::-1])
    for alike in (described, DatasetSettings(stems=KEPT)):
        assert disk_need(found, work, "stereo-melody-large", alike) == 0
    other = replace(LABELLED, stems=("vocals",))
    assert disk_need(found, work, "stereo-melody", other) > 0.9 * whole
    assert disk_need(found, work, "stereo-small", LABELLED) > 0.6 * whole
    write_source(music / "c.wav", tones(8000, 5), 8000)
    assert 0 < disk_need(find(music, work), work, "stereo-melody", LABELLED) < whole / 2


def test_stems_that_are_there_need_no_more_of_the_disk(done, tmp_path):
    """Those of one file, as a job that was stopped leaves them."""
    _, music = done
    found = find(music, tmp_path)
    work = tmp_path / "work"
    (work / "stems").mkdir(parents=True)
    whole = disk_need(found, work, "stereo-melody", LABELLED)
    there = 0
    for path in (music.parent / "work" / "stems").glob(f"{found.files[0].sha256}-*"):
        shutil.copy(path, work / "stems")
        there += path.stat().st_size
    assert there > whole / 3
    assert disk_need(found, work, "stereo-melody", LABELLED) == whole - there
    # What others keep is of no use here, but for its melody.
    other = replace(LABELLED, stems=("vocals",))
    assert disk_need(found, work, "stereo-melody", other) > 0.8 * whole
    assert disk_need(found, work, "small", DatasetSettings()) > 200_000


def test_a_length_that_cannot_be_true_does_not_count(tmp_path, monkeypatch):
    """Then it is that of music of 64 kbit/s."""
    path = convert(SONG, tmp_path / "a.m4a")
    data, guess = bytearray(path.read_bytes()), path.stat().st_size / 8000
    # Of the header behind its name: version, two times and the unit, each of four bytes.
    place = slice(data.index(b"mvhd") + 20, data.index(b"mvhd") + 24)
    for stated, expected in ((0, guess), (16_000, 1.1 * 16), (2**32 - 2, guess)):
        data[place] = stated.to_bytes(4, "big")
        path.write_bytes(data)
        assert longest_duration(path) == pytest.approx(expected)
    monkeypatch.setenv("PATH", str(tmp_path))  # without ffprobe
    data[place] = (16_000).to_bytes(4, "big")
    path.write_bytes(data)
    assert longest_duration(path) == pytest.approx(guess)


def test_a_recording_whose_header_was_never_finished_has_a_length(tmp_path):
    path = leave_open(write_source(tmp_path / "a.wav", tones(8000, 5), 8000))
    assert longest_duration(path) == pytest.approx(1.1 * 5, rel=0.01)


def test_files_whose_length_is_exact_are_not_looked_into(tmp_path, monkeypatch):
    """It takes a process each time."""
    monkeypatch.setattr(chunks, "stated_duration", None)
    assert longest_duration(write_source(tmp_path / "a.wav", tones(8000, 5), 8000)) == 5
    assert longest_duration(convert(SONG, tmp_path / "a.flac")) == 8
    assert longest_duration((tmp_path / "a.wav").rename(tmp_path / "a.raw")) == 5


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "codes"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_disk_that_gets_full_is_named(music, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    work = tmp_path / "work"
    monkeypatch.setattr(dataset, "save_encoded", full)
    with pytest.raises(AssetError) as caught:
        run(music, work, DatasetSettings(), "small")
    assert str(caught.value) == (
        f"The disk of {work} is full before the music is prepared: free some of it and start the "
        "training again, which goes on from there."
    )


def test_another_error_of_the_disk_is_no_full_one(music, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(dataset, "save_encoded", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run(music, tmp_path / "work", DatasetSettings(), "small")


def test_the_middle_of_a_song_tells_its_key(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(dataset, "key_and_tempo", lambda wav, rate: asked.append((wav, rate)))
    path = write_source(tmp_path / "a.wav", torch.arange(8000 * 130)[None] / 2e6, 8000)
    (tmp_path / "music").mkdir()
    shutil.move(path, tmp_path / "music")
    found = find(tmp_path / "music", tmp_path / "work")
    (clip,) = dataset.cut(found.files, tmp_path / "decoded").clips
    dataset._key_and_tempo(clip)
    ((wav, rate),) = asked
    assert (wav.shape, rate) == ((1, 8000 * 120), 8000)
    assert wav[0, 0].item() == pytest.approx(8000 * 5 / 2e6)
