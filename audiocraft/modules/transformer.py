"""The decoder: pre-norm transformer with causal self-attention and optional cross-attention.

One forward serves training (whole sequence, no cache), prefill (whole sequence, empty cache) and
decode (one step, filled cache). Golden tests: `lm_tiny_text_mono`, `lm_tiny_text_stereo`,
`lm_tiny_melody`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from audiocraft.modules.linear import Int8Weight, Linear, linear

Memory = Sequence[tuple[Tensor, Tensor]]
"""Cross-attention keys and values of each layer, each (B, H, M, D)."""


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the decoder.

    Attributes:
        dim: width of the residual stream.
        num_heads: attention heads; `dim` is a multiple of it.
        num_layers: number of layers.
        hidden_scale: width of the feed-forward layer over `dim`.
        cross_attention: whether the layers attend to a condition.
        bias_attn: biases in the attention projections.
        bias_ff: biases in the feed-forward layers.
    """

    dim: int
    num_heads: int
    num_layers: int
    hidden_scale: int = 4
    cross_attention: bool = False
    bias_attn: bool = False
    bias_ff: bool = False


class KVCache:
    """Keys and values of all layers, allocated once for a whole generation.

    Args:
        config: shape of the decoder.
        rows: B, rows of the batch.
        max_steps: most positions that will be written.
        device: where it lives.
        dtype: of keys and values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        max_steps: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (
            config.num_layers,
            rows,
            config.num_heads,
            max_steps,
            config.dim // config.num_heads,
        )
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        """(L, B, H, T, D)."""
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a step's keys and values (B, H, S, D) behind the filled part; return all of it.

        What is returned is of `attention_dtype`.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        dtype = attention_dtype(self.keys.device, self.keys.dtype)
        filled = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        return filled[0].to(dtype), filled[1].to(dtype)


def attention_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What attention of the layers is computed in for weights of a type.

    On a CPU that is float32 always: with 400 filled positions of two rows of `small`, torch's
    attention in bfloat16 took 0.83 ms where float32 took 0.33, on an EPYC with AVX-512.
    """
    return torch.float32 if device.type == "cpu" else dtype


def cache_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """What keys and values are kept in beside weights of a type, int8 among them.

    On a CPU those of 16 bits take three quarters of the time of a step with 8-bit weights at 30 s.
    """
    few_bits = weights in {torch.bfloat16, torch.int8}
    return torch.bfloat16 if few_bits else attention_dtype(device, weights)


def sin_embedding(positions: Tensor, dim: int) -> Tensor:
    """Sinusoidal positions: cosines in the first half, sines in the second.

    The exponents run over `j / (dim / 2 - 1)`: MusicGen divides by half less one, not by half.
    They are computed in float32 whatever the weights' type.

    Args:
        positions: (S,), counted from 0, the prefix included.
        dim: even width.

    Returns:
        (S, dim), float32.
    """
    half = dim // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / (half - 1)
    phase = positions[:, None].float() / 10000.0**exponents
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


class Norm(nn.LayerNorm):
    """LayerNorm between a float32 residual stream and layers in the weights' type.

    With 16-bit weights the official model's residual stream is float32 too: adding the positions
    makes it so.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, dim), float32, to the weights' type."""
        weight, bias = self.weight, self.bias
        normed = F.layer_norm(
            x.float(), self.normalized_shape, weight.float(), bias.float(), self.eps
        )
        return normed.to(weight.dtype)


