"""The optimizers and the groups of parameters that they get.

Golden tests: `train_loss` (AdamW), `dadam`.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from audiocraft.errors import InputError
from audiocraft.models.lm import LMModel
from audiocraft.solvers.sharding import is_sharded, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

OptimizerName = Literal["dadam", "adamw", "prodigy"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)

# The older fine-tuner's default of 1 is a factor for dadam and prodigy, which find the rate
# themselves. For AdamW it would be far too much: there it stands for the official `medium` and
# `large` runs' rate.
_NO_RATE, _ADAMW_LR = 1.0, 1e-4
_HIGH_ADAMW_LR = 1e-2


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer and its numbers; the defaults are those of the released configurations.

    Attributes:
        name: dadam is Adam with D-Adaptation's step sizes, adamw is torch's AdamW, prodigy is
            Prodigy.
        lr: > 0, as `learning_rate` gives it.
        betas: decay of the averages of gradients and of their squares.
        weight_decay: decoupled, times the learning rate.
        eps: added to the denominator.
    """

    name: OptimizerName = "dadam"
    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    eps: float = 1e-8


def learning_rate(name: OptimizerName, lr: float) -> float:
    """The rate that an optimizer takes where `lr` is asked for; the log says where it differs.

    Args:
        name: one of `OPTIMIZERS`.
        lr: > 0. For dadam and prodigy a factor of the rate that they find, 1 if in doubt. For adamw
            the rate; there 1, which nobody can mean, stands for 1e-4.

    Raises:
        InputError: no such optimizer, or a rate that is not above 0.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer is {name!r}, it must be one of {', '.join(OPTIMIZERS)}.")
    if not 0 < lr < float("inf"):
        raise InputError(
            f"lr is {lr}, it must be a finite number above 0: leave it at 1 if in doubt."
        )
    if name != "adamw":
        return lr
    if lr == _NO_RATE:
        logger.info("lr=1 with adamw means %g; give another lr to choose it.", _ADAMW_LR)
        return _ADAMW_LR
    if lr > _HIGH_ADAMW_LR:
        logger.warning(
            "lr=%g is a high rate for adamw: above %g training mostly diverges, try %g.",
            lr,
            _HIGH_ADAMW_LR,
            _ADAMW_LR,
        )
    return lr


def _place(name: str) -> tuple[int, str]:
    """Sorts a parameter's name into its group."""
    if name.startswith("emb."):
        return 1, name.split(".")[1].zfill(3)
    return (2, "") if name.startswith("transformer.") else (0, "")


def parameter_groups(lm: LMModel) -> list[list[nn.Parameter]]:
    """The trainable parameters in the official groups and their order.

    Everything else (heads, last norm, condition projections), then each embedding, then the
    transformer. Groups of which nothing is trained are left out.
    """
    named = [(name, weight) for name, weight in lm.named_parameters() if weight.requires_grad]
    ordered = sorted(named, key=lambda item: _place(item[0]))  # stable within a group
    return [
        [weight for _, weight in group]
        for _, group in groupby(ordered, key=lambda item: _place(item[0]))
    ]


class _SumOverRanks(TorchFunctionMode):
    """Each number that is taken out of a tensor is its sum over the processes.

    Args:
        group: the processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = group

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Where every function of torch comes to."""
        if func is Tensor.item:
            total = args[0].detach().double().clone()
            dist.all_reduce(total, group=self._group)
            args = (total,)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _local_shards(optimizer: Optimizer, flat: frozenset[str]) -> Iterator[None]:
    """The optimizer has plain tensors inside: this process's part of each weight and state.

    Args:
        optimizer: of DTensors on a mesh of one dimension.
        flat: keys of states that it keeps in one dimension.
    """
    state: dict[Any, dict[str, Any]] = optimizer.state
    whole = [group["params"] for group in optimizer.param_groups]
    pairs: list[tuple[DTensor, Tensor]] = []
    for group in optimizer.param_groups:
        shards = []
        for weight in group["params"]:
            shard = weight.detach().to_local()  # the same storage
            shard.grad = None if weight.grad is None else weight.grad.to_local()
            for key, value in state.pop(weight, {}).items():
                part = local(value) if isinstance(value, Tensor) else value
                state[shard][key] = part.flatten() if key in flat else part
            shards.append(shard)
            pairs.append((weight, shard))
        group["params"] = shards
    try:
        with _SumOverRanks(pairs[0][0].device_mesh.get_group()):
            yield
    finally:
        for group, weights in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = weights
        for weight, shard in pairs:
            for key, value in state.pop(shard, {}).items():
                state[weight][key] = _whole(value, weight)


