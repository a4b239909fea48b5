"""How many bits the weights of a language model have while it generates."""

from typing import Literal

import torch
from torch import nn

from audiocraft.errors import InputError
from audiocraft.modules.linear import Int8Weight, Linear
from audiocraft.modules.transformer import Attention

Precision = Literal["float32", "bfloat16", "float16", "int8"]


def offered_precisions(device: torch.device) -> tuple[Precision, ...]:
    """The precisions that pay on a device, its default first.

    float32 is exact and the CPU's default, float16 that of a GPU, as in the official package.
    """
    if device.type != "cuda":
        return ("float32", "bfloat16", "int8")
    return ("float16", "bfloat16", "float32") if has_bfloat16(device) else ("float16", "float32")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - no public name


def check_precision(precision: str | None, device: torch.device) -> Precision:
    """A precision that the device offers; its default where none is given.

    Raises:
        InputError: it does not offer this one.
    """
    offered = offered_precisions(device)
    if not precision:
        return offered[0]
    for one in offered:
        if one == precision:
            return one
    raise InputError(
        f"precision is {precision}, {device.type} offers {', '.join(offered)}: choose one of these."
    )


def weight_dtype(precision: Precision) -> torch.dtype:
    """Type of the weights; those that int8 leaves as they are have float32."""
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
    assert isinstance(dtype, torch.dtype)
    return dtype


def int8_bytes(model: nn.Module) -> int:
    """Memory of the projections that `to_int8` made."""
    weights: list[object] = []
    for module in model.modules():
        if isinstance(module, Linear):
            weights.append(module.weight)
        elif isinstance(module, Attention):
            weights.append(module.in_proj_weight)
    return sum(weight.nbytes for weight in weights if isinstance(weight, Int8Weight))


def to_int8(model: nn.Module) -> None:
    """Replace all projections of a model by ones with 8 bits, one after the other.

    Args:
        model: float32, on the CPU; it cannot be trained, copied or saved afterwards.
    """
    for module in model.modules():
        if isinstance(module, Linear | Attention):
            module.to_int8()
