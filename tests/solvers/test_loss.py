import math

import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.models.lm import LMOutput
from audiocraft.solvers.ema import Ema
from audiocraft.solvers.loss import clip_mask, codebook_loss, count_targets
from audiocraft.solvers.optimizers import OptimizerSettings, build_optimizer, parameter_groups
from tests.golden_data import load, meta
from tests.models.test_lm import descriptions, lm

NAME, STEREO = "lm_tiny_text_mono", "lm_tiny_text_stereo"
INFO = meta("train_loss")
EXACT = {"rtol": 0, "atol": 1e-5}


def loss_of(model, codes, items, counted=None, condition_tensors=None):
    output = model.compute_predictions(codes, items, condition_tensors)
    return codebook_loss(output, codes, counted)


def assert_loss(loss, golden):
    assert loss.total.item() == pytest.approx(golden["ce"], abs=1e-5)
    assert loss.per_codebook.tolist() == pytest.approx(golden["per_codebook"], abs=1e-5)


def gradient_norm(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def test_loss_and_gradients():
    model, data = lm(NAME).train(), load("train_loss/data")
    loss = loss_of(model, data["codes"], descriptions(NAME))
    assert_loss(loss, INFO["first"])
    loss.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    golden = {name[5:]: value for name, value in data.items() if name.startswith("grad.")}
    assert len(golden) == 7
    for name, value in golden.items():
        torch.testing.assert_close(gradients[name], value, **EXACT)
    assert gradient_norm(model) == pytest.approx(INFO["first"]["grad_norm"], abs=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_stereo():
    loss = loss_of(lm(STEREO), load("train_loss/data")["stereo.codes"], descriptions(STEREO))
    assert_loss(loss, INFO["stereo"])


def test_padding_with_the_special_token():
    data = load("train_loss/data")
    codes = data["codes_padded_special"]
    assert codes.max() == 32  # no target: it must not be looked up in the logits
    assert_loss(
        loss_of(lm(NAME), codes, descriptions(NAME), counted=data["pad_mask"]), INFO["padded"]
    )


def test_five_steps_with_their_average():
    model, data = lm(NAME).train(), load("train_loss/data")
    info = INFO["optim"]
    groups = parameter_groups(model)
    assert [{"n": len(group)} for group in groups] == INFO["param_groups"]
    adam = info["adam"]
    settings = OptimizerSettings("adamw", info["lr"], tuple(adam["betas"]), adam["weight_decay"])
    optimizer = build_optimizer(settings, groups)
    average = Ema(dict(model.named_parameters()), 0.99, warmup=False)
    for step, golden in enumerate(INFO["adamw_steps"]):
        loss = loss_of(model, data[f"step{step}.codes"], descriptions(NAME))
        assert_loss(loss, golden)
        optimizer.zero_grad()
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), INFO["max_norm"])
        assert norm.item() == pytest.approx(golden["grad_norm_before_clip"], abs=1e-5)
        optimizer.step()
        average.step()
    state = model.state_dict()
    final = {name[6:]: value for name, value in data.items() if name.startswith("final.")}
    assert final.keys() == state.keys()
    for name, value in final.items():
        torch.testing.assert_close(state[name], value, **EXACT)
    assert average.count == pytest.approx(INFO["ema_count"], abs=1e-9)
    averages = {name[4:]: value for name, value in data.items() if name.startswith("ema.")}
    assert len(averages) == 3
    for name, value in averages.items():
        torch.testing.assert_close(average.average[name], value, **EXACT)


def random_output(frames=17, rows=8, delays=(0, 1, 2, 3), seed=0):
    """Predictions as a model gives them, NaN where there are none, and codes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, len(delays), frames, 32, generator=generator)
    codes = torch.randint(32, logits.shape[:3], generator=generator)
    t = torch.arange(frames)
    mask = t + torch.tensor(delays)[:, None] < frames
    logits.masked_fill_(~mask[..., None], math.nan)
    return LMOutput(logits, mask.expand(rows, -1, -1)), codes


LENGTHS = torch.tensor([17, 3, 17, 9, 1, 16, 12, 17])


def test_frames_beyond_a_clips_end_carry_no_loss():
    output, codes = random_output()
    output.logits.requires_grad_()
    loss = codebook_loss(output, codes, clip_mask(LENGTHS, 17))
    for k in range(4):
        nats = [
            -output.logits[row, k, t].log_softmax(0)[codes[row, k, t]]
            for row, length in enumerate(LENGTHS.tolist())
            for t in range(min(length, 17 - k))
        ]
        assert len(nats) == loss.counts[k]
        assert loss.per_codebook[k].item() == pytest.approx(sum(nats).item() / len(nats), abs=1e-6)
    loss.total.backward()
    gradient = output.logits.grad
    assert gradient[1, :, :3].abs().min() > 0
    assert not gradient[1, :, 3:].any()
    other = codes.clone()
    other[1, :, 3:] = 0
    assert torch.equal(codebook_loss(output, other, clip_mask(LENGTHS, 17)).sums, loss.sums)


@pytest.mark.parametrize("delays", [(0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)])
def test_targets_are_counted_before_they_are_seen(delays):
    output, codes = random_output(delays=delays)
    loss = codebook_loss(output, codes, clip_mask(LENGTHS, 17))
    assert torch.equal(count_targets(delays, 17, LENGTHS.tolist()), loss.counts)
    everything = count_targets(delays, 17, [17] * 8)
    assert torch.equal(everything, codebook_loss(output, codes).counts)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_parts_add_up_to_the_batch(rows):
    """Clips of unequal length: a mean of the parts' means would be another number."""
    output, codes = random_output()
    output.logits.requires_grad_()
    mask = clip_mask(LENGTHS, 17)
    whole = codebook_loss(output, codes, mask)
    (gradient,) = torch.autograd.grad(whole.total, output.logits)
    parts = [
        codebook_loss(
            LMOutput(output.logits[first : first + rows], output.mask[first : first + rows]),
            codes[first : first + rows],
            mask[first : first + rows],
        )
        for first in range(0, 8, rows)
    ]
    assert torch.equal(sum(part.counts for part in parts), whole.counts)
    torch.testing.assert_close(sum(part.sums for part in parts), whole.sums, rtol=1e-12, atol=0)
    shares = [part.share(count_targets((0, 1, 2, 3), 17, LENGTHS.tolist())) for part in parts]
    assert sum(shares).item() == pytest.approx(whole.total.item(), abs=1e-12)
    (added,) = torch.autograd.grad(sum(shares), output.logits)
    torch.testing.assert_close(added, gradient, rtol=1e-6, atol=1e-9)
    means = sum(part.total for part in parts).item() / len(parts)
    assert abs(means - whole.total.item()) > 1e-3


def test_16_bit_logits_are_summed_in_float32():
    output, codes = random_output()
    half = LMOutput(output.logits.bfloat16(), output.mask)
    exact = codebook_loss(LMOutput(half.logits.float(), output.mask), codes)
    assert torch.equal(codebook_loss(half, codes).sums, exact.sums)


def test_a_codebook_without_targets():
    loss = codebook_loss(*random_output(frames=2))
    assert loss.counts.tolist() == [16, 8, 0, 0]
    assert loss.total.isfinite()
    assert loss.per_codebook[2:].tolist() == [0, 0]


def test_predictions_of_other_codes_are_refused():
    output, codes = random_output()
    with pytest.raises(InputError, match=r"\[8, 4, 16\].*\[8, 4, 17\]"):
        codebook_loss(output, codes[..., :-1])
