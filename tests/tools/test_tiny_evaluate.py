"""The measures of the bundled release: arithmetic, and that clean music reaches the ceiling."""

import json
import math

import pytest
import torch

from audiocraft.models import MusicGen
from tests.tools.tiny_runs import make_data, run_in
from tools.synthetic_music.measures import stereo_width
from tools.synthetic_music.midi import missing
from tools.synthetic_music.pieces import plan
from tools.tiny.evaluate import PARTS, Evaluation, Sizes, evaluate, prompt
from tools.tiny.scores import (
    Heard,
    adherence,
    agreement,
    chance,
    decibels,
    faults,
    level_spread,
    mean_kl,
)

RATE = 32000
SIZES = Sizes(prompts=4, codec=2, melodies=2, long=1, tokens=2)
renders = pytest.mark.skipif(missing() is not None, reason=f"needs {missing()}")


def right(piece, **changes):
    facts = {"bpm": piece.bpm, "key": piece.key, "lead": piece.lead, "style": piece.style}
    return Heard(**facts | changes)


def test_the_divergence_of_two_predictions():
    reference = torch.tensor([0.5, 0.5]).log()[None, None, None]
    other = torch.tensor([0.9, 0.1]).log()[None, None, None]
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert mean_kl(reference, other, mask) == pytest.approx(expected, rel=1e-6)
    assert mean_kl(reference, reference + 7, mask) == pytest.approx(0, abs=1e-12)
    # Positions without a prediction are NaN, and do not count.
    nothing = torch.full((1, 1, 1, 2), math.nan)
    both = torch.cat([reference, nothing], 2), torch.cat([other, nothing], 2)
    mask = torch.tensor([[[True, False]]])
    assert mean_kl(*both, mask) == pytest.approx(expected, rel=1e-6)


def test_shares_of_clips_that_have_what_was_asked_for():
    pieces = list(plan(5, 4))
    heard = [
        right(pieces[0], bpm=pieces[0].bpm * 2.03),
        right(pieces[1], bpm=pieces[1].bpm * 1.06, key="none"),
        right(pieces[2], lead="none"),
        right(pieces[3], bpm=pieces[3].bpm / 2, style="none"),
    ]
    assert adherence(heard, pieces) == {"bpm": 0.75, "key": 0.75, "lead": 0.75, "style": 0.75}


def test_chance_is_what_the_same_clips_have_of_other_prompts():
    pieces = list(plan(5, 24))
    perfect = [right(piece) for piece in pieces]
    assert adherence(perfect, pieces) == dict.fromkeys(("bpm", "key", "lead", "style"), 1.0)
    found = chance(perfect, pieces)
    assert found["key"] == 0  # each key comes once in 24
    assert found["lead"] == pytest.approx(1 / 23)  # and each lead twice
    always = [right(pieces[0]) for _ in pieces]
    assert chance(always, pieces)["lead"] == pytest.approx(adherence(always, pieces)["lead"])


def test_agreement_of_clips_with_others():
    pieces = list(plan(5, 2))
    one = [right(piece) for piece in pieces]
    other = [right(pieces[0], bpm=pieces[0].bpm * 1.03), right(pieces[1], bpm=2 * pieces[1].bpm)]
    alike = {"bpm": 1.0, "bpm_exact": 0.5, "key": 1.0, "lead": 1.0, "style": 1.0}
    assert agreement(one, other) == alike
    other[1] = right(pieces[1], bpm=1.5 * pieces[1].bpm)
    assert agreement(one, other)["bpm"] == 0.5


def test_levels():
    wav = 0.5 * torch.ones(2, 3 * RATE)
    assert decibels(wav) == pytest.approx(20 * math.log10(0.5), abs=1e-4)
    assert decibels(torch.zeros(2, 9)) == -200
    assert level_spread(wav, RATE, 1.0) == pytest.approx(0, abs=1e-4)
    wav[:, RATE : 2 * RATE] /= 10
    whole = 10 * math.log10((2 * 0.25 + 0.0025) / 3)
    assert level_spread(wav, RATE, 1.0) == pytest.approx(whole - 20 * math.log10(0.05), abs=1e-3)


