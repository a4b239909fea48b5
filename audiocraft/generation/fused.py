"""Decoding steps on a GPU by a few kernels each, all of them in one CUDA graph.

A graph replays kernels on the memory that they were recorded with, so buffers and graphs stay from
one request to the next. Those of the last size are kept; they go with the model's weights. While
a request uses them, another that comes meanwhile makes its own.
"""

import gc
import logging
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from subprocess import CalledProcessError
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from audiocraft.errors import is_out_of_memory
from audiocraft.generation.sampling import RowNoise, SamplingParams
from audiocraft.generation.weights import Weights, collect
from audiocraft.modules.transformer import KVCache, Memory, Norm, Transformer

if TYPE_CHECKING:
    from audiocraft.generation.step import Buffers, Choice, Size

logger = logging.getLogger(__name__)

_MIN_CAPABILITY: Final = (7, 5)
_MIN_CAPABILITY_BFLOAT16: Final = (8, 0)
# What the kernels take as one block; the largest release has 64 and 8192.
_MAX_HEAD_DIM: Final = 256
_MAX_WIDTH: Final = 16384


class Model(Protocol):
    """What the kernels need of a language model."""

    emb: nn.ModuleList
    transformer: Transformer
    out_norm: Norm
    linears: nn.ModuleList


class State(Protocol):
    """What they need of a decoding state that has not been fed yet.

    Attributes:
        cache: None; it will be one that the kernels read as well.
        memory: cross-attention keys and values, if there are any; they are copied.
        positions: most positions of self-attention.
    """

    cache: KVCache | None
    memory: Memory | None
    positions: int


class _Rows(KVCache):
    """Rows of a cache that lies elsewhere."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0


@dataclass(frozen=True)
class _Kept:
    """Buffers and graphs for the requests to come.

    Attributes:
        owner: a part of the model; they go when it goes.
        addresses: of the weights that the graphs read.
        size: what the buffers have room for.
        buffers: of a step.
        graphs: of a step, by how its tokens are chosen; None where none is wanted.
    """

    owner: weakref.ref[nn.Module]
    addresses: tuple[tuple[int, torch.dtype], ...]
    size: "Size"
    buffers: "Buffers"
    graphs: dict["Choice", torch.cuda.CUDAGraph | None] = field(default_factory=dict)


@dataclass
class _Process:
    """What this process remembers from one request to the next.

    Attributes:
        kept: of the last request; None while one uses it.
        failure: why the kernels do not run here, once they have failed.
        warned: whether that they are not used has been said.
        lock: held while a request is made ready; torch records one graph at a time.
    """

    kept: _Kept | None = None
    failure: str | None = None
    warned: bool = False
    lock: Lock = field(default_factory=Lock)

    def forget(self, owner: weakref.ref[nn.Module]) -> None:
        """Let go of what belongs to a model that is no more."""
        kept = self.kept
        if kept is not None and kept.owner is owner:
            self.kept = None


@cache
def _process() -> _Process:
    return _Process()


def release() -> None:
    """Free the buffers and graphs that are kept for requests to come, not those in use."""
    _process().kept = None


def kept_bytes(model: Model) -> int:
    """Bytes of keys and values that are kept for a model's requests to come."""
    kept = _process().kept
    if kept is None or kept.owner() is not model.out_norm:
        return 0
    return kept.buffers.keys.nbytes + kept.buffers.values.nbytes


def graphs_wanted() -> bool:
    """False with `NO_CUDA_GRAPH=1`, which launches the same kernels one by one."""
    return os.environ.get("NO_CUDA_GRAPH") != "1"


