"""Runs of a small model: they learn, and are the same however they are split and resumed."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audiocraft.errors import InputError, TrainingError
from audiocraft.models.builders import get_lm_model
from audiocraft.models.loaders import read_checkpoint
from audiocraft.modules.lora import adapter_parameters, adapter_state, detach
from audiocraft.solvers.checkpoints import find_checkpoint, load_state, save_checkpoint
from audiocraft.solvers.conditions import ConditionSettings
from audiocraft.solvers.loss import count_targets
from audiocraft.solvers.musicgen import Trainer, batch_clips
from audiocraft.solvers.optimizers import OptimizerSettings
from tests.golden_data import GOLDEN
from tests.solvers.training import (
    FRAMES,
    OPTIMIZERS,
    SETTINGS,
    Case,
    clips,
    close,
    model,
    train,
    train_in,
)


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
@pytest.mark.parametrize(("processes", "micro"), [(2, 4), (4, 1)])
def test_processes_change_rounding_only(processes, micro, tmp_path):
    cases = [Case(name, micro=micro) for name in OPTIMIZERS]
    ranks = train_in(processes, [*cases, replace(cases[0], resumed=9)], tmp_path)
    for rank in ranks:
        resumed = rank.pop()
        assert resumed["losses"] == rank[0]["losses"]
        close(resumed["state"], rank[0]["state"], 0.0)
    first, *others = ranks
    for case, together in zip(cases, first, strict=True):
        alone = train(replace(case, micro=8), tmp_path)
        close(together["losses"], alone["losses"], 1e-5)
        close(together["evaluated"], alone["evaluated"], 1e-3)  # of sums over 100 times as much
        assert together["counts"] == alone["counts"]
        close(together["exported"], alone["exported"], 1e-3)
    for other in others:
        for ours, theirs in zip(other, first, strict=True):
            assert ours["exported"] is None
            assert ours["losses"] == theirs["losses"]
            assert ours["evaluated"] == theirs["evaluated"]
            close(ours["state"], theirs["state"], 0.0)
    if micro * processes < 8:  # then gradients wait for others, and in no second place
        # But for the first update, before which they have met in another one for nothing.
        assert {number for case in first for number in case["beside"][1:]} == {0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_bit_for_bit(name, tmp_path):
    settings = replace(SETTINGS, optimizer=OptimizerSettings(name, OPTIMIZERS[name]))
    whole, expected = losses(settings)
    first, begun = losses(settings, until=13)
    save_checkpoint(tmp_path, 13, begun.state_dict(), {})
    resumed = Trainer(model(), settings)
    resumed.load_state_dict(load_state(find_checkpoint(tmp_path)))
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
    with pytest.raises(TrainingError, match=r"^The loss of update 1 is nan: give a lower lr\.$"):
        trainer.train(clips(), lambda _: None)
    assert trainer.update == 0


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_weights_that_are_no_numbers_are_found(lora_rank):
    """Also those that no loss has met yet."""
    trainer, data = Case(lora_rank=lora_rank).trainer(), clips()
    trainer.train(data, lambda _: None, 2)
    trainer.check_weights()
    for wrong in (math.inf, math.nan):
        with torch.no_grad():
            trainer.optimizer.param_groups[0]["params"][-1].view(-1)[-1] = wrong
        with pytest.raises(
            TrainingError,
            match=rf"^The norm of the weights after update 2 is {wrong}: give a lower lr\.$",
        ):
            trainer.check_weights()


def test_the_average_of_a_short_run_has_all_its_updates():
    settings = replace(SETTINGS, updates=15, schedule="linear_warmup")
    trainer, averages = Trainer(model(), settings), []

    def note(_):
        averages.append(trainer.ema.average["out_norm.weight"].clone())

    trainer.train(clips(), note)
    assert len(averages) == 15
    for before, after in pairwise(averages):
        assert not torch.equal(before, after)


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


@pytest.mark.parametrize("case", [Case(kind="mono"), Case(), Case(kind="mono", lora_rank=4)])
def test_activations_computed_again_are_the_same_bit_for_bit(case, tmp_path):
    """Text and melody, full and LoRA; each layer is run twice an update."""
    kept = train(case, tmp_path)
    again = train(replace(case, checkpointing=True), tmp_path)
    close(again, kept, 0.0)
    trainer = replace(case, checkpointing=True).trainer()
    runs = []
    layer = trainer.lm.transformer.layers[1]
    layer.norm2.register_forward_hook(lambda *_: runs.append(1))
    trainer.train(clips(num_codebooks=trainer.lm.num_codebooks), lambda _: None, 3)
    assert len(runs) == 6
    trainer.evaluate(clips(2, num_codebooks=trainer.lm.num_codebooks))
    assert len(runs) == 7


@pytest.mark.parametrize("case", [Case(lora_rank=4, micro=3), Case("dadam", "mono", lora_rank=4)])
def test_adapters_are_trained_averaged_resumed_and_exported(case, tmp_path):
    whole = train(case, tmp_path)
    resumed = train(replace(case, resumed=13), tmp_path)
    close(resumed, whole, 0.0)
    losses = [loss for loss, _ in whole["losses"]]
    assert losses[-1] < losses[0] - 0.1
    trainer = case.trainer()
    assert whole["exported"].keys() == adapter_parameters(trainer.lm).keys()
    assert whole["state"]["ema"]["average"].keys() == whole["exported"].keys()
    assert trainer.exported_state()["transformer.layers.0.linear1.weight.lora_b"].abs().max() == 0
    assert whole["exported"]["transformer.layers.0.linear1.weight.lora_b"].abs().max() > 0
    trainer.load_state_dict(whole["state"])
    base = model(case.kind)
    detach(trainer.lm)
    assert all(torch.equal(v, trainer.lm.state_dict()[k]) for k, v in base.state_dict().items())


def test_adapters_on_a_base_of_16_bit(tmp_path):
    half = train(Case(lora_rank=4, sixteen=True), tmp_path)
    whole = train(Case(lora_rank=4), tmp_path)
    close(half["losses"], whole["losses"], 0.1)
    trainer = Case(lora_rank=4, sixteen=True).trainer()
    adapters = set(adapter_parameters(trainer.lm).values())
    for weight in trainer.lm.parameters():
        assert weight.dtype == (torch.float32 if weight in adapters else torch.bfloat16)
    with pytest.raises(InputError, match="need bfloat16"):
        Trainer(model(lora_rank=4, frozen16=True), SETTINGS)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_is_exported_is_the_average(lora_rank):
    """In 16 bit, of which another trainer says the same."""
    # At a rate that does not come down, so that the last updates are not all alike.
    settings = replace(Case().settings(), schedule="linear_warmup")
    trainer, data = Trainer(model("mono", lora_rank), settings), clips(num_codebooks=4)
    start = trainer.exported_state()
    for name, weight in (adapter_parameters(trainer.lm) or trainer.lm.state_dict()).items():
        assert torch.equal(start[name], weight.half())  # no step yet
    trainer.train(data, lambda _: None)
    own = {name: value.clone() for name, value in trainer.lm.state_dict().items()}
    expected = trainer.evaluate(data)
    state = trainer.exported_state()
    assert all(value.dtype == torch.float16 for value in state.values())
    for name, value in trainer.ema.average.items():
        assert torch.equal(state[name], value.half())
    assert all(torch.equal(value, own[name]) for name, value in trainer.lm.state_dict().items())
    apart = trainer.evaluate(data, averaged=False)
    assert (apart.sums - expected.sums).abs().max() > 1
    other = Trainer(model("mono", lora_rank), settings)
    if lora_rank:
        for name, value in adapter_state(other.lm).items():
            value.copy_(state[name])
    else:
        other.lm.load_state_dict(state)
    close(float(other.evaluate(data).total), float(expected.total), 1e-4)


def test_evaluation_is_of_each_clip_once():
    trainer, data = Case(micro=3).trainer(), clips()
    drops = replace(SETTINGS.conditions, cfg_p=1.0)
    assert torch.equal(
        trainer.evaluate(data).sums,
        Trainer(model(), replace(SETTINGS, micro_batch=3, conditions=drops)).evaluate(data).sums,
    )
    once = trainer.evaluate(data)
    frames = [clip.frames for clip in data]
    delays = trainer.lm.pattern_provider.delays
    assert torch.equal(once.counts, count_targets(delays, FRAMES, frames))
    close(trainer.evaluate(data[::-1]).sums, once.sums, 1e-3)


def test_a_new_model_is_trained_by_the_same_loop():
    """From random weights as `get_lm_model` makes them, text and melody."""
    torch.manual_seed(0)
    cfg = read_checkpoint(GOLDEN / "tiny_release/stereo-melody/state_dict.bin").cfg
    lm = get_lm_model(cfg, GOLDEN / "t5_tiny")
    settings = replace(SETTINGS, updates=150, conditions=ConditionSettings(cfg_p=0.1))
    trainer = Trainer(lm, settings)
    before = float(trainer.evaluate(clips()).total)
    assert before == pytest.approx(math.log(32), abs=1.0)  # it knows nothing, and is calm
    seen, _ = losses(settings, trainer=trainer)
    assert seen[-1] < 0.5 * seen[0]
    assert float(trainer.evaluate(clips()).total) < 0.5 * before


class _Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in {
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
        }
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["mono", "stereo-melody"])
def test_the_host_does_not_wait_for_each_micro_batch(kind):
    counts = []
    for micro in (8, 2, 1):
        trainer = Case(kind=kind, micro=micro).trainer()
        data = clips(num_codebooks=trainer.lm.num_codebooks)
        trainer.train(data, lambda _: None, 2)
        with _Waits() as waits:
            trainer.train(data, lambda _: None, 3)
        counts.append(waits.count)
    assert counts[0] == counts[1] == counts[2] > 0
