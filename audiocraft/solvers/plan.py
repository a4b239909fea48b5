"""How a training fits into the memory that there is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a training goes without to fit; it changes a result by no more than rounding.

    Attributes:
        micro_batch: clips that a process computes at once, >= 1.
        checkpointing: compute the activations of each layer again in the backward pass.
        sharded: spread weights, gradients and optimizer state over the processes (FSDP2).
        ema_on_host: keep the moving average in the host's memory.
    """

    micro_batch: int = 1
    checkpointing: bool = False
    sharded: bool = False
    ema_on_host: bool = False
