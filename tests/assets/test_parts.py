"""Files that are whole, or not there."""

import json
import os

import pytest

from audiocraft.assets.parts import is_leftover, read_json, whole_file, write_json


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with whole_file(path) as unfinished:
        unfinished.write_bytes(b"after")
        assert unfinished.parent == tmp_path
        assert path.read_bytes() == b"before"
        # Hidden: in a folder of the user's own nothing else is taken for a leftover.
        assert unfinished.name.startswith(".")
        assert is_leftover(unfinished.name)
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(error, tmp_path):
    def stop():
        with whole_file(path) as unfinished:
            unfinished.write_bytes(b"half")
            raise error

    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(error):
        stop()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_it_has_no_name_before_its_content_is_on_the_disk(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "a.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_broken_small_file_is_as_none(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    write_json(path, {"a": [1, "ü"]})
    assert json.loads(path.read_bytes()) == read_json(path) == {"a": [1, "ü"]}
    path.write_bytes(path.read_bytes()[:5])
    assert read_json(path) == {}
