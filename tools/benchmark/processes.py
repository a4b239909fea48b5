"""Runs the sides of a benchmark, each in a process of its own with packages of its own.

Peers come from the package registry into a folder, by `pip install --no-deps --target`. A peer's
process has that folder in front of this project's, so that `audiocraft` is the peer's there; in
ours it stands behind, where it gives only what is missing. torch and transformers are the same for
all sides: those of the Python that runs this.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from audiocraft.errors import InputError
from tools.benchmark.shapes import ROOT
from tools.benchmark.side import Job

PEER_PACKAGES: Final = ("audiocraft==1.3.0",)
"""What the peers need beyond this project's packages; `peer_audiocraft.ABSENT` is left out."""

BROUGHT: Final = (
    *PEER_PACKAGES,
    "omegaconf==2.4.0",
    "julius==0.2.8",
    *("librosa==0.11.0", "decorator", "pooch", "platformdirs"),  # for a melody
    *("dadaptation==2.0", "prodigyopt==1.1.2"),  # optimizers of a training
)
"""What a GPU machine without a network may lack for the benchmarks and the tests marked `gpu`.

Such a machine has torch, transformers, scikit-learn and what those need. What librosa reads and
resamples files with is not there: its filters do without.
"""

ENVIRONMENT: Final = ROOT / "benchmarks/environments/peers"
"""Where they lie; git ignores it."""


@dataclass(frozen=True)
class Packages:
    """Folders of packages.

    Attributes:
        own: for all sides, or None.
        peers: for the peers' sides.
    """

    own: Path | None
    peers: Path

    def environment(self, system: str) -> dict[str, str]:
        """Of a side's process: how long threads spin is set for ours alone, as `serving` does."""
        given = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        others = [part for part in given if Path(part).resolve() != ROOT]
        if system == "ours":
            path = [str(ROOT), *others, *([str(self.own)] if self.own else [])]
        else:
            path = [str(self.peers), str(ROOT), *others]
        ours = set() if system == "ours" else {"GOMP_SPINCOUNT"}
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        return {**kept, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}

    def versions(self, systems: Sequence[str]) -> dict[str, str]:
        """Of the peers' packages, where they are."""
        path = [str(self.peers), *sys.path]
        found: dict[str, str] = {}
        for name in systems:
            for distribution in importlib.metadata.distributions(name=name, path=path):
                found.setdefault(name, distribution.version)
        return found


def find_packages(given: Path | None, systems: Sequence[str]) -> Packages:
    """Folders of packages; the peers' are installed if they are not there.

    A peer that cannot be installed is no error here: its rows say that it cannot be imported.

    Args:
        given: folder that was filled beforehand; then nothing is installed.
        systems: that will be measured.
    """
    if given is None and "audiocraft" in systems and not ENVIRONMENT.is_dir():
        install_peers()
    return Packages(given, given or ENVIRONMENT)


def install_peers() -> None:
    """Fills `ENVIRONMENT`, whole or not at all."""
    ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ENVIRONMENT.parent) as scratch:
        target = f"{scratch}/packages"
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", target]
        command = [sys.executable, "-I", "-m", "pip", "install", *options, *PEER_PACKAGES]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0:  # noqa: S603
            Path(target).rename(ENVIRONMENT)


def run_side(
    job: Job,
    packages: Packages,
    timeout: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a side's process says; `error` where it fails.

    Args:
        job: what it does.
        packages: that it finds.
        timeout: seconds after which it is ended.
        variables: of its environment.
    """
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-P", "-m", "tools.benchmark.side", job.to_json()],
            env={**packages.environment(job.system), **(variables or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took longer than {timeout:.0f} s"}
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"its process ended with status {done.returncode}: {last}"}
    return result


def probe_device(device: str, packages: Packages, deadline: float | None = None) -> dict[str, Any]:
    """What a device is and how fast its memory; see `tools.benchmark.probe`.

    Args:
        device: `cpu` or `cuda`.
        packages: of the process.
        deadline: see `take_turns`.

    Raises:
        InputError: it cannot be used.
    """
    found = run_side(Job("probe", device), packages, left(deadline))
    if "error" in found:
        raise InputError(f"{device} cannot be measured ({found['error']}).")
    return found


def take_turns(
    jobs: Sequence[Job],
    rounds: int,
    packages: Packages,
    tell: Callable[[Job, int, dict[str, Any]], None],
    deadline: float | None = None,
) -> list[list[dict[str, Any]]]:
    """What each job's process says in each round; a job that has failed is not run again.

    Args:
        jobs: of all sides. They go there and back again, so that a device that slows down slows
            all alike.
        rounds: how often.
        packages: of the sides.
        tell: hears of a job, its round from 1 on, and what it said.
        deadline: on the monotonic clock, when everything is ended.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for number in range(rounds):
        turns = list(zip(jobs, found, strict=True))
        for job, results in turns if number % 2 == 0 else turns[::-1]:
            if results and "error" in results[-1]:
                continue
            results.append(run_side(job, packages, left(deadline)))
            tell(job, number + 1, results[-1])
    return found


def left(deadline: float | None) -> float | None:
    """Seconds until a deadline on the monotonic clock, at least one; none without a deadline."""
    return None if deadline is None else max(1.0, deadline - time.monotonic())
