"""What is held out, and in which words clips are trained, measured and prompted with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from audiocraft.data.codes import EncodedChunk, save_encoded
from audiocraft.data.dataset import Example
from audiocraft.data.descriptions import ClipMetadata
from audiocraft.solvers.clips import (
    choose_prompts,
    full_text,
    hold_out,
    load_clips,
    load_measured_clips,
)
from audiocraft.solvers.conditions import ConditionSettings

SETTINGS = ConditionSettings()
KNOWN = ClipMetadata(
    key="C Minor", bpm=120, genre=("Rock", "Pop"), moods=("calm",), description="a slow song."
)


def example(song, chunk=0, metadata=KNOWN):
    return Example(
        f"{song} {chunk}", song, f"{song}.wav", 30.0 * chunk, 30.0, Path("none"), metadata
    )


def examples(songs, chunks=3):
    return [example(f"song {song}", chunk) for song in range(songs) for chunk in range(chunks)]


@pytest.mark.parametrize(
    ("songs", "held_out"), [(1, 0), (4, 0), (5, 1), (14, 1), (16, 2), (60, 6), (1000, 10)]
)
def test_a_tenth_of_the_songs_is_held_out_whole(songs, held_out):
    kept, measured = hold_out(examples(songs), seed=1)
    assert len({item.song for item in measured}) == held_out
    assert not {item.song for item in measured} & {item.song for item in kept}
    assert len(measured) == 3 * held_out
    assert len(kept) + len(measured) == 3 * songs


def test_what_is_held_out_depends_on_seed_and_songs_alone():
    items = examples(30)
    chosen = {item.key for item in hold_out(items, seed=1)[1]}
    assert {item.key for item in hold_out(items[::-1], seed=1)[1]} == chosen
    assert any({item.key for item in hold_out(items, seed)[1]} != chosen for seed in range(2, 6))


def test_a_full_text_has_all_that_is_known():
    text = full_text(example("a"), SETTINGS, seed=1)
    assert text.startswith("a slow song. ")
    assert sorted(text.split(". ")[1:]) == [
        "bpm: 120.0",
        "genre: rock, pop",
        "key: c minor",
        "moods: calm",
    ]
    assert full_text(example("a", metadata=ClipMetadata(description="x")), SETTINGS, 1) == "x."
    undescribed = replace(KNOWN, description=None, moods=(), genre=())
    assert sorted(full_text(example("a", metadata=undescribed), SETTINGS, 1).split(". ")) == [
        "bpm: 120.0",
        "key: c minor",
    ]
    assert full_text(example("a", metadata=ClipMetadata(title="T")), SETTINGS, 1) is None


def test_prompts_are_of_different_songs_first():
    words = {"a": "1", "b": "2", "c": "1", "d": "3"}
    items = [
        example(song, chunk, ClipMetadata(description=f"{text} {chunk * (song == 'a')}"))
        for song, text in words.items()
        for chunk in range(2)
    ]
    assert choose_prompts(items, SETTINGS, 1) == ["1 0.", "2 0.", "3 0."]
    assert choose_prompts(items[:2], SETTINGS, 1) == ["1 0.", "1 1."]
    assert choose_prompts([example("a", metadata=ClipMetadata())], SETTINGS, 1) == []


def test_clips_have_what_was_encoded(tmp_path):
    chunk = EncodedChunk(torch.arange(8, dtype=torch.int16).view(2, 4), 3, torch.rand(5, 12), 777)
    save_encoded(tmp_path / "codes.safetensors", chunk)
    item = replace(example("a"), encoded=tmp_path / "codes.safetensors")
    (clip,) = load_clips([item])
    assert torch.equal(clip.codes, chunk.codes)
    assert torch.equal(clip.chroma, chunk.chroma)
    assert (clip.key, clip.frames, clip.samples) == ("a 0", 3, 777)
    assert clip.description == "a slow song."
    assert clip.metadata["genre"] == "rock, pop"
    assert clip.metadata["moods"] == ["calm"]
    (measured,) = load_measured_clips([item], SETTINGS, 1)
    assert measured.description == full_text(item, SETTINGS, 1)
    assert measured.key == clip.key
    # A process may have some 65,000 maps of files, and a training has more clips.
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