class Attention(nn.Module):
    """What both kinds of attention share: one packed input projection, one output projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.dim, config.dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.dim)) if config.bias_attn else None
        self.out_proj = Linear(config.dim, config.dim, bias=config.bias_attn)

    def to_int8(self) -> None:
        """Replace the input projection by one with 8 bits."""
        packed = Int8Weight(self.in_proj_weight.detach())
        del self.in_proj_weight
        setattr(self, "in_proj_weight", packed)  # noqa: B010 - it is no parameter any more

    def block(self, first: int, last: int) -> tuple[Tensor | Int8Weight, Tensor | None]:
        """Weight and bias of blocks `first` to `last` of (query, key, value)."""
        dim = self.out_proj.in_features
        rows = slice(first * dim, last * dim)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        return self.in_proj_weight[rows], bias

    def _project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Blocks `first` to `last` of (query, key, value), each (B, H, S, D)."""
        packed = linear(x, *self.block(first, last))
        heads = packed.view(*x.shape[:2], last - first, self.num_heads, -1)
        return tuple(heads.permute(2, 0, 3, 1, 4).unbind(0))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, is_causal=is_causal)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2).to(q.dtype))
        return projected


class SelfAttention(Attention):
    """Causal self-attention."""

    def forward(self, x: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        """Attend from `x` (B, S, dim) to itself and to the cache's filled part.

        With a filled cache S must be 1: the mask covers only sequences that start at position 0.
        """
        q, k, v = self._project(x, 0, 3)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        return self._attend(q, k, v, is_causal=q.shape[2] > 1)


class CrossAttention(Attention):
    """Attention to a condition, whose keys and values are computed once."""

    def project_memory(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M, D) of the condition (B, M, dim)."""
        k, v = self._project(source, 1, 3)
        return k.contiguous(), v.contiguous()

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """Attend from `x` (B, S, dim) to all of the memory.

        No padding mask (golden tests `lm_tiny_*`): zeroed text padding is attended as well.
        """
        (q,) = self._project(x, 0, 1)
        return self._attend(q, *memory, is_causal=False)


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention if any, feed-forward; each behind a LayerNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.dim * config.hidden_scale
        self.self_attn = SelfAttention(config)
        self.norm1 = Norm(dim)
        if config.cross_attention:
            self.cross_attention = CrossAttention(config)
            self.norm_cross = Norm(dim)
        self.linear1 = Linear(dim, hidden, bias=config.bias_ff)
        self.linear2 = Linear(hidden, dim, bias=config.bias_ff)
        self.norm2 = Norm(dim)

    def forward(
        self,
        x: Tensor,
        layer: int,
        memory: tuple[Tensor, Tensor] | Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Residual stream in and out, (B, S, dim); memory or its source, see `Transformer`."""
        x = x + self.self_attn(self.norm1(x), layer, cache)
        if memory is not None:
            if isinstance(memory, Tensor):
                memory = self.cross_attention.project_memory(memory)
            x = x + self.cross_attention(self.norm_cross(x), memory)
        out: Tensor = x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """The stack of layers, with positions added to its input."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        """Whether activations of a layer are computed again when its gradient is."""
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))

    def project_memory(self, source: Tensor) -> Memory:
        """Cross-attention keys and values of every layer for a condition (B, M, dim)."""
        dtype = attention_dtype(source.device, source.dtype)
        projected = (
            cast("TransformerLayer", layer).cross_attention.project_memory(source)
            for layer in self.layers
        )
        return [(keys.to(dtype), values.to(dtype)) for keys, values in projected]

    def forward(
        self, x: Tensor, memory: Memory | Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Run the layers.

        Args:
            x: (B, S, dim).
            memory: of `project_memory`; or its source, which each layer then projects by itself,
                as training needs it, where a layer's weights are there only while it runs.
            cache: positions go on from its filled part.
        """
        start = 0 if cache is None else cache.length
        steps = x.shape[1]
        positions = torch.arange(start, start + steps, device=x.device)
        x = x + sin_embedding(positions, x.shape[-1])  # float32 from here on
        again = self.checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            own = memory if memory is None or isinstance(memory, Tensor) else memory[index]
            if again:
                # Nothing is random in a layer.
                x = checkpoint(
                    layer, x, index, own, cache, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, index, own, cache)
        if cache is not None:
            cache.length += steps
        return x
