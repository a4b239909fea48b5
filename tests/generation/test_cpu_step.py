import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from audiocraft.generation import cpu_kernels
from audiocraft.generation.cpu_step import CpuStep, supports
from audiocraft.modules.linear import Linear
from audiocraft.modules.precision import to_int8
from audiocraft.modules.transformer import KVCache, Norm, Transformer, TransformerConfig

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
KINDS = ["float32", "bfloat16", "int8"]
CARD, CODEBOOKS, MEMORY, POSITIONS = 48, 3, 7, 10


class Decoder(nn.Module):
    """What comes behind an embedding."""

    def __init__(self, config):
        super().__init__()
        self.transformer = Transformer(config)
        self.norm = Norm(config.dim)
        self.heads = nn.ModuleList(
            Linear(config.dim, CARD, bias=config.bias_ff) for _ in range(CODEBOOKS)
        )

    def forward(self, x, memory, cache):
        hidden = self.norm(self.transformer(x, memory, cache))
        return torch.stack([head(hidden[:, -1]) for head in self.heads], dim=1)

    def step(self, memory, cache):
        return CpuStep(self.transformer, self.norm, list(self.heads), memory, cache)


def decoder(biases=False, crosses=True, dim=64, heads=4):
    torch.manual_seed(0)
    model = Decoder(TransformerConfig(dim, heads, 3, 4, crosses, biases, biases)).eval()
    for name, weight in model.requires_grad_(requires_grad=False).named_parameters():
        if weight.dim() == 1:
            weight.normal_()
        elif name.endswith("in_proj_weight"):
            weight.normal_(std=dim**-0.5)
    return model


def with_bits(model, kind):
    """The decoder, and one in float32 that has the same weights as numbers."""
    if kind == "bfloat16":
        model.bfloat16()
        twin = decoder_like(model)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.copy_(ours)
        return model, twin
    twin = decoder_like(model)
    twin.load_state_dict(model.state_dict())
    if kind == "int8":
        to_int8(model)
        for ours, theirs in zip(model.modules(), twin.modules(), strict=True):
            if isinstance(ours, Linear):
                theirs.weight.copy_(ours.weight.float())
            elif hasattr(ours, "in_proj_weight"):
                theirs.in_proj_weight.copy_(ours.in_proj_weight.float())
    return model, twin


def decoder_like(model):
    return Decoder(model.transformer.config).eval().requires_grad_(requires_grad=False)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def filled(model, rows, crosses=True, steps=4):
    """Memory, and a cache that has heard something, as the decoder computes them in float32."""
    dim = model.transformer.config.dim
    memory = model.transformer.project_memory(numbers(rows, MEMORY, dim)) if crosses else None
    cache = KVCache(model.transformer.config, rows, POSITIONS, CPU, torch.float32)
    model(numbers(rows, steps, dim), memory, cache)
    return memory, cache


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
@pytest.mark.parametrize(
    ("crosses", "dim", "heads"), [(True, 64, 4), (False, 64, 1), (True, 40, 4)]
)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_step_is_what_the_layers_make_of_it(kind, biases, crosses, dim, heads, rows):
    model, twin = with_bits(decoder(biases, crosses, dim, heads), kind)
    memory, ours = filled(twin, rows, crosses)
    _, theirs = filled(twin, rows, crosses)
    step = model.step(memory, ours)
    # Inputs of integers are rounded to 15 bits or fewer.
    tolerance = 1e-3 if kind == "int8" else 2e-5
    for position in range(4, 7):
        x = numbers(rows, 1, dim + position)[..., :dim]
        logits = step(x)
        expected = twin(x, memory, theirs)
        assert logits.shape == expected.shape == (rows, CODEBOOKS, CARD)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() < tolerance * expected.std()
        assert ours.length == theirs.length == position + 1
    for name in ("keys", "values"):
        found, exact = (getattr(each, name)[:, :, :, :7] for each in (ours, theirs))
        assert (found - exact).abs().max() < tolerance * exact.std()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_number_of_threads_gives_the_same_numbers(kind, monkeypatch):
    """More than there are cores as well."""
    model, twin = with_bits(decoder(), kind)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        memory, cache = filled(twin, 2)
        step = model.step(memory, cache)
        found.append(torch.stack([step(numbers(2, 1, 64)) for _ in range(3)]))
        assert len(step._own_room) == threads
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(kind):
    model, twin = with_bits(decoder(), kind)
    found = []
    for scale in (1, 100):
        memory, cache = filled(twin, 3)
        x = numbers(3, 1, 64)
        x[1:] *= scale
        found.append(model.step(memory, cache)(x))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


