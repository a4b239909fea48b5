"""Conditions are dropped in training as generation goes without them."""

from dataclasses import replace

import torch

from audiocraft.modules.conditioners import ConditioningAttributes
from audiocraft.solvers.conditions import ConditionSettings, Drops, condition_settings
from audiocraft.solvers.musicgen import Trainer
from tests.solvers.training import SETTINGS, clips, model


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
