"""Autoregressive decoding of codes: prefill once, then one step at a time.

Golden test: `generate_greedy`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from audiocraft.errors import InputError
from audiocraft.generation.fused import Model, fused_decoder
from audiocraft.generation.sampling import RowNoise, SamplingParams, sample_next
from audiocraft.modules.codebooks_patterns import DelayedPatternProvider

ProgressCallback = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""
_STRIDE: Final = 8
"""Steps from one look at a GPU's progress to the next."""


class StepModel(Model, Protocol):
    """What the engine asks of a language model; what a decoding state is, only the model knows."""

    pattern_provider: DelayedPatternProvider

    @property
    def special_token_id(self) -> int:
        """Token that stands where the pattern holds no code."""

    def advance(self, state: Any, sequence: Tensor) -> Tensor:
        """Feed (rows, K, S) tokens; logits (rows, K, card) for the step after the last."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance over the branches of a batch.

    Branches are [conditional; unconditional], or with `beta` [conditional; wav only;
    unconditional], each of B rows.

    Attributes:
        coef: weight of the condition, above 1 exaggerates it; None computes the condition's branch
            alone, as where there is nothing to be guided by.
        beta: weight of the text against the wav condition (double guidance), or None.
    """

    coef: float | None
    beta: float | None = None

    @property
    def num_branches(self) -> int:
        """How many times the batch's rows are computed."""
        if self.coef is None:
            return 1
        return 2 if self.beta is None else 3

    def combine(self, logits: Tensor) -> Tensor:
        """Guided logits [B, ...] from the branches' logits [branches * B, ...], in float32."""
        if self.coef is None:
            return logits.float()
        branches = logits.float().chunk(self.num_branches)
        cond, uncond = branches[0], branches[-1]
        if self.beta is not None:
            wav = branches[1]
            cond = wav + self.beta * (cond - wav)
        return uncond + self.coef * (cond - uncond)


def generate_codes(
    model: StepModel,
    states: Sequence[Any],
    guidance: Guidance,
    prompt: Tensor,
    max_gen_len: int,
    params: SamplingParams,
    noise: RowNoise,
    callback: ProgressCallback | None = None,
) -> Tensor:
    """Generate codes behind a prompt.

    Args:
        model: the language model.
        states: decoding states, fresh; together their rows are the branches of `guidance`.
        guidance: how the branches become one.
        prompt: codes [B, K, P], P >= 0; they are part of the result, unchanged.
        max_gen_len: T, frames of the result, more than P.
        params: how tokens are chosen.
        noise: one stream per row of the batch.
        callback: called after each step on a CPU, and every 8 steps on a GPU, which is then at most
            16 steps behind what has been queued for it.

    Returns:
        Codes [B, K, T].

    Raises:
        InputError: the prompt leaves nothing to generate.
    """
    rows, num_codebooks, prompt_len = prompt.shape
    if prompt_len >= max_gen_len:
        raise InputError(
            f"The prompt has {prompt_len} frames and the result {max_gen_len}: "
            "the prompt must be shorter than the result."
        )
    pattern = model.pattern_provider.get_pattern(max_gen_len)
    unknown = -1
    codes = prompt.new_full((rows, num_codebooks, max_gen_len), unknown)
    codes[..., :prompt_len] = prompt
    sequence, _, _ = pattern.build_pattern_sequence(codes, model.special_token_id)
    # Which steps hold a code to be found; the rest is prompt or special and is never overwritten.
    is_unknown = sequence[:1] == unknown
    steps = sequence.shape[-1]
    branches = guidance.num_branches
    start = pattern.get_first_step_with_timesteps(prompt_len)
    progress = _Progress(sequence.device, steps - start, callback)
    previous = 0
    with fused_decoder(model, states, branches, steps, params, rows) or nullcontext() as decoder:
        for step in range(start, steps):
            # Prefill is everything before the first unknown step; after it one step at a time.
            if decoder is None or step == start:
                inputs = sequence[..., previous:step].repeat(branches // len(states), 1, 1)
                logits = torch.cat([model.advance(state, inputs) for state in states])
                token = sample_next(guidance.combine(logits), params, noise)
                sequence[..., step] = torch.where(is_unknown[..., step], token, sequence[..., step])
                previous = step
            else:
                if step == start + 1:
                    coefs = guidance.coef or 0.0, guidance.beta or 0.0
                    decoder.begin(states, sequence, step, coefs, params)
                decoder.step(noise)
            progress.queued(step - start + 1)
        if decoder is not None and steps > start + 1:
            sequence = decoder.tokens(steps)
    generated, _, _ = pattern.revert_pattern_sequence(sequence, special_token=unknown)
    return generated


class _Progress:
    """Reports steps that are done, and lets a GPU fall behind by no more than two strides.

    Args:
        device: where the steps run.
        total: steps in all.
        callback: called with (steps done, steps in all), if given.
    """

    def __init__(self, device: torch.device, total: int, callback: ProgressCallback | None) -> None:
        self._device = device
        self._total = total
        self._callback = callback
        self._pending: deque[tuple[int, torch.cuda.Event]] = deque()

    def queued(self, step: int) -> None:
        """A step, counted from 1, has been queued; wait until the one 16 before it is done."""
        if self._device.type != "cuda":
            self._report(step)
            return
        is_last = step == self._total
        if step % _STRIDE == 0 or is_last:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._pending.append((step, event))
        while len(self._pending) > (0 if is_last else 1):
            done, event = self._pending.popleft()
            event.synchronize()
            self._report(done)

    def _report(self, done: int) -> None:
        if self._callback is not None:
            self._callback(done, self._total)
