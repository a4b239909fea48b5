"""Speed of decoding with MultiBand Diffusion: `scripts/benchmark mbd`."""

import argparse
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from audiocraft.assets.store import PARTS
from audiocraft.errors import InputError
from audiocraft.serving.command import Parser, say
from tools.benchmark.generate import Scratch, add_packages, scratch
from tools.benchmark.processes import Packages, find_packages, probe_device, take_turns
from tools.benchmark.records import rounded, save, show, today
from tools.benchmark.shapes import DIFFUSION_STEPS, FRAME_RATE
from tools.benchmark.side import Job, System
from tools.benchmark.weights import link_into_hub_cache, write_codec
from tools.make_diffusion import write_diffusion

BANDS: Final = 4
DEPTH: Final = 4
GROWTH: Final = 4
HIDDEN: Final = {"cpu": 16, "cuda": 64}
_PEER: Final[System] = "audiocraft"
_PEERS_CODEC: Final = "facebook--musicgen-small"  # in whose release audiocraft looks for it
COLUMNS: Final = (
    "system",
    "precision",
    "channels",
    "evaluations_per_s",
    "real_time_factor",
    "peak_gb",
)
"""Of the table for the eye."""
_WARM_UP_S: Final = 1.0
_HELP: Final = f"""\
Each side runs in a process of its own, one after the other, in several rounds; a number is the
median of the rounds. Both decode the same random codes, from one file of random weights in the
official layout, with a codec of the released shape: nothing is downloaded.

The file has {BANDS} networks of {DEPTH} levels, each with {GROWTH} times the channels of the one before. The first
has {HIDDEN["cuda"]} on a GPU: such a file has 4.7 GB, the published ones for 24 kHz have 4.6. On a CPU it has
{HIDDEN["cpu"]}, a sixteenth of the work.

Ours runs in float32 on a CPU and in float16 on a GPU, audiocraft as published, in float32. Its
codec is mono, so of stereo it decodes one channel after the other.

evaluations_per_s  of one network for one channel, of {BANDS * DIFFUSION_STEPS} a channel; the first is left out
real_time_factor   seconds of music over the time from codes to audio, codec and equaliser included
peak_gb            of the device's memory meanwhile; on a CPU of the process

The last line is one JSON object.
"""  # noqa: E501 - the lines are shorter once the numbers are in


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        seconds: of music.
        channels: 1 or 2.
        device: `cpu` or `cuda`.
        against: whether audiocraft is measured too.
        rounds: how often.
        hidden: channels of the networks' first level; 0 is `HIDDEN`.
    """

    seconds: float = 10.0
    channels: int = 1
    device: str = "cpu"
    against: bool = True
    rounds: int = 2
    hidden: int = 0

    @property
    def name(self) -> str:
        """Of its record."""
        return f"mbd-{'mono' if self.channels == 1 else 'stereo'}-{self.device}"

    @property
    def width(self) -> int:
        """Channels of the networks' first level."""
        return self.hidden or HIDDEN[self.device]

    @property
    def sides(self) -> list[tuple[System, str]]:
        """Systems and their precisions."""
        ours = "float32" if self.device == "cpu" else "float16"
        return [("ours", ours), *([(_PEER, "float32")] if self.against else [])]

    @property
    def arguments(self) -> list[str]:
        """Of the command that does the same."""
        return [
            "mbd",
            *("--seconds", f"{self.seconds:g}"),
            *(["--stereo"] if self.channels > 1 else []),
            *("--device", self.device),
            *("--against", _PEER if self.against else "none"),
            *("--rounds", str(self.rounds)),
            *("--hidden", str(self.width)),
        ]


