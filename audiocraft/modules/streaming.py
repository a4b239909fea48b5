"""Layers that hear their input piece by piece.

Whatever the pieces, what comes out of them, put together, is what the layer makes of the whole: a
stream keeps the end of what it heard, as much as later output depends on, and gives only what
nothing later changes. A layer's own `stream()` makes one, for one input and for inference.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Stream(Protocol):
    """A layer on its way through one input."""

    def push(self, x: Tensor, last: bool) -> Tensor:
        """Hear the next piece of the input.

        Args:
            x: (B, C, n), n >= 0.
            last: the input ends with it.

        Returns:
            (B, C', m), m >= 0: all further output that is final.
        """


@runtime_checkable
class Streamable(Protocol):
    """A layer that can be streamed."""

    def stream(self) -> Stream:
        """At the beginning of an input."""


@dataclass
class Pointwise:
    """What treats each sample by itself."""

    function: Callable[[Tensor], Tensor]

    def push(self, x: Tensor, last: bool) -> Tensor:  # noqa: ARG002 - the protocol has it
        """Hear the next piece."""
        return self.function(x)


@dataclass
class Chain:
    """Streams one after the other."""

    streams: Sequence[Stream]

    def push(self, x: Tensor, last: bool) -> Tensor:
        """Hear the next piece."""
        for stream in self.streams:
            x = stream.push(x, last)
        return x


@dataclass
class Sum:
    """Two streams of the same input, added up, though one may be ahead of the other.

    Attributes:
        early: the one that is never behind.
        late: the other.
        waiting: what `early` gave and `late` has yet to give.
    """

    early: Stream
    late: Stream
    waiting: Tensor | None = None

    def push(self, x: Tensor, last: bool) -> Tensor:
        """Hear the next piece."""
        late = self.late.push(x, last)
        early = joined(self.waiting, self.early.push(x, last))
        ready = late.shape[-1]
        self.waiting = rest(early, ready)
        return early[..., :ready] + late


def chain(layers: Iterable[nn.Module]) -> Chain:
    """The layers at the beginning of an input; those without a stream are pointwise."""
    return Chain(
        [layer.stream() if isinstance(layer, Streamable) else Pointwise(layer) for layer in layers]
    )


def records_gradients(module: nn.Module, x: Tensor) -> bool:
    """Whether training goes through the module, which then computes on the whole input."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(weight.requires_grad for weight in module.parameters())
    )


def split(x: Tensor, length: int) -> Iterator[tuple[Tensor, bool]]:
    """Pieces of `length` samples, each with whether it is the last; one of none has one piece."""
    samples = x.shape[-1]
    for start in range(0, max(1, samples), length):
        yield x[..., start : start + length], start + length >= samples


def run(stream: Stream, x: Tensor, length: int) -> Iterator[Tensor]:
    """The output for a whole input, as it comes out for pieces of `length` samples."""
    for piece, last in split(x, length):
        yield stream.push(piece, last)


def collect(pieces: Iterator[Tensor], samples: int) -> Tensor:
    """Put pieces together as they come; `samples` is their length together."""
    first = next(pieces)
    whole = first.new_empty(*first.shape[:-1], samples)
    whole[..., : first.shape[-1]] = first
    done = first.shape[-1]
    for piece in pieces:
        whole[..., done : done + piece.shape[-1]] = piece
        done += piece.shape[-1]
    return whole


def joined(held: Tensor | None, x: Tensor) -> Tensor:
    """What was held, and `x` behind it."""
    return x if held is None else torch.cat([held, x], dim=-1)


def rest(x: Tensor, start: int) -> Tensor | None:
    """From sample `start` on, apart from the memory of what comes before."""
    return x[..., start:].clone() if start < x.shape[-1] else None
