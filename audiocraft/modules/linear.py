"""Products with weights of fewer bits, of sequences; `cpu_kernels.py` has those of single steps."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INT8_LEVELS: Final = 127
"""The largest magnitude of an integer in `Int8Weight`."""
_TINY = 1e-12  # all zeros have a factor too


class Int8Weight:
    """What a layer finds in the place of its weight with 8 bits, on a CPU.

    A row of the weight is scaled by its largest magnitude.

    Args:
        weight: (out, in), float32, on the CPU; it is not kept.

    Attributes:
        dtype: of the values.
        values: (out, in), int8, from -127 to 127.
        factors: (out,), float32, what they are to be multiplied with.
    """

    dtype = torch.int8

    def __init__(self, weight: Tensor) -> None:
        self.factors = weight.abs().amax(dim=1).clamp_min(_TINY) / INT8_LEVELS
        self.values = (weight / self.factors[:, None]).round().to(torch.int8)

    def __getitem__(self, rows: slice) -> "Int8Weight":
        """Some of the rows; nothing is copied."""
        some = object.__new__(Int8Weight)
        some.factors, some.values = self.factors[rows], self.values[rows]
        return some

    @property
    def nbytes(self) -> int:
        """Memory of the values."""
        return self.values.nbytes

    def float(self) -> Tensor:
        """(out, in), float32."""
        return self.values.float() * self.factors[:, None]


def linear(x: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; on a CPU, weights with fewer bits become float32 for it.

    A product of 20 rows in bfloat16 takes 2.6 times as long on a CPU without instructions for it.

    Args:
        x: (..., in).
        weight: (out, in), or what stands in its place.
        bias: (out,).

    Returns:
        (..., out), of the input's type.
    """
    # Of adapters in training, see `lora.py`, the weight is no tensor either.
    is_16_bit = isinstance(weight, Tensor) and weight.dtype != torch.float32
    if isinstance(weight, Int8Weight) or (is_16_bit and weight.is_cpu):
        y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(x.dtype)
    return F.linear(x, weight, bias)


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
