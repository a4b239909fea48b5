"""From logits to tokens: temperature, top-k, top-p, and noise that belongs to one row alone.

Golden test: `sampling`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from audiocraft.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        use_sampling: false takes the most likely token.
        temp: temperature, >= 0; 0 takes the most likely token.
        top_k: keep the k most likely tokens (and ties with the k-th); 0 keeps all.
        top_p: above 0 it replaces top_k: keep the tokens whose preceding mass is at most p.
    """

    use_sampling: bool = True
    temp: float = 1.0
    top_k: int = 250
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temp < math.inf:
            raise InputError(f"temperature is {self.temp}, it must be 0 or more.")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}, it must be 0 or more (0 turns it off).")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, it must be between 0 and 1.")

    @property
    def greedy(self) -> bool:
        """True where no noise is needed."""
        # Below this the second most likely token has no chance, and float32 no room.
        return not self.use_sampling or self.temp < 1e-4  # noqa: PLR2004


def next_token_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities of the next token after temperature and top-p or top-k.

    Args:
        logits: [..., card].
        params: with `temp` above 0.

    Returns:
        Probabilities [..., card], float32, summing to 1.
    """
    probs = torch.softmax(logits.float() / params.temp, dim=-1)
    if params.top_p > 0:
        # Of equal tokens those with the lower numbers come first, on every device.
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(mass_before > params.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    elif 0 < params.top_k < probs.shape[-1]:
        kth = probs.topk(params.top_k, dim=-1).values[..., -1:]
        probs = probs.masked_fill(probs < kth, 0.0)
    else:
        return probs
    return probs / probs.sum(dim=-1, keepdim=True)


class RowNoise:
    """One random stream per row, so that a row's tokens do not depend on the rows beside it.

    Args:
        seed: row `i` draws from the stream of `seed + i`, so it equals row 0 of seed `seed + i`.
            None draws one seed per row from torch's global generator (`torch.manual_seed`).
        num_rows: B.
        device: where the noise is drawn; streams of different devices differ.
    """

    def __init__(self, seed: int | None, num_rows: int, device: torch.device) -> None:
        if seed is None:
            seeds = torch.randint(2**62, (num_rows,)).tolist()
        else:
            seeds = [seed + row for row in range(num_rows)]
        self._generators = [torch.Generator(device).manual_seed(row_seed) for row_seed in seeds]

    def exponential(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Exponentially distributed noise [B, *shape], float32."""
        noise = torch.empty(len(self._generators), *shape, device=device)
        self.draw(noise)
        return noise

    def draw(self, out: Tensor) -> None:
        """Fill a tensor [B, ...] as `exponential` does."""
        for row, generator in zip(out, self._generators, strict=True):
            row.exponential_(generator=generator)


def sample_next(logits: Tensor, params: SamplingParams, noise: RowNoise) -> Tensor:
    """Choose one token per row and codebook.

    A token is drawn as the winner of an exponential race, argmax(p / e): it has the distribution
    p and, unlike a multinomial draw, needs no word from the device to the host.

    Args:
        logits: [B, K, card].
        params: the choice rule.
        noise: one stream per row.

    Returns:
        Tokens [B, K].
    """
    if params.greedy:
        return logits.argmax(dim=-1)
    with _one_thread() if logits.is_cpu else nullcontext():
        probs = next_token_probs(logits, params)
        return (probs / noise.exponential(probs.shape[1:], probs.device)).argmax(dim=-1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch's threads asleep, which look for more work for milliseconds once they are awake.

    The next step's threads need the cores: with it, where the environment does not keep libgomp's
    threads from that, 8-bit weights of `small` go 1.3 times as fast on two cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
