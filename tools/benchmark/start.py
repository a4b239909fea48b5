"""From the start of a process to a finished file: `scripts/benchmark start`."""

import argparse
import json
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from audiocraft.assets.store import RELEASES
from audiocraft.serving.command import Parser, say
from tools.benchmark.generate import PEERS, Scratch, add_packages, scratch
from tools.benchmark.processes import Packages, find_packages, probe_device, run_side
from tools.benchmark.records import rounded, save, today
from tools.benchmark.shapes import DESCRIPTION, ROOT
from tools.benchmark.side import Job
from tools.benchmark.weights import write_release

COMMAND: Final = "scripts/predict"
_HELP: Final = """\
Weights are random, have the published shape and size, and lie on disk: two to three GB, removed at
the end. Each side loads them from there as its users do: ours once by scripts/predict and once by
a Python program, the peers by a Python program. Packages of the official one that it imports
without need are left out, so that its real start takes longer. The last line is one JSON object.
"""


def measure(
    version: str, seconds: float, rounds: int, packages: Packages, place: Scratch
) -> dict[str, Any]:
    """Measures all sides in turn, on the CPU.

    Args:
        version: whose shape.
        seconds: of music.
        rounds: how often.
        packages: of the sides.
        place: of the weights.

    Returns:
        A record: `device`, `rows`, and what they come from.

    Raises:
        InputError: the CPU cannot be described.
    """
    store = place.folder / "store"
    release = store / "facebook" / f"musicgen-{version}"
    write_release(release, version, place.text_encoder, place.shapes, full_size=True)
    job = Job(
        "make_file",
        "cpu",
        version=version,
        seconds=seconds,
        release=str(release),
        hub=str(place.hub),
        shapes=str(place.shapes),
        output=str(place.folder / "music.wav"),
        checkpoint=str(place.folder / "transformers"),
    )
    run_side(replace(job, task="save", system="transformers"), packages)
    jobs = [job, *(replace(job, system=peer) for peer in PEERS)]
    ways: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
        ("ours", COMMAND): partial(_predict, job, store),
        **{(one.system, "python"): partial(run_side, one, packages) for one in jobs},
    }
    found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    errors: dict[tuple[str, str], str] = {}
    for number in range(rounds):
        for way in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            if way in errors:
                continue
            Path(job.output).unlink(missing_ok=True)
            begin = time.perf_counter()
            result = ways[way]()
            took = time.perf_counter() - begin
            if "error" not in result and not Path(job.output).is_file():
                result = {"error": "it wrote no file"}
            if "error" in result:
                errors[way] = result["error"]
            found[way].append(took)
            said = errors.get(way) or f"{took:.1f} s"
            say(f"{version}, {way[0]} by {way[1]}, round {number + 1}: {said}")
    probe = probe_device("cpu", packages)
    rows = []
    for way, times in found.items():
        row: dict[str, Any] = {"system": way[0], "by": way[1], "version": version}
        row["seconds"] = seconds
        if way in errors:
            row["error"] = errors[way]
        else:
            row["start_to_file_s"] = rounded(statistics.median(times))
        rows.append(row)
    return {
        "command": "",
        "device": probe["device"],
        "date": today(),
        "versions": {**probe["versions"], **packages.versions(PEERS)},
        "rows": rows,
    }


def _predict(job: Job, store: Path) -> dict[str, Any]:
    """Makes a file as a user does."""
    inputs = {"model_version": job.version, "prompt": DESCRIPTION, "duration": f"{job.seconds:g}"}
    command = [str(ROOT / COMMAND), "-e", f"AUDIOCRAFT_CACHE_DIR={store}", "-o", job.output]
    for name, value in inputs.items():
        command += ["-i", f"{name}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    return {}


def main(arguments: Sequence[str]) -> None:
    """Prints the table and the JSON object."""
    parser = Parser(
        prog="scripts/benchmark start",
        description="Seconds from the start of a process to a finished file, on the CPU.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", default="small", choices=RELEASES)
    parser.add_argument("--seconds", type=int, default=5, help="of music (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides in turn (default: 3)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/")
    add_packages(parser)
    given = parser.parse_args(arguments)
    packages = find_packages(given.packages, PEERS)
    with scratch() as place:
        record = measure(given.version, given.seconds, given.rounds, packages, place)
    record["command"] = shlex.join(["scripts/benchmark", "start", *arguments])
    for row in record["rows"]:
        print(f"{row['system']:>12} {row['by']:>15} {row.get('start_to_file_s', row.get('error'))}")
    if given.record:
        say(f"Kept in {save(f'start-{given.version}-cpu', record)}.")
    print(json.dumps({name: record[name] for name in ("command", "device", "rows")}))
