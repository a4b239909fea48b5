"""One step of the decoder on a CPU: its weights, its room and its threads, for `cpu_kernels.py`."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from audiocraft.modules.linear import Int8Weight, Linear
from audiocraft.modules.transformer import (
    Attention,
    KVCache,
    Memory,
    Norm,
    Transformer,
    TransformerLayer,
    sin_embedding,
)

logger = logging.getLogger(__name__)

_MOST_THREADS: Final = 16
"""More do not read the memory any faster."""


def supports(transformer: Transformer, heads: Sequence[Linear]) -> bool:
    """Whether the kernels know these weights: on a CPU, all of one kind, without adapters."""
    weights: list[Tensor | Int8Weight] = [head.weight for head in heads]
    for module in transformer.modules():
        if is_parametrized(module):
            return False
        if isinstance(module, Linear):
            weights.append(module.weight)
        elif isinstance(module, Attention):
            weights.append(module.in_proj_weight)
    values = [_values(weight) for weight in weights]
    kinds = {each.dtype for each in values}
    known = len(kinds) == 1 and kinds <= {torch.float32, torch.bfloat16, torch.int8}
    return known and all(each.is_cpu for each in values)


class CpuStep:
    """The steps of one request.

    Args:
        transformer: one that is supported; its weights must stay as they are.
        norm: behind its last layer.
        heads: one for each codebook.
        memory: of `Transformer.project_memory`, if there is cross-attention.
        cache: where the steps' keys and values go.
    """

    def __init__(
        self,
        transformer: Transformer,
        norm: Norm,
        heads: Sequence[Linear],
        memory: Memory | None,
        cache: KVCache,
    ) -> None:
        from audiocraft.generation import cpu_kernels  # numba is slow to import

        self._kernel = cpu_kernels.run_step
        self._owned: list[Tensor] = []  # what the addresses of products point to
        layers = [cast("TransformerLayer", layer) for layer in transformer.layers]
        norms: list[Norm] = []
        products: list[tuple[int, int, int]] = []
        for layer in layers:
            crossing = layer.norm1 if memory is None else layer.norm_cross  # unused where none is
            norms += [layer.norm1, crossing, layer.norm2]
            products += self._layer(layer, memory is not None)
        products += [self._linear(head) for head in heads]
        gains = [torch.stack([each.weight, each.bias]).float() for each in [*norms, norm]]
        keys = values = cache.keys.new_empty(*cache.keys.shape[:3], 0, cache.keys.shape[4])
        if memory is not None:
            keys, values = (torch.stack(each).to(keys) for each in zip(*memory, strict=True))
        kind = _values(heads[0].weight)[:0]
        self._constants = (
            _array(kind),
            np.array(products),
            _array(torch.stack(gains)),
            np.float32(norm.eps),
            memory is not None,
            _array(keys),
            _array(values),
        )
        _, rows, _, positions, _ = cache.keys.shape
        dim, hidden = transformer.config.dim, layers[0].linear1.out_features
        self._positions = sin_embedding(torch.arange(positions), dim)
        self._room = (_room(rows, 3 * dim), _room(rows, dim), _room(rows, hidden))
        self._threads = min(torch.get_num_threads(), _MOST_THREADS)
        inputs = np.int16 if kind.dtype == torch.int8 else np.float32
        longest = max(positions, keys.shape[3])
        self._own_room = [
            (_room(rows, dim), np.empty(rows * hidden, inputs), _room(rows), _room(longest))
            for _ in range(self._threads)
        ]
        self._logits = (rows, len(heads), heads[0].out_features)
        self._cache = cache
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="step")
        self._first = True

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, K, card) of a step behind the filled part of the cache, which grows by it.

        Args:
            x: embedded tokens (B, 1, dim), without position.
        """
        cache = self._cache
        logits = torch.empty(self._logits)
        stream = x[:, 0] + self._positions[cache.length]
        cached = _array(cache.keys), _array(cache.values), cache.length
        common = (*self._constants, *cached, _array(stream), *self._room)
        arguments = [(*common, *own, _array(logits.flatten(1))) for own in self._own_room]
        with torch.profiler.record_function("decoding step"):
            if self._first:
                # The one that compiles has nobody who waits for it.
                begun, before = time.monotonic(), self._compilations()
                self._kernel(0, 1, _counter(), *arguments[0])
                if self._compilations() > before:
                    seconds = time.monotonic() - begun
                    logger.info("Compiled the decoder's step for this CPU in %.1f s.", seconds)
                self._first = False
            else:
                self._run(arguments)
        cache.length += 1
        return logits

    def _compilations(self) -> int:
        """How many there have been in this process; what was found on the disk does not count."""
        return sum(self._kernel.stats.cache_misses.values())

    def _run(self, arguments: Sequence[tuple[Any, ...]]) -> None:
        """The kernel on all threads, this one among them."""
        counter, threads = _counter(), len(arguments)

        def share(thread: int) -> None:
            try:
                self._kernel(thread, threads, counter, *arguments[thread])
            except BaseException:
                counter[1] = 1  # lets the others go, who would wait for this thread
                raise

        try:
            others = [self._pool.submit(share, thread) for thread in range(1, threads)]
            share(0)
        except BaseException:
            counter[1] = 1
            raise
        for other in others:
            other.result()

    def _layer(self, layer: TransformerLayer, crosses: bool) -> list[tuple[int, int, int]]:
        """Addresses of a layer's products, as `cpu_kernels.run_step` wants them."""
        own = self._product(*layer.self_attn.block(0, 3)), self._linear(layer.self_attn.out_proj)
        cross = own
        if crosses:
            attention = layer.cross_attention
            cross = self._product(*attention.block(0, 1)), self._linear(attention.out_proj)
        return [*own, *cross, self._linear(layer.linear1), self._linear(layer.linear2)]

    def _linear(self, linear: Linear) -> tuple[int, int, int]:
        return self._product(linear.weight, linear.bias)

    def _product(self, weight: Tensor | Int8Weight, bias: Tensor | None) -> tuple[int, int, int]:
        values = _values(weight)
        factors = weight.factors if isinstance(weight, Int8Weight) else torch.ones(len(values))
        biases = torch.zeros(len(values)) if bias is None else bias.detach().float()
        parts = [part.contiguous() for part in (values, factors, biases)]
        self._owned += parts
        first, second, third = (part.data_ptr() for part in parts)
        return first, second, third


def _values(weight: Tensor | Int8Weight) -> Tensor:
    return weight.values if isinstance(weight, Int8Weight) else weight.detach()


def _array(tensor: Tensor) -> Any:
    """The same memory for numpy, bfloat16 as what `cpu_kernels.py` takes for it."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _counter() -> Any:
    """See `cpu_kernels.meet`."""
    return np.zeros(2, np.int64)


def _room(*shape: int) -> Any:
    return np.empty(shape, np.float32)
