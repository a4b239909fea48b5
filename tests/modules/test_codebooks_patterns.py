import math

import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
from tests.golden_data import load, meta

KINDS = ["mono", "stereo"]
DATA = load("patterns/data")
META = meta("patterns")


def pattern(kind, timesteps=10):
    delays = META[kind]["delays"]
    return DelayedPatternProvider(len(delays), delays).get_pattern(timesteps)


@pytest.mark.parametrize("kind", KINDS)
def test_layout(kind):
    golden, ours = META[kind], pattern(kind)
    assert [[list(coord) for coord in step] for step in ours.layout] == golden["layout"]
    assert len(ours.layout) == golden["num_layout_steps"]
    assert ours.num_sequence_steps == golden["num_sequence_steps"]
    assert ours.max_delay == golden["max_delay"]
    assert len(ours.valid_layout) == golden["valid_layout_len"]
    for timestep, step in golden["first_step_with_timesteps"].items():
        assert ours.get_first_step_with_timesteps(int(timestep)) == step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "only_valid"), [("full", False), ("valid", True)])
def test_sequence_and_back(kind, steps, only_valid):
    key, special = f"{kind}.{steps}", META[kind]["special_token"]
    built = pattern(kind).build_pattern_sequence(DATA[f"{kind}.codes"], special, only_valid)
    for ours, name in zip(built, ("seq", "seq_indexes", "seq_mask"), strict=True):
        assert torch.equal(ours, DATA[f"{key}.{name}"]), name
    back = pattern(kind).revert_pattern_sequence(built[0], -1, only_valid)
    for ours, name in zip(back, ("rev", "rev_indexes", "rev_mask"), strict=True):
        assert torch.equal(ours, DATA[f"{key}.{name}"]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "only_valid"), [("full", False), ("valid", True)])
def test_logits(kind, steps, only_valid):
    key = f"{kind}.{steps}"
    logits, _, mask = pattern(kind).revert_pattern_logits(
        DATA[f"{key}.logits_in"], math.nan, only_valid
    )
    torch.testing.assert_close(logits, DATA[f"{key}.logits_rev"], equal_nan=True)
    assert torch.equal(mask, DATA[f"{key}.logits_mask"])


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_timesteps_than_the_pattern(kind):
    special = META[kind]["special_token"]
    sequence, _, mask = pattern(kind).build_pattern_sequence(
        DATA[f"{kind}.codes"][..., :7], special
    )
    assert torch.equal(sequence, DATA[f"{kind}.T7_in_T10.seq"])
    assert torch.equal(mask, DATA[f"{kind}.T7_in_T10.mask"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_stands_before_unknown_codes(kind):
    codes = torch.full_like(DATA[f"{kind}.codes"], -1)
    codes[..., :4] = DATA[f"{kind}.codes"][..., :4]
    sequence, _, _ = pattern(kind).build_pattern_sequence(codes, META[kind]["special_token"])
    assert torch.equal(sequence, DATA[f"{kind}.gen_seq_prompt4"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="3 codebooks"):
        pattern("mono").build_pattern_sequence(torch.zeros(1, 3, 10, dtype=torch.long), 64)
    with pytest.raises(InputError, match="11 timesteps"):
        pattern("mono").build_pattern_sequence(torch.zeros(1, 4, 11, dtype=torch.long), 64)
    with pytest.raises(InputError, match="never fall"):
        DelayedPatternProvider(2, [1, 0])
    with pytest.raises(InputError, match="flatten_first"):
        DelayedPatternProvider(4, flatten_first=2)
