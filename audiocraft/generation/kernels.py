"""Triton kernels of one decoding step, each of which reads what it needs of the weights once.

They round where the layers in `modules/transformer.py` round: the residual stream is float32, what
a layer hands on is of the weights' type, sums are made in float32.

Block sizes follow from the shapes alone, never from a measurement: another choice would change the
order of sums, and so the codes, from one process to the next. They are made for an H100 (132
processors, 3.35 TB/s): a product reads some 8 to 32 KB of its weight per program and asks for all
of it before it waits for any, which with two to eight programs for each processor covers the 20 KB
that have to be on their way to each to keep the memory busy.
"""

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

_jit: Callable[[Callable[..., Any]], Any] = triton.jit


@_jit
def embed_kernel(
    sequence: tl.tensor,
    tables: tl.tensor,
    positions: tl.tensor,
    offsets: tl.tensor,
    next_step: tl.tensor,
    step: tl.tensor,
    x: tl.tensor,
    batch: tl.constexpr,
    max_steps: int,
    codebooks: tl.constexpr,
    dim: tl.constexpr,
    dtype: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Sum of the last tokens' embeddings, plus the position; `step` becomes the step at hand."""
    row = tl.program_id(0)
    n = tl.program_id(1) * block + tl.arange(0, block)
    inside = n < dim
    now = tl.load(next_step)
    if (row == 0) & (tl.program_id(1) == 0):
        tl.store(step, now)
    total = tl.zeros([block], tl.float32)
    for k in tl.static_range(codebooks):
        token = tl.load(sequence + ((row % batch) * codebooks + k) * max_steps + now - 1)
        table = tl.load(tables + k).to(tl.pointer_type(dtype))
        total += tl.load(table + token * dim + n, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(offsets + row) + now
    total = total.to(dtype).to(tl.float32)
    total += tl.load(positions + position * dim + n, mask=inside, other=0.0)
    tl.store(x + row * dim + n, total, mask=inside)


@_jit
def _normed(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    inside: tl.tensor,
    n: tl.tensor,
    dim: tl.constexpr,
    eps: tl.constexpr,
) -> tl.tensor:
    """LayerNorm of rows (rows, block), in float32."""
    mean = tl.sum(x, 1) / dim
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / dim + eps)
    w = tl.load(weight + n, mask=n < dim, other=0.0).to(tl.float32)
    b = tl.load(bias + n, mask=n < dim, other=0.0).to(tl.float32)
    return centred * scale[:, None] * w[None, :] + b[None, :]


@_jit
def norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    dim: tl.constexpr,
    eps: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """LayerNorm of one row."""
    row = tl.program_id(0)
    n = tl.arange(0, block)
    inside = (n < dim)[None, :]
    values = tl.load(x + row * dim + n[None, :], mask=inside, other=0.0)
    normed = _normed(values, weight, bias, inside, n, dim, eps)
    tl.store(out + row * dim + n[None, :], normed.to(out.dtype.element_ty), mask=inside)


@_jit
def _finish(
    y: tl.tensor,
    n: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_stride: tl.constexpr,
    keys: tl.tensor,
    values: tl.tensor,
    offsets: tl.tensor,
    step: tl.tensor,
    row_stride: int,
    head_stride: int,
    out_dim: tl.constexpr,
    head_dim: tl.constexpr,
    has_bias: tl.constexpr,
    kind: tl.constexpr,
    dtype: tl.constexpr,
) -> None:
    """What becomes of a product: bias, rounding, and where it goes."""
    if has_bias:
        y += tl.load(bias + n, mask=n < out_dim, other=0.0).to(tl.float32)
    y = y.to(dtype)
    if kind == "qkv":
        dim: tl.constexpr = out_dim // 3
        tl.store(out + row * out_stride + n, y, mask=inside & (n < dim))
        position = tl.load(offsets + row) + tl.load(step)
        within = n % dim
        place = row.to(tl.int64) * row_stride + (within // head_dim) * head_stride
        place += position * head_dim + within % head_dim
        cached = y.to(keys.dtype.element_ty)
        tl.store(keys + place, cached, mask=inside & (n >= dim) & (n < 2 * dim))
        tl.store(values + place, cached, mask=inside & (n >= 2 * dim))
    else:
        at = out + row * out_stride + n
        if kind == "add":
            tl.store(at, tl.load(at, mask=inside, other=0.0) + y.to(tl.float32), mask=inside)
        elif kind == "gelu":
            wide = y.to(tl.float32)
            wide = 0.5 * wide * (1.0 + tl.math.erf(wide * 0.7071067811865476))
            tl.store(at, wide.to(dtype), mask=inside)
        else:
            tl.store(at, y, mask=inside)


@_jit
def vector_kernel(
    x: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    offsets: tl.tensor,
    step: tl.tensor,
    row_stride: int,
    head_stride: int,
    rows: tl.constexpr,
    in_dim: tl.constexpr,
    out_dim: tl.constexpr,
    out_stride: tl.constexpr,
    head_dim: tl.constexpr,
    eps: tl.constexpr,
    has_norm: tl.constexpr,
    has_bias: tl.constexpr,
    is_table: tl.constexpr,
    kind: tl.constexpr,
    dtype: tl.constexpr,
    block_rows: tl.constexpr,
    block_in: tl.constexpr,
    block_out: tl.constexpr,
) -> None:
    """Few rows times some outputs: multiply and sum, with all of the inputs in one block."""
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    n = tl.program_id(1) * block_out + tl.arange(0, block_out)
    k = tl.arange(0, block_in)
    if is_table:
        weight = tl.load(weight + tl.program_id(2)).to(tl.pointer_type(dtype))
        weight = tl.multiple_of(weight, 16)
        if has_bias:
            bias = tl.load(bias + tl.program_id(2)).to(tl.pointer_type(dtype))
        out += tl.program_id(2) * out_dim
    w = tl.load(
        weight + n[None, :, None] * in_dim + k[None, None, :],
        mask=(n[None, :, None] < out_dim) & (k[None, None, :] < in_dim),
        other=0.0,
    )
    # They come while the norm is made: without this the compiler asks for them after the rows.
    tl.debug_barrier()
    inside = (r[:, None] < rows) & (k[None, :] < in_dim)
    v = tl.load(x + r[:, None] * in_dim + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if has_norm:
        v = _normed(v, norm_weight, norm_bias, inside, k, in_dim, eps).to(dtype).to(tl.float32)
    y = tl.sum(v[:, None, :] * w.to(tl.float32), 2)
    _finish(
        y,
        n[None, :],
        r[:, None],
        (n[None, :] < out_dim) & (r[:, None] < rows),
        bias,
        out,
        out_stride,
        keys,
        values,
        offsets,
        step,
        row_stride,
        head_stride,
        out_dim,
        head_dim,
        has_bias,
        kind,
        dtype,
    )


@_jit
def matrix_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    offsets: tl.tensor,
    step: tl.tensor,
    row_stride: int,
    head_stride: int,
    rows: tl.constexpr,
    in_dim: tl.constexpr,
    out_dim: tl.constexpr,
    out_stride: tl.constexpr,
    head_dim: tl.constexpr,
    has_bias: tl.constexpr,
    is_table: tl.constexpr,
    kind: tl.constexpr,
    dtype: tl.constexpr,
    block_rows: tl.constexpr,
    block_in: tl.constexpr,
    block_out: tl.constexpr,
) -> None:
    """Many rows times some outputs by the matrix units; the weight stands on their left."""
    # Programs that share a part of the weight are neighbours: only one reads it from memory.
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    n = tl.program_id(1) * block_out + tl.arange(0, block_out)
    if is_table:
        weight = tl.load(weight + tl.program_id(2)).to(tl.pointer_type(dtype))
        weight = tl.multiple_of(weight, 16)
        if has_bias:
            bias = tl.load(bias + tl.program_id(2)).to(tl.pointer_type(dtype))
        out += tl.program_id(2) * out_dim
    y = tl.zeros([block_out, block_rows], tl.float32)
    for start in range(0, in_dim, block_in):
        k = start + tl.arange(0, block_in)
        w = tl.load(
            weight + n[:, None] * in_dim + k[None, :],
            mask=(n[:, None] < out_dim) & (k[None, :] < in_dim),
            other=0.0,
        )
        v = tl.load(
            x + r[None, :] * in_dim + k[:, None],
            mask=(r[None, :] < rows) & (k[:, None] < in_dim),
            other=0.0,
        )
        y = tl.dot(w, v, y, input_precision="ieee")
    _finish(
        y,
        n[:, None],
        r[None, :],
        (n[:, None] < out_dim) & (r[None, :] < rows),
        bias,
        out,
        out_stride,
        keys,
        values,
        offsets,
        step,
        row_stride,
        head_stride,
        out_dim,
        head_dim,
        has_bias,
        kind,
        dtype,
    )


@_jit
def attention_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    lengths: tl.tensor,
    step: tl.tensor,
    row_stride: int,
    head_stride: int,
    scale: float,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    causal: tl.constexpr,
    splits: tl.constexpr,
    block_dim: tl.constexpr,
    block_time: tl.constexpr,
) -> None:
    """One row and head over one part of the filled positions; the last part adds them all up.

    Each of the `block_time` places of a block keeps a running maximum, sum and output of its own,
    so that threads wait for each other only at the end.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    row = pair // heads
    length = tl.load(lengths + row)
    if causal:
        length += tl.load(step) + 1
    part = tl.cdiv(tl.cdiv(length, splits), block_time) * block_time
    start = split * part
    if start >= length:
        return
    end = tl.minimum(start + part, length)
    d = tl.arange(0, block_dim)
    inside = d < head_dim
    query = tl.load(q + pair * head_dim + d, mask=inside, other=0.0).to(tl.float32) * scale
    base = row.to(tl.int64) * row_stride + (pair % heads) * head_stride
    # Not infinity: their difference would be no number where a place stays empty.
    highest = tl.full([block_time], -1e30, tl.float32)
    total = tl.zeros([block_time], tl.float32)
    mixed = tl.zeros([block_time, block_dim], tl.float32)
    while start < end:
        t = start + tl.arange(0, block_time)
        at = base + t[:, None] * head_dim + d[None, :]
        filled = (t[:, None] < end) & inside[None, :]
        key = tl.load(keys + at, mask=filled, other=0.0)
        value = tl.load(values + at, mask=filled, other=0.0)
        score = tl.sum(query[None, :] * key.to(tl.float32), 1)
        score = tl.where(t < end, score, float("-inf"))
        higher = tl.maximum(highest, score)
        fade = tl.exp(highest - higher)
        weight = tl.exp(score - higher)
        total = total * fade + weight
        mixed = mixed * fade[:, None] + weight[:, None] * value.to(tl.float32)
        highest = higher
        start += block_time
    top = tl.max(highest, 0)
    fade = tl.exp(highest - top)
    mass = tl.sum(total * fade, 0)
    result = tl.sum(mixed * fade[:, None], 0)
    if splits > 1:
        place = partial + (pair * splits + split) * (block_dim + 2)
        tl.store(place + d, result)
        tl.store(place + block_dim, mass)
        tl.store(place + block_dim + 1, top)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        last = tl.cdiv(length, part) - 1
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel", scope="gpu") != last:
            return
        tl.store(arrived + pair, 0)
        # Always in the order of the parts, whichever came last; past the cache of this processor.
        s = tl.arange(0, splits)
        places = partial + (pair * splits + s) * (block_dim + 2)
        tops = tl.load(
            places + block_dim + 1, mask=s <= last, other=float("-inf"), cache_modifier=".cg"
        )
        fade = tl.exp(tops - tl.max(tops, 0))
        masses = tl.load(places + block_dim, mask=s <= last, other=0.0, cache_modifier=".cg")
        mass = tl.sum(masses * fade, 0)
        results = tl.load(
            places[:, None] + d[None, :], mask=(s <= last)[:, None], other=0.0, cache_modifier=".cg"
        )
        result = tl.sum(results * fade[:, None], 0)
    tl.store(out + pair * head_dim + d, (result / mass).to(out.dtype.element_ty), mask=inside)


@_jit
def sample_kernel(
    logits: tl.tensor,
    settings: tl.tensor,
    top_k: tl.tensor,
    noise: tl.tensor,
    sequence: tl.tensor,
    next_step: tl.tensor,
    step: tl.tensor,
    max_steps: int,
    batch: tl.constexpr,
    branches: tl.constexpr,
    codebooks: tl.constexpr,
    card: tl.constexpr,
    choice: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """`Guidance.combine` and `sample_next` for one row and codebook; the token goes in its place.

    The k-th largest probability, or that at which the mass exceeds p, is found bit by bit: floats
    that are not negative have the order of their bits.
    """
    row = tl.program_id(0)
    codebook = tl.program_id(1)
    c = tl.arange(0, block)
    inside = c < card
    at = (row * codebooks + codebook) * card + c
    branch: tl.constexpr = batch * codebooks * card
    logit = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    if branches > 1:
        null = tl.load(logits + (branches - 1) * branch + at, mask=inside, other=0.0)
        null = null.to(tl.float32)
        if branches == 3:  # noqa: PLR2004 - double guidance
            wav = tl.load(logits + branch + at, mask=inside, other=0.0).to(tl.float32)
            logit = wav + tl.load(settings + 1) * (logit - wav)
        logit = null + tl.load(settings) * (logit - null)
    logit = tl.where(inside, logit, float("-inf"))
    if choice == "greedy":
        token = tl.argmax(logit, 0)
    else:
        logit = tl.div_rn(logit, tl.zeros_like(logit) + tl.load(settings + 2))
        exponential = tl.exp(logit - tl.max(logit, 0))
        prob = exponential / tl.sum(exponential, 0)
        bits = tl.where(inside, prob.to(tl.int32, bitcast=True), -1)
        bound = 0
        if choice == "top_k":
            kept = tl.load(top_k)
            for bit in range(30):
                higher = bound | (1 << (29 - bit))
                if tl.sum((bits >= higher).to(tl.int32), 0) >= kept:
                    bound = higher
            keep = bits >= bound
        else:
            mass = tl.load(settings + 3)
            for bit in range(30):
                higher = bound | (1 << (29 - bit))
                if tl.sum(tl.where(bits >= higher, prob, 0.0), 0) > mass:
                    bound = higher
            # Of equal tokens at the bound those with the lower numbers come first.
            equal = bits == bound
            before = tl.sum(tl.where(bits > bound, prob, 0.0), 0)
            before += (tl.cumsum(equal.to(tl.int32), 0) - 1).to(tl.float32) * prob
            keep = (bits > bound) | (equal & (before <= mass))
        prob = tl.where(keep, prob, 0.0)
        total = tl.sum(prob, 0)
        if choice == "top_k":
            total = tl.where(kept < card, total, 1.0)
        prob = prob / total
        race = prob / tl.load(noise + at, mask=inside, other=1.0)
        token = tl.argmax(tl.where(inside, race, -1.0), 0)
    token = tl.minimum(token, card - 1)  # a place beyond, where a logit is no number
    now = tl.load(step)
    place = sequence + (row * codebooks + codebook) * max_steps + now
    known = tl.load(place)
    tl.store(place, tl.where(known < 0, token.to(tl.int64), known))
    if (row == 0) & (codebook == 0):
        tl.store(next_step, now + 1)