@torch.no_grad()
def test_what_the_kernels_do_not_know_is_left_to_the_layers():
    model = decoder()
    heads = list(model.heads)
    assert supports(model.transformer, heads)
    assert not supports(decoder().half().transformer, list(decoder().half().heads))
    assert not supports(decoder().bfloat16().transformer, heads)
    assert not supports(decoder().to("meta").transformer, list(decoder().to("meta").heads))
    parametrize.register_parametrization(
        model.transformer.layers[1].linear1, "weight", nn.Identity()
    )
    assert not supports(model.transformer, heads)


@pytest.mark.parametrize("which", [0, 1])
@torch.no_grad()
def test_a_step_that_is_broken_off_lets_its_threads_go(which, monkeypatch):
    """As a cancelled request is, whose exception comes between any two lines of Python."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    model = decoder()
    memory, cache = filled(model, 2)
    step = model.step(memory, cache)
    step(numbers(2, 1, 64))
    kernel = step._kernel

    def broken(thread, *rest):
        if thread == which:
            raise KeyboardInterrupt
        return kernel(thread, *rest)

    step._kernel = broken
    with pytest.raises(KeyboardInterrupt):
        step(numbers(2, 1, 64))
    assert cache.length == 5
    others = [step._pool.submit(threading.get_ident) for _ in range(2)]
    assert len([other.result(timeout=30) for other in others]) == 2
    step._kernel = kernel
    assert step(numbers(2, 1, 64)).isfinite().all()


def threads_left(count):
    """Waits until so many threads of steps are left."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        gc.collect()
        if sum(each.name.startswith("step") for each in threading.enumerate()) == count:
            return True
        time.sleep(0.01)
    return False


@torch.no_grad()
def test_threads_end_with_the_request(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert threads_left(0)
    model = decoder()
    step = model.step(*filled(model, 2))
    step(numbers(2, 1, 64))
    assert threads_left(0)  # the first step, which may have to be compiled, is made by one thread
    step(numbers(2, 1, 64))
    assert threads_left(2)
    del step
    assert threads_left(0)


def test_elementary_functions():
    """Softmax takes exponents up to 0; of those below -87 nothing is left anyway."""
    x = np.concatenate([np.linspace(-87, 88, 4001), -np.logspace(-8, 1.9, 500)]).astype(np.float32)
    ours = np.array([cpu_kernels.exponential(each) for each in x], dtype=np.float64)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(ours - exact) / exact).max() < 3e-7
    assert cpu_kernels.exponential(np.float32(-np.inf)) < 1e-37
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    ours = torch.tensor([cpu_kernels.gelu(each) for each in x], dtype=torch.float64)
    exact = F.gelu(torch.from_numpy(x).double())
    assert ((ours - exact).abs() <= 2.5e-7 * (1 + exact.abs())).all()


def test_bfloat16_is_torchs():
    x = numbers(500)
    tag = np.empty(0, np.uint16)
    ours = torch.tensor([_narrow(tag, each) for each in x.numpy()], dtype=torch.int32)
    exact = x.bfloat16().view(torch.uint16).int()
    assert torch.equal(ours, exact)


@cpu_kernels.njit
def _narrow(tag, x):
    return cpu_kernels.narrow(tag, x)


@pytest.mark.slow
def test_a_process_that_compiles_makes_the_numbers_of_those_that_do_not(tmp_path):
    """Rounding to integers shows the smallest difference between two compilations."""
    code = (
        "import logging; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "import torch; from tests.generation.test_cpu_step import *\n"
        "with torch.no_grad():\n"
        "    model, twin = with_bits(decoder(), 'int8')\n"
        "    step = model.step(*filled(twin, 2))\n"
        "    print(sum(step(numbers(2, 1, 64 + i)[..., :64]).flatten() for i in range(5)).tolist())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert len(json.loads(first.stdout)) == 2 * CODEBOOKS * CARD
    assert list(tmp_path.rglob("*.nbc"))
    assert first.stdout == second.stdout
    said = "Compiled the decoder's step for this CPU in "
    assert first.stderr.count(said) == 1
    assert said not in second.stderr


def test_without_a_place_for_the_outcome_it_is_compiled_all_the_same(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(cpu_kernels, "njit", njit)
    function, options = cpu_kernels._compiled(len)
    assert function is len
    assert options["nogil"]