def measure(
    plan: Plan,
    packages: Packages,
    place: Scratch,
    deadline: float | None = None,
    probe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures both sides in turn.

    Args:
        plan: what is measured.
        packages: of the sides.
        place: of the weights.
        deadline: on the monotonic clock, when everything is ended.
        probe: of the device, see `probe_device`; probed here if not given.

    Returns:
        A record: `device`, `diffusion` with the networks' shape, `rows`, and what they come from.

    Raises:
        InputError: the device cannot be used.
    """
    probe = probe or probe_device(plan.device, packages, deadline)
    jobs = _jobs(plan, place)

    def tell(job: Job, number: int, result: dict[str, Any]) -> None:
        said = result.get("error") or f"{result['elapsed_s']:.1f} s"
        say(f"{plan.name}, {job.system} {job.precision}, round {number}: {said}")

    found = take_turns(jobs, plan.rounds, packages, tell, deadline)
    return {
        "command": shlex.join(["scripts/benchmark", *plan.arguments]),
        "device": probe["device"],
        "date": today(),
        "versions": {**probe["versions"], **packages.versions([_PEER])},
        "diffusion": {"bands": BANDS, "hidden": plan.width, "depth": DEPTH, "growth": GROWTH},
        "rows": [_row(job, results) for job, results in zip(jobs, found, strict=True)],
        "rounds": [
            {"system": job.system, "precision": job.precision, **result}
            for job, results in zip(jobs, found, strict=True)
            for result in results
        ],
    }


def _jobs(plan: Plan, place: Scratch) -> list[Job]:
    """What each side does, with the files written that it reads."""
    repo_id, (filename,) = PARTS["mbd"]
    folder = place.folder / f"mbd-{plan.width}"
    codec, diffusion, hub = folder / "codec", folder / "diffusion", folder / "hub"
    if not folder.is_dir():
        for part in (codec, diffusion):
            part.mkdir(parents=True)
        write_codec(codec, place.shapes)
        write_diffusion(
            diffusion / filename, bands=BANDS, hidden=plan.width, depth=DEPTH, growth=GROWTH
        )
        link_into_hub_cache(hub, _PEERS_CODEC, codec)
        link_into_hub_cache(hub, repo_id.replace("/", "--"), diffusion)
    return [
        Job(
            "decode",
            plan.device,
            system=system,
            version="mbd",
            precision=precision,
            channels=plan.channels,
            seconds=plan.seconds,
            warm_up=min(plan.seconds, _WARM_UP_S),
            release=str(codec),
            diffusion=str(diffusion / filename),
            hub=str(hub),
            shapes=str(place.shapes),
        )
        for system, precision in plan.sides
    ]


def _row(job: Job, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of the result, from the rounds of a side."""
    row: dict[str, Any] = {
        "system": job.system,
        "version": job.version,
        "precision": job.precision,
        "batch": job.batch,
        "seconds": job.seconds,
        "channels": job.channels,
    }
    if "error" in results[-1]:
        return row | {"error": results[-1]["error"]}

    def median(name: str) -> float:
        return float(statistics.median(result[name] for result in results))

    numbers = {
        "evaluations_per_s": median("steps_per_s"),
        "real_time_factor": job.batch * job.seconds / median("elapsed_s"),
        "peak_gb": median("peak_gb"),
    }
    return row | {name: rounded(number) for name, number in numbers.items()}


def parse(arguments: Sequence[str]) -> tuple[Plan, argparse.Namespace]:
    """The plan of a command line.

    Raises:
        InputError: it is wrong.
    """
    parser = Parser(
        prog="scripts/benchmark mbd",
        description="How fast codes are decoded with MultiBand Diffusion, by this package and by "
        "audiocraft.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of music (default: 10)")
    parser.add_argument("--stereo", action="store_true", help="codes of two channels")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    parser.add_argument("--against", default=_PEER, choices=(_PEER, "none"), help="the other side")
    parser.add_argument("--rounds", type=int, default=2, help="of both sides in turn (default: 2)")
    widths = ", ".join(f"{width} on {device}" for device, width in HIDDEN.items())
    parser.add_argument(
        "--hidden",
        type=int,
        default=0,
        metavar="CHANNELS",
        help=f"of the networks' first level, a multiple of 4 (default: {widths})",
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/")
    add_packages(parser)
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.seconds * FRAME_RATE < 5 or given.hidden < 0 or given.hidden % 4:  # noqa: PLR2004
        raise InputError(
            "--rounds must be 1 or more, --seconds 0.1 or more, --hidden a multiple of 4."
        )
    plan = Plan(
        given.seconds,
        2 if given.stereo else 1,
        given.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        given.against != "none",
        given.rounds,
        given.hidden,
    )
    return plan, given


def main(arguments: Sequence[str]) -> None:
    """Prints the table and the JSON object."""
    plan, given = parse(arguments)
    packages = find_packages(given.packages, [_PEER] if plan.against else [])
    with scratch() as place:
        record = measure(plan, packages, place)
    record["command"] = shlex.join(["scripts/benchmark", "mbd", *arguments])
    print(show(COLUMNS, record["rows"]))
    print(f"{record['device']}: networks of {json.dumps(record['diffusion'])}")
    if given.record:
        say(f"Kept in {save(plan.name, record)}.")
    print(json.dumps({name: record[name] for name in ("command", "device", "diffusion", "rows")}))
