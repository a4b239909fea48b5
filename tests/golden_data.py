"""The official implementation's numbers, which the project did not produce."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, Tensor]:
    """Tensors of `golden/<name>.safetensors`."""
    return load_file(GOLDEN / f"{name}.safetensors")


def meta(name: str) -> Any:
    """`golden/<name>/meta.json`."""
    return json.loads((GOLDEN / name / "meta.json").read_text())
