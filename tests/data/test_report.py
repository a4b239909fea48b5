import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from audiocraft.data import report as report_module
from audiocraft.data.archive import LeftOut
from audiocraft.data.chunks import Cut, cut
from audiocraft.data.descriptions import ClipMetadata, describe
from audiocraft.data.files import Found, find
from audiocraft.data.report import ChunkLabels, check_usable, make_report, summarize, write_report
from tests.data.signals import sentence, tones, write_source

SONG = Path(__file__).parent.parent / "audio" / "real_song.ogg"


def run(source, work):
    """The stages in a row."""
    found = find(source, work)
    clips = cut(found.files, work / "decoded")
    metadata = [[describe(clip)] * len(clip.chunks) for clip in clips.clips]
    return make_report(source.name, found, clips, metadata)


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "music"
    for name in ("a/Lied ä.ogg", "b/Lied ä.ogg"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(SONG, folder / name)
    (folder / "a" / "Lied ä.txt").write_text("metal guitar")
    write_source(folder / "long.wav", tones(8000, 41)[:1], 8000)
    write_source(folder / "short.wav", tones(8000, 3)[:1], 8000)
    (folder / "broken.mp3").write_text("nothing")
    (folder / "cover.jpg").write_text("x")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._long.wav").write_text("x")
    return folder


def test_every_file_has_its_fate(dataset, tmp_path):
    report = run(dataset, tmp_path / "work")
    assert [(file.name, file.chunks, file.description) for file in report.used] == [
        ("a/Lied ä.ogg", 1, "metal guitar"),
        ("b/Lied ä.ogg", 1, None),
        ("long.wav", 2, None),
    ]
    assert [left.name for left in report.left_out] == ["broken.mp3", "short.wav"]
    assert [left.name for left in report.others] == ["__MACOSX/._long.wav", "cover.jpg"]
    check_usable(report)
    assert summarize(report) == {
        "key": report.key,
        "files": 3,
        "chunks": 4,
        "seconds": 57.0,
        "described_files": 1,
        "left_out_files": 2,
        "left_out_reasons": {"cannot be read as audio": 1, "is shorter than 5 s": 1},
        "other_files": 2,
    }
    names = [path.relative_to(dataset).as_posix() for path in dataset.rglob("*") if path.is_file()]
    texts = ["a/Lied ä.txt"]
    accounted = [entry.name for entry in (*report.used, *report.left_out, *report.others)]
    assert sorted(names) == sorted(accounted + texts)


def test_the_words_of_each_chunk_are_told(dataset, tmp_path):
    found = find(dataset, tmp_path / "work")
    clips = cut(found.files, tmp_path / "decoded")
    words = [
        [ClipMetadata(genre=(f"{n}",), moods=("x",), key="C major") for n in range(len(c.chunks))]
        for c in clips.clips
    ]
    file = make_report("music", found, clips, words).used[2]
    assert (file.name, file.key, file.bpm) == ("long.wav", "C major", None)
    assert file.labels == (
        ChunkLabels(0.0, 30.0, ("0",), ("x",), ()),
        ChunkLabels(30.0, 11.0, ("1",), ("x",), ()),
    )


def test_a_zip_of_the_folder_gives_the_same_report(dataset, tmp_path):
    packed = tmp_path / "music.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for path in dataset.rglob("*"):
            file.write(path, path.relative_to(dataset))
    one, other = run(dataset, tmp_path / "work"), run(packed, tmp_path / "work")
    assert (one.used, one.left_out, one.others) == (other.used, other.left_out, other.others)
    assert one.key == other.key


def test_the_report_is_written_whole_and_in_a_stable_order(dataset, tmp_path, monkeypatch):
    report = run(dataset, tmp_path / "work")
    path = tmp_path / "report.json"
    write_report(report, path, {"losses": [3.0, 2.5]})
    first = path.read_text(encoding="utf-8")
    value = json.loads(first)
    assert list(value) == ["dataset", "summary", "losses"]
    assert value["dataset"]["used"][0]["name"] == "a/Lied ä.ogg"
    assert value["dataset"]["left_out"][1] == {
        "name": "short.wav",
        "reason": "is shorter than 5 s (3.00 s)",
    }
    assert "Lied ä" in first
    write_report(run(dataset, tmp_path / "elsewhere"), path, {"losses": [3.0, 2.5]})
    assert path.read_text(encoding="utf-8") == first

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # it has no name before it is on the disk
    with pytest.raises(OSError, match="No space left"):
        write_report(report, path)
    assert path.read_text(encoding="utf-8") == first
    monkeypatch.setattr(report_module.json, "dumps", lambda *_a, **_k: "x" * 10 + "\udc80")
    with pytest.raises(UnicodeEncodeError):
        write_report(report, path)
    assert path.read_text(encoding="utf-8") == first
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("elsewhere", "music", "report.json", "work")
    ]


def test_names_of_any_bytes_can_be_written(tmp_path):
    folder = tmp_path / "music"
    folder.mkdir()
    subprocess.run(["cp", SONG, bytes(folder) + b"/caf\xe9.ogg"], check=True)
    write_report(run(folder, tmp_path / "work"), tmp_path / "report.json")
    value = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert value["dataset"]["used"][0]["name"] == "caf\ufffd.ogg"


def test_a_dataset_of_nothing_usable_is_refused_with_the_reasons(dataset, tmp_path):
    for path in [*dataset.glob("*/*.ogg"), dataset / "long.wav"]:
        path.unlink()
    for number in range(3):
        write_source(dataset / f"{number}.wav", tones(8000, 2 + number)[:1], 8000)
    message = sentence(check_usable, run(dataset, tmp_path / "work"))
    assert message == (
        "music holds no music that can be used (4 x is shorter than 5 s; 1 x housekeeping of "
        "macOS; 1 x no music beside it has its name; 1 x cannot be read as audio; 1 x not a file "
        "of music by its name): give files of music that play and last 5 s or more."
    )


def test_an_empty_dataset_is_refused(tmp_path):
    (tmp_path / "music").mkdir()
    message = sentence(check_usable, run(tmp_path / "music", tmp_path / "work"))
    assert message == (
        "music holds no music that can be used, because it is empty: give files of music that "
        "play and last 5 s or more."
    )


def test_the_refusal_stays_short():
    left = tuple(LeftOut(f"{n}.wav", f"{'x' * 500} {n % 20}{'y' * n}") for n in range(1000))
    kinds = tuple(LeftOut(f"{n}.bin", f"reason {n}") for n in range(20))
    report = make_report("music", Found((), kinds, ""), Cut((), left), [])
    message = sentence(check_usable, report)
    assert message.startswith(f"music holds no music that can be used (1000 x {'x' * 160}; 1 x")
    assert "; 13 other reasons): " in message
    assert len(message) < 600
