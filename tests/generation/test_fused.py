"""The kernels under Triton's interpreter, and what becomes of a request that cannot have them."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from audiocraft.generation import fused
from tests.models.test_lm import descriptions, lm
from tests.project import ROOT

# Imported before the tests below ask for the interpreter, which would last as long as the process.
pytest.importorskip("triton", reason="there is no Triton on this system")
INTERPRETED = Path(__file__).with_name("interpreted.py")


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
