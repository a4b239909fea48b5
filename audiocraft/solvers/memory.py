"""How much memory a training takes, and what it goes without where a device has less.

The sum is made from a version's shape alone, before anything is fetched. What is kept for the
backward pass was counted tensor by tensor in `audiocraft.modules.transformer`; a test compares the
sum with what torch's allocator gives out in real updates.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from audiocraft.errors import InputError
from audiocraft.models.shapes import Shape, shape_of
from audiocraft.models.versions import VERSIONS
from audiocraft.solvers.devices import Device, host_memory, matmul_speed, threads_of
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.optimizers import OptimizerName
from audiocraft.solvers.plan import Plan

TEXT_TOKENS: Final = 256
"""Of the longest text, a paragraph with its labels; longer ones are cut, see `prepare.shorten`."""
TEXT_WORDS: Final = 190
"""As many in English, about."""

OPTIMIZER_BYTES: Final[dict[OptimizerName, int]] = {"adamw": 8, "dadam": 12, "prodigy": 16}
"""Per trained weight: float32 moments (2), the weighted gradient sum (1), the start (1)."""

_FLOAT32, _FLOAT16 = 4, 2  # bytes
# What an allocator has and cannot hand out: on a GPU a part of everything (an assumption), on the
# host a part of what comes and goes (measured: 2 GB of 3.3 GB in updates at the shape of small).
_RESERVE, _HOST_RESERVE = 0.08, 0.6
_CUDA = 600_000_000  # context, kernels and workspaces of cuBLAS
_NCCL = 500_000_000  # buffers of a process among several
_PROCESS = 500_000_000  # Python with torch, without a GPU
_HOST_SHARE = 0.5  # of the host's memory that averages may take: data and checkpoints need theirs
_SMALL_RANK = 16

EFFICIENCY: Final = {"cpu": 0.7, "cuda": 0.4}
"""Speed of an update over that of a large matrix product. `cpu` was measured with float32 updates
at the shapes of small and medium (0.8 to 0.9 on one core, 0.6 on two that other work shared);
`cuda` is an assumption."""


@dataclass(frozen=True)
class Need:
    """Bytes that each process of a training needs at its peak.

    Attributes:
        weights: trained and frozen ones.
        optimizer: its state.
        average: the moving average.
        encoder: of text.
        working: the largest of what the end of the forward pass, the step and loading need
            besides: activations, 16-bit copies of weights, gradients; weights before they are
            sharded.
        rest: context, libraries, and a reserve for what the allocator cannot hand out.
    """

    weights: int
    optimizer: int
    average: int
    encoder: int
    working: int
    rest: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights: trained ones, frozen ones, and the trained ones of one layer."""

    trained: int
    frozen: int
    layer: int


def _sizes(shape: Shape, rank: int) -> _Sizes:
    if not rank:
        return _Sizes(shape.parameters, 0, shape.layer)
    adapter = sum(rank * (rows + columns) for rows, columns in shape.matrices)
    return _Sizes(shape.num_layers * adapter, shape.parameters, adapter)


def sequence_length(shape: Shape) -> int:
    """Steps that the decoder sees of a clip: the context, the pattern's first step, the prefix."""
    prefix = 0 if shape.cross_attention else shape.chroma_frames + TEXT_TOKENS
    return shape.frames + 1 + prefix


def activation_bytes(shape: Shape, rank: int, bfloat16: bool) -> int:
    """What one layer keeps of one clip for its backward pass.

    With `b` bytes per number of the computation, per step and per `dim`: each residual connection
    keeps its float32 input for the norm, 4; self-attention the normed input, query, key, value and
    output, 6 b; the feed-forward layer its input, and 4 times as wide the input and the output of
    the activation, 9 b. Cross-attention: its float32 input, 4, the normed input, query and output,
    3 b, and keys and values of the text. An adapter keeps its narrow product, rank x b.
    """
    b = _FLOAT16 if bfloat16 else _FLOAT32
    narrow = b * rank * len(shape.matrices)
    if shape.cross_attention:
        text = 2 * b * TEXT_TOKENS * shape.dim
        return sequence_length(shape) * (shape.dim * (12 + 18 * b) + narrow) + text
    return sequence_length(shape) * (shape.dim * (8 + 15 * b) + narrow)


def _logit_bytes(shape: Shape, bfloat16: bool) -> int:
    """What the loss of one clip takes at the start of the backward pass.

    The float32 log-probabilities, 4 bytes, and in the computation's type the gradient of all
    codebooks' logits twice: what there is, and what the next codebook adds to it. Before them the
    last norm keeps its input and output.
    """
    b = _FLOAT16 if bfloat16 else _FLOAT32
    logits = shape.n_q * shape.card * (_FLOAT32 + 2 * b)
    return (shape.frames + 1) * (logits + shape.dim * (4 + b))


