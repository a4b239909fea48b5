"""Weights spread over the processes of a training by FSDP2, and what has to know of it.

A spread weight is a `DTensor` of which each process holds some rows, its shard; before a layer
computes, the processes put its weights together, and take them apart again afterwards.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, layers: Iterable[nn.Module], device: torch.device, ranks: int) -> None:
    """Spread a model's weights over the processes; its parameters are then DTensors.

    Autocast stays what decides on the type of computations, so shards are as they were: weights
    that are trained in float32, frozen ones maybe in 16 bit.

    Args:
        model: what is called for a forward pass; the same in each process.
        layers: parts of it that are put together one after the other.
        device: of its weights.
        ranks: number of processes.
    """
    # A third of the time that a process takes to import what it trains with.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def take_apart(model: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward pass has left put together.

    FSDP2 keeps those outside of the layers for the backward pass. The next forward pass would take
    them, whatever became of the shards in between.

    Args:
        model: that `shard` was given.
    """
    cast("FSDPModule", model).reshard()


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor, of which there are none where their module is not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; tensors that are not spread are whole.

    It is to be taken anew each time: at the first forward pass FSDP2 moves shards to other memory.
    """
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part.detach()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together of all processes' parts, which all have to take part in."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def clip_gradients(weights: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm over all of them, and over all processes.

    Args:
        weights: all spread or none.
        max_norm: gradients longer than this are scaled down to it.

    Returns:
        The norm before, a scalar; equal in each process.
    """
    if not is_sharded(weights[0]):
        return clip_grad_norm_(weights, max_norm)
    norm = whole(get_total_norm([weight.grad for weight in weights if weight.grad is not None]))
    clip_grads_with_norm_(weights, max_norm, norm)
    return norm
