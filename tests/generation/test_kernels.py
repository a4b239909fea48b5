"""Every kernel compiles for the GPUs that it is for, within their registers and shared memory.

No device is needed for it, and none for what these numbers say: a kernel whose values do not fit
the registers is slow, and one that asks for too much shared memory does not start. Nor is one for
the memory that a step takes of the device.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from audiocraft.generation.weights import collect
from audiocraft.modules.transformer import Norm, Transformer, TransformerConfig
from tools.benchmark.shapes import TEXT_TOKENS, Shape

triton = pytest.importorskip("triton", reason="there is no Triton on this system")

SIZES = {"small": (1024, 16), "medium": (1536, 24), "large": (2048, 32)}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
# Bytes that one block may have, by compute capability; 99 KB on 8.6 and 8.9, which run code for 8.0
SHARED = {75: 64 * 1024, 80: 99 * 1024, 90: 99 * 1024}
# (batch, branches): double guidance, the ordinary units' four rows, and two of the matrix units'.
BATCHES = [(1, 1), (1, 2), (1, 3), (2, 2), (4, 2), (16, 2), (32, 3)]


@pytest.fixture
def launches(monkeypatch):
    """Kernels with their arguments and options, instead of launches."""
    from triton.runtime import JITFunction

    calls = []

    def record(self, *args, grid, warmup, **kwargs):
        assert not warmup
        assert all(size > 0 for size in grid)
        assert all(size < 2**16 for size in grid[1:])
        calls.append((self, args, kwargs))

    monkeypatch.setattr(JITFunction, "run", record)
    return calls


def modules(size, dtype, layers=1, bias=False):
    """A version's language model as `collect` takes it, without its numbers."""
    dim, heads = SIZES[size]
    config = TransformerConfig(
        dim, heads, layers, cross_attention=True, bias_attn=bias, bias_ff=bias
    )
    with torch.device("meta"):
        embeddings = nn.ModuleList(nn.Embedding(2049, dim) for _ in range(4)).to(dtype)
        linears = nn.ModuleList(nn.Linear(dim, 2048, bias) for _ in range(4)).to(dtype)
        decoder, norm = Transformer(config).to(dtype), Norm(dim).to(dtype)
    return embeddings, decoder, norm, linears


def run_step_of(size, dtype, batch, branches, choice, bias=False):
    from audiocraft.generation import step

    weights = collect(*modules(size, dtype, bias=bias))
    room = step.Size(batch, branches, 1536, 1536, 64)
    step.run_step(weights, step.allocate(weights, room, torch.device("meta")), choice)


def arguments(kernel, args, kwargs):
    """Signature, constants and attributes as Triton makes them of arguments, and the options."""
    bound = dict(zip(kernel.arg_names, args, strict=False))
    options = {}
    for name, value in kwargs.items():
        (bound if name in kernel.arg_names else options)[name] = value
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value, divisible = bound[param.name], False
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], divisible = POINTERS[value.dtype], True
        elif isinstance(value, int):
            signature[param.name], divisible = "i32", value % 16 == 0
        else:
            signature[param.name] = "fp32"
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def compile_all(launches, capability, folder):
    """Compiles each kernel once; yields its name, constants, registers, stack and shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    seen = set()
    for kernel, args, kwargs in launches:
        signature, constants, attributes, options = arguments(kernel, args, kwargs)
        key = repr((kernel.__name__, signature, constants, attributes, options))
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        binary = folder / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool, "-res-usage", binary], capture_output=True, text=True, check=True
        ).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        yield kernel.__name__, constants, registers, stack, compiled.metadata.shared


def check(launches, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = set()
    for name, constants, registers, stack, shared in compile_all(launches, capability, tmp_path):
        names.add(name)
        assert stack == 0, f"{name} spills: {constants}"
        assert shared <= SHARED[capability], f"{name} takes {shared} bytes: {constants}"
        # What a program asks for is on its way while others compute: there must be others.
        warps = 8 if constants.get("block_in", 0) > 2048 else 4
        assert registers * 32 * warps * 2 <= 65536, f"{name} takes {registers}: {constants}"
    return names


def test_batch_of_one(launches, tmp_path, monkeypatch):
    run_step_of("medium", torch.float16, 1, 2, "top_k")
    names = check(launches, 90, tmp_path, monkeypatch)
    assert names == {"embed_kernel", "vector_kernel", "attention_kernel", "sample_kernel"}
    assert len(launches) == 11


def test_batch_of_sixteen(launches, tmp_path, monkeypatch):
    run_step_of("large", torch.float16, 16, 2, "greedy")
    names = check(launches, 90, tmp_path, monkeypatch)
    assert names >= {"norm_kernel", "matrix_kernel"}
    assert "vector_kernel" not in names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "capability", "dtype"),
    [
        ("small", 80, torch.float16),
        ("large", 75, torch.float16),
        ("large", 90, torch.bfloat16),
        ("large", 80, torch.float32),
    ],
)
def test_all_batches(launches, tmp_path, monkeypatch, size, capability, dtype):
    from audiocraft.generation import step

    if capability == 75:
        monkeypatch.setattr(step, "has_matrix_units", lambda *_: False)
    for batch, branches in BATCHES:
        choices = ("greedy", "top_k", "top_p") if (size, batch) == ("small", 1) else ("top_k",)
        for choice in choices:
            run_step_of(size, dtype, batch, branches, choice, bias=batch == 2)
    check(launches, capability, tmp_path, monkeypatch)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("size", ["medium", "large"])
def test_steps_take_little_more_memory_than_weights_and_cache(size, batch):
    """Of 30 s, guided. Text encoder and codec, which lie there as well, count on neither side."""
    from audiocraft.generation import step

    shape = Shape.of(size)
    parts = modules(size, torch.float16, shape.layers)
    weights = sum(weight.nbytes for part in parts for weight in part.parameters())
    assert weights > shape.weight_bytes("float16")
    positions = shape.positions(1500, TEXT_TOKENS)
    cache = shape.cache_bytes("float16", batch, positions)
    steps = 1500 + shape.max_delay + 1
    asked = step.Size(batch, branches=2, steps=steps, positions=steps, memory=TEXT_TOKENS)
    buffers = step.allocate(collect(*parts), asked.rounded(), torch.device("meta"))
    taken = weights + sum(buffer.nbytes for buffer in vars(buffers).values())
    assert weights + cache < taken <= 1.2 * (weights + cache)
