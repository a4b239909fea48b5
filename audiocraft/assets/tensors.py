"""Tensors on disk, in the one form that both weights and separators use."""

from pathlib import Path

from torch import Tensor

from audiocraft.errors import WeightsError


def read_safetensors(
    path: Path, name: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and metadata of a file; the tensors are read by memory map.

    Args:
        path: the file.
        name: what messages call it, if not by its own name.

    Raises:
        WeightsError: the file is broken or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{name or path.name} is broken ({error}); fetch it again.") from error
