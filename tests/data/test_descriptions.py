import json
from pathlib import Path

import pytest

from audiocraft.data.chunks import Clip
from audiocraft.data.descriptions import (
    ClipMetadata,
    describe,
    read_first_line,
    with_labels,
)
from audiocraft.data.files import AudioFile
from audiocraft.data.labels import Labels

TAGS = {"title": "A Title", "artist": "Somebody", "genre": "Rock; Blues", "comment": "a comment"}


@pytest.fixture
def clip(tmp_path):
    def make(tags=None, text=None, metadata=None):
        sides = []
        for name, content in (("song.txt", text), ("song.json", metadata)):
            sides.append(None if content is None else tmp_path / name)
            if content is not None:
                data = content if isinstance(content, bytes) else content.encode()
                (tmp_path / name).write_bytes(data)
        file = AudioFile("album/My song.v2.ogg", Path("song.ogg"), "0" * 64, *sides)
        return Clip(file, 44100, 2, 8.0, tags or {}, (), 0)

    return make


def test_the_first_of_four_sources_describes_a_clip(clip):
    side = json.dumps({"description": "from the json"})
    assert describe(clip(TAGS, "from the text", side), "the same").description == "the same"
    assert describe(clip(TAGS, "from the text", side)).description == "from the text"
    assert describe(clip(TAGS, "\n \n", side)).description == "from the json"
    assert describe(clip(TAGS, "")).description == "a comment"
    assert describe(clip(TAGS), "  \n").description == "a comment"
    assert describe(clip({"title": "x"})).description is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Größe 曲".encode(), "Größe 曲"),
        ("Größe 曲".encode("utf-8-sig"), "Größe 曲"),
        ("Größe “quoted” €".encode("cp1252"), "Größe “quoted” €"),
        (b"no such letter: \x81\xe9", "no such letter: \ufffd\xe9"),
        ("Größe 曲\r\nsecond".encode("utf-16"), "Größe 曲"),
        (b"\r\n\n   \nthe  first\tline \r\nthe second", "the first line"),
        (b"only one line", "only one line"),
        (b"a\0b\x1b[31m", "a b [31m"),
        (b"", None),
        (b"\n\n \r\n", None),
        ("\ufeff\n".encode(), None),
    ],
)
def test_the_first_line_is_read_in_any_usual_encoding(tmp_path, content, expected):
    path = tmp_path / "song.txt"
    path.write_bytes(content)
    assert read_first_line(path) == expected


@pytest.mark.parametrize("offset", range(3))
def test_a_letter_on_the_border_of_what_is_read_does_not_change_the_encoding(tmp_path, offset):
    path = tmp_path / "song.txt"
    path.write_text("Größe\n" + "x" * offset + "曲" * 30000, encoding="utf-8")
    assert read_first_line(path) == "Größe"


def test_tags_join_the_metadata(clip):
    assert describe(clip(TAGS)) == ClipMetadata(
        title="A Title",
        artist="Somebody",
        genre=("Rock", "Blues"),
        description="a comment",
        name="My song.v2",
    )
    assert describe(clip()) == ClipMetadata(name="My song.v2")


def test_official_metadata_beside_a_file_are_read(clip):
    side = {
        "title": "Other",
        "key": "C# minor",
        "bpm": "120",
        "genre": "Pop, Rock, Pop",
        "moods": ["Happy", "Bright", ""],
        "keywords": "guitar, drums",
        "instrument": ["Guitar"],
        "name": "ignored",
        "unknown": {"a": 1},
    }
    assert describe(clip(TAGS, metadata=json.dumps(side))) == ClipMetadata(
        title="Other",
        artist="Somebody",
        key="C# minor",
        bpm=120.0,
        genre=("Pop", "Rock"),
        moods=("Happy", "Bright"),
        keywords=("guitar", "drums"),
        description="a comment",
        name="My song.v2",
        instrument=("Guitar",),
    )


@pytest.mark.parametrize(
    "value",
    [
        *("{", "[1, 2]", "null", "[" * 100_000, b"\xff\xfe", '{"bpm": 1e999}', '{"bpm": true}'),
        '{"bpm": "fast", "genre": 5, "moods": {"a": 1}, "title": ["x"], "key": null}',
    ],
)
def test_json_of_another_kind_says_nothing(clip, value):
    assert describe(clip(metadata=value)) == ClipMetadata(name="My song.v2")


def test_json_that_cannot_be_read_is_named(clip, caplog):
    describe(clip(metadata="{"))
    assert "song.json is not used, it is no JSON" in caplog.text


def test_a_tag_of_several_genres_is_taken_apart(clip):
    tags = {"genre": "Rock/Pop, Folk;Folk|Blues"}
    assert describe(clip(tags)).genre == ("Rock", "Pop", "Folk", "Blues")


def test_labels_join_lists_and_fill_gaps():
    found = Labels(("Rock", "Blues"), ("dark",), ("Piano",), "F# minor", 120.0)
    assert with_labels(ClipMetadata(title="t"), found) == ClipMetadata(
        title="t",
        key="F# minor",
        bpm=120.0,
        genre=("Rock", "Blues"),
        moods=("dark",),
        instrument=("Piano",),
    )
    said = ClipMetadata(
        key="A minor", bpm=60.0, genre=("My own", "rock"), moods=("Dark",), keywords=("x",)
    )
    assert with_labels(said, found) == ClipMetadata(
        key="A minor",
        bpm=60.0,
        genre=("My own", "rock", "Blues"),
        moods=("Dark",),
        keywords=("x",),
        instrument=("Piano",),
    )
    assert with_labels(said, Labels()) == said