def _whole(value: Any, weight: "DTensor") -> Any:
    """A local state as a DTensor that is laid out as its weight is; anything else as it is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, Tensor):
        return value
    shape = weight.to_local().shape
    # `expand`: Prodigy keeps the start of weights that were zero as a single zero.
    part = (value.view(shape) if value.dim() else value.expand(shape)).contiguous()
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(part, mesh, placements, shape=weight.shape, stride=weight.stride())


def _sharded(kind: Any, flat: frozenset[str]) -> Any:
    """An adaptive optimizer that also takes FSDP2's DTensors.

    Both find one rate from sums over all weights, which they take by `.sum().item()`. Of a DTensor
    that gives each process its own part of the sum (torch 2.11), and without an error the processes
    go on at different rates. Their own `fsdp_in_use` is for CUDA and for FSDP1. So here they see
    local tensors, and get sums over the processes. Between steps the state is DTensors, laid out as
    the weights are.
    """

    class Sharded(kind):  # type: ignore[misc] # of one of two libraries without types
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with _local_shards(self, flat):
                return super().step(closure)

    Sharded.__name__ = Sharded.__qualname__ = kind.__name__
    return Sharded


def _takes_shards(groups: Sequence[Sequence[nn.Parameter]]) -> bool:
    kinds = {is_sharded(weight) for group in groups for weight in group}
    if len(kinds) > 1:
        raise InputError(
            "Some weights are sharded and some are not, whose parts of the sums would count once "
            "for each process: shard all that are trained."
        )
    return kinds == {True}


@contextlib.contextmanager
def _printed_to_log() -> Iterator[None]:
    """Both adaptive optimizers print what they do when they are made."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    logger.debug("%s", said.getvalue().strip())


def build_optimizer(
    settings: OptimizerSettings, groups: Sequence[Sequence[nn.Parameter]]
) -> Optimizer:
    """An optimizer over groups of parameters, whole or sharded by FSDP2.

    Args:
        settings: which, and its numbers.
        groups: from `parameter_groups`, after sharding.

    Returns:
        The optimizer; `param_groups[0]["lr"]` is the rate that a schedule's factors are of.

    Raises:
        InputError: nothing to train, or some weights sharded and some not.
    """
    if not any(groups):
        raise InputError("No weight of the model is trainable: attach an adapter, or unfreeze it.")
    given = [{"params": list(group)} for group in groups]
    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
        "eps": settings.eps,
    }
    is_sharded = _takes_shards(groups)
    if settings.name == "adamw":
        return torch.optim.AdamW(given, **common)
    if settings.name == "dadam":
        from dadaptation import DAdaptAdam

        # Version 2.0 is the official optimizer to the bit. Decoupled it must be told to be.
        kind, flat = DAdaptAdam, frozenset[str]()
    else:
        from prodigyopt import Prodigy

        kind, flat = Prodigy, frozenset({"s", "p0"})
        # As Prodigy's authors advise for warm-up: else its low rates weigh in the estimate.
        common |= {"use_bias_correction": True, "safeguard_warmup": True}
    if is_sharded:
        kind = _sharded(kind, flat)
    with _printed_to_log():
        optimizer: Optimizer = kind(given, decouple=True, **common)
    return optimizer


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's `state_dict`, not copied; of spread weights this process's part."""
    state = optimizer.state_dict()
    parts = {
        index: {
            key: local(value) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": parts}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from an `optimizer_state` of the same weights, spread in the same way."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    wholes = {
        index: {key: _own(value, weights[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": wholes})


def _own(value: Any, weight: nn.Parameter) -> Any:
    """A state as it belongs to a weight; what is spread as its weight is."""
    if not isinstance(value, Tensor):
        return value
    if not value.dim():  # AdamW keeps its steps where they are, in a file that is mapped to memory
        return value.clone()
    return _whole(value.to(weight.device), weight) if is_sharded(weight) else value


def effective_lr(optimizer: Optimizer) -> float:
    """The rate in use, for logs: for dadam and prodigy the factor times the estimate."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))
