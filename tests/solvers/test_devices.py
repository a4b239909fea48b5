"""What this machine has: GPUs, free memory, speed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audiocraft.errors import TrainingError
from audiocraft.solvers.devices import Device, find_devices, host_memory, matmul_speed

MIB = 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_no_devices():
    assert find_devices() == []


@pytest.mark.gpu
def test_devices():
    """As torch sees them, without a context in the process that asks."""
    code = (
        "import torch; from audiocraft.solvers.devices import find_devices; "
        "found = find_devices(); assert not torch.cuda.is_initialized(); "
        "print(len(found), found[0].memory)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, memory = map(int, said.stdout.split())
    assert number == torch.cuda.device_count()
    assert 0 < memory <= torch.cuda.get_device_properties(0).total_memory
    assert find_devices()[0] == Device(
        torch.cuda.get_device_name(0),
        pytest.approx(memory, rel=0.1),
        torch.cuda.get_device_capability(0) >= (8, 0),
    )


@pytest.mark.gpu
def test_hidden_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_devices() == []


def test_devices_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The child's own last words reach the user."""
    broken = tmp_path / "torch.py"
    broken.write_text("raise RuntimeError('the driver is asleep')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TrainingError, match=r"\(RuntimeError: the driver is asleep\)"):
        find_devices()


@pytest.mark.slow
def test_speed_is_that_of_a_product_timed_here():
    a = torch.randn(512, 512)
    torch.mm(a, a)
    ratios = []
    while len(ratios) < 5 and not any(1 / 10 < ratio < 10 for ratio in ratios):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(10):
                torch.mm(a, a)
        (product,) = [event for event in profile.key_averages() if event.key == "aten::mm"]
        here = 10 * 2 * 512**3 / (product.self_cpu_time_total * 1e-6)
        ratios.append(matmul_speed("cpu", 1) / here)
    assert 1 / 10 < ratios[-1] < 10, ratios  # other work may take a part of the time of either


def machine(
    folder: Path, available_mib: int, groups: str, files: dict[str, str | int]
) -> tuple[Path, Path]:
    """A kernel's files: memory of the machine, this process's groups, and the groups' own."""
    proc, root = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: 64000000 kB\nMemAvailable:  {available_mib * 1024} kB\n"
    )
    (proc / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return proc, root


V2 = "0::/job/rank\n"
V1 = "5:cpu,cpuacct:/other\n4:memory:/job\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "mib"),
    [
        pytest.param(V2, {}, 1000, id="no limits"),
        pytest.param(
            V2,
            {"job/rank/memory.max": "max", "job/rank/memory.current": 5 * MIB},
            1000,
            id="v2, unlimited",
        ),
        pytest.param(
            V2,
            {"job/rank/memory.max": 300 * MIB, "job/rank/memory.current": 100 * MIB},
            200,
            id="v2, own limit",
        ),
        pytest.param(
            V2,
            {
                "job/rank/memory.max": 300 * MIB,
                "job/rank/memory.current": 100 * MIB,
                "job/rank/memory.stat": f"anon 5\ninactive_file {60 * MIB}",
            },
            260,
            id="v2, files that are cached count as free",
        ),
        pytest.param(
            V2,
            {
                "job/rank/memory.max": 300 * MIB,
                "job/rank/memory.current": 100 * MIB,
                "job/memory.max": 250 * MIB,
                "job/memory.current": 110 * MIB,
            },
            140,
            id="v2, limit of the group above",
        ),
        pytest.param(
            "0::/host/path\n",
            {"memory.max": 300 * MIB, "memory.current": 100 * MIB},
            200,
            id="v2, in a container that sees its own group at the top",
        ),
        pytest.param(
            V1,
            {
                "memory/job/memory.limit_in_bytes": 300 * MIB,
                "memory/job/memory.usage_in_bytes": 120 * MIB,
                "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}",
                "memory/memory.limit_in_bytes": 2**63 - 4096,
                "memory/memory.usage_in_bytes": 130 * MIB,
            },
            200,
            id="v1",
        ),
        pytest.param(
            V2,
            {"job/rank/memory.max": 3000 * MIB, "job/rank/memory.current": 100 * MIB},
            1000,
            id="the machine has less than the limit",
        ),
    ],
)
def test_host_memory(tmp_path, groups, files, mib):
    assert host_memory(*machine(tmp_path, 1000, groups, files)) == mib * MIB


def test_host_memory_of_this_machine():
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert 0 < host_memory() <= total


def test_host_memory_without_a_linux_kernel(tmp_path):
    everything = host_memory(tmp_path / "none", tmp_path / "none")
    assert everything >= host_memory() > 0
