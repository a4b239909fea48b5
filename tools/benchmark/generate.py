"""Speed of generation: `scripts/benchmark generate`."""

import argparse
import json
import shlex
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from audiocraft.assets.store import RELEASES
from audiocraft.errors import InputError
from audiocraft.serving.command import Parser, say
from tools.benchmark.processes import (
    BROUGHT,
    Packages,
    find_packages,
    probe_device,
    take_turns,
)
from tools.benchmark.records import rounded, save, show, today
from tools.benchmark.shapes import FRAME_RATE, PUBLISHED, TEXT_TOKENS, Shape
from tools.benchmark.side import Job, System
from tools.benchmark.weights import link_into_hub_cache, write_release, write_text_encoder

PEERS: Final[tuple[System, ...]] = ("audiocraft", "transformers")
COLUMNS: Final = (
    *("system", "precision", "batch", "steps_per_s", "real_time_factor", "first_step_s"),
    *("gb_per_s", "bandwidth_share", "peak_gb"),
)
"""Of the table for the eye."""
_WARM_UP_S: Final = 1.0
_HELP: Final = """\
Each side runs in a process of its own, one after the other, in several rounds; a number is the
median of the rounds. Weights are random and have the published shape, so nothing is downloaded.
All sides have the same description of {tokens} tokens, the same text encoder of t5-base's shape,
guidance 3, top_k 250. Peers run as published: audiocraft in float32 on a CPU and in float16 on a
GPU, with torch's attention, transformers likewise.

steps_per_s       steps of 20 ms of music a second, each for the whole batch, the first left out
real_time_factor  seconds of music of the whole batch, over the time from request to audio
first_step_s      from the request to the first step: text encoder and prefill
gb_per_s          bytes of weights, keys and values that the steps must read, over their time
bandwidth_share   that, over the speed of the device's memory in the same run: of reading a large
                  array by all threads on a CPU, of a large copy, read and written, on a GPU
peak_gb           of the device's memory in the request; on a CPU of the process

The last line is one JSON object.
"""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        version: whose shape.
        against: peers.
        seconds: of each item.
        batch: items.
        device: `cpu` or `cuda`.
        rounds: how often.
        precisions: of ours; none is all that the device offers.
    """

    version: str
    against: tuple[System, ...] = PEERS
    seconds: float = 30.0
    batch: int = 1
    device: str = "cpu"
    rounds: int = 2
    precisions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its record."""
        return f"generate-{self.version}-batch{self.batch}-{self.device}"

    @property
    def arguments(self) -> list[str]:
        """Of the command that does the same."""
        chosen = ["--precision", ",".join(self.precisions)] if self.precisions else []
        return [
            "generate",
            *("--version", self.version),
            *("--against", ",".join(self.against) or "none"),
            *("--seconds", f"{self.seconds:g}"),
            *("--batch", str(self.batch)),
            *("--device", self.device),
            *("--rounds", str(self.rounds)),
            *chosen,
        ]


@dataclass(frozen=True)
class Scratch:
    """Random weights on disk.

    Attributes:
        folder: that goes with the benchmark.
        shapes: configurations of the versions.
        text_layers: of the text encoder.
    """

    folder: Path
    shapes: Path = PUBLISHED
    text_layers: int = 12

    @property
    def hub(self) -> Path:
        """Cache of the hub, with the text encoder."""
        hub = self.folder / "hub"
        if not hub.is_dir():
            link_into_hub_cache(hub, "t5-base", self.text_encoder)
        return hub

    @property
    def text_encoder(self) -> Path:
        """Folder of the text encoder."""
        folder = self.folder / "t5"
        if not folder.is_dir():
            write_text_encoder(folder, self.text_layers)
        return folder

    def release(self, version: str) -> Path:
        """Folder of a release."""
        folder = self.folder / "releases" / version
        if not folder.is_dir():
            write_release(folder, version, self.text_encoder, self.shapes)
        return folder


@contextmanager
def scratch() -> Iterator[Scratch]:
    """A folder that goes with the benchmark."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        yield Scratch(Path(folder))


def measure(
    plan: Plan,
    packages: Packages,
    place: Scratch,
    deadline: float | None = None,
    probe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures all sides in turn.

    Args:
        plan: what is measured.
        packages: of the sides.
        place: of the weights.
        deadline: on the monotonic clock, when everything is ended.
        probe: of the device, see `probe_device`; probed before and after if not given.

    Returns:
        A record: `device`, `rows`, and what they come from.

    Raises:
        InputError: the device cannot be used.
    """
    known = probe or probe_device(plan.device, packages, deadline)
    precisions = plan.precisions or tuple(known["precisions"])
    theirs = "float32" if plan.device == "cpu" else "float16"
    sides: list[tuple[System, str]] = [("ours", precision) for precision in precisions]
    sides += [(peer, theirs) for peer in plan.against]
    jobs = [_job(plan, side, place) for side in sides]

    def tell(job: Job, number: int, result: dict[str, Any]) -> None:
        said = result.get("error") or f"{result['steps_per_s']:.1f} steps/s"
        say(f"{job.version} x {job.batch}, {job.system} {job.precision}, round {number}: {said}")

    found = take_turns(jobs, plan.rounds, packages, tell, deadline)
    probes = [known]
    if probe is None:
        # Before and after, since a machine's memory is not always as fast.
        try:
            probes.append(probe_device(plan.device, packages, deadline))
        except InputError as error:  # what has been measured is kept
            say(f"The memory's speed is that before the first side: {error}")
    bandwidth = statistics.median(one["bandwidth_gb_per_s"] for one in probes)
    shape = Shape.of(plan.version, place.shapes)
    end = shape.positions(int(plan.seconds * FRAME_RATE), TEXT_TOKENS)
    return {
        "command": shlex.join(["scripts/benchmark", *plan.arguments]),
        "device": known["device"],
        "date": today(),
        "versions": {**known["versions"], **packages.versions(PEERS)},
        "bandwidth_gb_per_s": rounded(bandwidth),
        "rows": [
            _row(plan, side, results, bandwidth, shape)
            for side, results in zip(sides, found, strict=True)
        ],
        "rounds": [
            {
                "system": side[0],
                "precision": side[1],
                "cache_gb": shape.cache_bytes(side[1], plan.batch, end) / 1e9,
                **result,
            }
            for side, results in zip(sides, found, strict=True)
            for result in results
        ],
    }


