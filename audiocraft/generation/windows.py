"""Music longer than the context, made window by window.

Each window goes on from the end of the one before: the first `stride` frames of a window are
dropped and the rest is the prompt of the next. Golden test: `generate_greedy`, cases `api_long*`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    generate: Callable[[Tensor, Window], Tensor], windows: Sequence[Window], prompt: Tensor
) -> Tensor:
    """Run the windows one after the other.

    Args:
        generate: makes codes [B, K, window.length] from the window's prompt
            [B, K, window.prompt_len], which they begin with.
        windows: from `plan_windows`.
        prompt: codes [B, K, P] that the result begins with.

    Returns:
        Codes [B, K, total].
    """
    codes = prompt
    for window in windows:
        known = codes[..., window.offset : window.offset + window.prompt_len]
        generated = generate(known, window)
        codes = torch.cat([codes, generated[..., window.prompt_len :]], dim=-1)
    return codes


def loop_window(wav: Tensor, start: int, length: int) -> Tensor:
    """`length` samples of (..., T) from sample `start` on, beginning again where the clip ends."""
    index = torch.arange(start, start + length, device=wav.device) % wav.shape[-1]
    return wav[..., index]
