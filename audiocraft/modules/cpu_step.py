"""One step of the decoder's layers on a CPU, as one TorchScript program.

With a row or two the layers are some eighty small operations each, and Python between them takes a
third of the time of 8-bit weights (`scripts/benchmark generate`). The program does what the layers
in `modules/transformer.py` do, operation by operation, so its numbers are theirs bit for bit.
TorchScript is deprecated in favour of compilers, which a user's machine need not have; where it is
gone, the same functions run as Python.
"""

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from audiocraft.modules.linear import (
    FEW_ROWS,
    LEAST_ROWS,
    TINY,
    Int8Weight,
    Linear,
    Packed,
    int8_levels,
    multiply_int8,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from audiocraft.modules.transformer import Attention, KVCache, Memory, Norm, Transformer


class Product(NamedTuple):
    """What an input is multiplied with: a weight (out, in), or one with 8 bits, and a bias."""

    weight: Tensor | None
    packed: Optional[Packed]  # noqa: UP045 - a class of TorchScript knows no `|`
    bias: Tensor | None


class Gain(NamedTuple):
    """Of a LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float


class Layer(NamedTuple):
    """Of one layer; the fields of cross-attention are unused where there is none."""

    norm1: Gain
    qkv: Product
    out: Product
    norm_cross: Gain
    query: Product
    cross_out: Product
    norm2: Gain
    linear1: Product
    linear2: Product


class Numbers(NamedTuple):
    """What TorchScript cannot read from modules: see `modules/linear.py`."""

    heads: int
    least_rows: int
    few_rows: int
    tiny: float
    levels: int


def multiply(x: Tensor, product: Product, numbers: Numbers) -> Tensor:
    """`linear`, of (B, 1, in)."""
    bias = product.bias
    packed = product.packed
    if packed is not None:
        y = multiply_int8(x, packed, numbers.levels, numbers.tiny)
        return y if bias is None else y + bias
    weight = product.weight
    assert weight is not None
    rows = x.size(0)
    if weight.dtype != torch.float32 or not numbers.least_rows <= rows <= numbers.few_rows:
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1)
    if rows == 1:
        columns = columns.repeat(2, 1)
    product_rows = torch.mm(weight, columns.t())[:, :rows].t().contiguous().view(rows, 1, -1)
    return product_rows if bias is None else product_rows + bias


def normalize(x: Tensor, gain: Gain) -> Tensor:
    """`Norm`."""
    weight = gain.weight
    normed = F.layer_norm(x, [x.size(2)], weight.float(), gain.bias.float(), gain.eps)
    return normed.to(weight.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Product, numbers: Numbers) -> Tensor:
    """`Attention._attend`."""
    mixed = F.scaled_dot_product_attention(q.to(k.dtype), k, v)
    return multiply(mixed.transpose(1, 2).flatten(2).to(q.dtype), out, numbers)


def run_layers(
    x: Tensor,
    layers: list[Layer],
    memory: list[tuple[Tensor, Tensor]],
    keys: Tensor,
    values: Tensor,
    position: int,
    numbers: Numbers,
) -> Tensor:
    """The residual stream (B, 1, dim) through all layers.

    Args:
        x: with its position added, float32.
        layers: their weights.
        memory: of `Transformer.project_memory`; empty without cross-attention.
        keys: of the cache, (L, B, H, T, D); the step's are written to `position`.
        values: likewise.
        position: of the step.
        numbers: the rest.
    """
    rows = x.size(0)
    for index, layer in enumerate(layers):
        packed = multiply(normalize(x, layer.norm1), layer.qkv, numbers)
        q, k, v = packed.view(rows, 1, 3, numbers.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        keys[index, :, :, position : position + 1] = k
        values[index, :, :, position : position + 1] = v
        k = keys[index, :, :, : position + 1]
        v = values[index, :, :, : position + 1]
        x = x + attend(q, k, v, layer.out, numbers)
        if len(memory) > 0:
            packed = multiply(normalize(x, layer.norm_cross), layer.query, numbers)
            q = packed.view(rows, 1, numbers.heads, -1).transpose(1, 2)
            k, v = memory[index]
            x = x + attend(q, k, v, layer.cross_out, numbers)
        hidden = F.gelu(multiply(normalize(x, layer.norm2), layer.linear1, numbers))
        x = x + multiply(hidden, layer.linear2, numbers)
    return x


@cache
def _program() -> Callable[..., Tensor]:
    """`run_layers`, compiled once per process."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return cast("Callable[..., Tensor]", torch.jit.script(run_layers))
    except (AttributeError, RuntimeError) as error:  # a torch without TorchScript
        logger.warning("Steps are not compiled, which makes music slower on this CPU: %s", error)
        return run_layers


class CpuStep:
    """The steps of one request.

    Args:
        transformer: on a CPU; its weights must stay as they are.
        memory: of `Transformer.project_memory`, if there is cross-attention.
    """

    def __init__(self, transformer: "Transformer", memory: "Memory | None") -> None:
        self._layers = [_layer(layer, memory is not None) for layer in transformer.layers]
        self._memory = list(memory or ())
        heads = transformer.config.num_heads
        self._numbers = Numbers(heads, LEAST_ROWS, FEW_ROWS, TINY, int8_levels())

    def __call__(self, x: Tensor, cache: "KVCache") -> Tensor:
        """The residual stream (B, 1, dim), float32, behind the filled part of a cache."""
        return _program()(
            x, self._layers, self._memory, cache.keys, cache.values, cache.length, self._numbers
        )


def _layer(layer: Any, crosses: bool) -> Layer:
    attention = layer.self_attn
    norm1, (qkv, out) = _gain(layer.norm1), _attention(attention, 3)
    cross = (_gain(layer.norm_cross), *_attention(layer.cross_attention, 1)) if crosses else None
    return Layer(
        norm1,
        qkv,
        out,
        *(cross or (norm1, qkv, out)),
        _gain(layer.norm2),
        _product(layer.linear1),
        _product(layer.linear2),
    )


def _gain(norm: "Norm") -> Gain:
    return Gain(norm.weight.detach(), norm.bias.detach(), norm.eps)


def _attention(attention: "Attention", last: int) -> tuple[Product, Product]:
    """The projection of the first `last` blocks of (query, key, value), and that of the output."""
    weight, bias = attention.block(0, last)
    return _as_product(weight, bias), _product(attention.out_proj)


def _product(linear: Linear) -> Product:
    return _as_product(linear.weight, linear.bias)


def _as_product(weight: "Tensor | Int8Weight", bias: Tensor | None) -> Product:
    bias = None if bias is None else bias.detach()
    if isinstance(weight, Int8Weight):
        return Product(None, weight.packed, bias)
    return Product(weight.detach(), None, bias)
