"""From a request to a file, once a process is warm: `scripts/benchmark request`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from audiocraft.assets.store import RELEASES
from audiocraft.errors import AudiocraftError
from audiocraft.serving.command import Parser, say
from tools.benchmark.generate import Scratch, add_packages, scratch
from tools.benchmark.processes import Packages, find_packages, left, probe_device, run_side
from tools.benchmark.records import rounded, save, today
from tools.benchmark.side import Job


def measure(
    version: str,
    seconds: float,
    device: str,
    packages: Packages,
    place: Scratch,
    deadline: float | None = None,
    probe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures the first request of a process and the one after it.

    Args:
        version: whose shape.
        seconds: of music.
        device: `cpu` or `cuda`.
        packages: of the process.
        place: of the weights.
        deadline: on the monotonic clock, when it is ended.
        probe: of the device, see `probe_device`; probed here if not given.

    Returns:
        A record: `device`, `rows`, and what they come from.

    Raises:
        AudiocraftError: it cannot be measured.
    """
    probe = probe or probe_device(device, packages, deadline)
    release = str(place.release(version))
    precision = probe["precisions"][0]
    job = Job(
        "request", device, version=version, precision=precision, seconds=seconds, release=release
    )
    found = run_side(job, packages, left(deadline))
    if "error" in found:
        raise AudiocraftError(f"The request for {version} on {device} failed ({found['error']}).")
    row = {"system": "ours", "version": version, "precision": precision, "seconds": seconds}
    return {
        "command": shlex.join(_command(version, seconds, device)),
        "device": probe["device"],
        "date": today(),
        "versions": probe["versions"],
        "rows": [row | {name: rounded(value) for name, value in found.items()}],
    }


def _command(version: str, seconds: float, device: str) -> list[str]:
    flags = ["--version", version, "--seconds", f"{seconds:g}", "--device", device]
    return ["scripts/benchmark", "request", *flags]


def main(arguments: Sequence[str]) -> None:
    """Prints the JSON object."""
    parser = Parser(
        prog="scripts/benchmark request",
        description="Seconds from a request to a WAV file, of the first request of a process and "
        "of the one after it; random weights of the published shape. The last line is one JSON "
        "object.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", default="stereo-melody", choices=RELEASES)
    parser.add_argument("--seconds", type=float, default=30.0, help="of music (default: 30)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/")
    add_packages(parser)
    given = parser.parse_args(arguments)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with scratch() as place:
        packages = find_packages(given.packages, ())
        record = measure(given.version, given.seconds, device, packages, place)
    if given.record:
        say(f"Kept in {save(f'request-{given.version}-{device}', record)}.")
    print(json.dumps({name: record[name] for name in ("command", "device", "rows")}))
