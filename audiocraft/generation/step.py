"""One decoding step on a GPU: its buffers, and the kernels that it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from audiocraft.generation import kernels
from audiocraft.generation.weights import Projection, Weights
from audiocraft.modules.transformer import attention_dtype, sin_embedding

Kind = Literal["store", "gelu", "add", "qkv"]
Choice = Literal["greedy", "top_k", "top_p"]

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
# Up to here the ordinary units keep up with the memory; the matrix units take 8 rows or more.
_MAX_VECTOR_ROWS = 4
# Programs of attention that keep an H100 busy: four for each of its processors.
_ATTENTION_PROGRAMS = 528
_MAX_SPLITS = 16
_ATTENTION_BLOCK = 4096
"""Keys of one block of attention, in values."""


@dataclass(frozen=True)
class Size:
    """What a request needs room for.

    Attributes:
        batch: B, rows of the result.
        branches: of guidance; the decoder has R = branches * B rows.
        steps: S, steps of the pattern.
        positions: T, positions of self-attention, the prefix included.
        memory: M, positions of cross-attention; 0 without.
    """

    batch: int
    branches: int
    steps: int
    positions: int
    memory: int

    @property
    def rows(self) -> int:
        """R."""
        return self.batch * self.branches

    def rounded(self) -> "Size":
        """A little more, so that requests of about this size find room as well."""

        def up(value: int) -> int:
            return -(-value // 64) * 64

        return Size(self.batch, self.branches, up(self.steps), up(self.positions), up(self.memory))

    def covers(self, other: "Size") -> bool:
        """Whether another request finds room in this one."""
        same = (self.batch, self.branches) == (other.batch, other.branches)
        return same and all(
            getattr(self, name) >= getattr(other, name) for name in ("steps", "positions", "memory")
        )


@dataclass(frozen=True)
class Buffers:
    """What a step reads and writes besides the weights; always in the same place.

    Attributes:
        keys: (L, R, H, T, D) of self-attention.
        values: likewise.
        memory_keys: (L, R, H, M, D) of cross-attention.
        memory_values: likewise.
        lengths: (R,) int32, positions of cross-attention that are filled.
        sequence: (B, K, S) int64, the tokens in their pattern, -1 where they are to be found.
        offsets: (R,) int32, position of a row's last token, less the step that is to be found.
        next_step: (1,) int32, the step that is to be found next.
        step: (1,) int32, the one being found.
        settings: (4,) float32: cfg_coef, cfg_coef_beta, temperature, top_p.
        top_k: (1,) int32, from 1 to card.
        noise: (B, K, card) float32, exponentially distributed.
        positions: (T, dim) float32, what is added for each.
        embeddings: (K,) int64, addresses of the embeddings.
        heads: (K,) int64, addresses of the heads' weights.
        head_biases: (K,) int64, addresses of the heads' biases, if they have any.
        x: (R, dim) float32, the residual stream.
        normed: (R, dim), behind a LayerNorm.
        query: (R, dim).
        mixed: (R, dim), out of attention.
        hidden: (R, hidden), of the feed-forward layer.
        logits: (R, K, card).
        partial: (R * H * splits, D + 2) float32, parts of attention with their sum and maximum.
        arrived: (R * H,) int32, parts that are done; 0 between steps.
    """

    keys: Tensor
    values: Tensor
    memory_keys: Tensor
    memory_values: Tensor
    lengths: Tensor
    sequence: Tensor
    offsets: Tensor
    next_step: Tensor
    step: Tensor
    settings: Tensor
    top_k: Tensor
    noise: Tensor
    positions: Tensor
    embeddings: Tensor
    heads: Tensor
    head_biases: Tensor
    x: Tensor
    normed: Tensor
    query: Tensor
    mixed: Tensor
    hidden: Tensor
    logits: Tensor
    partial: Tensor
    arrived: Tensor


def allocate(weights: Weights, size: Size, device: torch.device) -> Buffers:
    """Buffers for requests of a size, in a state in which a step can run."""
    config, dtype = weights.config, weights.dtype
    rows, dim, heads = size.rows, config.dim, config.num_heads
    head_dim, codebooks, card = dim // heads, len(weights.heads), weights.card
    splits = attention_splits(rows, heads)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def cached(length: int) -> Tensor:
        shape = (config.num_layers, rows, heads, length, head_dim)
        return empty(*shape, dtype=attention_dtype(device, dtype))

    def addresses(tensors: Sequence[Tensor | None]) -> Tensor:
        given = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        return torch.tensor(given, dtype=torch.int64, device=device)

    buffers = Buffers(
        keys=cached(size.positions),
        values=cached(size.positions),
        memory_keys=cached(size.memory),
        memory_values=cached(size.memory),
        lengths=empty(rows, dtype=torch.int32),
        sequence=empty(size.batch, codebooks, size.steps, dtype=torch.int64),
        offsets=empty(rows, dtype=torch.int32),
        next_step=empty(1, dtype=torch.int32),
        step=empty(1, dtype=torch.int32),
        settings=empty(4, dtype=torch.float32),
        top_k=empty(1, dtype=torch.int32),
        noise=empty(size.batch, codebooks, card, dtype=torch.float32),
        positions=sin_embedding(torch.arange(size.positions, device=device), dim),
        embeddings=addresses(weights.embeddings),
        heads=addresses([head.weight for head in weights.heads]),
        head_biases=addresses([head.bias for head in weights.heads]),
        x=empty(rows, dim, dtype=torch.float32),
        normed=empty(rows, dim),
        query=empty(rows, dim),
        mixed=empty(rows, dim),
        hidden=empty(rows, dim * config.hidden_scale),
        logits=empty(rows, codebooks, card),
        partial=empty(rows * heads * splits, _block(head_dim) + 2, dtype=torch.float32),
        arrived=empty(rows * heads, dtype=torch.int32),
    )
    reset(buffers)
    return buffers


def reset(buffers: Buffers) -> None:
    """Back to a state in which a step can run, whatever the last request left."""
    buffers.lengths.fill_(1)
    buffers.sequence.zero_()
    buffers.offsets.fill_(-1)
    buffers.next_step.fill_(1)
    buffers.settings.fill_(1)
    buffers.top_k.fill_(1)
    buffers.noise.fill_(1)
    buffers.arrived.zero_()


def run_step(weights: Weights, buffers: Buffers, choice: Choice) -> None:
    """Queue the kernels of one step.

    Args:
        weights: of the language model.
        buffers: `next_step` says which step is to be found; its tokens then stand in `sequence`.
        choice: how they are chosen.
    """
    _embed(weights, buffers)
    for index, layer in enumerate(weights.layers):
        keys, values = buffers.keys[index], buffers.values[index]
        _project(weights, buffers, layer.qkv, buffers.x, buffers.query, "qkv", (keys, values))
        _attend(buffers, keys, values, causal=True)
        _project(weights, buffers, layer.out, buffers.mixed, buffers.x, "add")
        if layer.cross is not None:
            query, out = layer.cross
            _project(weights, buffers, query, buffers.x, buffers.query, "store")
            memory = buffers.memory_keys[index], buffers.memory_values[index]
            _attend(buffers, *memory, causal=False)
            _project(weights, buffers, out, buffers.mixed, buffers.x, "add")
        _project(weights, buffers, layer.up, buffers.x, buffers.hidden, "gelu")
        _project(weights, buffers, layer.down, buffers.hidden, buffers.x, "add")
    _project(weights, buffers, weights.heads[0], buffers.x, buffers.logits, "store", is_head=True)
    _sample(weights, buffers, choice)


def _block(size: int) -> int:
    power: int = triton.next_power_of_2(size)
    return power


def _embed(weights: Weights, buffers: Buffers) -> None:
    rows, dim = buffers.x.shape
    batch, codebooks, max_steps = buffers.sequence.shape
    block = min(_block(dim), 256)
    kernels.embed_kernel[(rows, triton.cdiv(dim, block))](
        buffers.sequence,
        buffers.embeddings,
        buffers.positions,
        buffers.offsets,
        buffers.next_step,
        buffers.step,
        buffers.x,
        max_steps=max_steps,
        batch=batch,
        codebooks=codebooks,
        dim=dim,
        dtype=_DTYPES[weights.dtype],
        block=block,
        num_warps=4,
    )


def vector_blocks(out_dim: int, in_dim: int, itemsize: int) -> tuple[int, int, int]:
    """Outputs and inputs of a program of `vector_kernel`, and its warps.

    Mostly 8 to 32 KB of the weight. Wide products are cut into fewer pieces, as each piece makes
    the LayerNorm again.
    """
    block_in = max(_block(in_dim), 16)
    block_out = 8 if out_dim >= 3072 else 4  # noqa: PLR2004 - the narrowest release's wide ones
    block_out = max(block_out, 4096 // block_in)
    while block_out > 1 and block_out * block_in * itemsize > 32 * 1024:
        block_out //= 2
    return block_out, block_in, 4 if block_in <= 2048 else 8  # noqa: PLR2004 - 16 inputs a thread


def matrix_blocks(rows: int, out_dim: int, in_dim: int) -> tuple[int, int, int]:
    """Rows, outputs and inputs of a program of `matrix_kernel`.

    Three blocks of inputs are on their way at a time, within the 99 KB of consumer cards.
    """
    block_rows = min(max(_block(rows), 16), 64)
    block_out = 32 if out_dim >= 4096 else 16  # noqa: PLR2004 - a program or more a processor
    return block_rows, block_out, min(max(_block(in_dim), 16), 8192 // max(block_rows, 32))


def has_matrix_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are units for products of a type that Triton can use."""
    if dtype == torch.float32:  # TF32 would round
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _project(
    weights: Weights,
    buffers: Buffers,
    projection: Projection,
    x: Tensor,
    out: Tensor,
    kind: Kind,
    cache: tuple[Tensor, Tensor] | None = None,
    is_head: bool = False,
) -> None:
    """One product, from (R, in) to (R, out); of the heads all at once."""
    out_dim, in_dim = projection.weight.shape
    rows, dtype = len(x), weights.dtype
    heads = len(weights.heads) if is_head else 1
    keys, values = cache or (buffers.keys[0], buffers.values[0])
    weight, bias = projection.weight, projection.bias
    if is_head:
        weight, bias = buffers.heads, None if bias is None else buffers.head_biases
    shared: dict[str, Any] = {
        "row_stride": keys.stride(0),
        "head_stride": keys.stride(1),
        "rows": rows,
        "in_dim": in_dim,
        "out_dim": out_dim,
        "out_stride": out.stride(0),
        "head_dim": keys.shape[-1],
        "has_bias": bias is not None,
        "is_table": is_head,
        "kind": kind,
        "dtype": _DTYPES[dtype],
    }
    if bias is None:
        bias = weight
    if rows > _MAX_VECTOR_ROWS and has_matrix_units(x.device, dtype):
        if projection.norm is not None:
            gain, shift, eps = projection.norm
            kernels.norm_kernel[(rows,)](
                x, gain, shift, buffers.normed, dim=in_dim, eps=eps, block=_block(in_dim)
            )
            x = buffers.normed
        block_rows, block_out, block_in = matrix_blocks(rows, out_dim * heads, in_dim)
        grid = triton.cdiv(rows, block_rows), triton.cdiv(out_dim, block_out), heads
        kernels.matrix_kernel[grid](
            x,
            weight,
            bias,
            out,
            keys,
            values,
            buffers.offsets,
            buffers.step,
            block_rows=block_rows,
            block_in=block_in,
            block_out=block_out,
            num_warps=4,
            num_stages=4,
            **shared,
        )
        return
    gain, shift, eps = projection.norm or (weight, weight, 0.0)
    block_rows = min(_block(rows), _MAX_VECTOR_ROWS)
    block_out, block_in, warps = vector_blocks(out_dim * heads, in_dim, dtype.itemsize)
    grid = triton.cdiv(rows, block_rows), triton.cdiv(out_dim, block_out), heads
    kernels.vector_kernel[grid](
        x,
        gain,
        shift,
        weight,
        bias,
        out,
        keys,
        values,
        buffers.offsets,
        buffers.step,
        eps=eps,
        has_norm=projection.norm is not None,
        block_rows=block_rows,
        block_in=block_in,
        block_out=block_out,
        num_warps=warps,
        **shared,
    )


