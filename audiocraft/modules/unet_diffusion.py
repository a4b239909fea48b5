"""The network of MultiBand Diffusion: a U-Net over audio with a codec's latent at its bottom.

It only generates: there is no dropout, so it is in evaluation mode always. Names of parameters are
those of the released files. Golden test: `mbd_tiny`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiocraft.modules.tracks import Kept, Sweep, Track
from audiocraft.modules.transformer import sin_embedding

_HEADS = 8  # of the bottleneck's attention, in every file
# Elements of the largest activation within a window. On a CPU a clip of 12 s takes 5 % longer in
# two windows than in one; more elements bring no speed to a long one. A GPU wants enough to do.
_WINDOW = {"cpu": 2**22, "cuda": 2**26}
# Bytes of the largest activation that is kept, see `audiocraft.modules.tracks`. Computing it again
# takes several times as long (12 times at 24 channels of growth 4, on a CPU).
_MOST_BYTES = 2**30
# Bytes of an activation up to which clips are computed side by side. Larger ones fill a CPU alone:
# two rows take as long at once as apart, or 1.2 times as long.
_TOGETHER_BYTES = {"cpu": 2**20, "cuda": 2**30}
_WINDOWS_AT_ONCE = 12
_MARGIN = 1.25  # over what was counted, which came to 0.92 to 1.3 of what was measured
_LSTM_WORK = 14  # gates of both directions, and the outputs of both layers


@dataclass(frozen=True)
class UnetConfig:
    """Shape of the network, from the file's own configuration.

    Attributes:
        hidden: channels of the first level.
        depth: levels.
        growth: channels of a level over those of the one before.
        max_channels: most channels of a level.
        res_blocks: residual blocks of a level.
        norm_groups: groups of each normalisation.
        kernel: taps of the convolutions between levels.
        stride: frames of a level per frame of the next.
        codec_dim: channels of the latent.
        emb_all_layers: whether the step is told to every level, or to the first alone.
        bilstm: whether there is an LSTM at the bottom.
        transformer_layers: layers of the transformer at the bottom; 0 for none.
        transformer_hidden: width of their feed-forward layer.
        num_steps: steps of the diffusion.
    """

    hidden: int
    depth: int
    growth: float
    max_channels: int
    res_blocks: int
    norm_groups: int
    kernel: int
    stride: int
    codec_dim: int
    emb_all_layers: bool
    bilstm: bool
    transformer_layers: int
    transformer_hidden: int
    num_steps: int

    @property
    def channels(self) -> list[int]:
        """Of each level."""
        widths = [self.hidden]
        while len(widths) < self.depth:
            widths.append(min(int(widths[-1] * self.growth), self.max_channels))
        return widths


class _Residual(nn.Module):
    """Two convolutions of three taps with a skip connection."""

    def __init__(self, channels: int, groups: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)

    def apply_to(self, x: Kept, sweep: Sweep, hop: int) -> Kept:
        source = x.track
        inner = sweep.keep(_convolved(x, self.norm1, self.conv1), hop, self.norm2.num_groups)
        outer = _convolved(inner, self.norm2, self.conv2)

        def compute(start: int, stop: int) -> Tensor:
            y = outer.read(start, stop)  # first: it reads the wider window of the source
            return y + source.read(start, stop)

        summed = Track(source.channels, source.frames, compute)
        into = source if inner.track.held is not None else None
        return sweep.keep(summed, hop, self.norm1.num_groups, into)


class _Encoder(nn.Module):
    """From a level to the next lower one."""

    def __init__(self, in_channels: int, channels: int, config: UnetConfig) -> None:
        super().__init__()
        kernel, stride = config.kernel, config.stride
        padding = (kernel - stride) // 2
        self.conv = nn.Conv1d(in_channels, channels, kernel, stride, padding, bias=False)
        self.norm = nn.GroupNorm(config.norm_groups, channels)
        self.res_blocks = nn.ModuleList(
            _Residual(channels, config.norm_groups, 2**index) for index in range(config.res_blocks)
        )

    def apply_to(self, source: Track, sweep: Sweep, hop: int) -> Track:
        (kernel,), (stride,) = self.conv.kernel_size, self.conv.stride
        halo = -(-kernel // stride)

        def compute(start: int, stop: int) -> Tensor:
            window, begin = source.around(start * stride, stop * stride, halo * stride)
            # The clip's last frame may lack samples.
            window = F.pad(window.to(self.conv.weight.dtype), (0, -window.shape[-1] % stride))
            y: Tensor = self.conv(window)
            return y[..., start - begin // stride : stop - begin // stride]

        frames = -(-source.frames // stride)
        convolved = Track(self.conv.out_channels, frames, compute)
        groups = self.norm.num_groups
        x = sweep.keep(convolved, hop, groups)
        x = sweep.keep(x.normalized(self.norm), hop, groups, into=x.track)
        for block in self.res_blocks:
            x = cast("_Residual", block).apply_to(x, sweep, hop)
        return x.track


class _Decoder(nn.Module):
    """From a level to the next higher one."""

    def __init__(self, channels: int, out_channels: int, config: UnetConfig) -> None:
        super().__init__()
        kernel, stride = config.kernel, config.stride
        self.res_blocks = nn.ModuleList(
            _Residual(channels, config.norm_groups, 2**index) for index in range(config.res_blocks)
        )
        self.norm = nn.GroupNorm(config.norm_groups, channels)
        padding = (kernel - stride) // 2
        self.convtr = nn.ConvTranspose1d(
            channels, out_channels, kernel, stride, padding, bias=False
        )
        self.upsample: Callable[[Tensor], Tensor] | None = None  # see `DiffusionUnet.prepared`

    def apply_to(
        self, source: Track, frames: int, sweep: Sweep, hop: int, into: Track | None
    ) -> tuple[Track, bool]:
        """The level above, of which `frames` are wanted; `into` may be written over.

        Also whether nothing but what is in memory is read for it.
        """
        x = sweep.keep(source, hop, self.norm.num_groups, into)
        for block in self.res_blocks:
            x = cast("_Residual", block).apply_to(x, sweep, hop)
        normalized = x.normalized(self.norm)
        (kernel,), (stride,) = self.convtr.kernel_size, self.convtr.stride
        halo = -(-kernel // stride)
        upsample = self.upsample or _upsampling(self.convtr)

        def compute(start: int, stop: int) -> Tensor:
            window, begin = normalized.around(start // stride, -(-stop // stride), halo)
            return upsample(window)[..., start - begin * stride : stop - begin * stride]

        return Track(self.convtr.out_channels, frames, compute), x.track.held is not None


def _upsampling(layer: nn.ConvTranspose1d) -> Callable[[Tensor], Tensor]:
    """A transposed convolution, as a convolution that makes all samples of a frame at once.

    On a CPU that takes 0.4 to 0.8 of the time, for which the weights are put in another order.
    """
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    channels, width = layer.in_channels, layer.out_channels
    taps = F.pad(layer.weight, (0, -kernel % stride)).view(channels, width, -1, stride)
    weight = taps.flip(2).permute(1, 3, 0, 2).reshape(width * stride, channels, -1)

    def upsample(x: Tensor) -> Tensor:
        frames = F.conv1d(x, weight, padding=weight.shape[-1] - 1)
        y = frames.view(len(x), width, stride, -1).transpose(2, 3).flatten(2)
        return y[..., padding : (x.shape[-1] - 1) * stride + kernel - padding]

    return upsample


class _BiLSTM(nn.Module):
    """Two bidirectional layers and a projection."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dimension, dimension, 2, bidirectional=True)
        self.linear = nn.Linear(2 * dimension, dimension)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, T) to (R, C, T)."""
        y: Tensor = self.linear(self.lstm(x.permute(2, 0, 1))[0])
        return y.permute(1, 2, 0)


class _Attention(nn.Module):
    """Self-attention over all frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(R, T, C) to (R, T, C)."""
        packed = F.linear(x, self.in_proj_weight).view(*x.shape[:2], 3, _HEADS, -1)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()  # (R, H, T, D)
        y: Tensor = self.out_proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return y


class _TransformerLayer(nn.Module):
    """A layer as in the first transformers: each part's sum is normalised after it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"mha": _Attention(dim)})  # for the files' names
        self.linear1 = nn.Linear(dim, hidden, bias=False)
        self.linear2 = nn.Linear(hidden, dim, bias=False)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(R, T, C) to (R, T, C)."""
        x = self.norm1(x + self.self_attn["mha"](x))
        y: Tensor = self.norm2(x + self.linear2(F.relu(self.linear1(x))))
        return y


class _Transformer(nn.Module):
    """Layers over frames whose position is added."""

    def __init__(self, dim: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TransformerLayer(dim, hidden) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, T) to (R, C, T)."""
        positions = torch.arange(x.shape[-1], device=x.device)
        y = x.transpose(1, 2) + sin_embedding(positions, x.shape[1]).to(x.dtype)
        for layer in self.layers:
            y = layer(y)
        return y.transpose(1, 2)


