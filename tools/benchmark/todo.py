"""The figures of a GPU that are still missing: `scripts/benchmark --gpu-todo`."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from audiocraft.errors import AudiocraftError, InputError
from audiocraft.serving.command import Parser, say
from tools.benchmark import generate, mbd, profile, request
from tools.benchmark.generate import PEERS, Plan, Scratch, add_packages, scratch
from tools.benchmark.processes import Packages, find_packages
from tools.benchmark.records import FOLDER, load_all, save, show

LIMIT_S: Final = 570.0
"""Of a whole run; what does not fit is left to another."""

Measure = Callable[[Packages, Scratch, float], dict[str, Any]]


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


def _generate(version: str, estimate: float, *, batch: int = 1, peers: bool = True) -> Item:
    plan = Plan(
        version,
        PEERS if peers else (),
        batch=batch,
        device="cuda",
        rounds=1,
        precisions=("float16",),
    )

    def run(packages: Packages, place: Scratch, deadline: float) -> dict[str, Any]:
        record = generate.measure(plan, packages, place, deadline)
        say(show(generate.COLUMNS, record["rows"]))
        return record

    return Item(plan.name, estimate, run, peers)


def _diffusion(estimate: float) -> Item:
    plan = mbd.Plan(30.0, 2, "cuda", rounds=1)

    def run(packages: Packages, place: Scratch, deadline: float) -> dict[str, Any]:
        record = mbd.measure(plan, packages, place, deadline)
        say(show(mbd.COLUMNS, record["rows"]))
        return record

    return Item(plan.name, estimate, run, peers=True)


ITEMS: Final = (
    _generate("medium", 180),
    _generate("large", 160),  # with the peak of its memory
    Item(
        "request-stereo-melody-cuda",
        40,
        lambda packages, place, deadline: request.measure(
            "stereo-melody", 30.0, "cuda", packages, place, deadline
        ),
    ),
    _generate("small", 120),
    _diffusion(120),
    _generate("medium", 40, batch=16, peers=False),
    _generate("large", 50, batch=16, peers=False),
    Item(
        "profile-medium-cuda",
        50,
        lambda packages, place, deadline: profile.measure(
            "medium", "cuda", packages, place, deadline
        ),
    ),
    _generate("stereo-melody", 40, peers=False),
)
"""The most important first."""


def missing(folder: Path = FOLDER, items: Sequence[Item] = ITEMS) -> list[Item]:
    """What is not recorded yet."""
    records = load_all(folder)
    return [item for item in items if item.is_missing(records)]


def run_items(
    items: Sequence[Item],
    packages: Packages,
    place: Scratch,
    folder: Path = FOLDER,
    limit: float = LIMIT_S,
) -> list[Item]:
    """Measures one item after the other and records each as it comes.

    Args:
        items: the most important first.
        packages: of the sides.
        place: of the weights.
        folder: of the records.
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
            record = item.measure(packages, place, min(end, begin + 2 * item.estimate))
            path = save(item.name, record, folder)
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
    with scratch() as place:
        left = run_items(items, find_packages(given.packages, PEERS), place)
    names = ", ".join(item.name for item in left)
    say(f"Still missing: {names}; run this again." if left else "Nothing is missing.")
