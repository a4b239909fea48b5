import random
from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.errors import InputError
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition, nullify
from audiocraft.solvers.conditions import (
    ConditionSettings,
    batch_random,
    clip_random,
    condition_settings,
    draw_drops,
    drop_words,
    merge_metadata,
    parse_metadata,
)
from tests.golden_data import GOLDEN, meta

INFO = meta("condition_dropout_and_merge")
ALWAYS = ConditionSettings(merge_text_p=1.0)


def released(version):
    return condition_settings(OmegaConf.load(GOLDEN / "checkpoints" / f"{version}.xp_cfg.yaml"))


def torch_draw(seed=1234):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.rand(1, generator=generator).item()


def stream(seed):
    return random.Random(seed)  # noqa: S311 - not for secrets


def never():
    raise AssertionError


# Official sequences


@pytest.mark.parametrize("example", INFO["examples"])
def test_merge(example):
    metadata, description = INFO["parsed"], INFO["parsed"]["description"]
    if "case" in example:
        assert example["case"].startswith("no description")
        metadata, description = {"genre": "pop"}, None
    settings = ConditionSettings(
        **{name: value for name, value in example.items() if name.startswith(("merge", "drop"))}
    )
    rng = stream(example["python_random_seed"])
    assert merge_metadata(description, metadata, settings, rng) == example["description"]


def test_the_examples_show_every_outcome():
    texts = [example["description"] for example in INFO["examples"]]
    assert None in texts
    assert "A driving rock song." in texts
    assert any(text and "bpm: 120.0" in text for text in texts)


def test_metadata_are_parsed():
    parsed = parse_metadata(INFO["raw_json"])
    assert parsed == {name: INFO["parsed"][name] for name in INFO["raw_json"]}


@pytest.mark.parametrize("field", INFO["parse"])
def test_fields_are_parsed(field):
    for raw, expected in INFO["parse"][field].items():
        value = {"None": None, "['X', 'Y ']": ["X", "Y "], "[]": [], "128": 128.0}.get(raw, raw)
        assert parse_metadata({field: value}) == {field: expected}


def test_sequence_of_classifier_free_guidance():
    settings, draw = ConditionSettings(cfg_p=0.3), torch_draw()
    golden = INFO["cfg_dropout_sequence_p0.3_seed1234"]
    assert [draw_drops(settings, draw).everything for _ in golden] == golden


def test_sequence_of_the_melody():
    """The configuration's entry `args` takes a number of its own at each call."""
    settings = released("melody")
    assert settings.attributes == (("args", "active_on_eval", 0.0), ("wav", "self_wav", 0.5))
    golden, draw = INFO["att_dropout_sequence_melody_seed1234"], torch_draw()
    ours = [draw_drops(settings, lambda: 1.0, draw) for _ in golden]
    assert ["self_wav" in drops.wav for drops in ours] == golden
    assert not any(drops.text or drops.everything for drops in ours)


# Settings


def test_settings_of_the_releases():
    small, melody = released("small"), released("stereo-melody")
    assert small == ConditionSettings(0.3, (), 0.3, 0.25, 0.5, 0.5)
    assert (melody.cfg_p, melody.word_p) == (0.2, 0.2)
    assert condition_settings(OmegaConf.create({})) == ConditionSettings()
    cfg = OmegaConf.create({"classifier_free_guidance": {"training_dropout": 0.2}})
    assert condition_settings(cfg, cfg_p=0.7).cfg_p == 0.7
    assert condition_settings(cfg, cfg_p=0.0).cfg_p == 0.0


def test_probabilities_are_checked():
    with pytest.raises(InputError, match=r"cfg_p is 1.5, a probability"):
        condition_settings(OmegaConf.create({}), cfg_p=1.5)
    with pytest.raises(InputError, match=r"attribute_dropout.wav.self_wav is -1"):
        ConditionSettings(attributes=(("wav", "self_wav", -1),))


# Random streams