class DiffusionUnet(nn.Module):
    """Hears the noise in audio.

    Args:
        config: shape of the network.
    """

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList()
        self.decoders = nn.ModuleList()
        above = 1
        for channels in config.channels:
            self.encoders.append(_Encoder(above, channels, config))
            self.decoders.insert(0, _Decoder(channels, above, config))
            above = channels
        self.embedding = nn.Embedding(config.num_steps, config.hidden)
        told = config.channels[1:] if config.emb_all_layers else []
        self.embeddings = nn.ModuleList(nn.Embedding(config.num_steps, width) for width in told)
        self.conv_codec = nn.Conv1d(config.codec_dim, above, 1)
        if config.bilstm:
            self.bilstm = _BiLSTM(above)
        if config.transformer_layers:
            self.transformer = _Transformer(
                above, config.transformer_hidden, config.transformer_layers
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.embedding.weight.dtype

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Has weights whose order is changed for a step in that order for all steps of a clip."""
        decoders = [cast("_Decoder", decoder) for decoder in self.decoders]
        try:
            for decoder in decoders:
                decoder.upsample = _upsampling(decoder.convtr)
            yield
        finally:
            for decoder in decoders:
                decoder.upsample = None

    def condition(self, latent: Tensor) -> Tensor:
        """What of a latent (R, codec_dim, F) is the same at every step, (R, C, F)."""
        projected: Tensor = self.conv_codec(latent.to(self.dtype))
        return projected

    def forward(
        self, sample: Tensor, step: int, condition: Tensor, sweep: Sweep | None = None
    ) -> Tensor:
        """The noise in a sample.

        Args:
            sample: (R, 1, T), any length.
            step: of the diffusion, 0 to num_steps - 1.
            condition: (R, C, F) of the same audio, from `condition`.
            sweep: how activations are gone through, if not as the device likes it.

        Returns:
            (R, 1, T), float32.
        """
        sweep = sweep or self.sweep(len(sample), sample.device)
        track, hop = Track.of(sample), 1
        levels: list[tuple[Track, Track]] = []  # without and with what the step adds
        lengths: list[int] = []
        for level, encoder in enumerate(self.encoders):
            lengths.append(track.frames)
            hop *= self.config.stride
            encoded = cast("_Encoder", encoder).apply_to(track, sweep, hop)
            track = self._told(encoded, level, step)
            levels.append((encoded, track))
        bottom = _conditioned(levels.pop()[1], condition)
        track = self._through_bottleneck(bottom, sweep, hop)
        into, held = None, False
        for index, decoder in enumerate(self.decoders):
            if index:
                encoded, skip = levels.pop()
                # What lies below is computed of it again where it was too large to keep.
                into = encoded if held else None
                track = _sum(track, skip)
            track, held = cast("_Decoder", decoder).apply_to(track, lengths.pop(), sweep, hop, into)
            hop //= self.config.stride
        return sweep.hold(track, hop).float()

    def sweep(self, rows: int, device: torch.device) -> Sweep:
        """How activations of `rows` clips are gone through on a device."""
        elements = _WINDOW[device.type] // rows
        samples = int(elements / max(self._per_sample))
        return Sweep(rows, samples, _MOST_BYTES)

    def rows_at_once(self, samples: int, device: torch.device) -> int:
        """Clips of a length that are computed side by side."""
        largest = max(self._per_sample) * samples * self.dtype.itemsize
        return max(1, int(_TOGETHER_BYTES[device.type] / largest))

    def memory(self, samples: int, rows: int, device: torch.device) -> int:
        """About the bytes that it needs beside its weights.

        Args:
            samples: of each clip.
            rows: clips side by side.
            device: where it runs.
        """
        item = self.dtype.itemsize
        sizes = [rows * samples * ratio * item for ratio in self._per_sample]
        kept = [size for size in sizes if size <= _MOST_BYTES]
        # Beside what the levels leave to each other, one holds its input and a residual block's.
        work = sum(kept) + 2 * max(kept, default=0)
        bottom = sizes[-1] * self._bottleneck_work
        window = min(_WINDOW[device.type], max(sizes) / item)
        windows = _WINDOWS_AT_ONCE * window * item
        signals = 6 * 4 * rows * samples
        packed = 2 * max(weight.nbytes for weight in self.parameters())  # in the library's order
        packed += sum(cast("_Decoder", decoder).convtr.weight.nbytes for decoder in self.decoders)
        return int(_MARGIN * (max(work, sum(kept) + bottom) + windows + signals + packed))

    @property
    def _per_sample(self) -> list[float]:
        """Elements of each level's activations per sample of audio."""
        return [
            width / self.config.stride ** (level + 1)
            for level, width in enumerate(self.config.channels)
        ]

    @property
    def _bottleneck_work(self) -> float:
        """Activations of the bottom's size that it takes at once."""
        if self.config.bilstm:
            return _LSTM_WORK
        if self.config.transformer_layers:
            return 6 + self.config.transformer_hidden / self.config.channels[-1]
        return 1

    def _told(self, track: Track, level: int, step: int) -> Track:
        """An activation with the step's embedding added."""
        if level and not self.config.emb_all_layers:
            return track
        table = cast("nn.Embedding", self.embeddings[level - 1] if level else self.embedding)
        added = table.weight[step][:, None]
        return Track(
            track.channels, track.frames, lambda start, stop: track.read(start, stop) + added
        )

    def _through_bottleneck(self, bottom: Track, sweep: Sweep, hop: int) -> Track:
        """The bottom's activation with what its LSTM or transformer makes of all of it added."""
        bottleneck = next(
            (getattr(self, name) for name in ("bilstm", "transformer") if hasattr(self, name)), None
        )
        if bottleneck is None:
            return bottom
        whole = sweep.hold(bottom, hop)
        return Track.of(whole + bottleneck(whole))


def _sum(one: Track, other: Track) -> Track:
    return Track(
        one.channels,
        one.frames,
        lambda start, stop: one.read(start, stop) + other.read(start, stop),
    )


def _conditioned(track: Track, condition: Tensor) -> Track:
    """An activation with the nearest frame of the condition added to each of its frames."""
    frames = torch.arange(condition.shape[-1], dtype=torch.float32, device=condition.device)
    nearest = F.interpolate(frames[None, None], track.frames)[0, 0].long()
    return Track(
        track.channels,
        track.frames,
        lambda start, stop: track.read(start, stop) + condition[..., nearest[start:stop]],
    )


def _convolved(x: Kept, norm: nn.GroupNorm, conv: nn.Conv1d) -> Track:
    """A convolution of a normalised activation, as long as it."""
    normalized, halo = x.normalized(norm), conv.dilation[0]

    def compute(start: int, stop: int) -> Tensor:
        window, begin = normalized.around(start, stop, halo)
        y: Tensor = conv(window)
        return y[..., start - begin : stop - begin]

    return Track(normalized.channels, normalized.frames, compute)
