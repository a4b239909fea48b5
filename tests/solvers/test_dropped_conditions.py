"""Conditions are dropped in training as officially, or as generation goes without them."""

from dataclasses import replace

import pytest
import torch

from audiocraft.models.lm import LMOutput
from audiocraft.modules.conditioners import ConditioningAttributes
from audiocraft.solvers.conditions import ConditionSettings, Drops, condition_settings
from audiocraft.solvers.loss import codebook_loss
from audiocraft.solvers.musicgen import Clip, Trainer
from tests.golden_data import load, meta
from tests.models.test_lm import LOGITS, lm
from tests.solvers.training import SETTINGS, clips, model

MELODY = "lm_tiny_melody"


def golden_clips(data):
    """The official batch: two descriptions and none, two melodies and none."""
    samples = (data["wav.0"].shape[-1], data["wav.1"].shape[-1], 0)
    return [
        Clip(f"clip {row}", codes, codes.shape[-1], text, chroma=chroma, samples=length)
        for row, (codes, text, chroma, length) in enumerate(
            zip(
                data["codes"],
                meta(MELODY)["descriptions"],
                data["train_cfg.chroma_raw"],
                samples,
                strict=True,
            )
        )
    ]


@pytest.mark.parametrize(
    ("drops", "dropped"),
    [
        (Drops(), set()),
        (Drops(text=frozenset({"description"})), {"description"}),
        (Drops(wav=frozenset({"self_wav"})), {"self_wav"}),
        (Drops(everything=True), {"description", "self_wav"}),
    ],
)
def test_conditions_are_the_official_ones(drops, dropped, monkeypatch):
    """What the trainer conditions a batch on; without a condition, what it has in its place."""
    data, trainer, seen = load(f"{MELODY}/data"), Trainer(lm(MELODY), SETTINGS), {}
    predict = trainer.lm.compute_predictions

    def note(codes, items, conditions):
        seen.update(conditions)
        return predict(codes, items, conditions)

    monkeypatch.setattr(trainer.lm, "compute_predictions", note)
    trainer.evaluate(golden_clips(data), drops=drops)
    assert list(seen) == meta(MELODY)["condition_dict_order"]
    for name, (condition, mask) in seen.items():
        case = "train_cfg.allnull" if name in dropped else "train_cfg"
        torch.testing.assert_close(condition, data[f"{case}.cond.{name}"], **LOGITS)
        assert torch.equal(mask, data[f"{case}.cond_mask.{name}"].long())


@pytest.mark.parametrize("case", ["train_cfg", "train_cfg.allnull"])
def test_the_loss_is_that_of_the_official_logits(case):
    data, trainer = load(f"{MELODY}/data"), Trainer(lm(MELODY), SETTINGS)
    loss = trainer.evaluate(golden_clips(data), drops=Drops(everything=case.endswith("allnull")))
    golden = codebook_loss(LMOutput(data[f"{case}.logits"], data["mask"]), data["codes"])
    assert torch.equal(loss.counts, golden.counts)
    torch.testing.assert_close(loss.per_codebook, golden.per_codebook, rtol=0, atol=1e-4)


def test_what_is_dropped_is_what_generation_has_in_its_place():
    """The null row of a batch for guidance, whose other row has a text and no melody."""
    lm = model("stereo-melody").eval()
    texts = ["slow piano", "a rather longer text than the other"]
    items = [ConditioningAttributes({"description": text}) for text in texts]
    nulls = [ConditioningAttributes({"description": None}) for _ in texts]
    with torch.no_grad():
        generated = lm.encode_conditions([*items, *nulls])
    conditions = ConditionSettings(null_as_generated=True)
    trainer = Trainer(lm, replace(SETTINGS, conditions=conditions))
    data = [replace(clip, description=text) for clip, text in zip(clips(2), texts, strict=True)]
    for rows, drops in ((slice(0, 2), Drops(wav=frozenset({"self_wav"}))),
                        (slice(2, 4), Drops(everything=True))):  # fmt: skip
        provider = lm.condition_provider.conditioners
        with torch.no_grad():
            text, _ = provider["description"](trainer._tokens(texts, drops)["description"])
            chroma, _ = provider["self_wav"].project(*trainer._chroma("self_wav", data, True))
        torch.testing.assert_close(text, generated["description"][0][rows], rtol=0, atol=1e-6)
        torch.testing.assert_close(chroma, generated["self_wav"][0][rows], rtol=0, atol=1e-6)


def test_a_configuration_asks_for_it():
    cfg = model().cfg.copy()
    assert not condition_settings(cfg).null_as_generated
    cfg.classifier_free_guidance.null_as_generated = True
    assert condition_settings(cfg).null_as_generated


def test_a_loss_without_a_condition_is_that_of_clips_that_have_none():
    trainer = Trainer(model(), SETTINGS)
    data = clips(4)
    untold = [replace(clip, description=None) for clip in data]
    without = trainer.evaluate(data, drops=Drops(text=frozenset({"description"})))
    assert torch.equal(without.sums, trainer.evaluate(untold).sums)
    everything = trainer.evaluate(data, drops=Drops(everything=True))
    silent = trainer.evaluate(untold, drops=Drops(wav=frozenset({"self_wav"})))
    assert torch.equal(everything.sums, silent.sums)
    assert not torch.equal(everything.sums, without.sums)
