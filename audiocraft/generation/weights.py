"""A language model's weights as the kernels of a decoding step take them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from audiocraft.modules.transformer import Transformer, TransformerConfig, TransformerLayer


@dataclass(frozen=True)
class Projection:
    """A product of a layer.

    Attributes:
        weight: (out, in).
        bias: (out,), or None.
        norm: weight (in,), bias (in,) and epsilon of the LayerNorm in front of it, or None.
    """

    weight: Tensor
    bias: Tensor | None
    norm: tuple[Tensor, Tensor, float] | None = None


@dataclass(frozen=True)
class Layer:
    """A layer's products in their order; those of cross-attention where there is one."""

    qkv: Projection
    out: Projection
    cross: tuple[Projection, Projection] | None
    up: Projection
    down: Projection


@dataclass(frozen=True)
class Weights:
    """A language model's weights as the kernels take them: its own tensors, nothing copied.

    Attributes:
        config: shape of the decoder.
        embeddings: (card + 1, dim) of each codebook.
        layers: of the decoder.
        heads: (card, dim) of each codebook, the LayerNorm before them with each.
    """

    config: TransformerConfig
    embeddings: Sequence[Tensor]
    layers: Sequence[Layer]
    heads: Sequence[Projection]

    @property
    def dtype(self) -> torch.dtype:
        """Of all of them."""
        return self.embeddings[0].dtype

    @property
    def card(self) -> int:
        """Codes of a codebook."""
        return len(self.heads[0].weight)

    def tensors(self) -> Iterator[Tensor]:
        """All of them, in a fixed order."""
        yield from self.embeddings
        for layer in self.layers:
            for projection in (layer.qkv, layer.out, *(layer.cross or ()), layer.up, layer.down):
                yield from _tensors(projection)
        for projection in self.heads:
            yield from _tensors(projection)


def _tensors(projection: Projection) -> Iterator[Tensor]:
    yield projection.weight
    if projection.bias is not None:
        yield projection.bias
    if projection.norm is not None:
        yield from projection.norm[:2]


def collect(
    embeddings: nn.ModuleList,
    transformer: Transformer,
    out_norm: nn.LayerNorm,
    heads: nn.ModuleList,
) -> Weights:
    """The weights of a language model's modules."""

    def layer_of(module: TransformerLayer) -> Layer:
        attention = module.self_attn
        dim = transformer.config.dim
        cross = None
        if transformer.config.cross_attention:
            other = module.cross_attention
            bias = other.in_proj_bias
            cross = (
                Projection(
                    other.in_proj_weight.detach()[:dim],
                    None if bias is None else bias.detach()[:dim],
                    _norm(module.norm_cross),
                ),
                _projection(other.out_proj),
            )
        return Layer(
            Projection(
                attention.in_proj_weight.detach(),
                None if attention.in_proj_bias is None else attention.in_proj_bias.detach(),
                _norm(module.norm1),
            ),
            _projection(attention.out_proj),
            cross,
            _projection(module.linear1, module.norm2),
            _projection(module.linear2),
        )

    return Weights(
        transformer.config,
        [cast("nn.Embedding", module).weight.detach() for module in embeddings],
        [layer_of(cast("TransformerLayer", module)) for module in transformer.layers],
        [_projection(cast("nn.Linear", module), out_norm) for module in heads],
    )


def _projection(linear: nn.Linear, norm: nn.LayerNorm | None = None) -> Projection:
    bias = None if linear.bias is None else linear.bias.detach()
    return Projection(linear.weight.detach(), bias, None if norm is None else _norm(norm))


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach(), norm.bias.detach(), norm.eps
