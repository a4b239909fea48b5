"""A text encoder that is trained with its model, and conditions dropped as generation has them."""

from dataclasses import replace

import pytest
import torch

from audiocraft.modules.conditioners import ConditioningAttributes
from audiocraft.solvers.checkpoints import find_checkpoint, load_state, save_checkpoint
from audiocraft.solvers.conditions import ConditionSettings, Drops, condition_settings
from audiocraft.solvers.musicgen import Trainer, text_encoder_weights
from tests.solvers.training import SETTINGS, clips, model

STEP = 0.005
TRAINED = replace(SETTINGS, updates=4, text_encoder=True, conditions=ConditionSettings(cfg_p=0.0))


def encoder_of(lm):
    return {name: weight.detach().clone() for name, weight in text_encoder_weights(lm).items()}


def test_it_is_trained_where_that_is_asked_for_and_frozen_elsewhere():
    for asked in (True, False):
        lm = model()
        before = encoder_of(lm)
        trainer = Trainer(lm, replace(TRAINED, text_encoder=asked))
        trainer.train(clips(), lambda _: None, 2)
        moved = [
            name for name, weight in text_encoder_weights(lm).items()
            if not torch.equal(weight, before[name])
        ]  # fmt: skip
        assert moved == (list(before) if asked else [])
        assert not any("t5" in name for name in lm.state_dict())


def test_its_gradient_is_that_of_the_loss():
    """Against the evaluated loss a little way up and down that gradient."""
    conditions = ConditionSettings(cfg_p=0.0, word_p=0.0, merge_text_p=0.0)
    lm = model()
    trainer = Trainer(lm, replace(TRAINED, conditions=conditions))
    data = [replace(clip, description=f"piano {i}") for i, clip in enumerate(clips(8))]
    weights = text_encoder_weights(lm)
    gradients = {}

    def keep():
        gradients.update({name: weight.grad.clone() for name, weight in weights.items()})

    trainer.optimizer.step = keep
    trainer.settings = replace(trainer.settings, max_norm=1e9)
    trainer.train(data, lambda _: None, 1)
    length = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    losses = []
    for step in (STEP, -2 * STEP):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(gradients[name], alpha=step / float(length))
        losses.append(float(trainer.evaluate(data, averaged=False).total))
    slope = (losses[0] - losses[1]) / (2 * STEP)
    assert length > 1e-4
    assert slope == pytest.approx(float(length), rel=0.05)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = Trainer(model(), TRAINED)
    whole.train(clips(), lambda _: None)
    begun = Trainer(model(), TRAINED)
    begun.train(clips(), lambda _: None, 2)
    save_checkpoint(tmp_path, 2, begun.state_dict(), {})
    resumed = Trainer(model(), TRAINED)
    resumed.load_state_dict(load_state(find_checkpoint(tmp_path)))
    resumed.train(clips(), lambda _: None)
    expected = encoder_of(whole.lm) | whole.lm.state_dict()
    found = encoder_of(resumed.lm) | resumed.lm.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_average_is_of_it_too():
    trainer = Trainer(model(), replace(TRAINED, updates=20))
    trainer.train(clips(), lambda _: None)
    last = encoder_of(trainer.lm)
    with trainer.ema.applied():
        averaged = encoder_of(trainer.lm)
    assert all(not torch.equal(averaged[name], last[name]) for name in last)
    assert all(torch.equal(encoder_of(trainer.lm)[name], last[name]) for name in last)


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
