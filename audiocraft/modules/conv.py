"""Convolutions that pad their input so that frames and samples keep a fixed ratio.

Names of parameters are those of the released checkpoints (`conv.conv.weight_g` and so on).
Golden tests: `encodec_tiny`, `encodec_tiny_hf`.
"""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PadMode = Literal["constant", "reflect"]


class _WeightNorm(nn.Module):
    """Weight of a convolution as direction and length per first axis, with a bias.

    The released checkpoints have `weight_g` and `weight_v`, which torch's own weight norm no
    longer calls so.
    """

    def __init__(self, rows: int, columns: int, kernel_size: int, num_biases: int) -> None:
        super().__init__()
        weight = torch.empty(rows, columns, kernel_size)
        bound = 1 / math.sqrt(columns * kernel_size)
        nn.init.uniform_(weight, -bound, bound)
        self.weight_v = nn.Parameter(weight)
        self.weight_g = nn.Parameter(weight.norm(dim=(1, 2), keepdim=True))
        self.bias = nn.Parameter(torch.empty(num_biases).uniform_(-bound, bound))

    @property
    def weight(self) -> Tensor:
        """The weight itself."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)  # noqa: SLF001 - no public name


def _named(name: str, module: nn.Module) -> nn.ModuleDict:
    """A module one level down, for the sake of the checkpoints' names."""
    return nn.ModuleDict({name: module})


def pad1d(x: Tensor, left: int, right: int, mode: PadMode) -> Tensor:
    """Pad the last axis; reflection of a too short input first extends it with zeros."""
    if mode == "constant":
        return F.pad(x, (left, right))
    missing = max(0, max(left, right) + 1 - x.shape[-1])
    padded = F.pad(F.pad(x, (0, missing)), (left, right), mode)
    return padded[..., : padded.shape[-1] - missing]


class StreamableConv1d(nn.Module):
    """Convolution whose output has `ceil(samples / stride)` frames.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps.
        stride: samples per frame.
        dilation: distance of the taps.
        causal: all padding on the left.
        pad_mode: what the padding holds.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
        pad_mode: PadMode = "reflect",
    ) -> None:
        super().__init__()
        self.conv = _named(
            "conv", _WeightNorm(out_channels, in_channels, kernel_size, out_channels)
        )
        self.stride = stride
        self.dilation = dilation
        self.causal = causal
        self.pad_mode = pad_mode
        self.span = (kernel_size - 1) * dilation + 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T) to (B, out_channels, ceil(T / stride))."""
        total = self.span - self.stride
        right = 0 if self.causal else total // 2
        frames = -(-x.shape[-1] // self.stride)
        # The last window is filled up, so that no sample is lost.
        extra = frames * self.stride - x.shape[-1]
        x = pad1d(x, total - right, right + extra, self.pad_mode)
        conv = cast("_WeightNorm", self.conv["conv"])
        return F.conv1d(x, conv.weight, conv.bias, self.stride, dilation=self.dilation)


class StreamableConvTranspose1d(nn.Module):
    """Transposed convolution that gives `stride` samples per frame.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps, at least `stride`.
        stride: samples per frame.
        causal: trim mostly on the right, as `trim_right_ratio` says.
        trim_right_ratio: part of the surplus that a causal model trims on the right.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        causal: bool = False,
        trim_right_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.convtr = _named(
            "convtr", _WeightNorm(in_channels, out_channels, kernel_size, out_channels)
        )
        self.stride = stride
        surplus = kernel_size - stride
        self.trim_right = math.ceil(surplus * trim_right_ratio) if causal else surplus // 2
        self.trim_left = surplus - self.trim_right

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T) to (B, out_channels, T * stride)."""
        convtr = cast("_WeightNorm", self.convtr["convtr"])
        y = F.conv_transpose1d(x, convtr.weight, convtr.bias, self.stride)
        return y[..., self.trim_left : y.shape[-1] - self.trim_right]