def fused_decoder(
    model: Model,
    states: Sequence[State],
    branches: int,
    steps: int,
    params: SamplingParams,
    batch: int,
) -> "FusedDecoder | None":
    """A decoder for a request, or None where the device or the model is not one for the kernels.

    The decoder is a context manager; behind it later requests take its buffers and graphs.

    On a GPU one warning says why not. Under Triton's interpreter (`TRITON_INTERPRET=1`) the kernels
    run on the CPU as well, slowly.

    Args:
        model: the language model.
        states: fresh decoding states, together with `branches * batch` rows; their caches become
            the decoder's.
        branches: of guidance.
        steps: of the pattern.
        params: how tokens are chosen.
        batch: rows of the result.

    Raises:
        torch.OutOfMemoryError: there is no room for the cache, the kernels or the graph.
    """
    device = model.out_norm.weight.device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    process = _process()
    reason = process.failure or _unsupported(model, device)
    if reason is None:
        try:
            with process.lock, _on(device):
                return _prepare(process, model, states, branches, steps, params, batch)
        except Exception as error:  # whatever it is, the request does without
            process.kept = None
            if is_out_of_memory(error):  # of what CUDA or Triton asks for beside torch
                raise torch.OutOfMemoryError(str(error)) from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, CalledProcessError) or "C compiler" in reason:
                reason += " Building the kernels takes gcc and the headers of Python: install both."
            process.failure = reason
    if not process.warned:
        process.warned = True
        logger.warning(
            "Music is generated without the GPU's kernels and graphs, several times slower, "
            "because of this: %s",
            reason,
        )
    return None


def _unsupported(model: Model, device: torch.device) -> str | None:
    """Why the kernels cannot take a model on a device, if so."""
    try:
        import triton  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        return "Triton is not installed."
    config = model.transformer.config
    modules = (model.emb, model.transformer, model.out_norm, model.linears)
    weights = [weight for module in modules for weight in module.parameters()]
    dtypes = {weight.dtype for weight in weights}
    parts = (part for module in modules for part in module.modules())
    if any(type(weight) is not nn.Parameter for weight in weights) or any(
        map(is_parametrized, parts)
    ):
        return "The model is being trained."
    if len(dtypes) != 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        return f"The model's weights are {', '.join(sorted(map(str, dtypes)))}."
    if not all(weight.is_contiguous() and weight.data_ptr() % 16 == 0 for weight in weights):
        return "The model's weights do not lie in memory as the kernels read them."
    head_dim, width = config.dim // config.num_heads, config.dim * config.hidden_scale
    if head_dim > _MAX_HEAD_DIM or width > _MAX_WIDTH:
        return (
            f"The model has heads of {head_dim} and layers of {width}, the kernels take up to "
            f"{_MAX_HEAD_DIM} and {_MAX_WIDTH}."
        )
    return _too_old(device, torch.bfloat16 in dtypes) if device.type == "cuda" else None


def _too_old(device: torch.device, bfloat16: bool) -> str | None:
    """Why a GPU cannot run the kernels, if so."""
    needed = _MIN_CAPABILITY_BFLOAT16 if bfloat16 else _MIN_CAPABILITY
    capability = torch.cuda.get_device_capability(device)
    if capability >= needed:
        return None
    have, least = (".".join(map(str, version)) for version in (capability, needed))
    return f"The GPU has compute capability {have}, {least} is needed."


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _prepare(
    process: _Process,
    model: Model,
    states: Sequence[State],
    branches: int,
    steps: int,
    params: SamplingParams,
    batch: int,
) -> "FusedDecoder":
    from audiocraft.generation.step import Size, allocate

    device = model.out_norm.weight.device
    weights = collect(model.emb, model.transformer, model.out_norm, model.linears)
    addresses = tuple((tensor.data_ptr(), tensor.dtype) for tensor in weights.tensors())
    memories = [state.memory[0][0].shape[2] for state in states if state.memory is not None]
    positions = max(state.positions for state in states)
    size = Size(batch, branches, steps, positions, max(memories, default=0))
    choice: Choice = "top_k"
    if params.greedy:
        choice = "greedy"
    elif params.top_p > 0:
        choice = "top_p"
    kept, process.kept = process.kept, None
    if kept is not None and (kept.addresses != addresses or not kept.size.covers(size)):
        kept = None  # so that its memory is free for what takes its place
    # Later requests may come outside of it; they share the buffers, and the seeds that torch keeps
    # with its first graph.
    with torch.inference_mode(False):
        if kept is None:
            size = size.rounded()
            owner = weakref.ref[nn.Module](model.out_norm, process.forget)
            kept = _Kept(owner, addresses, size, allocate(weights, size, device))
        lacks_graph = graphs_wanted() and kept.graphs.get(choice) is None
        if device.type == "cuda" and (lacks_graph or choice not in kept.graphs):
            kept.graphs[choice] = _make_ready(weights, kept.buffers, choice)
    decoder = FusedDecoder(weights, kept, choice)
    decoder.lend_caches(states)
    return decoder


