"""One side of a benchmark, in a process of its own: `python -m tools.benchmark.side JOB`.

A peer's process finds the peer's `audiocraft` before this project's, so that nothing here may
import that of this project, but for the modules named `ours`. The last line of the output is one
JSON object, with `error` where the side cannot be measured.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from tools.benchmark.shapes import CODEC, FRAME_RATE, SAMPLES_PER_FRAME, read_config

System = Literal["ours", "audiocraft", "transformers"]
OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

Generate = Callable[[float, OnStep], Tensor]
"""Makes that many seconds of audio [B, C, T] and tells of each step."""

MODULES: Final = {
    "ours": "tools.benchmark.ours",
    "audiocraft": "tools.benchmark.peer_audiocraft",
    "transformers": "tools.benchmark.peer_transformers",
}
TASKS: Final = {"probe": "tools.benchmark.probe"}
LOADERS: Final = {"generate": "load", "decode": "load_diffusion"}
"""Functions of the side's module whose result is measured."""


@dataclass(frozen=True)
class Job:
    """What a process does.

    Attributes:
        task: `generate`, or `decode` by MultiBand Diffusion; or a function of the side's module:
            `make_file` as a program does that starts, `request` for a file, `profile`, `save`; or
            `probe` of the device.
        device: `cpu` or `cuda`.
        system: whose model.
        version: whose shape it has.
        precision: of its weights.
        batch: items.
        channels: of the codes that are decoded.
        seconds: of each.
        warm_up: seconds of a request before the one that is measured.
        release: folder of an official release.
        diffusion: file of MultiBand Diffusion.
        hub: cache of the hub in which a peer finds what it asks for by name.
        shapes: configurations of the versions.
        output: file that is made.
        checkpoint: folder of a transformers model.
    """

    task: str
    device: str
    system: System = "ours"
    version: str = "small"
    precision: str = "float32"
    batch: int = 1
    channels: int = 1
    seconds: float = 30.0
    warm_up: float = 1.0
    release: str = ""
    diffusion: str = ""
    hub: str = ""
    shapes: str = ""
    output: str = ""
    checkpoint: str = ""

    def to_json(self) -> str:
        """As the process takes it."""
        return json.dumps(asdict(self))


def random_codes(job: Job, seconds: float) -> Tensor:
    """Codes [B, K, frames] of the versions' codec, of stereo [L, R, L, R, ...]; always the same."""
    rvq = read_config(CODEC, Path(job.shapes))["rvq"]
    shape = job.batch, job.channels * rvq["n_q"], int(seconds * FRAME_RATE)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(rvq["bins"], shape, generator=generator).to(job.device)


class StepClock:
    """When steps were done, and the device's memory between them.

    Nothing waits for the device at the first call: a peer's host is no further than a step ahead,
    and ours calls when a step is known to be done. At the last one the device may still be busy.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._begin = time.perf_counter()
        self._first: tuple[int, float] | None = None
        self._last = (0, self._begin)
        self.peak_before = 0
        """Bytes, up to the first step."""
        self.peak_loop = 0
        """Bytes, of the steps after it."""

    def __call__(self, step: int, total: int) -> None:
        """A step is done."""
        if step == total:
            synchronize(self._device)
            self.peak_loop = peak_bytes(self._device)
        self._last = (step, time.perf_counter())
        if self._first is None:
            self._first = self._last
            self.peak_before = peak_bytes(self._device)
            reset_peak(self._device)

    @property
    def steps(self) -> int:
        """How many."""
        return self._last[0]

    @property
    def steps_per_s(self) -> float:
        """Of the steps after the first that was told of."""
        assert self._first is not None, "there are several steps"
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])

    @property
    def first_step_s(self) -> float:
        """From the request to the first step, text encoder and prefill included.

        Where steps are told of several at a time, those after the first are taken off.
        """
        assert self._first is not None, "there are several steps"
        return self._first[1] - self._begin - (self._first[0] - 1) / self.steps_per_s


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Count the peak of memory from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    # Freed memory that the allocator keeps is no need of what comes next.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory, see proc(5)


def peak_bytes(device: str) -> int:
    """Peak of the device's memory since it was reset, on a CPU of the whole process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(generate: Generate, job: Job) -> dict[str, Any]:
    """Measure one request behind another that warms up.

    Args:
        generate: what is measured.
        job: its settings.

    Returns:
        `steps_per_s`, `first_step_s`, `elapsed_s` from the request to the audio, `peak_gb` of it,
        and `loop_peak_gb` after the first step; `warm_up_s` of the first request, and `weights_gb`
        before it, where the device tells.
    """
    weights = torch.cuda.memory_allocated() / 1e9 if job.device == "cuda" else None
    begin = time.perf_counter()
    generate(job.warm_up, lambda *_: None)
    synchronize(job.device)
    warm_up = time.perf_counter() - begin
    reset_peak(job.device)
    clock = StepClock(job.device)
    begin = time.perf_counter()
    audio = generate(job.seconds, clock)
    synchronize(job.device)
    elapsed = time.perf_counter() - begin
    samples = int(job.seconds * FRAME_RATE) * SAMPLES_PER_FRAME
    if (len(audio), audio.shape[-1]) != (job.batch, samples) or not bool(audio.isfinite().all()):
        raise RuntimeError(f"the audio is {list(audio.shape)}, not {samples} finite samples")
    return {
        "steps_per_s": clock.steps_per_s,
        "first_step_s": clock.first_step_s,
        "elapsed_s": elapsed,
        "peak_gb": max(clock.peak_before, clock.peak_loop, peak_bytes(job.device)) / 1e9,
        "loop_peak_gb": clock.peak_loop / 1e9,
        "warm_up_s": warm_up,
        "weights_gb": weights,
    }


def run(job: Job) -> dict[str, Any]:
    """Do what a job says."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    module = import_module(TASKS.get(job.task, MODULES[job.system]))
    if job.task in LOADERS:
        return measure(getattr(module, LOADERS[job.task])(job), job)
    result: dict[str, Any] = getattr(module, job.task)(job) or {}
    return result


def main(arguments: Iterable[str]) -> None:
    """Prints the JSON object."""
    (text,) = arguments
    try:
        result = run(Job(**json.loads(text)))
    except Exception as error:  # noqa: BLE001 - a row says it, and the other sides are measured
        reason = str(error).strip().splitlines() or ["no reason given"]
        result = {"error": f"{type(error).__name__}: {reason[0]}"}
    sys.stdout.flush()
    os.write(1, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
