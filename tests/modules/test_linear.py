import pytest
import torch
from torch.nn import functional as F

from audiocraft.modules.linear import Int8Weight, Linear, linear


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [None, numbers(24)])
@torch.no_grad()
def test_float32_is_torchs(bias):
    x, weight = numbers(2, 5, 40), numbers(24, 40)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("bias", [None, numbers(24)])
@torch.no_grad()
def test_16_bits_are_summed_in_32(bias):
    x, weight = numbers(2, 5, 40).bfloat16(), numbers(24, 40).bfloat16()
    ours = linear(x, weight, None if bias is None else bias.bfloat16())
    bias = None if bias is None else bias.bfloat16().double()
    exact = F.linear(x.double(), weight.double(), bias)
    assert ours.dtype == torch.bfloat16
    assert ((ours - exact).abs() <= 2**-8 * exact.abs()).all()


def test_gradients_reach_input_and_weight():
    layer, x = Linear(8, 6), numbers(2, 8).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().min() > 0


@torch.no_grad()
def test_an_int8_weight_is_within_half_a_step():
    weight = numbers(48, 64)
    weight[3] *= 100  # each row has a scale of its own
    packed = Int8Weight(weight)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert packed.nbytes == weight.numel()
    assert packed.values.abs().amax(1).tolist() == [127] * 48
    assert ((packed.float() - weight).abs() <= 0.5001 * steps).all()
    assert torch.equal(packed[8:16].float(), packed.float()[8:16])
    assert packed[8:16].values.data_ptr() == packed.values[8:].data_ptr()
    x, bias = numbers(3, 2, 64), numbers(48)
    assert torch.equal(linear(x, packed, bias), F.linear(x, packed.float(), bias))


@torch.no_grad()
def test_zeros_stay_zeros():
    """As a weight's row may be."""
    weight = numbers(4, 16)
    weight[1] = 0
    y = linear(numbers(3, 16), Int8Weight(weight))
    assert torch.equal(y[:, 1], torch.zeros(3))
    assert (y[:, 0] != 0).all()
