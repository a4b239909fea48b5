"""What the device does in one step: `scripts/benchmark profile`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from audiocraft.assets.store import RELEASES
from audiocraft.errors import AudiocraftError
from audiocraft.serving.command import Parser, say
from tools.benchmark.generate import Scratch, add_packages, scratch
from tools.benchmark.processes import Packages, find_packages, left, probe_device, run_side
from tools.benchmark.records import rounded, save, today
from tools.benchmark.side import Job

MODES: Final[dict[str, dict[str, str]]] = {
    "launched singly": {"NO_CUDA_GRAPH": "1"},
    "as a graph": {},
}
"""Environment of each way in which a GPU makes a step."""


def measure(
    version: str,
    device: str,
    packages: Packages,
    place: Scratch,
    deadline: float | None = None,
    probe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Profiles a step, on a GPU with and without a graph.

    Args:
        version: whose shape.
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
    job = Job("profile", device, version=version, precision=precision, release=release)
    rows = []
    for mode, variables in (MODES if device == "cuda" else {"step": {}}).items():
        found = run_side(job, packages, left(deadline), variables)
        if "error" in found:
            raise AudiocraftError(f"The steps of {version} cannot be profiled ({found['error']}).")
        numbers = {name: rounded(found[name]) for name in ("step_ms", "device_ms", "kernels")}
        largest = [(name, rounded(ms), rounded(count)) for name, ms, count in found["largest"]]
        row = {"system": "ours", "version": version, "precision": precision, "mode": mode}
        rows.append(row | numbers | {"largest": largest})
    return {
        "command": shlex.join(
            ["scripts/benchmark", "profile", "--version", version, "--device", device]
        ),
        "device": probe["device"],
        "date": today(),
        "versions": probe["versions"],
        "rows": rows,
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for the eye."""
    lines = []
    for row in rows:
        lines.append(
            f"{row['mode']}: {row['step_ms']} ms a step, of which the device works "
            f"{row['device_ms']} ms, in {row['kernels']} kernels:"
        )
        lines += [f"{ms:10.4f} ms {count:8.1f} x {name}" for name, ms, count in row["largest"]]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Prints the profile and the JSON object."""
    parser = Parser(
        prog="scripts/benchmark profile",
        description="What the device does in one step, averaged over 64: on a GPU with its kernels "
        "launched singly and as a graph; random weights of the published shape. The last line is "
        "one JSON object.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", default="medium", choices=RELEASES)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/")
    add_packages(parser)
    given = parser.parse_args(arguments)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with scratch() as place:
        record = measure(given.version, device, find_packages(given.packages, ()), place)
    print(show(record["rows"]))
    if given.record:
        say(f"Kept in {save(f'profile-{given.version}-{device}', record)}.")
    print(json.dumps({name: record[name] for name in ("command", "device", "rows")}))