def test_faults():
    music = 0.5 * torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9)
    silence, constant = torch.zeros(2, 1000), 0.3 * torch.ones(2, 1000)
    assert faults([music]) == {"silent": 0, "constant": 0, "full_scale": 0}
    assert faults([music, silence, constant]) == {"silent": 1, "constant": 2, "full_scale": 0}
    loud = music.clone()
    loud[0, :10] = -1.0
    assert faults([loud, music])["full_scale"] == 10 / 4000


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Of a model that has hardly learnt anything."""
    folder = tmp_path_factory.mktemp("tiny")
    run = run_in(folder / "run", make_data(folder / "data"))
    run.export(folder / "release")
    return Evaluation(MusicGen.get_pretrained(folder / "release", "cpu"), SIZES)


class Perfect(Evaluation):
    """Of a model that makes what it is asked for, and plays melodies as they are."""

    def _generate(self, prompts, melodies=None, seconds=12.0, coef=3.0):
        known = {prompt(piece): piece for piece in self._pieces(48, seconds)}
        own = self._clean([known[text] for text in prompts])
        return own[::-1] if coef == 1 else list(melodies or own)

    def _decoded(self, wav):
        return wav + 1e-3 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))


@renders
def test_clean_music_is_the_ceiling(evaluation):
    perfect = Perfect(evaluation.model, SIZES)
    figures = evaluate(perfect, ("codec", "text", "guidance", "melody", "sound", "long"))
    text = figures["text"]
    assert text["right"] == text["clean"]
    assert text["clean"]["lead"] >= 0.5
    assert text["clean"]["bpm"] >= 0.75
    assert text["shuffled"] == text["clean_shuffled"]
    assert text["shuffled"]["lead"] < text["right"]["lead"]
    assert figures["guidance"]["3"] == text["right"] != figures["guidance"]["1"]
    codec = figures["codec"]
    assert codec["same_as_original"] == dict.fromkeys(
        ("bpm", "bpm_exact", "key", "lead", "style"), 1.0
    )
    assert codec["lead_ratio"] == 1.0
    assert 20 < codec["si_sdr_db"] < 60
    assert 0 < codec["log_mel_db"] < 20
    melody = figures["melody"]
    assert melody["followed"] == melody["without"] == 1.0
    assert melody["clean"] > 0.9
    assert max(melody["other"], melody["shuffled"]) < 0.6
    sound = figures["sound"]
    assert sound["width"] == sound["clean_width"] > sound["least_width"] > 0
    assert (sound["silent"], sound["constant"], sound["full_scale"]) == (0, 0, 0)
    long = figures["long"]
    assert long["level_spread_db"] == long["clean_level_spread_db"] < 3
    assert long["bpm_kept"] == long["clean_bpm_kept"] == 1.0


@renders
def test_a_model_is_heard(evaluation, monkeypatch, capsys):
    """What a model makes, not what was rendered; each clip has a prompt and a chance of its own."""
    asked = []
    generate = MusicGen.generate
    monkeypatch.setattr(
        MusicGen,
        "generate",
        lambda self, texts: asked.append((texts, self.duration)) or generate(self, texts),
    )
    clips = evaluation._generate(["a", "b"], seconds=1.0)
    assert asked == [(["a", "b"], 1.0)]
    assert [clip.shape for clip in clips] == [(2, RATE)] * 2
    again = evaluation._generate(["a", "b"], seconds=1.0)
    assert all(torch.equal(*pair) for pair in zip(clips, again, strict=True))
    assert stereo_width(clips[0]) > 0
    melody = torch.randn(2, RATE)
    (followed,) = evaluation._generate(["a"], [melody], seconds=1.0)
    assert not torch.equal(followed, clips[0])
    figures = evaluate(evaluation, ("int8",))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["int8"] == figures["int8"]
    assert 0 < figures["int8"]["kl"] < 0.1
    assert figures["int8"]["tokens"] == 2 * (8 * 600 - sum(range(8)))
    assert evaluation.model.lm.precision == "int8"


def test_the_part_that_changes_the_weights_is_the_last():
    assert list(PARTS)[-1] == "int8"
