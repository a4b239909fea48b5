"""Which device computes, and what is said of one that torch cannot use."""

import os

import pytest
import torch

from audiocraft.modules.device import default_device, device_warning, has_kernels

ARCHES = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120"]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """The driver's tool, which lists what it is told to."""

    def listing(text):
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\nprintf '{text}'\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return listing


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch sees, of a compute capability, and the architectures torch is built for."""

    def seen(capability, arches=ARCHES):
        for name, value in {
            "is_available": True,
            "get_device_capability": capability,
            "get_arch_list": arches,
            "get_device_name": "Tesla V100",
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    return seen


def test_a_device_that_the_driver_has_and_torch_cannot_use(nvidia_smi, monkeypatch):
    nvidia_smi(r"GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_warning().startswith("Warning: GPU 0: NVIDIA H200 is there, but torch")
    assert default_device() == torch.device("cpu")


@pytest.mark.parametrize(("visible", "warns"), [("", False), ("-1", False), ("0", True)])
def test_a_device_that_the_user_hides_is_not_missed(visible, warns, nvidia_smi, monkeypatch):
    nvidia_smi(r"GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (device_warning() is not None) == warns


def test_no_device_no_warning(nvidia_smi, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nvidia_smi(r"No devices were found\n")
    assert device_warning() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert device_warning() is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 0)])
def test_a_device_that_torch_has_code_for(gpu, capability):
    gpu(capability)
    assert has_kernels()
    assert default_device() == torch.device("cuda")
    assert device_warning() is None


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (11, 0), (13, 0)])
def test_a_device_that_torch_sees_and_has_no_code_for(gpu, capability):
    gpu(capability)
    assert default_device() == torch.device("cpu")
    major, minor = capability
    assert device_warning().startswith(
        f"Warning: Tesla V100 has compute capability {major}.{minor}, for which torch 2."
    )


def test_what_a_later_driver_compiles(gpu):
    gpu((11, 0), ["sm_80", "compute_90"])
    assert has_kernels()
    gpu((8, 9), ["compute_90"])
    assert not has_kernels()
