import contextlib

import pytest
import torch

from audiocraft.errors import InputError, WeightsError
from audiocraft.solvers.ema import Ema, updates_per_step


def weights(*values):
    return {f"w{i}": torch.nn.Parameter(torch.tensor(value)) for i, value in enumerate(values)}


def averaged(values, **kwargs):
    """Average after the weight has taken each value in turn."""
    named = weights([0.0])
    ema = Ema(named, **kwargs)
    for value in values:
        named["w0"].data.fill_(value)
        ema.step()
    return ema.average["w0"].item()


def test_official_rule_is_a_weighted_mean_without_the_start():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    powers = [0.9 ** (4 - i) for i in range(5)]
    expected = sum(p * v for p, v in zip(powers, values, strict=True)) / sum(powers)
    assert averaged(values, decay=0.9, warmup=False) == pytest.approx(expected, rel=1e-6)


def test_warm_up_reaches_back_a_ninth_of_the_run():
    """Weights that count up lag by the mean age of what is averaged."""
    for steps in (30, 100, 300):
        lag = steps - averaged([float(n) for n in range(1, steps + 1)])
        assert 0.6 * steps / 9 < lag < 1.4 * steps / 9
    without = 100 - averaged([float(n) for n in range(1, 101)], warmup=False)
    assert without > 40


def test_warm_up_ends_in_the_official_rule():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).tolist()
    assert averaged(values) == pytest.approx(averaged(values, warmup=False), abs=1e-6)


def test_the_first_step_is_the_weights_themselves():
    assert averaged([7.0]) == 7.0
    assert averaged([7.0], warmup=False) == 7.0


def test_a_step_follows_every_so_many_updates():
    named = weights([0.0])
    ema = Ema(named, every=10)
    for update in range(1, 36):
        named["w0"].data.fill_(update)
        ema.after(update)
    assert ema.steps == 3
    assert 20 < ema.average["w0"].item() < 30


@pytest.mark.parametrize(
    ("updates", "every"),
    [(1, 1), (19, 1), (59, 1), (60, 2), (150, 5), (299, 9), (300, 10), (1000, 10), (10**9, 10)],
)
def test_a_long_run_has_the_official_steps_and_a_short_one_more(updates, every):
    assert updates_per_step(updates) == every


def test_hardly_an_update_is_left_out():
    for updates in range(1, 2000):
        assert updates % updates_per_step(updates) < updates / 30


@pytest.mark.parametrize("device", [None, "cpu"])
def test_weights_and_averages_change_places(device):
    named = weights([1.0, 2.0], [[3.0]])
    ema = Ema(named, device=device)
    ema.step()
    for weight in named.values():
        weight.data.mul_(1 / 3)  # no sum or difference gives these back to the bit
    ema.step()
    own = {name: weight.detach().clone() for name, weight in named.items()}
    mean = {name: value.clone() for name, value in ema.average.items()}
    storage = {name: weight.data_ptr() for name, weight in named.items()}
    with contextlib.suppress(ZeroDivisionError), ema.applied():
        assert all(torch.equal(named[name], mean[name]) for name in named)
        assert all(torch.equal(ema.average[name], own[name]) for name in named)
        raise ZeroDivisionError  # the weights come back whatever happens
    assert all(torch.equal(named[name], own[name]) for name in named)
    assert all(torch.equal(ema.average[name], mean[name]) for name in named)
    assert storage == {name: weight.data_ptr() for name, weight in named.items()}


def test_without_a_step_the_weights_stay():
    named = weights([1.0])
    ema = Ema(named)
    named["w0"].data.fill_(2.0)
    with ema.applied():
        assert named["w0"].item() == 2.0
    assert named["w0"].item() == 2.0


def test_going_on_from_a_state_is_to_the_bit():
    values = torch.randn(20, generator=torch.Generator().manual_seed(1)).tolist()
    named = weights([0.0])
    ema = Ema(named)
    for i, value in enumerate(values):
        if i == 7:
            state = ema.state_dict()
            state["average"] = {name: v.clone() for name, v in state["average"].items()}
            ema = Ema(named)
            ema.load_state_dict(state)
        named["w0"].data.fill_(value)
        ema.step()
    assert ema.average["w0"].item() == averaged(values)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"w0 needs float32, got torch.bfloat16"):
        Ema({"w0": torch.zeros(1, dtype=torch.bfloat16)})
    with pytest.raises(WeightsError, match="2 weights are not those of this model's 1"):
        Ema(weights([1.0])).load_state_dict(Ema(weights([1.0], [2.0])).state_dict())
