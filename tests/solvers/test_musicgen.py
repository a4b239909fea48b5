"""Runs of a small model: they learn, and are the same however they are split and resumed."""

import json
from dataclasses import replace

import pytest
import torch

from audiocraft.errors import InputError, TrainingError
from audiocraft.solvers.checkpoints import load_checkpoint, save_checkpoint
from audiocraft.solvers.conditions import ConditionSettings
from audiocraft.solvers.launch import launch
from audiocraft.solvers.musicgen import Trainer, batch_clips
from audiocraft.solvers.optimizers import OptimizerSettings
from tests.solvers.training import SETTINGS, clips, model

OPTIMIZERS = {"adamw": 3e-3, "dadam": 1.0, "prodigy": 1.0}


def losses(settings, until=None, trainer=None):
    trainer = trainer or Trainer(model(), settings)
    seen = []
    trainer.train(clips(), lambda update: seen.append(float(update.loss.total)), until)
    return seen, trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_micro_batches_change_rounding_only(name):
    settings = replace(SETTINGS, optimizer=OptimizerSettings(name, OPTIMIZERS[name]))
    whole, _ = losses(settings)
    parts, _ = losses(replace(settings, micro_batch=2))
    uneven, _ = losses(replace(settings, micro_batch=3))
    assert len(whole) == 20
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(uneven), torch.tensor(whole), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("processes", "micro"), [(2, 4), (4, 1)])
def test_processes_change_rounding_only(name, processes, micro, tmp_path):
    settings = replace(SETTINGS, optimizer=OptimizerSettings(name, OPTIMIZERS[name]))
    alone, _ = losses(settings)
    path = tmp_path / "losses.json"
    arguments = [str(micro), name, str(OPTIMIZERS[name]), str(path)]
    launch("tests.solvers.training", arguments, processes, lambda _: None)
    together = json.loads(path.read_text())
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_bit_for_bit(name, tmp_path):
    settings = replace(SETTINGS, optimizer=OptimizerSettings(name, OPTIMIZERS[name]))
    whole, expected = losses(settings)
    first, begun = losses(settings, until=13)
    save_checkpoint(tmp_path / "last.pt", begun.state_dict())
    resumed = Trainer(model(), settings)
    resumed.load_state_dict(load_checkpoint(tmp_path / "last.pt"))
    rest, _ = losses(settings, trainer=resumed)
    assert first + rest == whole
    for key, value in expected.lm.state_dict().items():
        assert torch.equal(resumed.lm.state_dict()[key], value)
    assert all(
        torch.equal(resumed.ema.average[key], value) for key, value in expected.ema.average.items()
    )


def test_it_learns():
    """What repeats itself is learnt, and evaluation says so too."""
    settings = replace(
        SETTINGS, updates=150, conditions=ConditionSettings(cfg_p=0.1), micro_batch=8
    )
    trainer = Trainer(model(), settings)
    before = float(trainer.evaluate(clips()).total)
    seen, _ = losses(settings, trainer=trainer)
    after = float(trainer.evaluate(clips()).total)
    assert seen[-1] < 0.5 * seen[0]
    assert after < 0.5 * before
    with trainer.ema.applied():
        assert float(trainer.evaluate(clips()).total) < 0.7 * before


def test_each_clip_comes_once_in_a_pass():
    data = clips()
    settings = replace(SETTINGS, batch_size=4)
    passes = [batch_clips(data, settings, update) for update in range(1, 7)]
    keys = [clip.key for batch in passes for clip in batch]
    assert sorted(keys[:12]) == sorted(keys[12:]) == sorted(clip.key for clip in data)
    assert keys[:12] != keys[12:]
    assert keys == [
        clip.key
        for update in range(1, 7)
        for clip in batch_clips(list(reversed(data)), settings, update)
    ]
    assert keys[:4] != [clip.key for clip in batch_clips(data, replace(settings, seed=8), 1)]


def test_what_lies_beyond_a_clips_end_does_not_count():
    settings = replace(SETTINGS, updates=1, batch_size=1, micro_batch=1)
    data = clips(1)[0]
    other = replace(data, codes=data.codes.clone())
    # Of a codebook that is three steps late the last frame is predicted from those of others.
    other.codes[:, 40 + 3 :] = 0
    values = []
    for clip in (data, other):
        trainer = Trainer(model(), settings)
        trainer.train([clip], lambda update: values.append(float(update.loss.total)))
    assert values[0] == values[1]
    counted = replace(settings, count_padding=True)
    for clip in (data, other):
        trainer = Trainer(model(), counted)
        trainer.train([clip], lambda update: values.append(float(update.loss.total)))
    assert values[2] != values[3]


def test_a_loss_that_is_no_number_stops_the_run():
    trainer = Trainer(model(), SETTINGS)
    with torch.no_grad():
        trainer.lm.out_norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"^The loss of update 1 is nan: give a lower lr"):
        trainer.train(clips(), lambda _: None)
    assert trainer.update == 0


def test_clips_without_what_the_version_needs():
    data = [replace(clip, chroma=None) for clip in clips()]
    trainer = Trainer(model(), replace(SETTINGS, conditions=ConditionSettings(cfg_p=0)))
    with pytest.raises(InputError, match="is trained with clips that have chroma"):
        trainer.train(data, lambda _: None)


def test_in_sixteen_bit():
    settings = replace(SETTINGS, bfloat16=True)
    half, trainer = losses(settings)
    whole, _ = losses(SETTINGS)
    assert half != whole
    torch.testing.assert_close(torch.tensor(half), torch.tensor(whole), rtol=0, atol=0.1)
    assert all(weight.dtype == torch.float32 for weight in trainer.lm.parameters())
