"""The process that prepares a dataset, as a job launches it."""

import random
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from audiocraft.assets.store import BUNDLED
from audiocraft.data.codes import load_encoded
from audiocraft.data.dataset import Example, Prepared, load_prepared
from audiocraft.data.descriptions import ClipMetadata
from audiocraft.data.report import DatasetReport
from audiocraft.errors import InputError, TrainingError
from audiocraft.modules.conditioners import T5Conditioner
from audiocraft.solvers import prepare
from audiocraft.solvers.conditions import ConditionSettings, merge_metadata, parse_metadata
from audiocraft.solvers.job import Place, TrainingJob, read_job, write_job
from audiocraft.solvers.launch import launch
from audiocraft.solvers.memory import TEXT_TOKENS
from audiocraft.solvers.plan import Plan
from audiocraft.solvers.prepare import (
    DATASET_FILE,
    check_description,
    load_text_encoder,
    shorten,
)
from tests.golden_data import GOLDEN
from tests.releases import stand_in
from tests.separators import put_htdemucs

SONG = Path(__file__).parent.parent / "audio" / "real_song.ogg"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The work folder of a job that removes vocals for a text version."""
    store = tmp_path / "store"
    stand_in(store, "small", 1)
    put_htdemucs(store)
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(store))
    (tmp_path / "music").mkdir()
    shutil.copy(SONG, tmp_path / "music" / "Lied ä.ogg")
    (tmp_path / "music" / "rest.mp3").write_text("x")
    place = Place(
        dataset=str(tmp_path / "music"),
        data=str(tmp_path / "data"),
        unpacked=str(tmp_path / "unpacked"),
        weights=str(tmp_path / "weights"),
        device="cpu",
        processes=1,
        plan=Plan(),
    )
    job = TrainingJob("small", one_same_description="a song", stems=("drums", "bass", "other"))
    (tmp_path / "work").mkdir()
    write_job(tmp_path / "work", job, place)
    return tmp_path / "work"


def run(work):
    lines = []
    launch("audiocraft.solvers.prepare", [str(work)], 1, lines.append)
    return lines


@pytest.mark.slow
def test_it_writes_down_what_is_trained_on_and_says_how_far_it_is(work):
    lines = run(work)
    prepared = load_prepared(work / DATASET_FILE)
    (example,) = prepared.examples
    assert (example.name, example.metadata.description) == ("Lied ä.ogg", "a song")
    assert load_encoded(example.encoded).codes.dtype == torch.int16
    assert prepared.report.source == "music"
    assert [left.name for left in prepared.report.left_out] == ["rest.mp3"]
    for line in (
        "decoding the dataset: 100 %, 2 of 2 files, 0 s left",
        "separating stems: 100 %, 1 of 1 files, 0 s left",
        "encoding: 100 %, 1 of 1 files, 0 s left",
    ):
        assert line in lines
    assert any(line.startswith("rest.mp3 is left out: it cannot be read") for line in lines)
    # What could not be decoded is tried again, and nothing else.
    again = [line for line in run(work) if "100 %" in line]
    assert again == ["decoding the dataset: 100 %, 1 of 1 files, 0 s left"]


@pytest.mark.slow
def test_an_error_reaches_the_caller_as_its_sentence(work):
    (work.parent / "music" / "Lied ä.ogg").unlink()
    with pytest.raises(TrainingError) as caught:
        run(work)
    assert str(caught.value).startswith(
        "music holds no music that can be used (1 x cannot be read as audio): give"
    )
    assert not (work / DATASET_FILE).exists()


@pytest.mark.slow
def test_texts_that_are_too_long_are_cut_and_told_of(work):
    job, place = read_job(work)
    write_job(work, replace(job, one_same_description=None), place)
    (work.parent / "music" / "Lied ä.txt").write_text("slow piano " * 5000)
    (line,) = (line for line in run(work) if "cut to" in line)
    assert line == (
        f"The texts of 1 files are cut to {TEXT_TOKENS} tokens, some 190 words with their labels: "
        "a training takes no longer ones."
    )
    (example,) = load_prepared(work / DATASET_FILE).examples
    encoder = load_text_encoder(job.version)
    assert 0.9 * TEXT_TOKENS < count(example.metadata.description, encoder) <= TEXT_TOKENS


@pytest.mark.slow
def test_a_description_that_is_too_long_is_refused_before_the_music_is_touched(work):
    job, place = read_job(work)
    write_job(work, replace(job, one_same_description="piano " * 300), place)
    with pytest.raises(TrainingError, match=r"^one_same_description has \d+ tokens, a training"):
        run(work)
    assert not Path(place.data).exists()


# How long texts may be


@pytest.fixture(params=[BUNDLED / "tiny/t5", GOLDEN / "t5_tiny"], ids=["tiny", "golden"])
def encoder(request):
    """One with tokens for bytes, and one with a token for whatever it does not know."""
    return T5Conditioner(partial(Path, request.param), 1, 1)


def count(text, encoder):
    return encoder.tokenize([text])["input_ids"].shape[1]


def dataset(*clips):
    """A dataset of clips, each the name of its file and what is known of it."""
    examples = [
        Example(f"{n}", name, name, 0.0, 30.0, Path("codes"), known)
        for n, (name, known) in enumerate(clips)
    ]
    return Prepared(tuple(examples), DatasetReport("music", "key", (), (), ()), {})


def texts(known):
    """Some of those that a clip is trained with, all of it in a random order among them."""
    for merge in ConditionSettings(), ConditionSettings(merge_text_p=1, drop_desc_p=0):
        for p in (0.5, 1.0):
            for seed in range(10):
                settings = replace(merge, drop_other_p=p)
                rng = random.Random(seed)  # noqa: S311 - not for secrets
                metadata = parse_metadata(asdict(known))
                yield merge_metadata(known.description, metadata, settings, rng)


def longest(known, encoder):
    return max((count(text, encoder) for text in {*texts(known)} if text), default=0)


def told(caplog):
    return [record.message for record in caplog.records if record.name == prepare.__name__]


LABELS = ClipMetadata(
    title="T " * 1000,
    key="C# minor",
    bpm=120.0,
    genre=("Rock", "Hip hop"),
    moods=("Dark",),
    instrument=("piano", "guitar"),
)
"""Of some 50 tokens; the title is not merged into texts."""


def described(words):
    return replace(LABELS, description=" ".join(["piano"] * words))


def test_texts_up_to_the_limit_stay_as_they_are(encoder, caplog):
    words = TEXT_TOKENS - longest(LABELS, encoder)
    while longest(described(words), encoder) > TEXT_TOKENS:
        words -= 1
    fits, more = described(words), described(words + 2)
    assert longest(fits, encoder) > TEXT_TOKENS - 3
    prepared = dataset(("a.wav", fits), ("b.wav", LABELS), ("c.wav", ClipMetadata()))
    assert shorten(prepared, encoder) == prepared
    assert not told(caplog)
    prepared = dataset(("a.wav", fits), ("b.wav", more))
    first, second = shorten(prepared, encoder).examples
    assert first.metadata == fits
    assert second.metadata != more


def test_short_texts_need_no_text_encoder():
    encoder = load_text_encoder("tiny")
    prepared = dataset(("a.wav", replace(LABELS, description="slow piano")))
    assert shorten(prepared, encoder) == prepared
    check_description("slow piano, " * 10, encoder)
    check_description(None, encoder)
    assert encoder.loaded is None


def test_long_texts_need_the_tokenizer_alone():
    encoder = load_text_encoder("tiny")
    long = described(1000)
    prepared = dataset(("a.wav", long), ("b.wav", replace(long, key=None)))
    for example in shorten(prepared, encoder).examples:
        assert len(example.metadata.description) < len(long.description) / 2
    with pytest.raises(InputError, match=r"^one_same_description has \d+ tokens, a training"):
        check_description(long.description, encoder)
    assert encoder.loaded is None


def test_descriptions_are_cut_at_a_word_and_labels_stay(encoder, caplog):
    said = "slow piano and a warm guitar. " * 300
    long = replace(LABELS, description=said.strip())
    prepared = dataset(
        ("a.wav", long), ("a.wav", replace(long, moods=("Calm",))), ("b.wav", LABELS)
    )
    *cut, same = shorten(prepared, encoder).examples
    assert same.metadata == LABELS
    for example, moods in zip(cut, (("Dark",), ("Calm",)), strict=True):
        known = example.metadata
        assert said.startswith(f"{known.description} ")
        assert replace(known, description=None) == replace(LABELS, moods=moods)
        assert 0.9 * TEXT_TOKENS < longest(known, encoder) <= TEXT_TOKENS
    (line,) = told(caplog)
    assert line.startswith(f"The texts of 1 files are cut to {TEXT_TOKENS} tokens, ")


def test_neither_a_description_nor_labels_take_all_the_room(encoder):
    keywords = tuple(f"word {number}" for number in range(10_000))
    long = replace(LABELS, description="slow piano " * 1000, keywords=keywords)
    (example,) = shorten(dataset(("a.wav", long)), encoder).examples
    known = example.metadata
    assert longest(known, encoder) <= TEXT_TOKENS
    assert known.keywords == keywords[: len(known.keywords)] != ()
    assert replace(known, description=None, keywords=()) == LABELS
    assert count(known.description, encoder) > TEXT_TOKENS / 4
    labels = (*known.keywords, *known.genre, *known.instrument)
    assert count(", ".join(labels), encoder) > TEXT_TOKENS / 4
    # A short description leaves its room.
    short = replace(long, description="slow piano")
    (example,) = shorten(dataset(("a.wav", short)), encoder).examples
    assert example.metadata.description == "slow piano"
    assert len(example.metadata.keywords) > len(known.keywords)
    assert longest(example.metadata, encoder) <= TEXT_TOKENS


@pytest.mark.parametrize(
    "known",
    [
        ClipMetadata(description="x" * 65_536),
        ClipMetadata(description="piano " + "x" * 65_536),
        ClipMetadata(description="\u66f2" * 20_000),
        ClipMetadata(description="\ufdfa" * 300),  # 18 letters each, once they are made plain
        ClipMetadata(description="PIANO \u0130\u023a " * 400),
        ClipMetadata(description="piano", key="c " * 30_000),
        ClipMetadata(genre=tuple(f"Rock {n}" for n in range(300)), bpm=1e308),
        ClipMetadata(instrument=("x" * 65_536,)),
    ],
    ids=lambda known: next(name for name, value in asdict(known).items() if value),
)
def test_no_text_is_longer_than_memory_is_planned_for(known, encoder):
    (example,) = shorten(dataset(("a.wav", known)), encoder).examples
    assert longest(example.metadata, encoder) <= TEXT_TOKENS


def test_a_description_of_all_the_music_is_refused_where_it_is_too_long(encoder):
    """It counts with the period that it is trained with: none that is taken is cut."""
    words = ["piano"] * TEXT_TOKENS
    while count(" ".join(words), encoder) > TEXT_TOKENS:
        words.pop()
    text = " ".join(words)
    assert count(f"{text}.", encoder) == TEXT_TOKENS + 1
    for given in (text, f"{text}..."):
        with pytest.raises(InputError) as caught:
            check_description(given, encoder)
        assert str(caught.value) == (
            f"one_same_description has {TEXT_TOKENS + 1} tokens, a training takes {TEXT_TOKENS} "
            "at most: shorten it to some 190 words."
        )
    fits = " ".join(words[1:])
    assert longest(ClipMetadata(description=fits), encoder) == TEXT_TOKENS
    for given in (fits, f"{fits}."):
        check_description(given, encoder)
        prepared = dataset(("a.wav", ClipMetadata(description=given)))
        assert shorten(prepared, encoder) == prepared


def test_no_room_is_left_for_what_is_not_known(encoder):
    """Of a description alone no more is cut than has to be, and the last word."""
    known = ClipMetadata(description=" ".join(["piano"] * 300))
    (example,) = shorten(dataset(("a.wav", known)), encoder).examples
    assert longest(example.metadata, encoder) == TEXT_TOKENS - 1