def _working(
    shape: Shape, sizes: _Sizes, plan: Plan, rank: int, *, bfloat16: bool, lasting: int, step: int
) -> int:
    """Most that is there besides weights and states, from the forward pass to the step.

    Args:
        shape: of the version.
        sizes: numbers of its weights.
        plan: what it goes without.
        rank: of adapters.
        bfloat16: whether it computes under autocast.
        lasting: bytes of gradients that are there all the time.
        step: of all gradients.
    """
    b = _FLOAT16 if bfloat16 else _FLOAT32
    clips = plan.micro_batch
    kept = clips * activation_bytes(shape, rank, bfloat16)
    logits = clips * _logit_bytes(shape, bfloat16)
    copies = _FLOAT16 * sizes.trained if bfloat16 else 0
    residual = clips * sequence_length(shape) * shape.dim  # numbers
    # In the backward pass of a layer its widest gradient and the residual's meet what it has kept.
    # Of the 16-bit copies only its own are there, those of all layers until the forward pass ends.
    backward = kept + (6 + 4 * b) * residual + copies // shape.num_layers
    if plan.checkpointing:
        first = shape.num_layers * _FLOAT32 * residual  # the input of each layer
        first += max(logits, max(kept + copies, backward) - _FLOAT32 * residual)
    else:
        first = shape.num_layers * kept + copies + logits
    return max(lasting + first, step + backward)


