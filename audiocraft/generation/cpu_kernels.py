"""What a decoding step on a CPU is made of, compiled by numba (which needs no compiler there).

All threads of a step run `run_step` together, each its share of the output of every product, and
wait for each other in between. Weights are read once, one row after the other, whatever the number
of rows of the input: reading them is nearly all of the work.

The functions are inlined, or numba would compile them more than once, not to the same instructions,
and a process that compiles would round unlike those that find the outcome on the disk. They stand
in one file, for numba looks at that of `run_step` to see whether the outcome is out of date.

Arrays are named by their shape: L layers, R rows, H heads, D width of a head, T positions. A weight
with 16 bits (bfloat16) is an array of uint16 here, for numpy has no name for it.
"""

import platform
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from audiocraft.modules.linear import INT8_LEVELS

_FAST: Final = {
    "nogil": True,
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},  # sums in any order; NaN stays NaN
    "error_model": "numpy",  # a quotient by zero is no error
}
_Decorator = Callable[[Callable[..., Any]], Any]
_inlined: _Decorator = njit(forceinline=True, **_FAST)
_exact: _Decorator = njit(forceinline=True, **{**_FAST, "fastmath": {"contract"}})
_intrinsic: _Decorator = intrinsic
_literal: _Decorator = intrinsic(prefer_literal=True)
_LANES: Final = 32
"""Products that are made at once, in as many registers as the CPU needs for them."""
_INT32 = 2**31 - 1
_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH = np.float32(0.693359375)  # so few bits that its multiples are exact
_LN_2_LOW = np.float32(-2.12194440054690583e-4)
_LEAST_EXPONENT = np.float32(-87.0)
_SPINS = 4000
"""Looks at a barrier, some 50 microseconds, before a thread sleeps between them.

With two other programs on two cores, threads that yielded the core instead made 5 to 13 steps of
`small` a second with 8 bits; those that sleep make 13 to 20, on a free machine as many as before.
"""
_NAP = np.uint32(20)  # microseconds
_QUERY_KEY_VALUE, _OUT, _CROSS_QUERY, _CROSS_OUT, _HIDDEN, _DOWN, _HEAD = range(7)
"""Products of a layer, as they come one after the other, and what is behind all layers."""
_GRAIN = 16
"""Numbers of a cache line, which two threads should not write to."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()


@_intrinsic
def pointer(_typing: Any, tag: Any, address: Any) -> Any:
    """A pointer to numbers of an array's type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return types.CPointer(tag.dtype)(tag, address), codegen


@_intrinsic
def ahead(_typing: Any, start: Any, count: Any) -> Any:
    """A pointer `count` numbers ahead."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return start(start, count), codegen


def _widen(builder: Any, value: Any, lanes: int) -> Any:
    """Numbers as they are summed: 16 bits become float32, integers become 32 bits."""

    def kind(scalar: Any) -> Any:
        return ir.VectorType(scalar, lanes) if lanes else scalar

    element = value.type.element if lanes else value.type
    if element == _F32:
        return value
    if element == _I8:
        return builder.sext(value, kind(_I32))
    shift = ir.Constant(kind(_I32), [16] * lanes if lanes else 16)
    return builder.bitcast(builder.shl(builder.zext(value, kind(_I32)), shift), kind(_F32))


@_intrinsic
def widen(_typing: Any, value: Any) -> Any:
    """A float32, or the float32 of a bfloat16."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _widen(builder, args[0], 0)

    return types.float32(value), codegen


@_intrinsic
def holds_integers(_typing: Any, tag: Any) -> Any:
    """Whether an array's numbers are integers, known when it is compiled."""

    def codegen(_context: Any, _builder: Any, _signature: Any, _args: Any) -> Any:
        return cgutils.true_bit if isinstance(tag.dtype, types.Integer) else cgutils.false_bit

    return types.boolean(tag), codegen