def test_streams_are_keyed():
    """The numbers stand here: another process, machine or version of Python must draw the same."""
    assert batch_random(2036, 1).random() == 0.779464053455236
    assert clip_random(2036, 1, "ä.wav 3").random() == 0.012908961457004597
    streams = [
        batch_random(1, 2),
        batch_random(1, 3),
        batch_random(2, 2),
        batch_random(12, 3),
        batch_random(1, 23),
        *(clip_random(1, 2, clip) for clip in ("", "a", "b", "2 a")),
        clip_random(1, 22, "a"),
        clip_random(12, 2, "a"),
    ]
    assert len({each.random() for each in streams}) == len(streams)


def test_drops_are_as_frequent_as_asked_for():
    settings = ConditionSettings(0.3, (("args", "active_on_eval", 0.0), ("wav", "self_wav", 0.5)))
    drops = [draw_drops(settings, batch_random(2036, update).random) for update in range(4000)]
    assert sum(drop.everything for drop in drops) / 4000 == pytest.approx(0.3, abs=0.03)
    assert sum("self_wav" in drop.wav for drop in drops) / 4000 == pytest.approx(0.5, abs=0.03)
    both = sum(drop.everything and "self_wav" in drop.wav for drop in drops)
    assert both / 4000 == pytest.approx(0.15, abs=0.02)


def test_as_many_numbers_are_drawn_whatever_they_are():
    settings = released("melody")
    for numbers in ([0.0] * 3, [0.99] * 3):
        left = iter(numbers)
        draw_drops(settings, lambda left=left: next(left))
        assert list(left) == []


# Dropping


def test_no_audio_is_the_official_one():
    wav = WavCondition(torch.ones(1, 2, 100), torch.tensor([100]), [32000], ["a"], [3.0])
    item = ConditioningAttributes(text={"description": "one"}, wav={"self_wav": wav})
    (nothing,) = nullify([item])
    null, golden = nothing.wav["self_wav"], INFO["nullified_wav"]
    assert null.length.tolist() == golden["length"]
    assert (null.path, null.seek_time) == (golden["path"], golden["seek_time"])
    # One channel, not two: they are averaged anyway.
    assert [*null.wav.shape[::2]] == golden["wav_shape"][::2]
    assert not null.wav.any()
    assert nothing.text == {"description": None}
    assert item.text == {"description": "one"}
    assert item.wav["self_wav"] is wav


def test_words_are_dropped():
    text = "a slow song with a piano"
    assert drop_words(text, 0.0, never) == text
    assert drop_words(None, 0.5, never) is None
    assert drop_words(text, 1.0, lambda: 0.99) is None
    draws = iter([0.3, 0.29, 0.9, 0.0, 0.31, 0.5])
    assert drop_words(text, 0.3, lambda: next(draws)) == "a song a piano"
    rng = stream(0)
    words = sum(len((drop_words(text, 0.3, rng.random) or "").split()) for _ in range(2000))
    assert words / 12000 == pytest.approx(0.7, abs=0.02)


# Ours in the merge


def test_a_clip_without_a_description_keeps_at_least_one_field():
    metadata = {"genre": "rock", "bpm": 120.0, "moods": ["calm", "dark"], "title": "T"}
    settings = ConditionSettings(drop_other_p=0.0, merge_text_p=0.0)
    for description in (None, "", "  "):
        texts = Counter(
            merge_metadata(description, metadata, settings, stream(seed)) for seed in range(600)
        )
        assert texts.keys() == {"genre: rock", "bpm: 120.0", "moods: calm, dark"}
        assert min(texts.values()) > 150


def test_nothing_known():
    for seed in range(50):
        rng = stream(seed)
        assert merge_metadata(None, {"title": "T", "genre": None}, ALWAYS, rng) is None
        assert merge_metadata("A song..", {}, ALWAYS, rng) in {None, "A song."}


def test_no_merge_leaves_the_description_alone():
    settings = ConditionSettings(merge_text_p=0.0)
    assert merge_metadata("A song", {"genre": "rock"}, settings, stream(0)) == "A song"


def test_numbers_are_written_as_the_official_ones():
    settings = ConditionSettings(drop_other_p=1.0)
    for bpm in (120, 120.0):
        assert merge_metadata(None, {"bpm": bpm}, settings, stream(0)) == "bpm: 120.0"
