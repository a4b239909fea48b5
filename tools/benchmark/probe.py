"""What a device is and how fast its memory is."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from audiocraft.modules.precision import offered_precisions
from tools.benchmark.side import Job

_READ: Final = 2**30  # bytes, far beyond a CPU's caches
_COPIED: Final = 2**32  # bytes, far beyond a GPU's
_TIMES: Final = 10


def probe(job: Job) -> dict[str, Any]:
    """Name, bandwidth and what this package offers there."""
    device = torch.device(job.device)
    bandwidth = copy_bandwidth() if job.device == "cuda" else read_bandwidth()
    return {
        "device": device_name(job.device),
        "bandwidth_gb_per_s": bandwidth,
        "precisions": offered_precisions(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def device_name(device: str) -> str:
    """As its maker calls it; of a CPU with the instructions that torch uses, and of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({instructions}), {torch.get_num_threads()} threads of {os.cpu_count()}"


def read_bandwidth(size: int = _READ, times: int = _TIMES) -> float:
    """GB/s at which all threads together read a large array, by the fastest of three ways.

    Args:
        size: bytes of the array.
        times: that each way is tried.
    """
    array = torch.ones(size // 4)
    ways: list[Callable[[], object]] = [
        array.sum,
        array.view(torch.int64).amax,
        lambda: torch.linalg.vector_norm(array),
    ]
    return size / min(_seconds(way) for way in ways for _ in range(times)) / 1e9


def copy_bandwidth(size: int = _COPIED, times: int = _TIMES) -> float:
    """GB/s of a large copy on the GPU, what is read and what is written both counted.

    Args:
        size: bytes that are copied.
        times: that they are.
    """
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    copy()
    return 2 * size / min(_seconds(copy) for _ in range(times)) / 1e9


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
