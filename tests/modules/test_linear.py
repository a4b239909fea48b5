import pytest
import torch
from torch.nn import functional as F

from audiocraft.modules.linear import Int8Weight, Linear, int8_levels, int8_supported, linear

needs_int8 = pytest.mark.skipif(not int8_supported(), reason="this CPU's torch has no int8 kernels")


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[1, 4], ids=["any CPU", "Intel"])
def least_rows(request, monkeypatch):
    monkeypatch.setattr("audiocraft.modules.linear.LEAST_ROWS", request.param)


@pytest.mark.usefixtures("least_rows")
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (3, 4), (2, 16), (5, 7)])
@pytest.mark.parametrize("bias", [None, numbers(24)])
@torch.no_grad()
def test_few_rows(shape, bias):
    """Two columns, the transposed product and many rows take different ways to one result."""
    x, weight = numbers(*shape, 40), numbers(24, 40)
    ours = linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert ours.shape == (*shape, 24)
    assert ours.is_contiguous()
    assert (ours - exact).abs().max() < 1e-5


@pytest.mark.usefixtures("least_rows")
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    weight, x = numbers(512, 256), numbers(2, 1, 256)
    other = torch.stack([x[0], 100 * numbers(1, 256)])
    assert torch.equal(linear(x, weight)[0], linear(other, weight)[0])


def test_gradients_reach_input_and_weight():
    layer, x = Linear(8, 6), numbers(2, 8).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().min() > 0


@needs_int8
@pytest.mark.parametrize("levels", sorted({63, int8_levels()}))
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@torch.no_grad()
def test_int8_is_its_integer_arithmetic(monkeypatch, rows, levels):
    monkeypatch.setattr("audiocraft.modules.linear.int8_levels", lambda: levels)
    weight, x, bias = numbers(48, 64), numbers(rows, 1, 64), numbers(48)
    x[0] *= 50  # each row has a scale of its own
    steps = levels if levels == 127 else 63 * 126  # in two parts
    weight_scale = weight.abs().amax(1, keepdim=True).double() / 127
    input_scale = x.abs().amax(-1, keepdim=True).double() / steps
    integers = (x / input_scale).round() @ (weight / weight_scale).round().t()
    expected = integers * input_scale * weight_scale[:, 0] + bias
    ours = Int8Weight(weight)(x, bias)
    assert ours.dtype == torch.float32
    # A number half way between two integers may be rounded either way.
    close = (ours - expected).abs() < 1e-5 * expected.abs().max()
    assert close.float().mean() > 0.97
    assert (ours - F.linear(x, weight, bias)).std() < 0.02 * F.linear(x, weight).std()


@needs_int8
@torch.no_grad()
def test_an_int8_row_does_not_depend_on_the_others():
    packed, x = Int8Weight(numbers(512, 256)), numbers(2, 1, 256)
    other = torch.stack([x[0], 100 * numbers(1, 256)])
    assert torch.equal(packed(x)[0], packed(other)[0])


@needs_int8
@torch.no_grad()
def test_zeros_stay_zeros():
    """As the values of a null condition are, and a weight's row may be."""
    weight = numbers(4, 16)
    weight[1] = 0
    y = Int8Weight(weight)(torch.stack([torch.zeros(16), numbers(16)]))
    assert torch.equal(y[0], torch.zeros(4))
    assert y[1, 1] == 0
    assert y[1, 0] != 0