def _job(plan: Plan, side: tuple[System, str], place: Scratch) -> Job:
    # A graph belongs to a length, so ours is captured for the one that is measured.
    long = plan.device == "cuda" and side[0] == "ours"
    return Job(
        "generate",
        plan.device,
        system=side[0],
        version=plan.version,
        precision=side[1],
        batch=plan.batch,
        seconds=plan.seconds,
        warm_up=plan.seconds if long else min(plan.seconds, _WARM_UP_S),
        release=str(place.release(plan.version)),
        hub=str(place.hub),
        shapes=str(place.shapes),
    )


def _row(
    plan: Plan,
    side: tuple[System, str],
    results: Sequence[dict[str, Any]],
    bandwidth: float,
    shape: Shape,
) -> dict[str, Any]:
    """A row of the result, from the rounds of a side."""
    row: dict[str, Any] = {
        "system": side[0],
        "version": plan.version,
        "precision": side[1],
        "batch": plan.batch,
        "seconds": plan.seconds,
    }
    if "error" in results[-1]:
        return row | {"error": results[-1]["error"]}

    def median(name: str) -> float:
        return float(statistics.median(result[name] for result in results))

    frames = int(plan.seconds * FRAME_RATE)
    read = shape.step_bytes(side[1], plan.batch, frames, TEXT_TOKENS)
    speed = median("steps_per_s") * read / 1e9
    numbers = {
        "steps_per_s": median("steps_per_s"),
        "real_time_factor": plan.batch * plan.seconds / median("elapsed_s"),
        "first_step_s": median("first_step_s"),
        "gb_per_s": speed,
        "bandwidth_share": speed / bandwidth,
        "peak_gb": median("peak_gb"),
    }
    return row | {name: rounded(number) for name, number in numbers.items()}


def parse(arguments: Sequence[str]) -> tuple[Plan, argparse.Namespace]:
    """The plan of a command line.

    Raises:
        InputError: it is wrong.
    """
    parser = Parser(
        prog="scripts/benchmark generate",
        description="How fast music is made, by this package and by its peers.",
        epilog=_HELP.format(tokens=TEXT_TOKENS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", required=True, choices=RELEASES)
    parser.add_argument(
        "--against",
        default=",".join(PEERS),
        metavar="PEERS",
        help=f"{' and '.join(PEERS)} by default; none for ours alone",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of music (default: 30)")
    parser.add_argument("--batch", type=int, default=1, help="pieces at once (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    parser.add_argument("--rounds", type=int, default=2, help="of all sides in turn (default: 2)")
    parser.add_argument(
        "--precision", metavar="NAMES", help="of ours; all that the device offers by default"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/")
    add_packages(parser)
    given = parser.parse_args(arguments)
    against = tuple(peer for peer in PEERS if peer in given.against.split(","))
    unknown = set(given.against.split(",")) - {*PEERS, "none", ""}
    if unknown:
        raise InputError(
            f"--against is {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}."
        )
    if given.rounds < 1 or given.batch < 1 or not 2 / FRAME_RATE <= given.seconds <= 30:  # noqa: PLR2004
        raise InputError("--rounds and --batch must be 1 or more, --seconds from 0.04 to 30.")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precisions = tuple(given.precision.split(",")) if given.precision else ()
    plan = Plan(
        given.version, against, given.seconds, given.batch, device, given.rounds, precisions
    )
    return plan, given


def add_packages(parser: argparse.ArgumentParser) -> None:
    """The flag that all commands have."""
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="packages that this machine's Python lacks, for one without a network: then nothing "
        "is installed, and python3 is used as it is; fill it by pip install --no-deps --target DIR "
        f"{' '.join(BROUGHT)} (where our own process runs, this project's audiocraft comes first)",
    )


def main(arguments: Sequence[str]) -> None:
    """Prints the table and the JSON object."""
    plan, given = parse(arguments)
    packages = find_packages(given.packages, plan.against)
    with scratch() as place:
        record = measure(plan, packages, place)
    record["command"] = shlex.join(["scripts/benchmark", "generate", *arguments])
    print(show(COLUMNS, record["rows"]))
    print(f"{record['device']}: memory at {record['bandwidth_gb_per_s']} GB/s")
    if given.record:
        say(f"Kept in {save(plan.name, record)}.")
    print(json.dumps({name: record[name] for name in ("command", "device", "rows")}))
