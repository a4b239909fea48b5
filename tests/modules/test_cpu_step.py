import pytest
import torch

from audiocraft.modules import cpu_step
from audiocraft.modules.linear import int8_supported
from audiocraft.modules.precision import to_int8
from audiocraft.modules.transformer import KVCache, Transformer, TransformerConfig, sin_embedding

CPU = torch.device("cpu")
PRECISIONS = ["float32", "bfloat16", *(["int8"] if int8_supported() else [])]


def transformer(precision, biases, crosses):
    torch.manual_seed(0)
    config = TransformerConfig(32, 4, 3, 4, crosses, biases, biases)
    model = Transformer(config).eval().requires_grad_(requires_grad=False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or name.endswith("in_proj_weight"):
            weight.normal_()
    if precision == "int8":
        to_int8(model)
    elif precision == "bfloat16":
        model.bfloat16()
    return model


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def one_by_one(model, x, memory, cache):
    """What the layers themselves make of a step."""
    x = x + sin_embedding(torch.tensor([cache.length]), x.shape[-1])
    for index, layer in enumerate(model.layers):
        x = layer(x, index, None if memory is None else memory[index], cache)
    cache.length += 1
    return x


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("crosses", [True, False], ids=["text", "prefix"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_the_program_is_the_layers_bit_for_bit(
    precision, biases, crosses, rows, compiled, monkeypatch
):
    if not compiled:
        monkeypatch.setattr(cpu_step, "_program", lambda: cpu_step.run_layers)
    model = transformer(precision, biases, crosses)
    dtype = model.layers[0].norm1.weight.dtype
    memory = model.project_memory(numbers(rows, 7, 32).to(dtype)) if crosses else None
    start = numbers(rows, 4, 32).to(dtype)
    caches = [KVCache(model.config, rows, 10, CPU, dtype) for _ in range(2)]
    for cache in caches:
        model(start, memory, cache)
    for step in range(3):
        x = numbers(rows, 1, 32 + step)[..., :32].to(dtype)
        ours = model(x, memory, caches[0])
        theirs = one_by_one(model, x, memory, caches[1])
        assert torch.equal(ours, theirs)
        assert caches[0].length == caches[1].length
    assert caches[0].step is not None
    assert caches[1].step is None
    filled = caches[0].length
    assert torch.equal(caches[0].keys[:, :, :, :filled], caches[1].keys[:, :, :, :filled])
    assert torch.equal(caches[0].values[:, :, :, :filled], caches[1].values[:, :, :, :filled])


def test_it_is_compiled_here():
    """Or the Python of it would be measured, and nobody would know."""
    assert isinstance(cpu_step._program(), torch.jit.ScriptFunction)
