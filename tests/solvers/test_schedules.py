import math

import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.solvers.schedules import SCHEDULES, lr_factor, set_lr
from tests.golden_data import meta

COSINE = meta("train_loss")["cosine_lr"]


def test_cosine_table():
    ours = [
        lr_factor(
            "cosine",
            update,
            COSINE["warmup"],
            COSINE["total"],
            min_ratio=COSINE["lr_min_ratio"],
        )
        for update in range(len(COSINE["lr"]))
    ]
    assert len(ours) > COSINE["total"]
    assert ours == pytest.approx(COSINE["lr"], abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up(name):
    assert [lr_factor(name, t, 4, 100) for t in (0, 1, 2, 3, 4)] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exponential", lambda t: 0.01 ** ((t - 8) / 92)),
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * (t - 8) / 92))),
        ("polynomial_decay", lambda t: (100 - t) / 92),
        ("inverse_sqrt", lambda t: math.sqrt(8 / t)),
        ("linear_warmup", lambda _: 1),
    ],
)
def test_after_the_warm_up(name, expected):
    for t in (9, 10, 50, 99, 100):
        assert lr_factor(name, t, 8, 100) == pytest.approx(expected(t), abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_stay_between_0_and_1_and_never_rise_after_the_warm_up(name):
    for warmup in (0, 1, 7, 20, 50):
        for total in (1, 2, 7, 8, 20):
            rates = [lr_factor(name, t, warmup, total) for t in range(1, total + 1)]
            assert all(0 <= rate <= 1 for rate in rates)
            assert rates[0] > 0, "the first update counts"
            rising = range(1, min(warmup, total) + 1)
            assert rates[: len(rising)] == [t / warmup for t in rising]
            after = rates[max(warmup - 1, 0) :]
            assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warm_up(name):
    expected = {
        "exponential": 0.1,
        "cosine": 0.5,
        "polynomial_decay": 0.5,
        "inverse_sqrt": math.sqrt(0.5),
        "linear_warmup": 1,
    }
    assert lr_factor(name, 2, 0, 4) == pytest.approx(expected[name])
    assert lr_factor(name, 1, 0, 1) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_ends_in_the_warm_up(name):
    assert lr_factor(name, 5, 8, 5) == 5 / 8
    assert lr_factor(name, 8, 8, 8) == 1
    assert lr_factor(name, 1, 8, 1) == 1 / 8


def test_all_groups_get_the_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(3)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="'step', it must be one of exponential, cosine"):
        lr_factor("step", 1, 8, 100)
    for update, warmup, total in [(-1, 8, 100), (1, -1, 100), (1, 8, 0)]:
        with pytest.raises(InputError, match="at least one update"):
            lr_factor("cosine", update, warmup, total)
