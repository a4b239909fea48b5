"""Results that are kept in `benchmarks/`."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tools.benchmark.shapes import ROOT

FOLDER: Final = ROOT / "benchmarks"
_DIGITS: Final = 4


def rounded(value: float) -> float:
    """To four digits that count."""
    return float(f"{value:.{_DIGITS}g}")


def today() -> str:
    """The date, as records have it."""
    return datetime.now(UTC).date().isoformat()


def show(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table for the eye.

    Args:
        names: of the columns; the first three say what a row is.
        rows: with a value for each, or an `error`.
    """
    lines = ["  ".join(f"{name:>{max(12, len(name))}}" for name in names)]
    for row in rows:
        cells = [f"{row.get(name, ''):>{max(12, len(name))}}" for name in names]
        if "error" in row:
            cells[3:] = [row["error"]]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def save(name: str, record: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Writes a record, whole or not at all, in the place of an older one of its name."""
    text = json.dumps(record, indent=1) + "\n"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)  # noqa: PTH105 - both are strings
    return path


def load_all(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """All records by name, sorted."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
