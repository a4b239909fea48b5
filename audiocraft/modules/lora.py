"""Low-rank adapters: a weight plus the product of two narrow matrices.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraConfig:
    """Shape of an adapter.

    Attributes:
        rank: columns of `lora_b` and rows of `lora_a`, >= 1.
        alpha: the product is scaled by `alpha / rank`.
        targets: ends of the names of the weights that are adapted, such as `linear1.weight`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """A new weight with its adapter added, computed in float32.

    Args:
        weight: (out, in); it is not changed.
        lora_a: (rank, in).
        lora_b: (out, rank).
        scale: factor of the product.

    Returns:
        (out, in), of the weight's type and on its device.
    """
    a, b = (tensor.to(weight.device, torch.float32) for tensor in (lora_a, lora_b))
    return torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)
