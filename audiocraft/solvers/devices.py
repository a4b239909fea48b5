"""What this machine has: its GPUs, its free memory, its speed.

GPUs are asked in a child process, through torch: it sees the devices that the training's processes
will see (`CUDA_VISIBLE_DEVICES`, MIG, the order of numbers), and takes the CUDA context with it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from audiocraft.errors import TrainingError

_TIMEOUT_S: Final = 120.0
_MEASURE_S: Final = 0.5
_SIDES: Final = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product is timed
_BFLOAT16_FROM: Final = (8, 0)  # compute capability


@dataclass(frozen=True)
class Device:
    """A GPU that a process may use.

    Attributes:
        name: as its driver gives it.
        memory: bytes that are free.
        bfloat16: whether it computes in that type.
    """

    name: str
    memory: int
    bfloat16: bool


def find_devices() -> list[Device]:
    """The visible GPUs, in the order of their numbers; none where torch can use none.

    This process does not touch them.

    Raises:
        TrainingError: torch could not say, with its reason.
    """
    return [Device(**device) for device in _ask("find")]


def threads_of(processes: int) -> int:
    """Threads for each of so many processes, of the CPUs that this one's cpuset leaves it."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def matmul_speed(kind: str, threads: int) -> float:
    """FLOP/s of a large matrix product, measured now.

    Args:
        kind: `cuda`, in bfloat16 where the device has it, or `cpu`.
        threads: of the CPU.

    Raises:
        TrainingError: it could not be measured, with the reason.
    """
    return float(_ask("speed", kind, str(threads)))


def _ask(*question: str) -> Any:
    """What this module says when it is run in a process of its own."""
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", __name__, *question],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise TrainingError(
            f"The devices of this machine did not answer within {_TIMEOUT_S:.0f} s: look with "
            "nvidia-smi, or set CUDA_VISIBLE_DEVICES to those that work."
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise TrainingError(
            f"The devices of this machine cannot be used ({reason}): look with nvidia-smi, or set "
            "CUDA_VISIBLE_DEVICES to those that work."
        )
    return json.loads(done.stdout.splitlines()[-1])


def _find() -> list[dict[str, Any]]:
    """The devices as seen from inside; each then has a context of this process."""
    import torch

    from audiocraft.modules.device import default_device

    if default_device().type != "cuda":
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        bfloat16 = (properties.major, properties.minor) >= _BFLOAT16_FROM
        devices.append(asdict(Device(properties.name, free, bfloat16)))
    return devices


def _speed(kind: str, threads: int) -> float:
    """FLOP/s as measured from inside."""
    import torch

    torch.set_num_threads(threads)
    bfloat16 = kind == "cuda" and torch.cuda.get_device_capability() >= _BFLOAT16_FROM
    side = _SIDES[kind]
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    a, b = torch.randn(2, side, side, device=kind).to(dtype)

    def seconds(products: int) -> float:
        begin = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    once = min(seconds(1) for _ in range(3))  # the first one loads libraries
    products = max(3, round(_MEASURE_S / once))
    return products * 2 * side**3 / seconds(products)


def host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process and its children may still take.

    Args:
        proc: where the kernel tells about memory and processes.
        groups: where control groups, of version 2 or 1, tell about their limits.

    Returns:
        The least of what is available in the machine and what each limit leaves. The cache of
        files counts as free, as it is given back. Without such a kernel all of the memory.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known = dict(line.split(":") for line in lines)
    left = [int(known["MemAvailable"].split()[0]) * 1024]
    for folder in _groups_of(proc, groups):
        for names in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                left.append(max(0, limit - used + _file_cache(folder)))
    return min(left)


def _groups_of(proc: Path, groups: Path) -> Iterator[Path]:
    """Folders of the control groups of this process, and of those above them."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups
        own = Path(path.lstrip("/"))
        # In a container the path may be that of the machine, which is not to be seen from inside.
        yield from (root / part for part in (own, *own.parents))


def _number(path: Path) -> int | None:
    """What a file says; None where it is not there or says that there is no limit."""
    try:
        text = path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if text == "max" else int(text)


def _file_cache(folder: Path) -> int:
    """Bytes of a group that hold files which nobody uses at present."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except FileNotFoundError:
        return 0
    known = dict(line.split() for line in lines)
    return int(known.get("total_inactive_file", known.get("inactive_file", 0)))


if __name__ == "__main__":
    asked, *rest = sys.argv[1:]
    answer = _find() if asked == "find" else _speed(rest[0], int(rest[1]))
    sys.stdout.write(json.dumps(answer) + "\n")
