"""Low-rank adapters: a weight plus the product of two narrow matrices.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from audiocraft.errors import InputError

DEFAULT_TARGETS = ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight")
"""Every matrix of the decoder's layers: attention (self and cross, in and out) and feed-forward."""


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


@dataclass(frozen=True)
class AdaptedWeight:
    """What a layer finds in the place of its weight: `F.linear` with it adds the adapter's output.

    The sum of weight and adapter is never made: it would take its memory, and in the backward pass
    a gradient of its size, which costs as much as the forward pass.

    Attributes:
        weight: (out, in), of the base.
        lora_a: (rank, in).
        lora_b: (out, rank).
        scale: factor of the product.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def __getitem__(self, rows: slice) -> "AdaptedWeight":
        """Some rows, as attention takes them from its packed projection."""
        return AdaptedWeight(self.weight[rows], self.lora_a, self.lora_b[rows], self.scale)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Where functions of torch come to when one of their arguments is an adapted weight."""
        if func is not F.linear or kwargs or not isinstance(args[1], cls):
            return NotImplemented  # torch raises a TypeError that names both
        x, adapted, *bias = args
        low = F.linear(F.linear(x, adapted.lora_a), adapted.lora_b)
        return torch.add(F.linear(x, adapted.weight, *bias), low, alpha=adapted.scale)


class LowRank(nn.Module):
    """Parametrization of one weight: its layer finds an `AdaptedWeight` in its place.

    As in the paper `lora_a` starts normally distributed, here with the variance 1 / in, and
    `lora_b` at zero: the model starts as its base. Both are float32 whatever the weight's type, so
    layers of another type need autocast.

    Args:
        weight: (out, in), on the device where the adapter shall be.
        rank: of the adapter.
        scale: factor of the product.
        generator: on the CPU; makes `lora_a` the same on every device.
    """

    def __init__(
        self, weight: Tensor, rank: int, scale: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        start = torch.randn(rank, columns, generator=generator, device="cpu") / math.sqrt(columns)
        self.lora_a = nn.Parameter(start.to(weight.device))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.scale = scale

    def forward(self, weight: Tensor) -> AdaptedWeight:
        """The weight (out, in) with its adapter."""
        return AdaptedWeight(weight, self.lora_a, self.lora_b, self.scale)


def lora_config(rank: int) -> LoraConfig:
    """The adapter that `lora_rank` stands for.

    Args:
        rank: >= 1.

    Returns:
        All matrices of the decoder's layers, with `alpha = rank`: a scale of 1, so that another
        rank needs no other learning rate (section 4.1 of the paper).
    """
    return LoraConfig(rank, float(rank), DEFAULT_TARGETS)


def attach(model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None) -> None:
    """Add adapters to a model's weights; from then on nothing else of it is trainable.

    The model computes as before, until it is trained. Its `state_dict` has other names until
    `detach`: the base under `<module>.parametrizations.<weight>.original`.

    Args:
        model: without adapters.
        config: their shape.
        generator: on the CPU; of their start.

    Raises:
        InputError: the rank is below 1 or above a weight's width, or no weight has such a name.
    """
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if name.endswith(config.targets) and weight.dim() == 2  # noqa: PLR2004 - matrices
    }
    if not weights:
        raise InputError(
            f"The model has no weights named {', '.join(config.targets)}; choose others as targets."
        )
    widest = min(min(weight.shape) for weight in weights.values())
    if not 1 <= config.rank <= widest:
        raise InputError(
            f"lora_rank is {config.rank}, an adapter of this model can have 1 to {widest}: beyond, "
            "full fine-tuning is cheaper."
        )
    model.requires_grad_(requires_grad=False)
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        adapter = LowRank(weight, config.rank, config.scale, generator)
        # `unsafe`: torch would insist on a tensor.
        parametrize.register_parametrization(
            model.get_submodule(path), attribute, adapter, unsafe=True
        )


def _adapted(model: nn.Module) -> dict[str, tuple[nn.Module, str, LowRank]]:
    """Module, attribute and adapter of each adapted weight by its official name."""
    found: dict[str, tuple[nn.Module, str, LowRank]] = {}
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations = cast("nn.ModuleDict", module.parametrizations)
        for attribute, chain in parametrizations.items():
            adapter = cast("nn.ModuleList", chain)[0]
            assert isinstance(adapter, LowRank), "nothing else parametrizes MusicGen's weights"
            found[f"{path}.{attribute}" if path else attribute] = module, attribute, adapter
    return found


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors by the names of a fine-tune's file, `<official name>.lora_a|lora_b`."""
    return {
        f"{name}.{part}": parameter
        for name, (_, _, adapter) in _adapted(model).items()
        for part, parameter in adapter.named_parameters()
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """`adapter_parameters` without their graph, not copied: what `save_finetune` writes."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}


def detach(model: nn.Module) -> None:
    """Take a model's adapters away: what is left is its base bit for bit, still not trainable."""
    for module, attribute, _ in _adapted(model).values():
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