def _make_ready(
    weights: Weights, buffers: "Buffers", choice: "Choice"
) -> torch.cuda.CUDAGraph | None:
    """Compile and load the kernels, and record a step of them if a graph is wanted."""
    from audiocraft.generation.step import reset, run_step

    begin = time.perf_counter()
    reset(buffers)
    # Not on the stream of everything else, as torch asks of what is to be recorded.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_step(weights, buffers, choice)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    compiled = time.perf_counter()
    graph = None
    if graphs_wanted():
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others may use the GPU meanwhile, but torch refuses them numbers of
        # its default generator, which takes part in every recording.
        # On a stream of its device: torch has one for all, on the device that was first. Where a
        # recording fails, torch leaves its stream the current one.
        with (
            _nothing_collected(),
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            run_step(weights, buffers, choice)
    logger.info(
        "Made the GPU ready for %d rows: kernels in %.2f s, graph in %.2f s.",
        len(buffers.x),
        compiled - begin,
        time.perf_counter() - compiled,
    )
    return graph


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A graph that is garbage is freed before and not meanwhile, which would end a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class FusedDecoder:
    """The steps of one request behind its prefill.

    Args:
        weights: of the language model; held no longer than the request.
        kept: buffers and graphs, of this request alone until the `with` block ends.
        choice: how tokens are chosen.
    """

    def __init__(self, weights: Weights, kept: _Kept, choice: "Choice") -> None:
        self._weights = weights
        self._kept = kept
        self._buffers = kept.buffers
        self._graph = kept.graphs.get(choice) if graphs_wanted() else None
        self._choice = choice
        self._device = self._buffers.x.device

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave buffers and graphs to later requests, also where this one was cancelled."""
        if self._device.type == "cuda":  # the next may be on another stream
            torch.cuda.current_stream(self._device).synchronize()
        _process().kept = self._kept

    def lend_caches(self, states: Sequence[State]) -> None:
        """Let the prefill of decoding states write where the steps will read.

        Cross-attention keys and values are copied, to where a graph finds them.
        """
        buffers = self._buffers
        rows = len(buffers.x) // len(states)
        for index, state in enumerate(states):
            mine = slice(index * rows, (index + 1) * rows)
            state.cache = _Rows(buffers.keys[:, mine], buffers.values[:, mine])
            for layer, (keys, values) in enumerate(state.memory or ()):
                length = keys.shape[2]
                buffers.memory_keys[layer, mine, :, :length] = keys
                buffers.memory_values[layer, mine, :, :length] = values
                buffers.lengths[mine] = length

    def begin(
        self,
        states: Sequence[State],
        sequence: Tensor,
        step: int,
        coefs: tuple[float, float],
        params: SamplingParams,
    ) -> None:
        """Go on behind a prefill.

        Args:
            states: those that were given caches, fed up to `step`.
            sequence: tokens [B, K, S] in their pattern, -1 where they are to be found.
            step: the one that is to be found next.
            coefs: weight of the condition, and of the text against the melody.
            params: how tokens are chosen.
        """
        buffers = self._buffers
        rows = len(buffers.x) // len(states)
        for index, state in enumerate(states):
            assert state.cache is not None
            # The cache holds the prefix and all steps but the last, which comes next.
            first = state.cache.length - (step - 1)
            buffers.offsets[index * rows : (index + 1) * rows] = first - 1
            state.memory = None
        buffers.sequence[..., : sequence.shape[-1]] = sequence
        buffers.next_step.fill_(step)
        settings = torch.tensor([*coefs, params.temp, params.top_p], dtype=torch.float32)
        buffers.settings.copy_(settings)
        card = self._weights.card
        buffers.top_k.fill_(min(params.top_k, card) or card)

    def step(self, noise: RowNoise) -> None:
        """Queue the next step."""
        from audiocraft.generation.step import run_step

        with _on(self._device):
            if self._choice != "greedy":
                noise.draw(self._buffers.noise)
            if self._graph is None:
                run_step(self._weights, self._buffers, self._choice)
            else:
                self._graph.replay()

    def tokens(self, steps: int) -> Tensor:
        """The first steps of the sequence, [B, K, S]."""
        return self._buffers.sequence[..., :steps].clone()
