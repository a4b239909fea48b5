import gzip
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from audiocraft.data import files
from audiocraft.data.archive import Limits
from audiocraft.data.files import find, group_songs
from tests.data.signals import sentence

SONG = Path(__file__).parent.parent / "audio" / "real_song.ogg"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "music"
    folder.mkdir()
    return folder


def fill(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def pack(folder, target):
    with zipfile.ZipFile(target, "w") as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder))
    return target


def texts(found, kind="text"):
    """What stands beside each file."""
    sides = {file.name: getattr(file, kind) for file in found.files}
    return {name: side.read_text() if side else None for name, side in sides.items()}


def reasons(found):
    return {left.name: left.reason for left in found.left_out}


def test_an_archive_and_its_folder_are_found_alike(folder, tmp_path):
    fill(
        folder,
        {
            "b/song.wav": "1",
            "a/song.wav": "2",
            "a/song.txt": "text of a",
            "a/deep/er/Ünï.MP3": "3",
            "a/deep/er/Ünï.json": "{}",
            "cover.jpg": "4",
            ".DS_Store": "5",
            "lonely.txt": "6",
        },
    )
    work = tmp_path / "work"
    found = find(folder, work)
    assert not work.exists()
    packed = find(pack(folder, tmp_path / "music.zip"), work)
    assert [file.name for file in found.files] == ["a/deep/er/Ünï.MP3", "a/song.wav", "b/song.wav"]
    assert [file.path.read_text() for file in found.files] == ["3", "2", "1"]
    assert texts(found) == {
        "a/deep/er/Ünï.MP3": None,
        "a/song.wav": "text of a",
        "b/song.wav": None,
    }
    assert texts(found, "metadata")["a/deep/er/Ünï.MP3"] == "{}"
    assert reasons(found) == {
        ".DS_Store": "housekeeping of macOS",
        "cover.jpg": "not a file of music by its name",
        "lonely.txt": "no music beside it has its name",
    }
    for one, other in zip(found.files, packed.files, strict=True):
        assert (one.name, one.sha256) == (other.name, other.sha256)
    assert texts(packed) == texts(found)
    assert (packed.key, packed.left_out) == (found.key, found.left_out)


def test_a_text_serves_the_chunks_of_its_song(folder):
    fill(
        folder,
        {
            "song.txt": "of the song",
            "song_chunk0.wav": "",
            "song_chunk12.wav": "",
            "song_chunk12_chunk3.wav": "",
            "song_chunk2.wav": "",
            "song_chunk2.txt": "of the chunk",
            "songs.wav": "",
            "song_part1.wav": "",
            "other/song_chunk0.wav": "",
        },
    )
    assert texts(find(folder, folder)) == {
        "other/song_chunk0.wav": None,
        "song_chunk0.wav": "of the song",
        "song_chunk12.wav": "of the song",
        "song_chunk12_chunk3.wav": "of the song",
        "song_chunk2.wav": "of the chunk",
        "song_part1.wav": None,
        "songs.wav": None,
    }


def test_one_text_serves_files_of_every_suffix(folder):
    names = ["a.b.flac", "a.b.wav", "a.ogg"]
    fill(folder, dict.fromkeys(names, "") | {"a.b.TXT": "yes"})
    assert texts(find(folder, folder)) == {"a.b.flac": "yes", "a.b.wav": "yes", "a.ogg": None}


def test_letters_of_two_parts_are_the_same_letters(folder):
    """As macOS writes them, and as everybody else does."""
    fill(folder, {"Mu\u0308ller.wav": "", "M\u00fcller.txt": "yes"})
    assert texts(find(folder, folder)) == {"Mu\u0308ller.wav": "yes"}


def test_of_texts_with_one_name_one_is_left_out(folder):
    fill(folder, {"a.wav": "", "a.txt": "yes", "a.TXT": "no", "b.json": "{}", "b.JSON": "{}"})
    found = find(folder, folder)
    assert texts(found) == {"a.wav": "yes"}
    assert reasons(found) == {
        "a.TXT": "another beside it has its name",
        "b.JSON": "another beside it has its name",
        "b.json": "no music beside it has its name",
    }


def test_the_key_tells_what_matters(folder, tmp_path):
    fill(folder, {"a.wav": "1", "b.wav": "2", "a.txt": "text"})
    keys = [find(folder, folder).key]
    moved = shutil.move(folder, tmp_path / "elsewhere")
    fill(moved, {"cover.jpg": "3", "lonely.txt": "4"})
    assert find(moved, moved).key == keys[0]
    for change in ({"a.wav": "one"}, {"a.txt": "other"}, {"b.txt": "text"}, {"c.wav": "2"}):
        fill(moved, change)
        keys.append(find(moved, moved).key)
    (moved / "c.wav").rename(moved / "d.wav")
    keys.append(find(moved, moved).key)
    assert len(set(keys)) == 6


def test_a_single_file_goes_by_its_content(folder):
    """A server gives what it fetches a name of its own each time."""
    fill(folder, {"tmp1clip.wav": "1", "tmp2clip.wav": "1", "tmp3clip.wav": "2"})
    first, again, other = (find(folder / f"tmp{n}clip.wav", folder) for n in (1, 2, 3))
    assert first.key == again.key != other.key
    assert [found.files[0].name for found in (first, again)] == ["tmp1clip.wav", "tmp2clip.wav"]
    keys = {first.key}
    for sides in ({"txt": "text"}, {"txt": "other"}, {"txt": "other", "json": "{}"}):
        for number in (1, 2):
            fill(folder, {f"tmp{number}clip.{suffix}": text for suffix, text in sides.items()})
        first, again = (find(folder / f"tmp{number}clip.wav", folder).key for number in (1, 2))
        assert first == again
        keys.add(first)
    assert len(keys) == 4


