"""Products with a weight that is read once, however few rows there are.

A decoding step has one row per branch of guidance, so that reading the weights is all its work.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    Packed = Any
else:
    Packed = torch.classes.quantized.LinearPackedParamsBase  # TorchScript reads annotations


def _is_intel() -> bool:
    """Whether the CPU is one of those that torch's BLAS is made for."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# 32 rows take 0.5 to 0.7 of the time of `F.linear`, two 0.2 to 0.5, on an EPYC with AVX-512. On a
# Xeon with AVX-512 it is 0.8 from 4 rows on, but up to 3 rows, which BLAS knows there, 1 to 1.8.
LEAST_ROWS = 4 if _is_intel() else 1
FEW_ROWS = 32
TINY = 1e-12  # all zeros have a scale too


def int8_supported() -> bool:
    """Whether this machine's torch computes with `Int8Weight`."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"
    )


def int8_levels() -> int:
    """Magnitudes that a part of an input has as an integer, besides 0: 127, or 63 without VNNI.

    There pairs of products are summed in 16 bits, so inputs take 7.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63  # noqa: SLF001 - no public name


def multiply_int8(x: Tensor, packed: Packed, levels: int, tiny: float) -> Tensor:
    """An input times an `Int8Weight`; TorchScript can compile it.

    A row is scaled by its largest magnitude. Of 63 levels it takes two parts, the second of what
    rounding leaves of the first: with one alone, the bundled model's KL to float32 was 0.0029. Both
    are rows of one product, which reads the weight once.

    Args:
        x: (..., in), float32.
        packed: see `Int8Weight`.
        levels: of `int8_levels`.
        tiny: `TINY`.

    Returns:
        (..., out), float32.
    """
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(tiny)
    scale, zero = 1 / levels, levels + 1
    exact = x / largest
    if levels == 127:  # noqa: PLR2004 - TorchScript knows no constants of a module
        whole: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            exact, scale, zero, packed
        )
        return whole * largest
    steps = (exact * levels).round()
    inputs = torch.stack([steps * scale, 2 * (exact * levels - steps)])
    parts: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        inputs, scale, zero, packed
    )
    return (parts[0] + parts[1] * (scale / 2)) * largest


def linear(x: Tensor, weight: "Tensor | Int8Weight", bias: Tensor | None = None) -> Tensor:
    """`F.linear`, at the speed of the memory for few rows in float32 on a CPU.

    BLAS reads the weight several times for a few rows on its right, and once, by both cores, for a
    few columns on its left. It takes a single column for a vector and is slower then. On CPUs of
    Intel's it is as fast with up to three rows.

    Args:
        x: (..., in).
        weight: (out, in), or what stands in its place.
        bias: (out,).

    Returns:
        (..., out).
    """
    if isinstance(weight, Int8Weight):
        return weight(x, bias)
    rows = x.shape[:-1].numel()
    if (
        not LEAST_ROWS <= rows <= FEW_ROWS
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or not isinstance(weight, Tensor)
        or torch.is_grad_enabled()
    ):
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1)
    if rows == 1:
        columns = columns.repeat(2, 1)
    y = torch.mm(weight, columns.t())[:, :rows].t().contiguous().view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)

    def to_int8(self) -> None:
        """Replace the weight by one with 8 bits."""
        packed = Int8Weight(self.weight.detach())
        del self.weight
        setattr(self, "weight", packed)  # noqa: B010 - it is no parameter any more


class Int8Weight:
    """What a layer finds in the place of its weight with 8 bits, on a CPU.

    A row of the weight is scaled by its largest magnitude, and so is each row of the input when it
    comes; their products are summed as integers. No row of the input counts for another.

    Args:
        weight: (out, in), float32, on the CPU; it is not kept.
    """

    def __init__(self, weight: Tensor) -> None:
        largest = weight.abs().amax(dim=1).clamp_min(TINY)
        scales = largest.double() / 127
        zeros = torch.zeros(len(scales), dtype=torch.long)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"  # fixes the form that the weight is packed in
        try:
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = engine
        self.nbytes = weight.numel()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out), float32."""
        y = multiply_int8(x, self.packed, int8_levels(), TINY)
        return y if bias is None else y + bias
