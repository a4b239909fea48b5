"""The kernels under Triton's interpreter, and what becomes of a request that cannot have them."""

import logging
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from audiocraft.generation import fused
from audiocraft.generation.sampling import SamplingParams
from audiocraft.serving.models import ModelCache, Selection
from tests.models.test_lm import descriptions, lm
from tests.project import ROOT

# Imported before the tests below ask for the interpreter, which would last as long as the process.
pytest.importorskip("triton", reason="there is no Triton on this system")
INTERPRETED = Path(__file__).with_name("interpreted.py")
CUDA = torch.device("cuda")


def run_interpreted(marks):
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", marks]
    done = subprocess.run(
        [*command, INTERPRETED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_compute_what_the_modules_do():
    run_interpreted("not slow")


@pytest.mark.slow
def test_kernels_compute_what_the_modules_do_in_all_cases():
    run_interpreted("slow")


@pytest.fixture
def process(monkeypatch):
    """As on a device that has kernels, with nothing remembered."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    process = fused._Process()
    monkeypatch.setattr(fused, "_process", lambda: process)
    return process


def generate(model):
    items = descriptions("lm_tiny_text_mono")[:1]
    return model.generate(conditions=items, max_gen_len=5, use_sampling=False)


def test_a_cpu_is_no_reason_to_warn(caplog):
    generate(lm("lm_tiny_text_mono"))
    assert not caplog.records


def fails(monkeypatch):
    def prepare(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(fused, "_prepare", prepare)


def is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fails, "one. Building the kernels takes gcc and the headers of Python: install both."),
        (is_missing, "Triton is not installed."),
    ],
)
def test_requests_do_without_kernels_that_fail(process, monkeypatch, caplog, change, reason):
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        expected = generate(lm("lm_tiny_text_mono"))
    change(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(generate(lm("lm_tiny_text_mono")), expected)
    (record,) = caplog.records
    assert record.getMessage().endswith(reason)
    assert process.kept is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_requests_for_which_there_is_no_memory_fail(process, monkeypatch, error):
    """They would without kernels too; the next one tries again."""

    def prepare(*_):
        raise error

    monkeypatch.setattr(fused, "_prepare", prepare)
    with pytest.raises(torch.OutOfMemoryError):
        generate(lm("lm_tiny_text_mono"))
    assert process.failure is None


def parametrized(model):
    layer = model.transformer.layers[0].linear1
    register_parametrization(layer, "weight", nn.Identity())


def mixed(model):
    model.out_norm.half()


def transposed(model):
    layer = model.transformer.layers[0].linear2
    layer.weight = nn.Parameter(layer.weight.t().contiguous().t())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (parametrized, "being trained"),
        (mixed, "torch.float16, torch.float32"),
        (transposed, "do not lie in memory"),
    ],
)
def test_models_that_kernels_do_not_take(change, reason):
    model = lm("lm_tiny_text_mono")
    assert fused._unsupported(model, model.device) is None
    change(model)
    assert reason in fused._unsupported(model, model.device)


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 0), torch.float16, "The GPU has compute capability 7.0, 7.5 is needed."),
        ((7, 5), torch.bfloat16, "The GPU has compute capability 7.5, 8.0 is needed."),
        ((7, 5), torch.float16, None),
    ],
)
def test_old_gpus(monkeypatch, capability, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    model = lm("lm_tiny_text_mono").to(dtype)
    assert fused._unsupported(model, torch.device("cuda")) == reason


def test_graphs_are_recorded_outside_of_inference_mode(monkeypatch):
    """Torch keeps tensors from the first recording, which later ones write outside of it."""
    model = nn.Module()
    model.out_norm = nn.Module()
    model.out_norm.weight = SimpleNamespace(device=CUDA)
    model.emb = model.transformer = model.linears = None
    keys = torch.zeros(1, 1, 1, 64, 1)
    buffers = SimpleNamespace(x=torch.zeros(1, 1), keys=keys, values=keys)
    states, modes = [SimpleNamespace(memory=None, positions=6, cache=None)], []

    def modes_of(result):
        def called(*_):
            modes.append(torch.is_inference_mode_enabled())
            return result

        return called

    weights = SimpleNamespace(tensors=list)
    monkeypatch.setattr(fused, "collect", lambda *_: weights)
    monkeypatch.setattr("audiocraft.generation.step.allocate", modes_of(buffers))
    monkeypatch.setattr(fused, "_make_ready", modes_of(None))
    with torch.inference_mode():
        fused._prepare(fused._Process(), model, states, 1, 6, SamplingParams(), 1)
    assert modes == [False, False]


@pytest.fixture
def models(monkeypatch):
    """Loads models, as a server does, with nothing remembered."""
    process = fused._Process()
    monkeypatch.setattr(fused, "_process", lambda: process)
    return ModelCache(torch.device("cpu"))


def keep(model, cache=1):
    """As a request leaves buffers and graphs."""
    owner = weakref.ref(model.lm.out_norm, fused._process().forget)
    half = torch.empty(cache // 2, dtype=torch.uint8)
    buffers = SimpleNamespace(keys=half, values=half)
    fused._process().kept = fused._Kept(owner, (), size=None, buffers=buffers)


def test_what_is_kept_for_the_next_request_makes_room(models, monkeypatch):
    """Before any model does."""
    model, free = models.get(Selection("tiny")), [2**40]
    monkeypatch.setattr(ModelCache, "_free", lambda _: free[0])
    keep(model)
    models.make_room(model, 1, melody=False)
    assert fused._process().kept is not None
    free[0] = 0
    models.make_room(model, 1, melody=False)
    assert fused._process().kept is None
    assert models.get(Selection("tiny")) is model
    keep(model)
    models.evict_others(model)
    assert fused._process().kept is None
    assert models.get(Selection("tiny")) is model


def test_the_diffusion_gets_what_is_kept_left_over(models, monkeypatch):
    """Two rows of keys and values of one second, and of the conditions in front of it."""
    model, free = models.get(Selection("tiny")), []
    monkeypatch.setattr(ModelCache, "_free", lambda _: 2**40)
    diffusion = SimpleNamespace(
        memory=lambda _: 0, check_memory=lambda _, least: free.append(2**40 - least)
    )
    for device in (torch.device("cpu"), CUDA):
        models.device = device
        models.make_room(model, 1, melody=False, diffusion=diffusion)
    config = model.lm.config
    cache = 2 * config.num_layers * 2 * (50 + 512) * config.dim * 4
    assert free == [0, cache]
    keep(model, cache // 4)
    models.make_room(model, 1, melody=False, diffusion=diffusion)
    assert free[-1] == cache - cache // 4


def test_a_cache_that_is_kept_needs_no_room_again(models, monkeypatch):
    """Else it would go, and its graphs with it, at each request where memory is tight."""
    model, needs = models.get(Selection("tiny")), []
    monkeypatch.setattr(ModelCache, "_evict_until", lambda _, size, **__: needs.append(size))
    models.make_room(model, 1, melody=False)
    keep(model, 1000)
    models.make_room(model, 1, melody=False)
    keep(model, 2**24)
    models.make_room(model, 1, melody=False)
    assert needs[0] - needs[1] == 1000
    config = model.lm.config
    assert needs[0] - needs[2] == 2 * config.num_layers * 2 * (50 + 512) * config.dim * 4