def attention_splits(rows: int, heads: int) -> int:
    """Parts into which the positions of a row and head are cut; by their numbers alone."""
    most = max(_ATTENTION_PROGRAMS // (rows * heads), 1)
    return min(1 << (most.bit_length() - 1), _MAX_SPLITS)


def _attend(buffers: Buffers, keys: Tensor, values: Tensor, causal: bool) -> None:
    """From `query` to `mixed`, over keys and values (R, H, T, D)."""
    rows, heads, _, head_dim = keys.shape
    splits = attention_splits(rows, heads) if causal else 1
    block_dim = _block(head_dim)
    kernels.attention_kernel[(rows * heads, splits)](
        buffers.query,
        keys,
        values,
        buffers.mixed,
        buffers.partial,
        buffers.arrived,
        buffers.offsets if causal else buffers.lengths,
        buffers.step,
        row_stride=keys.stride(0),
        head_stride=keys.stride(1),
        scale=head_dim**-0.5,
        heads=heads,
        head_dim=head_dim,
        causal=causal,
        splits=splits,
        block_dim=block_dim,
        block_time=max(min(_ATTENTION_BLOCK // block_dim, 64), 16),
        num_warps=4,
    )


def _sample(weights: Weights, buffers: Buffers, choice: Choice) -> None:
    batch, codebooks, max_steps = buffers.sequence.shape
    kernels.sample_kernel[(batch, codebooks)](
        buffers.logits,
        buffers.settings,
        buffers.top_k,
        buffers.noise,
        buffers.sequence,
        buffers.next_step,
        buffers.step,
        max_steps=max_steps,
        batch=batch,
        branches=len(buffers.x) // batch,
        codebooks=codebooks,
        card=weights.card,
        choice=choice,
        block=_block(weights.card),
        num_warps=4,
        enable_fp_fusion=False,  # rounded as the same sums are elsewhere
    )
