"""What is asked of the figures in `benchmarks/`, and whether they are as good."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Records = Mapping[str, Mapping[str, Any]]

_DEVICES: Final = {"cpu": (", 2 threads",), "cuda": ("H100", "H200")}
"""What a record's device must be called, for it is asked on these alone."""

_SHARE: Final = 0.6  # of the memory's speed
_BEYOND: Final = 1.2  # weights and cache, of the memory in the steps


@dataclass(frozen=True)
class Target:
    """What is asked of a figure.

    Attributes:
        record: name of the one that has it.
        asked: in words.
        measure: the figure and its limit, of all records; a LookupError where one is missing.
        most: whether it must not exceed the limit; otherwise not fall short of it.
    """

    record: str
    asked: str
    measure: Callable[[Records], tuple[float, float]]
    most: bool = False

    def judge(self, records: Records) -> tuple[str, str, str]:
        """The figure and its limit, and whether it is `met`, `missed` or `not measured`."""
        try:
            figure, limit = self.measure(records)
        except LookupError:
            return "", "", "not measured"
        met = figure <= limit if self.most else figure >= limit
        return f"{figure:.4g}", f"{limit:.4g}", "met" if met else "missed"


def _figures(
    records: Records, name: str, field: str, precision: str = "", *, peers: bool = False
) -> list[float]:
    """A field of ours, or of the peers.

    Raises:
        LookupError: nothing of them is measured, or on another device than is asked for.
    """
    record = records[name]
    if not any(part in record["device"] for part in _DEVICES[name.rpartition("-")[2]]):
        raise LookupError(name)
    found = [
        row[field]
        for row in record["rows"]
        if "error" not in row
        and (row["system"] != "ours") == peers
        and precision in {"", row.get("precision")}
    ]
    if not found:
        raise LookupError(name)
    return found


def _than_peers(
    record: str,
    asked: str,
    field: str,
    precision: str = "",
    *,
    times: float = 1.0,
    most: bool = False,
) -> Target:
    """The worst of ours against the best of the peers, so many times."""

    def measure(records: Records) -> tuple[float, float]:
        ours = _figures(records, record, field, precision)
        peers = _figures(records, record, field, peers=True)
        return (max(ours), times * min(peers)) if most else (min(ours), times * max(peers))

    return Target(record, asked, measure, most)


def _alone(record: str, asked: str, field: str, limit: float, *, most: bool = False) -> Target:
    """Ours against a number."""

    def measure(records: Records) -> tuple[float, float]:
        (figure,) = _figures(records, record, field, "float16")
        return figure, limit

    return Target(record, asked, measure, most)


def _of_bandwidth(version: str, times: int) -> Target:
    """The lower of so many times the faster peer and a share of the memory's speed."""
    record = f"generate-{version}-batch1-cuda"

    def measure(records: Records) -> tuple[float, float]:
        (speed,) = _figures(records, record, "steps_per_s", "float16")
        (share,) = _figures(records, record, "bandwidth_share", "float16")
        limit = _SHARE / share * speed
        if share < _SHARE:  # otherwise it is met, whatever the peers do
            peers = _figures(records, record, "steps_per_s", peers=True)
            limit = min(times * max(peers), limit)
        return speed, limit

    asked = f"steps/s: {times} times the faster peer, or {_SHARE:.0%} of the memory's speed"
    return Target(record, asked, measure)


def _batch(version: str, times: float) -> Target:
    one, record = (f"generate-{version}-batch{batch}-cuda" for batch in (1, 16))

    def measure(records: Records) -> tuple[float, float]:
        (alone,) = _figures(records, one, "real_time_factor", "float16")
        (together,) = _figures(records, record, "real_time_factor", "float16")
        return together, times * alone

    return Target(record, f"x real time: {times:g} times that of one piece", measure)


def _memory(version: str, batch: int) -> Target:
    record = f"generate-{version}-batch{batch}-cuda"

    def measure(records: Records) -> tuple[float, float]:
        rounds = {record: {**records[record], "rows": records[record]["rounds"]}}
        peak, weights, cache = (
            max(_figures(rounds, record, field, "float16"))
            for field in ("loop_peak_gb", "weights_gb", "cache_gb")
        )
        return peak, _BEYOND * (weights + cache)

    asked = f"GB in the steps: {_BEYOND - 1:.0%} beyond weights and cache"
    return Target(record, asked, measure, most=True)


_SMALL: Final = "generate-small-batch1-cpu"
TARGETS: Final = (
    _than_peers(_SMALL, "steps/s: 2.5 times the faster peer", "steps_per_s", "float32", times=2.5),
    _than_peers(_SMALL, "8 bits, steps/s: 7 times it", "steps_per_s", "int8", times=7),
    _than_peers(
        "start-small-cpu", "s: no later than the faster peer", "start_to_file_s", most=True
    ),
    _than_peers("mbd-mono-cpu", "x real time: no slower than audiocraft", "real_time_factor"),
    _than_peers("mbd-mono-cpu", "GB: no more than audiocraft", "peak_gb", most=True),
    _of_bandwidth("medium", 10),
    _memory("medium", 1),
    _of_bandwidth("large", 6),
    _memory("large", 1),
    _alone("generate-large-batch1-cuda", "GB of the request", "peak_gb", 12, most=True),
    _alone("request-stereo-melody-cuda", "s to the file", "request_to_file_s", 4, most=True),
    _alone("generate-small-batch1-cuda", "steps/s", "steps_per_s", 1000),
    _than_peers("mbd-stereo-cuda", "x real time: 3 times audiocraft", "real_time_factor", times=3),
    _batch("medium", 4),
    _memory("medium", 16),
    _batch("large", 4.6),
    _memory("large", 16),
)
"""All of them, those of a record together."""