def memory_need(
    shape: Shape, job: TrainingJob, plan: Plan, processes: int, *, gpu: bool, bfloat16: bool
) -> Need:
    """What a process of a training needs.

    Args:
        shape: of the version that is trained.
        job: how it is trained.
        plan: what it goes without.
        processes: of the job.
        gpu: whether each has a GPU; otherwise it is the host's memory that it needs.
        bfloat16: whether it computes in that type, as only GPUs do.
    """
    sizes = _sizes(shape, job.lora_rank)
    parts = processes if plan.sharded else 1
    trained = -(-sizes.trained // parts)
    frozen_bytes = _FLOAT16 if bfloat16 else _FLOAT32
    gradients = _FLOAT32 * trained
    # From the first clips on if they are accumulated, and always in the buckets of DDP.
    is_accumulated = plan.micro_batch < _share(job, processes)
    is_replicated = processes > 1 and not plan.sharded
    lasting = gradients * (is_accumulated or is_replicated)
    working = _working(
        shape, sizes, plan, job.lora_rank, bfloat16=bfloat16, lasting=lasting, step=gradients
    )
    # AdamW takes the roots of all second moments of a group at once on a GPU.
    roots = gradients if gpu and job.optimizer == "adamw" else 0
    # In a start's first update DDP moves those that it adds up into new buckets; a run that goes on
    # has the optimizer's state by then.
    moved = gradients if is_accumulated and is_replicated else 0
    working = max(working, gradients + max(roots, moved))
    weights = _FLOAT32 * trained + frozen_bytes * -(-sizes.frozen // parts)
    optimizer = OPTIMIZER_BYTES[job.optimizer] * trained
    average = 0 if plan.ema_on_host else _FLOAT32 * trained
    if plan.sharded:
        # What is in no layer is whole, and so are the layer in use and the next one; each with the
        # gradients of what is trained.
        at_once = shape.parameters - (shape.num_layers - 2) * shape.layer
        trained_at_once = 2 * sizes.layer if job.lora_rank else at_once
        working += 2 * _FLOAT32 * trained_at_once
        working += frozen_bytes * at_once if job.lora_rank else 0
        # Each process has loaded all weights before they are spread and anything else is there.
        loaded = _FLOAT32 * sizes.trained + frozen_bytes * sizes.frozen
        working = max(working, loaded - weights - optimizer - average)
    need = Need(weights, optimizer, average, _FLOAT32 * shape.text_encoder, working)
    if not gpu:
        return replace(need, rest=_PROCESS + int(_HOST_RESERVE * working))
    libraries = _CUDA + (_NCCL if processes > 1 else 0)
    return replace(need, rest=libraries + int(_RESERVE * need.total))


def _share(job: TrainingJob, processes: int) -> int:
    """Clips of an update that a process has."""
    return max(1, job.batch_size // processes)


def _even(share: int, most: int) -> int:
    """Fewest clips at once with which a share takes no more turns than with `most`."""
    turns = -(-share // most)
    return -(-share // turns)


@dataclass(frozen=True)
class _Room:
    """Where a training shall fit: bytes of each process, and of the host for averages."""

    processes: int
    each: int
    gpu: bool
    bfloat16: bool
    host: int


def _ladder(job: TrainingJob, room: _Room, sharded: bool | None) -> Iterator[Plan]:
    """Plans without their micro-batch, in the order in which they are tried.

    Args:
        job: what is trained.
        room: where.
        sharded: whether the weights are; None tries both.
    """
    last = Plan(checkpointing=True)
    if not sharded:
        yield Plan()
        yield last
    if not room.gpu:
        return
    if room.processes > 1 and sharded is not False:
        yield Plan(sharded=True)
        yield (last := Plan(checkpointing=True, sharded=True))
    if _average_on_host(job, last, room.processes) <= room.host:
        yield replace(last, ema_on_host=True)


def _average_on_host(job: TrainingJob, plan: Plan, processes: int) -> int:
    """Bytes of the averages of all processes, which are on one host."""
    trained = _sizes(shape_of(job.version), job.lora_rank).trained
    return _FLOAT32 * trained * (1 if plan.sharded else processes)


def _need(job: TrainingJob, plan: Plan, room: _Room) -> int:
    shape = shape_of(job.version)
    need = memory_need(shape, job, plan, room.processes, gpu=room.gpu, bfloat16=room.bfloat16)
    return need.total


def _find_plan(job: TrainingJob, room: _Room, sharded: bool | None = None) -> Plan | None:
    """The plan that slows a training down least, of those that fit."""
    share = _share(job, room.processes)
    for plan in _ladder(job, room, sharded):
        if most := _most_clips(job, plan, room):
            return replace(plan, micro_batch=_even(share, most))
    return None


def _most_clips(job: TrainingJob, plan: Plan, room: _Room) -> int:
    """Most clips at once with which a plan fits; 0 where it never does."""

    def need(clips: int) -> int:
        return _need(job, replace(plan, micro_batch=clips), room)

    share = _share(job, room.processes)
    if need(share) <= room.each:  # which may take less than fewer do, whose gradients have to wait
        return share
    return bisect_right(range(1, share), room.each, key=need)


def plan_memory(
    job: TrainingJob,
    devices: Sequence[Device],
    processes: int,
    host_bytes: int | None = None,
    *,
    sharded: bool | None = None,
) -> tuple[Plan, list[str]]:
    """How a training fits the memory that there is.

    The clips of an update are computed in parts, down to single clips; if that is too much,
    activations are computed again in the backward pass, or weights and states sharded over the
    GPUs, or both; and last the average goes to the host.

    Args:
        job: what is trained.
        devices: one for each process; none trains on the CPU.
        processes: of the job.
        host_bytes: memory that the host has; looked up if not given.
        sharded: whether a training that goes on began so, which stays as it is; several GPUs can.
            None for a new one.

    Returns:
        The plan, and a line for each thing that it goes without, with one on the memory at the end.

    Raises:
        InputError: nothing fits; it says what is needed, what there is, and what would fit.
    """
    host = host_memory() if host_bytes is None else host_bytes
    if devices:
        smallest = min(devices, key=lambda device: device.memory)
        bfloat16 = all(device.bfloat16 for device in devices)
        room = _Room(processes, smallest.memory, True, bfloat16, int(_HOST_SHARE * host))
        where = f"on {smallest.name}"
    else:
        room = _Room(processes, host // processes, False, False, 0)
        where = "in this machine" + (f" for each of {processes} processes" if processes > 1 else "")
    plan = _find_plan(job, room, sharded)
    if plan is None:
        raise InputError(_refusal(job, room, where, sharded))
    lines = list(_lines(job, plan, room, sharded))
    lines.append(
        f"Memory: {_gb(_need(job, plan, room))} of the {_gb(room.each)} that are free {where}."
    )
    return plan, lines


def _lines(job: TrainingJob, plan: Plan, room: _Room, sharded: bool | None) -> Iterator[str]:
    share = _share(job, room.processes)
    if plan.micro_batch < share:
        own = f"the {share} clips of each process" if room.processes > 1 else f"{share} clips"
        yield (
            f"Memory is short for {own} at once: they are computed {plan.micro_batch} at a time "
            "and their gradients accumulated."
        )
    if plan.checkpointing:
        yield (
            "Memory is short for the activations of one clip: they are computed again in the "
            "backward pass, which makes updates about a third slower."
        )
    if plan.sharded:
        why = "Memory is short for all weights on each GPU: they are"
        yield (
            f"{'The weights stay as they were,' if sharded else why} sharded over the "
            f"{room.processes} GPUs, with gradients and optimizer state."
        )
    if plan.ema_on_host:
        average = _gb(_average_on_host(job, plan, room.processes))
        yield f"Memory is short for the moving average: its {average} go to the host's memory."


def _refusal(job: TrainingJob, room: _Room, where: str, sharded: bool | None) -> str:
    # With fewer clips at once gradients have to wait for the others, which may take more.
    least = min(
        _need(job, replace(plan, micro_batch=clips), room)
        for plan in _ladder(job, room, sharded)
        for clips in (1, _share(job, room.processes))
    )
    what = f"lora_rank={job.lora_rank}" if job.lora_rank else "full fine-tuning"
    goal = ""
    if sharded is not None and room.gpu and room.processes > 1:  # else there is no choice
        goal = f" to go on {'' if sharded else 'un'}sharded as it began"
    message = (
        f"model_version={job.version} with {what} and {job.optimizer} needs at least {_gb(least)} "
        f"of memory{goal}, {_gb(room.each)} are free {where}: "
    )
    if sharded is not None and _find_plan(job, room) is not None:
        return message + "end what else uses it, or begin again with --fresh."
    # Of one that goes on, other settings would begin another.
    fitting = _alternatives(job, room) if sharded is None else []
    if not fitting:
        return message + "take a device with more, or end what else uses it."
    return message + f"give {' or '.join(fitting)}, which {'fit' if len(fitting) > 1 else 'fits'}."


def _alternatives(job: TrainingJob, room: _Room) -> list[str]:
    """Up to two changes of settings that fit, those first that change least."""
    smaller = [replace(job, version=version) for version in _smaller_versions(job.version)]
    adapted = [replace(other, lora_rank=_SMALL_RANK) for other in (job, *smaller)]
    if 0 < job.lora_rank <= _SMALL_RANK:
        adapted = []
    fitting: dict[str, TrainingJob] = {}  # one for each version
    for other in (*adapted[:1], *smaller, *adapted[1:]):
        if other.version not in fitting and _find_plan(other, room) is not None:
            fitting[other.version] = other
    found = []
    for other in list(fitting.values())[:2]:
        changes = [f"model_version={other.version}"] if other.version != job.version else []
        changes += [f"lora_rank={other.lora_rank}"] if other.lora_rank != job.lora_rank else []
        found.append(" with ".join(changes))
    return found


def _smaller_versions(version: str) -> list[str]:
    """Those with fewer weights, the most alike and then the largest first; `tiny` comes last."""
    asked, size = VERSIONS[version], shape_of(version).parameters

    def unlike(name: str) -> tuple[bool, bool, bool, int]:
        other = VERSIONS[name]
        return (
            name == "tiny",
            other.stereo != asked.stereo,
            other.melody != asked.melody,
            -shape_of(name).parameters,
        )

    return sorted((name for name in VERSIONS if shape_of(name).parameters < size), key=unlike)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def clip_flops(shape: Shape, rank: int, plan: Plan) -> float:
    """Floating point operations that one clip costs in an update.

    A matrix of N weights costs 2 N for each step, forward; backward as much for its input, and as
    much again for its own gradient, which frozen weights do without. Attention costs twice the
    forward pass in the backward pass; half of its products are masked. Adapters, norms and the
    optimizer, which cost a few per cent, are left to the efficiency that was measured.
    """
    steps, dim = sequence_length(shape), shape.dim
    weights = sum(rows * columns for rows, columns in shape.matrices)
    layer = 2.0 * steps * weights
    attention = 2.0 * steps**2 * dim
    if shape.cross_attention:  # whose keys and values are those of the text
        layer -= 2.0 * (steps - TEXT_TOKENS) * 2 * dim**2
        attention += 4.0 * steps * TEXT_TOKENS * dim
    heads = 2.0 * (shape.frames + 1) * shape.n_q * shape.card * dim
    passes = 2 if rank else 3
    layers = shape.num_layers * (passes * layer + 3 * attention)
    if plan.checkpointing:  # all but the last matrix, whose output nobody needs again
        layers += shape.num_layers * (layer + attention - 2.0 * steps * 4 * dim**2)
    return layers + passes * heads


def estimate_seconds(
    job: TrainingJob,
    devices: Sequence[Device],
    processes: int,
    chunks: int | None,
    plan: Plan | None = None,
) -> float:
    """How long the updates of a training will take; a product of matrices is timed for it now.

    Preparing the music, validation and saving come on top.

    Args:
        job: what is trained.
        devices: one for each process; none trains on the CPU.
        processes: of the job.
        chunks: of music; needed where `updates_per_epoch` is 0.
        plan: how it is computed; whole if not given.

    Returns:
        Seconds.

    Raises:
        InputError: the number of updates is not known.
        TrainingError: the speed cannot be measured.
    """
    per_epoch = job.updates_per_epoch
    if not per_epoch:
        if chunks is None:
            raise InputError(
                "updates_per_epoch=0 means once through the music, whose length is not known yet: "
                "give updates_per_epoch to see how long the training takes."
            )
        per_epoch = -(-chunks // job.batch_size)
    kind = "cuda" if devices else "cpu"
    speed = matmul_speed(kind, threads_of(processes))
    clip = clip_flops(shape_of(job.version), job.lora_rank, plan or Plan())
    clips = job.epochs * per_epoch * _share(job, processes)
    return clips * clip / (speed * EFFICIENCY[kind])
