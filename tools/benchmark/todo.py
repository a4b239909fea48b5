"""The figures of a GPU that are still missing: `scripts/benchmark --gpu-todo`."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from audiocraft.errors import AudiocraftError, InputError
from audiocraft.serving.command import Parser, say
from tools.benchmark import generate, mbd, profile, request
from tools.benchmark.generate import PEERS, Plan, Scratch, add_packages, scratch
from tools.benchmark.processes import Packages, find_packages, probe_device
from tools.benchmark.records import FOLDER, load_all, save, show
from tools.benchmark.side import System

LIMIT_S: Final = 570.0
"""Of all figures; what does not fit is left to another run. To probe the device takes some ten."""


@dataclass(frozen=True)
class Session:
    """What the figures of a run share.

    Attributes:
        packages: of the sides.
        place: of the weights.
        probe: of the device, see `probe_device`; a GPU's memory is as fast at the end.
        folder: of the records.
    """

    packages: Packages
    place: Scratch
    probe: Mapping[str, Any]
    folder: Path = FOLDER


Measure = Callable[[Session, float], dict[str, Any]]


@dataclass(frozen=True)
class Item:
    """A figure.

    Attributes:
        name: of its record.
        estimate: seconds that it is allowed for; it is begun only where they are left.
        measure: makes the record, until a deadline.
        peers: whether it wants a peer's figure too.
    """

    name: str
    estimate: float
    measure: Measure
    peers: bool = False

    def is_missing(self, records: dict[str, dict[str, Any]]) -> bool:
        """Whether ours, or any peer that it wants, has no number yet."""
        rows = records.get(self.name, {}).get("rows", [])
        measured = [row["system"] for row in rows if "error" not in row]
        failed = any(row["system"] == "ours" and "error" in row for row in rows)
        return failed or "ours" not in measured or (self.peers and set(measured) == {"ours"})


def peers_to_beat(records: Mapping[str, Mapping[str, Any]]) -> tuple[System, ...]:
    """The faster peer, where the record of medium shows which it is, otherwise all.

    medium and large have 48 layers each, and a peer's step takes as long as launching them does, so
    that the faster one of one is that of the other.
    """
    rows = records.get("generate-medium-batch1-cuda", {}).get("rows", [])
    measured = [row for row in rows if row["system"] in PEERS and "error" not in row]
    if not measured:
        return PEERS
    return (max(measured, key=lambda row: float(row["steps_per_s"]))["system"],)


def _generate(version: str, estimate: float, *, batch: int = 1, peers: bool = False) -> Item:
    plan = Plan(
        version,
        PEERS if peers else (),
        batch=batch,
        device="cuda",
        rounds=1,
        precisions=("float16",),
    )

    def run(session: Session, deadline: float) -> dict[str, Any]:
        against = peers_to_beat(load_all(session.folder)) if peers else ()
        asked = replace(plan, against=against)
        record = generate.measure(asked, session.packages, session.place, deadline, session.probe)
        say(show(generate.COLUMNS, record["rows"]))
        return record

    return Item(plan.name, estimate, run, peers)


def _diffusion(estimate: float) -> Item:
    plan = mbd.Plan(30.0, 2, "cuda", rounds=1)

    def run(session: Session, deadline: float) -> dict[str, Any]:
        record = mbd.measure(plan, session.packages, session.place, deadline, session.probe)
        say(show(mbd.COLUMNS, record["rows"]))
        return record

    return Item(plan.name, estimate, run, peers=True)


# A process starts, loads and, if it is ours, builds its kernels in some 25 s; at the 40 steps a
# second that are published of peers 30 s of music take 38.
ITEMS: Final = (
    _generate("medium", 165, peers=True),
    _generate("large", 100, peers=True),  # with the peak of its memory
    Item(
        "request-stereo-melody-cuda",
        35,
        lambda session, deadline: request.measure(
            "stereo-melody", 30.0, "cuda", session.packages, session.place, deadline, session.probe
        ),
    ),
    _generate("small", 30),
    _diffusion(110),  # writes a file of 4.7 GB first
    _generate("medium", 35, batch=16),
    _generate("large", 45, batch=16),
    Item(
        "profile-medium-cuda",
        45,
        lambda session, deadline: profile.measure(
            "medium", "cuda", session.packages, session.place, deadline, session.probe
        ),
    ),
)
"""The most important first; peers where a ratio to them is asked for. All fit into one run."""


def missing(folder: Path = FOLDER, items: Sequence[Item] = ITEMS) -> list[Item]:
    """What is not recorded yet."""
    records = load_all(folder)
    return [item for item in items if item.is_missing(records)]


def run_items(items: Sequence[Item], session: Session, limit: float = LIMIT_S) -> list[Item]:
    """Measures one item after the other and records each as it comes.

    Args:
        items: the most important first.
        session: what they share.
        limit: seconds for all.

    Returns:
        What is left for another run.
    """
    end = time.monotonic() + limit
    left = []
    for item in items:
        if time.monotonic() + item.estimate > end:
            say(f"{item.name} is left for another run: it may take {item.estimate:.0f} s.")
            left.append(item)
            continue
        begin = time.monotonic()
        try:
            # One that hangs costs itself alone.
            record = item.measure(session, min(end, begin + 2 * item.estimate))
            path = save(item.name, record, session.folder)
        except AudiocraftError as error:
            say(f"{item.name}: {error}")
            left.append(item)
            continue
        except Exception:  # noqa: BLE001 - one figure's fault must not cost the others
            say(f"{item.name}: {traceback.format_exc()}")
            left.append(item)
            continue
        say(f"Kept in {path}, after {time.monotonic() - begin:.0f} s.")
    return left


def main(arguments: Sequence[str]) -> None:
    """Measures what is missing.

    Raises:
        InputError: there is no GPU.
    """
    parser = Parser(
        prog="scripts/benchmark --gpu-todo",
        description="Measures the figures of a GPU that benchmarks/ does not hold yet, the most "
        "important first, in under ten minutes, and writes each there as it comes.",
        allow_abbrev=False,
    )
    add_packages(parser)
    given = parser.parse_args(arguments)
    items = missing()
    if not torch.cuda.is_available():
        names = ", ".join(item.name for item in items) or "none"
        raise InputError(
            "These figures need an NVIDIA GPU that torch can use, and this machine has none; still "
            f"missing: {names}."
        )
    packages = find_packages(given.packages, PEERS)
    with scratch() as place:
        left = run_items(items, Session(packages, place, probe_device("cuda", packages)))
    names = ", ".join(item.name for item in left)
    say(f"Still missing: {names}; run this again." if left else "Nothing is missing.")
