"""The README's tables of what `benchmarks/` holds, and what is asked: `scripts/benchmark table`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from audiocraft.errors import InputError
from audiocraft.serving.command import Parser
from tools.benchmark.records import load_all
from tools.benchmark.shapes import ROOT
from tools.benchmark.targets import TARGETS

README: Final = ROOT / "README.md"
BEGIN: Final = "<!-- benchmarks: written by scripts/benchmark table --write -->"
END: Final = "<!-- end of benchmarks -->"
_GENERATION: Final = (
    *("model, pieces", "by", "precision", "steps/s", "x real time", "first step"),
    *("of the memory's speed", "peak memory"),
)
_SYSTEMS: Final = {
    "ours": "this package",
    "audiocraft": "audiocraft",
    "transformers": "transformers",
}


def tables(records: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables in Markdown, empty without records.

    Args:
        records: by name.
    """
    parts = [
        _table(
            f"{record['device']}: {_versions(record)}; memory at "
            f"{record['bandwidth_gb_per_s']:.0f} GB/s (`{record['command']}`, {record['date']})",
            _GENERATION,
            (_generation(row) for row in _measured(record)),
        )
        for record in _of(records, "generate-")
    ]
    parts += [
        _table(
            f"Start of a process to a finished file of {record['rows'][0]['seconds']} s, on "
            f"{record['device']}: {_versions(record)} (`{record['command']}`, {record['date']})",
            ["model", "by", "seconds"],
            (
                [f"`{row['version']}`", _way(row), f"{row['start_to_file_s']:.1f}"]
                for row in _measured(record)
            ),
        )
        for record in _of(records, "start-")
    ]
    parts += [
        _table(
            f"Request to file of {record['rows'][0]['seconds']:g} s, on {record['device']} "
            f"(`{record['command']}`, {record['date']})",
            ["model", "precision", "first request, s", "later, s"],
            (
                [
                    f"`{row['version']}`",
                    row["precision"],
                    f"{row['first_s']:.2f}",
                    f"{row['request_to_file_s']:.2f}",
                ]
                for row in _measured(record)
            ),
        )
        for record in _of(records, "request-")
    ]
    parts += [
        _table(
            f"Decoding with MultiBand Diffusion, {_networks(record['diffusion'])}, on "
            f"{record['device']}: {_versions(record)} (`{record['command']}`, {record['date']})",
            ["codes", "by", "precision", "evaluations/s", "x real time", "peak memory"],
            (
                [
                    f"{row['seconds']:g} s, {'mono' if row['channels'] == 1 else 'stereo'}",
                    _SYSTEMS[row["system"]],
                    row["precision"],
                    f"{row['evaluations_per_s']:.2f}",
                    f"{row['real_time_factor']:.3f}",
                    f"{row['peak_gb']:.2f} GB",
                ]
                for row in _measured(record)
            ),
        )
        for record in _of(records, "mbd-")
    ]
    parts += [
        _table(
            f"One step, on {record['device']} (`{record['command']}`, {record['date']})",
            ["model", "precision", "kernels", "their number", "ms a step", "ms of them busy"],
            (
                [
                    f"`{row['version']}`",
                    row["precision"],
                    row["mode"],
                    f"{row['kernels']:.0f}",
                    f"{row['step_ms']:.2f}",
                    f"{row['device_ms']:.2f}",
                ]
                for row in _measured(record)
            ),
        )
        for record in _of(records, "profile-")
    ]
    return "\n\n".join(parts)


def judgements(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What is asked of records, and which are as good as that, in Markdown.

    Args:
        records: by name.
    """
    return _table(
        "What is asked of the records",
        ("record", "asked", "measured", "limit", "verdict"),
        ([f"`{one.record}`", one.asked, *one.judge(records)] for one in TARGETS),
    )


def _of(records: Mapping[str, Mapping[str, Any]], prefix: str) -> Iterator[Mapping[str, Any]]:
    return (record for name, record in records.items() if name.startswith(prefix))


def _measured(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in record["rows"] if "error" not in row]


def _table(caption: str, columns: Sequence[str], rows: Iterator[list[str]]) -> str:
    lines = [f"{caption}:", "", f"| {' | '.join(columns)} |"]
    lines.append("|" + "---|" * len(columns))
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def _networks(shape: Mapping[str, int]) -> str:
    return (
        f"{shape['bands']} networks of {shape['depth']} levels from {shape['hidden']} channels, "
        f"each {shape['growth']} times the one before"
    )


def _way(row: Mapping[str, Any]) -> str:
    name = _SYSTEMS[row["system"]]
    return name if row["by"] == "python" else f"{name}, `{row['by']}`"


def _generation(row: Mapping[str, Any]) -> list[str]:
    return [
        f"`{row['version']}`, {row['batch']} of {row['seconds']:g} s",
        _SYSTEMS[row["system"]],
        row["precision"],
        f"{row['steps_per_s']:.1f}",
        f"{row['real_time_factor']:.2f}",
        f"{row['first_step_s']:.3f} s",
        f"{row['bandwidth_share']:.0%}",
        f"{row['peak_gb']:.1f} GB",
    ]


def block(readme: str) -> str:
    """What stands between the marks of a README.

    Raises:
        InputError: it has no marks.
    """
    _, begin, rest = readme.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise InputError(f"The README lacks the line {BEGIN} or, after it, {END}: put them in.")
    return inside.strip()


def main(arguments: Sequence[str]) -> None:
    """Prints the tables, or puts them into the README."""
    parser = Parser(
        prog="scripts/benchmark table",
        description="The README's tables, from what benchmarks/ holds, and, record by record, "
        "what is asked of it and whether that is met.",
        allow_abbrev=False,
    )
    parser.add_argument("--write", action="store_true", help="put them between the README's marks")
    given = parser.parse_args(arguments)
    records = load_all()
    text = tables(records)
    if not given.write:
        print(f"{text}\n\n{judgements(records)}")
        return
    readme = README.read_text()
    block(readme)  # raises without marks
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
