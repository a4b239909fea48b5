"""Convolutions that pad their input so that frames and samples keep a fixed ratio.

Names of parameters are those of the released checkpoints (`conv.conv.weight_g` and so on).
Golden tests: `encodec_tiny`, `encodec_tiny_hf`.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiocraft.modules.streaming import joined, rest

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
        total = self.span - stride
        self.pad_right = 0 if causal else total // 2
        self.pad_left = total - self.pad_right
        # Samples that must be there to be mirrored, one more than are padded at most.
        self.mirrored_left = self._mirrored(self.pad_left)
        self.mirrored_right = self._mirrored(self.pad_right + stride - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T) to (B, out_channels, ceil(T / stride))."""
        conv = self.weights
        x = pad1d(x, self.pad_left, self.right_padding(x.shape[-1]), self.pad_mode)
        return F.conv1d(x, conv.weight, conv.bias, self.stride, dilation=self.dilation)

    @property
    def weights(self) -> _WeightNorm:
        """Weight and bias."""
        return cast("_WeightNorm", self.conv["conv"])

    def right_padding(self, samples: int) -> int:
        """Padding behind that many samples: the last window is filled up, so that none is lost."""
        return self.pad_right + -samples % self.stride

    def _mirrored(self, padding: int) -> int:
        return padding + 1 if padding and self.pad_mode == "reflect" else 0

    def stream(self) -> "ConvStream":
        """The convolution at the beginning of an input."""
        return ConvStream(self, self.weights.weight)


@dataclass
class ConvStream:
    """A convolution on its way through one input.

    Attributes:
        conv: the convolution.
        weight: its weight, computed once.
        held: end of the padded input, from the next window on.
        samples: heard so far.
        begun: the padding on the left stands before what is held.
    """

    conv: StreamableConv1d
    weight: Tensor
    held: Tensor | None = None
    samples: int = 0
    begun: bool = False

    def push(self, x: Tensor, last: bool) -> Tensor:
        """Hear the next piece; see `Stream`."""
        conv = self.conv
        self.samples += x.shape[-1]
        x = joined(self.held, x)
        left = right = kept = 0
        if not self.begun:
            # A shorter input is padded as a whole, which may take zeros for what is missing.
            if not last and x.shape[-1] < max(conv.mirrored_left, conv.mirrored_right):
                self.held = x
                return self._nothing(x)
            left = conv.pad_left
        if last:
            right = conv.right_padding(self.samples)
        else:
            kept = conv.mirrored_right
        x = pad1d(x, left, right, conv.pad_mode)
        self.begun = True
        frames = (x.shape[-1] - max(conv.span - conv.stride, kept)) // conv.stride
        if frames < 1:
            self.held = x
            return self._nothing(x)
        start = frames * conv.stride
        window = x[..., : start - conv.stride + conv.span]
        self.held = rest(x, start)
        return F.conv1d(window, self.weight, conv.weights.bias, conv.stride, dilation=conv.dilation)

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), len(self.weight), 0)


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
        # Frames before one that its samples depend on.
        self.context = -(-kernel_size // stride) - 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T) to (B, out_channels, T * stride)."""
        convtr = self.weights
        y = F.conv_transpose1d(x, convtr.weight, convtr.bias, self.stride)
        return y[..., self.trim_left : y.shape[-1] - self.trim_right]

    @property
    def weights(self) -> _WeightNorm:
        """Weight and bias."""
        return cast("_WeightNorm", self.convtr["convtr"])

    def stream(self) -> "ConvTransposeStream":
        """The convolution at the beginning of an input."""
        return ConvTransposeStream(self, self.weights.weight, self.trim_left)


@dataclass
class ConvTransposeStream:
    """A transposed convolution on its way through one input.

    Attributes:
        conv: the convolution.
        weight: its weight, computed once.
        trim: samples that are still to be trimmed on the left.
        held: the last frames, `conv.context` of them or as many as there were.
    """

    conv: StreamableConvTranspose1d
    weight: Tensor
    trim: int
    held: Tensor | None = None

    def push(self, x: Tensor, last: bool) -> Tensor:
        """Hear the next piece; see `Stream`."""
        conv = self.conv
        before = 0 if self.held is None else self.held.shape[-1]
        x = joined(self.held, x)
        frames = x.shape[-1]
        if frames == 0 or (frames == before and not last):
            return x.new_empty(len(x), self.weight.shape[1], 0)
        self.held = rest(x, max(0, frames - conv.context))
        y = F.conv_transpose1d(x, self.weight, conv.weights.bias, conv.stride)
        stop = y.shape[-1] - conv.trim_right if last else frames * conv.stride
        y = y[..., before * conv.stride : stop]
        trim = min(self.trim, y.shape[-1])
        self.trim -= trim
        return y[..., trim:]
