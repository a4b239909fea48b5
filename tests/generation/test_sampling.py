import re

import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.generation.sampling import (
    RowNoise,
    SamplingParams,
    next_token_probs,
    sample_next,
)
from tests.golden_data import load

DATA = load("sampling/data")
CPU = torch.device("cpu")


@pytest.mark.parametrize("key", sorted(key for key in DATA if key.endswith("probs")))
def test_probabilities(key):
    temp, top_k, top_p = re.fullmatch(
        r"t([\d.]+)(?:\.topk(\d+))?(?:\.topp([\d.]+))?\.probs", key
    ).groups()
    params = SamplingParams(temp=float(temp), top_k=int(top_k or 0), top_p=float(top_p or 0))
    torch.testing.assert_close(
        next_token_probs(DATA["logits"], params), DATA[key], rtol=0, atol=1e-6
    )


def test_ties_with_the_kth_are_kept():
    probs = next_token_probs(DATA["tie.in"].log(), SamplingParams(top_k=2))
    torch.testing.assert_close(probs, DATA["tie.topk2"], rtol=0, atol=1e-6)


def test_drawn_tokens_have_the_distribution():
    params = SamplingParams(temp=0.7, top_k=5)
    logits = DATA["logits"][:1, :1]
    probs = next_token_probs(logits, params).flatten()
    draws = 40_000
    noise = RowNoise(3, 1, CPU)
    tokens = sample_next(logits.expand(1, draws, -1), params, noise)
    observed = torch.bincount(tokens.flatten(), minlength=len(probs)) / draws
    assert (observed[probs == 0] == 0).all()
    error = (probs * (1 - probs) / draws).sqrt()
    assert ((observed - probs).abs() <= 5 * error).all()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    logits, params = torch.zeros(3, 4, 64), SamplingParams(top_k=0)
    together = sample_next(logits, params, RowNoise(10, 3, CPU))
    for row in range(3):
        alone = sample_next(logits[:1], params, RowNoise(10 + row, 1, CPU))
        assert torch.equal(together[row], alone[0])
    assert not torch.equal(together[0], together[1])


def test_without_a_seed_torchs_own_counts():
    logits, params = torch.zeros(2, 4, 64), SamplingParams(top_k=0)

    def draw(seed):
        torch.manual_seed(seed)
        return sample_next(logits, params, RowNoise(None, 2, CPU))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(
    "params",
    [SamplingParams(use_sampling=False), SamplingParams(temp=0), SamplingParams(temp=1e-40)],
)
def test_greedy(params):
    logits = DATA["logits"]
    assert torch.equal(sample_next(logits, params, RowNoise(0, 3, CPU)), logits.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temp": -1}, "temperature"),
        ({"temp": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(InputError, match=name):
        SamplingParams(**settings)