@_intrinsic
def narrow(_typing: Any, tag: Any, value: Any) -> Any:
    """A float32, rounded to the nearest number of an array's type: float32, bfloat16 or int16."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        number = args[1]
        if tag.dtype == types.float32:
            return number
        if tag.dtype == types.int16:
            floor = ir.FunctionType(_F32, [_F32])
            lower = cgutils.get_or_insert_function(builder.module, floor, "llvm.floor.f32")
            return builder.fptosi(builder.call(lower, [builder.fadd(number, _F32(0.5))]), _I16)
        bits = builder.bitcast(number, _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)

    return tag.dtype(tag, value), codegen


@_intrinsic
def power_of_two(_typing: Any, exponent: Any) -> Any:
    """2 ** exponent of a float32 that is a whole number, from -126 to 127."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], _I32), _I32(127))
        return builder.bitcast(builder.shl(biased, _I32(23)), _F32)

    return types.float32(exponent), codegen


@_literal
def dots(_typing: Any, weight: Any, inputs: Any, stride: Any, count: Any, rows: Any) -> Any:
    """A weight's row times rows of the input.

    Args:
        weight: pointer to `count` numbers of float32, bfloat16 or int8.
        inputs: pointer to the first row's, float32, or int16 where the weight is int8.
        stride: numbers from one row's to the next.
        count: how many products are summed.
        rows: how many sums, as a literal.

    Returns:
        The sums, float32 or int32.
    """
    sums = rows.literal_value
    is_integer = weight.dtype == types.int8
    result = types.int32 if is_integer else types.float32
    signature = types.UniTuple(result, sums)(weight, inputs, stride, count, rows)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        weight_at, inputs_at, stride, count, _ = args
        lanes = _LANES // 2 if is_integer else _LANES
        total = ir.VectorType(_I32 if is_integer else _F32, lanes)
        totals = [cgutils.alloca_once_value(builder, ir.Constant(total, None)) for _ in range(sums)]

        def row(index: int, at: Any) -> Any:
            return builder.gep(inputs_at, [builder.add(at, builder.mul(stride, _I64(index)))])

        def load(at: Any, numbers: Any) -> Any:
            vector = ir.VectorType(context.get_value_type(numbers.dtype), _LANES)
            at = builder.bitcast(at, vector.as_pointer())
            return builder.load(at, align=numbers.dtype.bitwidth // 8)

        def halves(products: Any) -> Any:
            """Sums of neighbours: what CPUs have an instruction for, from products of 16 bits."""
            even, odd = (
                ir.Constant(ir.VectorType(_I32, lanes), list(range(start, _LANES, 2)))
                for start in (0, 1)
            )
            return builder.add(
                builder.shuffle_vector(products, products, even),
                builder.shuffle_vector(products, products, odd),
            )

        whole = builder.sdiv(count, _I64(_LANES))
        with cgutils.for_range(builder, whole) as loop:
            at = builder.mul(loop.index, _I64(_LANES))
            factors = _widen(builder, load(builder.gep(weight_at, [at]), weight), _LANES)
            for index in range(sums):
                numbers = load(row(index, at), inputs)
                before = builder.load(totals[index])
                if is_integer:
                    numbers = builder.sext(numbers, ir.VectorType(_I32, _LANES))
                    after = builder.add(before, halves(builder.mul(factors, numbers)))
                else:
                    after = _multiply_add(builder, factors, numbers, before)
                builder.store(after, totals[index])
        results = [
            cgutils.alloca_once_value(builder, _sum(builder, builder.load(each))) for each in totals
        ]
        with cgutils.for_range_slice(builder, builder.mul(whole, _I64(_LANES)), count, _I64(1)) as (
            at,
            _,
        ):
            factor = _widen(builder, builder.load(builder.gep(weight_at, [at])), 0)
            for index in range(sums):
                number = builder.load(row(index, at))
                before = builder.load(results[index])
                if is_integer:
                    product = builder.mul(factor, builder.sext(number, _I32))
                    after = builder.add(before, product)
                else:
                    after = _multiply_add(builder, factor, number, before)
                builder.store(after, results[index])
        return cgutils.pack_array(builder, [builder.load(each) for each in results])

    return signature, codegen


def _multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    flags = ("reassoc", "contract")
    return builder.fadd(total, builder.fmul(left, right, flags=flags), flags=flags)


def _sum(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes."""
    kind, lanes = vector.type.element, vector.type.count
    if kind == _I32:
        function = ir.FunctionType(_I32, [vector.type])
        name = f"llvm.vector.reduce.add.v{lanes}i32"
        reduce = cgutils.get_or_insert_function(builder.module, function, name)
        return builder.call(reduce, [vector])
    function = ir.FunctionType(_F32, [_F32, vector.type])
    name = f"llvm.vector.reduce.fadd.v{lanes}f32"
    reduce = cgutils.get_or_insert_function(builder.module, function, name)
    return builder.call(reduce, [_F32(0.0), vector], fastmath=("reassoc",))


@_intrinsic
def arrive(_typing: Any, counter: Any) -> Any:
    """Add one to a counter that other threads look at, behind all that was written before."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], _I64(1), "acq_rel")

    return types.int64(counter), codegen


@_intrinsic
def arrived(_typing: Any, counter: Any) -> Any:
    """A counter, before all that is read behind."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if platform.machine() in {"x86_64", "AMD64"}:  # leave the core to its other thread
            nothing = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, nothing, name), [])
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(counter), codegen


_sleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@_exact
def meet(counter: Any, count: int) -> bool:
    """Wait until `count` arrivals have been counted, this one included.

    Args:
        counter: (2,): arrivals, and what is not 0 once a thread will not come.
        count: that are waited for.

    Returns:
        Whether all have come.
    """
    arrivals = pointer(counter, counter.ctypes.data)
    arrive(arrivals)
    spins = 0
    while arrived(arrivals) < count:
        spins += 1
        if spins > _SPINS:
            if arrived(ahead(arrivals, 1)):
                return False
            _sleep(_NAP)
    return True


@_exact
def share(size: int, thread: int, threads: int) -> tuple[int, int]:
    """First and last of `size` numbers that are a thread's; cache lines stay whole."""
    grains = (size + _GRAIN - 1) // _GRAIN
    first, last = grains * thread // threads, grains * (thread + 1) // threads
    return min(first * _GRAIN, size), min(last * _GRAIN, size)


@_exact
def exponential(x: Any) -> Any:
    """Power of e, of a float32 up to 88, to 2e-7 of it; of less than -87 it is that of -87."""
    x = max(x, _LEAST_EXPONENT)
    power = np.floor(x * _LOG2_E + np.float32(0.5))
    rest = (x - power * _LN_2_HIGH) - power * _LN_2_LOW
    series = np.float32(1 / 5040)
    series = series * rest + np.float32(1 / 720)
    series = series * rest + np.float32(1 / 120)
    series = series * rest + np.float32(1 / 24)
    series = series * rest + np.float32(1 / 6)
    series = series * rest + np.float32(0.5)
    series = series * rest + np.float32(1)
    series = series * rest + np.float32(1)
    return series * power_of_two(power)


@_exact
def gelu(x: Any) -> Any:
    """The exact GELU of a float32.

    The error function's complement is Abramowitz and Stegun's 7.1.26, to 1.5e-7.
    """
    size = abs(x) * np.float32(0.7071067811865476)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * size)
    series = np.float32(1.061405429)
    series = series * t - np.float32(1.453152027)
    series = series * t + np.float32(1.421413741)
    series = series * t - np.float32(0.284496736)
    series = series * t + np.float32(0.254829592)
    tail = np.float32(0.5) * series * t * exponential(-size * size)
    return x * (np.float32(1) - tail if x > 0 else tail)


@_inlined
def normalize(x: Any, gain: Any, bias: Any, eps: float, out: Any) -> None:
    """LayerNorm of rows (R, dim)."""
    rows, dim = x.shape
    for row in range(rows):
        total = np.float32(0)
        for i in range(dim):
            total += x[row, i]
        mean = total / np.float32(dim)
        square = np.float32(0)
        for i in range(dim):
            square += (x[row, i] - mean) ** 2
        scale = np.float32(1) / np.sqrt(square / np.float32(dim) + eps)
        for i in range(dim):
            out[row, i] = (x[row, i] - mean) * scale * gain[i] + bias[i]


@_inlined
def load_inputs(x: Any, inputs: Any, scales: Any) -> None:
    """Rows (R, in) as a product takes them, and what their sums are to be multiplied with.

    Float32 stays as it is. Where weights are integers, a row is scaled by its largest magnitude to
    integers of as many bits as a sum of products leaves in 32.
    """
    rows, width = x.shape
    levels = np.float32(min(32767, _INT32 // (INT8_LEVELS * width)))
    for row in range(rows):
        steps = np.float32(1)
        if holds_integers(inputs):
            largest = np.float32(1e-12)
            for i in range(width):
                largest = max(largest, abs(x[row, i]))
            steps = levels / largest
        for i in range(width):
            inputs[row * width + i] = narrow(inputs, x[row, i] * steps)
        scales[row] = np.float32(1) / steps


@_inlined
def multiply(
    product: Any,
    weights: Any,
    inputs: Any,
    scales: Any,
    width: int,
    out: Any,
    offset: int,
    first: int,
    last: int,
    adds: bool,
) -> None:
    """Outputs `first` to `last` of a product.

    Args:
        product: addresses of the weight (out, in), the factors (out,) and the biases (out,).
        weights: any array of the weight's type.
        inputs: of `load_inputs`.
        scales: of `load_inputs`.
        width: in.
        out: (R, offset + out or more), float32.
        offset: of the first output in `out`.
        first: of the outputs.
        last: of the outputs, not included.
        adds: to what is in `out`.
    """
    weight = pointer(weights, product[0])
    factors = pointer(scales, product[1])
    biases = pointer(scales, product[2])
    start = pointer(inputs, inputs.ctypes.data)
    rows = out.shape[0]
    for n in range(first, last):
        own = ahead(weight, n * width)
        row = 0
        while row < rows:
            at = ahead(start, row * width)
            if rows - row >= 4:  # noqa: PLR2004
                sums = dots(own, at, width, width, 4)
                _put(sums, out, row, offset + n, factors[n], scales, biases[n], adds)
                row += 4
            elif rows - row >= 2:  # noqa: PLR2004
                pair = dots(own, at, width, width, 2)
                _put(pair, out, row, offset + n, factors[n], scales, biases[n], adds)
                row += 2
            else:
                one = dots(own, at, width, width, 1)
                _put(one, out, row, offset + n, factors[n], scales, biases[n], adds)
                row += 1


@_inlined
def _put(
    sums: Any, out: Any, row: int, n: int, factor: Any, scales: Any, bias: Any, adds: bool
) -> None:
    for i in range(len(sums)):
        value = np.float32(sums[i]) * (factor * scales[row + i]) + bias
        out[row + i, n] = out[row + i, n] + value if adds else value


@_inlined
def attend(query: Any, keys: Any, values: Any, length: int, scores: Any, out: Any) -> None:
    """Attention of one head to the first positions of its keys and values.

    Args:
        query: (D,), float32; it is scaled in place.
        keys: (T, D), float32 or bfloat16.
        values: likewise.
        length: how many positions.
        scores: room for `length` numbers, float32.
        out: (D,), float32.
    """
    dim = query.shape[0]
    scale = np.float32(1) / np.sqrt(np.float32(dim))
    for d in range(dim):
        query[d] *= scale
    start = pointer(query, query.ctypes.data)
    key = pointer(keys, keys.ctypes.data)
    largest = np.float32(-np.inf)
    for t in range(length):
        score = dots(ahead(key, t * dim), start, dim, dim, 1)[0]
        scores[t] = score
        largest = max(largest, score)
    total = np.float32(0)
    for t in range(length):
        weight = exponential(scores[t] - largest)
        scores[t] = weight
        total += weight
    for d in range(dim):
        out[d] = 0
    t = 0
    while t + 4 <= length:
        a, b, c, e = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
        for d in range(dim):
            out[d] += (
                a * widen(values[t, d])
                + b * widen(values[t + 1, d])
                + c * widen(values[t + 2, d])
                + e * widen(values[t + 3, d])
            )
        t += 4
    while t < length:
        for d in range(dim):
            out[d] += scores[t] * widen(values[t, d])
        t += 1
    for d in range(dim):
        out[d] /= total


def _compiled(function: Callable[..., None]) -> Any:
    """By numba, which keeps the outcome for later processes where it finds a place to write."""
    try:
        return njit(cache=True, **_FAST)(function)
    except RuntimeError:
        return njit(**_FAST)(function)


@_compiled
def run_step(
    thread: int,
    threads: int,
    counter: Any,
    weights: Any,
    products: Any,
    norms: Any,
    eps: float,
    crosses: bool,
    memory_keys: Any,
    memory_values: Any,
    keys: Any,
    values: Any,
    position: int,
    x: Any,
    projected: Any,
    mixed: Any,
    hidden: Any,
    normed: Any,
    inputs: Any,
    scales: Any,
    scores: Any,
    logits: Any,
) -> None:
    """One thread's share of a step.

    Products of all kinds are made in one place here, so that they are compiled once.

    Args:
        thread: which, from 0.
        threads: how many run.
        counter: (2,), int64, 0 before the step; see `meet`.
        weights: any array of the weights' type.
        products: (6 L + K, 3), see `multiply`: of each layer query, key and value; output; the
            query of cross-attention; its output; both feed-forward layers. Behind them the heads.
        norms: (3 L + 1, 2, dim), gains and biases, float32: of each layer's self-attention,
            cross-attention and feed-forward layers, and the last one before the heads.
        eps: of the norms.
        crosses: whether there is cross-attention.
        memory_keys: (L, R, H, M, D).
        memory_values: likewise.
        keys: (L, R, H, T, D); the step's are written to `position`.
        values: likewise.
        position: of the step.
        x: the residual stream (R, dim), position added, float32; it is changed.
        projected: room for (R, 3 dim).
        mixed: room for (R, dim).
        hidden: room for (R, hidden).
        normed: this thread's room for (R, dim).
        inputs: this thread's, for R times the widest input, float32 or int16.
        scales: this thread's, (R,).
        scores: this thread's, (T or M,).
        logits: (R, K card), float32.
    """
    rows, dim = x.shape
    layers, _, heads, _, head_dim = keys.shape
    codebooks = len(products) - _HEAD * layers
    card = logits.shape[1] // codebooks
    tasks = rows * heads
    own_tasks = range(tasks * thread // threads, tasks * (thread + 1) // threads)
    met = 0
    for index in range(len(products)):
        layer = index // _HEAD
        part = index % _HEAD if layer < layers else _HEAD
        if not crosses and part in (_CROSS_QUERY, _CROSS_OUT):
            continue
        source, out, size, offset = normed, x, dim, 0
        if part == _QUERY_KEY_VALUE:
            out, size = projected, 3 * dim
        elif part in (_OUT, _CROSS_OUT):
            source = mixed
        elif part == _CROSS_QUERY:
            out = projected
        elif part == _HIDDEN:
            out, size = hidden, hidden.shape[1]
        elif part == _DOWN:
            source = hidden
        else:
            out, size, offset = logits, card, (index - _HEAD * layers) * card
        if part != _HEAD or offset == 0:  # all heads have the same inputs
            if part in (_QUERY_KEY_VALUE, _CROSS_QUERY, _HIDDEN, _HEAD):
                norm = min(3 * layer + part // 2, 3 * layers)
                normalize(x, norms[norm, 0], norms[norm, 1], eps, normed)
            load_inputs(source, inputs, scales)
        begin, end = share(size, thread, threads)
        width, adds = source.shape[1], part in (_OUT, _CROSS_OUT, _DOWN)
        multiply(products[index], weights, inputs, scales, width, out, offset, begin, end, adds)
        if part == _HEAD:
            continue
        if part == _HIDDEN:
            for row in range(rows):
                for i in range(begin, end):
                    hidden[row, i] = gelu(hidden[row, i])
        met += threads
        if not meet(counter, met):
            return
        if part not in (_QUERY_KEY_VALUE, _CROSS_QUERY):
            continue
        some_keys, some_values, length = memory_keys, memory_values, memory_keys.shape[3]
        if part == _QUERY_KEY_VALUE:
            some_keys, some_values, length = keys, values, position + 1
        for task in own_tasks:
            row, head = task // heads, task % heads
            at = head * head_dim
            if part == _QUERY_KEY_VALUE:
                for d in range(head_dim):
                    keys[layer, row, head, position, d] = narrow(keys, projected[row, dim + at + d])
                    values[layer, row, head, position, d] = narrow(
                        values, projected[row, 2 * dim + at + d]
                    )
            attend(
                projected[row, at : at + head_dim],
                some_keys[layer, row, head],
                some_values[layer, row, head],
                length,
                scores,
                mixed[row, at : at + head_dim],
            )
        met += threads
        if not meet(counter, met):
            return
