"""Music longer than the context, made window by window.

Each window goes on from the end of the one before: the first `stride` frames of a window are
dropped and the rest is the prompt of the next. Golden test: `generate_greedy`, cases `api_long*`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from audiocraft.modules.seanet import BLOCK_FRAMES
from audiocraft.modules.streaming import Stream, joined


@dataclass(frozen=True)
class Window:
    """One call of the language model.

    Attributes:
        offset: where it begins in the whole result, in frames.
        length: frames of it, at most the context.
        prompt_len: frames of it that are known already.
    """

    offset: int
    length: int
    prompt_len: int


def plan_windows(total: int, context: int, stride: int, prompt_len: int) -> list[Window]:
    """Windows that make `total` frames behind a prompt, all counts in frames.

    Args:
        total: frames of the whole result.
        context: most frames that the model sees at once.
        stride: frames by which the window moves on; 0 < stride < context.
        prompt_len: frames of the prompt; one as long as the context slides before the first window.
    """
    windows = []
    offset = 0
    while prompt_len >= context:
        offset += stride
        prompt_len -= stride
    while offset + prompt_len < total:
        length = min(total - offset, context)
        windows.append(Window(offset, length, prompt_len))
        prompt_len = length - stride
        offset += stride
    return windows


def generate_windows(
    generate: Callable[[Tensor, Window], Tensor],
    windows: Sequence[Window],
    prompt: Tensor,
    finished: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Run the windows one after the other.

    Args:
        generate: makes codes [B, K, window.length] from the window's prompt
            [B, K, window.prompt_len], which they begin with.
        windows: from `plan_windows`.
        prompt: codes [B, K, P] that the result begins with.
        finished: called with the prompt, and after each window with the codes [B, K, n] that it
            added; together they are the result.

    Returns:
        Codes [B, K, total].
    """
    codes = prompt
    if finished is not None:
        finished(prompt)
    for window in windows:
        known = codes[..., window.offset : window.offset + window.prompt_len]
        generated = generate(known, window)
        added = generated[..., window.prompt_len :]
        codes = torch.cat([codes, added], dim=-1)
        if finished is not None:
            finished(added)
    return codes


class DecodingBehind:
    """Decodes finished windows while the next one is generated.

    On a CUDA device the work is queued on a stream of its own, and nothing waits for it but
    `finish`, or the end of the `with` block if there is an exception. It is cut where decoding of
    the whole cuts it, so that the audio is the same bit for bit.

    Args:
        decoder: a codec's, at the beginning of the clip.
        device: where it runs.
    """

    def __init__(self, decoder: Stream, device: torch.device) -> None:
        self._decoder = decoder
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waiting: Tensor | None = None
        self._audio: list[Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave no work running behind an exception."""
        if kind is not None and self._stream is not None:
            self._stream.synchronize()

    def push(self, codes: Tensor) -> None:
        """Decode the next codes [B, K, n], all but what may yet be the clip's last block."""
        codes = joined(self._waiting, codes)
        ready = max(0, codes.shape[-1] - 1) // BLOCK_FRAMES * BLOCK_FRAMES
        if ready:
            self._decode(codes[..., :ready], last=False)
        self._waiting = codes[..., ready:]

    def finish(self) -> Tensor:
        """The audio [B, C, T] of all codes."""
        assert self._waiting is not None, "windows make codes"
        self._decode(self._waiting, last=True)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for piece in self._audio:
                piece.record_stream(current)
        return torch.cat(self._audio, dim=-1)

    def _decode(self, codes: Tensor, last: bool) -> None:
        if self._stream is None:
            self._audio.append(self._decoder.push(codes, last))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        codes.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            self._audio.append(self._decoder.push(codes, last))


def loop_window(wav: Tensor, start: int, length: int) -> Tensor:
    """`length` samples of (..., T) from sample `start` on, beginning again where the clip ends."""
    index = torch.arange(start, start + length, device=wav.device) % wav.shape[-1]
    return wav[..., index]
