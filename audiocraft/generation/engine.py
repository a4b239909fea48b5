"""Autoregressive decoding of codes: prefill once, then one step at a time.

Golden test: `generate_greedy`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from audiocraft.errors import InputError
from audiocraft.generation.sampling import RowNoise, SamplingParams, sample_next
from audiocraft.modules.codebooks_patterns import DelayedPatternProvider

ProgressCallback = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class StepModel(Protocol):
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
        coef: weight of the condition; 1 follows it, above 1 exaggerates it.
        beta: weight of the text against the wav condition (double guidance), or None.
    """

    coef: float
    beta: float | None = None

    @property
    def num_branches(self) -> int:
        """How many times the batch's rows are computed."""
        return 2 if self.beta is None else 3

    def combine(self, logits: Tensor) -> Tensor:
        """Guided logits [B, ...] from the branches' logits [branches * B, ...], in float32."""
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
        callback: called after each step.

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
    branches = guidance.num_branches // len(states)
    start = pattern.get_first_step_with_timesteps(prompt_len)
    total = sequence.shape[-1] - start
    previous = 0
    for step in range(start, sequence.shape[-1]):
        # Prefill is everything before the first unknown step; after it one step at a time.
        inputs = sequence[..., previous:step].repeat(branches, 1, 1)
        logits = torch.cat([model.advance(state, inputs) for state in states])
        token = sample_next(guidance.combine(logits), params, noise)
        sequence[..., step] = torch.where(is_unknown[..., step], token, sequence[..., step])
        previous = step
        if callback is not None:
            callback(step - start + 1, total)
    generated, _, _ = pattern.revert_pattern_sequence(sequence, special_token=unknown)
    return generated