def test_an_archive_goes_by_the_names_within(folder, tmp_path):
    fill(folder, {"a.wav": "1"})
    one, other = (pack(folder, tmp_path / name) for name in ("tmp1music.zip", "tmp2music.zip"))
    key = find(one, tmp_path / "work").key
    assert find(other, tmp_path / "work").key == key
    (folder / "a.wav").rename(folder / "b.wav")
    assert find(pack(folder, other), tmp_path / "work").key != key
    for path in (tmp_path / "tmp1song.wav.gz", tmp_path / "tmp2song.wav.gz"):
        path.write_bytes(gzip.compress(b"1", mtime=0))
    one, other = (find(tmp_path / f"tmp{n}song.wav.gz", tmp_path / "work").key for n in (1, 2))
    assert one == other


def test_the_order_is_that_of_the_names(folder, monkeypatch):
    fill(folder, dict.fromkeys(("b.wav", "a/z.wav", "B.wav", "a.wav", "é.wav"), ""))
    found = find(folder, folder)
    assert [file.name for file in found.files] == ["B.wav", "a.wav", "a/z.wav", "b.wav", "é.wav"]
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: list(scandir(path))[::-1])
    assert find(folder, folder) == found


def test_one_file_is_used_in_place(folder):
    source = folder / "download"
    shutil.copy(SONG, source)
    before = source.stat()
    (file,) = find(source, folder / "work").files
    assert (file.name, file.path, file.text) == ("download", source, None)
    after = source.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (folder / "download.txt").write_text("beside it")
    (file,) = find(source, folder / "work").files
    assert file.text == folder / "download.txt"


def test_links_are_followed_inside_the_folder_alone(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    fill(outside, {"secret.wav": "secret"})
    fill(folder, {"real/song.wav": "song"})
    links = {
        "file.wav": "real/song.wav",
        "inside": "real",
        "real/up": "..",
        "self": ".",
        "out.wav": "../outside/secret.wav",
        "album": "../outside",
        "broken.wav": "nothing.wav",
        "loop.wav": "loop.wav",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    found = find(folder, tmp_path / "work")
    assert {file.name: file.path.read_text() for file in found.files} == {
        "file.wav": "song",
        "inside/song.wav": "song",
        "real/song.wav": "song",
    }
    out, nowhere = "a link out of the folder", "a link that leads nowhere"
    expected = {"out.wav": out, "album": out, "broken.wav": nowhere, "loop.wav": nowhere}
    assert reasons(found) == expected


def test_a_folder_that_is_a_link_itself_is_one(folder, tmp_path):
    fill(folder, {"song.wav": "song"})
    (tmp_path / "link").symlink_to(folder)
    assert [file.name for file in find(tmp_path / "link", tmp_path).files] == ["song.wav"]


def test_what_is_no_plain_file_is_not_opened(folder):
    """A pipe would wait for ever."""
    os.mkfifo(folder / "pipe.wav")
    assert reasons(find(folder, folder)) == {"pipe.wav": "not a plain file"}


def test_names_of_any_bytes_are_found(folder):
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.wav"))
    path.write_text("song")
    (file,) = find(folder, folder).files
    assert (file.name, file.path.read_text()) == ("caf\ufffd.wav", "song")


def test_a_file_that_may_not_be_read_is_left_out(folder, monkeypatch):
    fill(folder, {"a.wav": "1", "b.wav": "2"})
    original = files.file_sha256

    def denied(path):
        if path.name == "a.wav":  # permissions do not hold root back
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(files, "file_sha256", denied)
    found = find(folder, folder)
    assert [file.name for file in found.files] == ["b.wav"]
    assert reasons(found) == {"a.wav": "cannot be read (Permission denied)"}


def test_too_many_files_are_refused(folder):
    fill(folder, {f"{number}.wav": "" for number in range(4)})
    assert len(find(folder, folder, Limits(entries=4)).files) == 4
    message = sentence(find, folder, folder, Limits(entries=3))
    assert message.endswith("holds more than 3 files; give a folder of music alone.")


def test_a_missing_source_is_named(tmp_path):
    message = sentence(find, tmp_path / "nothing", tmp_path)
    assert message.endswith("nothing is not a file; give the path of an archive.")


def test_what_is_one_song(tmp_path):
    folder = tmp_path / "music"
    contents = {
        "a/song.mp3": "1",
        "a/song.wav": "2",
        "a/song_chunk1.wav": "3",
        "a/song_chunk10.wav": "4",
        "b/song_chunk1.wav": "5",
        "b/copy.wav": "4",
        "b/copy_chunk2.wav": "6",
        "b/song_chunky.wav": "7",
        "A/song.wav": "8",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    found = find(folder, tmp_path / "work")
    songs = group_songs(found.files)
    groups = {}
    for name, song in songs.items():
        groups.setdefault(song, set()).add(name)
    one = {name for name in contents if name.startswith("a/")} | {"b/copy.wav", "b/copy_chunk2.wav"}
    assert sorted(groups.values(), key=len) == [
        {"A/song.wav"},
        {"b/song_chunk1.wav"},
        {"b/song_chunky.wav"},
        one,
    ]
    assert groups.keys() <= {file.sha256 for file in found.files}
    assert group_songs(found.files[::-1]) == songs
