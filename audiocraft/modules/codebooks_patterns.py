"""The delay pattern: where each code of each codebook stands in the language model's sequence.

A layout has `1 + T + max_delay` steps for `T` timesteps. Step 0 is empty (all special tokens),
the code of timestep `t` and codebook `k` stands at step `1 + t + delays[k]`.
Golden test: `patterns`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from audiocraft.errors import InputError


class LayoutCoord(NamedTuple):
    """One code in the layout: timestep `t` of codebook `q`."""

    t: int
    q: int


class Pattern:
    """The delay pattern for a given number of timesteps.

    Args:
        timesteps: T, number of frames of codes.
        delays: delay of each codebook, in steps; its length is K.
    """

    def __init__(self, timesteps: int, delays: Sequence[int]) -> None:
        self.timesteps = timesteps
        self.delays = tuple(delays)

    @property
    def n_q(self) -> int:
        """K, the number of codebooks."""
        return len(self.delays)

    @property
    def max_delay(self) -> int:
        """The largest delay, in steps."""
        return max(self.delays)

    @property
    def num_sequence_steps(self) -> int:
        """Number of steps after the empty first one."""
        return self.timesteps + self.max_delay

    @property
    def layout(self) -> list[list[LayoutCoord]]:
        """For each step what stands there, ordered by codebook; the last steps reach beyond T."""
        return [
            [
                LayoutCoord(step - 1 - delay, q)
                for q, delay in enumerate(self.delays)
                if step > delay
            ]
            for step in range(self.num_sequence_steps + 1)
        ]

    @property
    def valid_layout(self) -> list[list[LayoutCoord]]:
        """The steps that training uses: 0..T, before codebooks begin to run out."""
        return self.layout[: self.timesteps + 1]

    def get_first_step_with_timesteps(self, t: int) -> int:
        """First step that holds a code of timestep `t`."""
        return 1 + t + min(self.delays)

    def _coordinates(self, keep_only_valid_steps: bool, device: torch.device) -> Tensor:
        """Timestep that stands at each step of each codebook, [K, S]; outside 0..T-1 is none."""
        steps = self.timesteps + 1 + (0 if keep_only_valid_steps else self.max_delay)
        delays = torch.tensor(self.delays, device=device)[:, None]
        return torch.arange(steps, device=device) - 1 - delays

    def build_pattern_sequence(
        self, z: Tensor, special_token: int, keep_only_valid_steps: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lay codes out in the pattern.

        Args:
            z: codes [B, K, T'] with T' <= T; missing timesteps become special tokens.
            special_token: value where no code stands.
            keep_only_valid_steps: keep only steps 0..T, as in training.

        Returns:
            Sequence [B, K, S], indexes [K, S] into the flattened [K * T'] codes (K * T' where none
            stands), and mask [K, S], true where a code stands.
        """
        num_codebooks, timesteps = self._check(z.shape[1], z.shape[2])
        t = self._coordinates(keep_only_valid_steps, z.device)
        mask = (t >= 0) & (t < timesteps)
        first = torch.arange(num_codebooks, device=z.device)[:, None] * timesteps
        indexes = torch.where(mask, first + t, num_codebooks * timesteps)
        padded = F.pad(z.flatten(1), (0, 1), value=special_token)
        return padded[:, indexes], indexes, mask

    def _reverse_indexes(
        self, steps: int, keep_only_valid_steps: bool, is_output: bool, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Where each code is found in a sequence of `steps` steps; outputs stand one step before.

        Returns:
            Indexes [K, T] into the flattened [K * steps] values (K * steps where there is none)
            and mask [K, T].
        """
        expected = self.timesteps + 1 + (0 if keep_only_valid_steps else self.max_delay)
        if steps > expected:
            raise InputError(f"The sequence has {steps} steps, at most {expected} fit the pattern.")
        delays = torch.tensor(self.delays, device=device)[:, None]
        step = 1 + torch.arange(self.timesteps, device=device) + delays
        mask = step < steps
        first = torch.arange(self.n_q, device=device)[:, None] * steps
        shift = 1 if is_output else 0
        return torch.where(mask, first + step - shift, self.n_q * steps), mask

    def revert_pattern_sequence(
        self, s: Tensor, special_token: int, keep_only_valid_steps: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take codes back out of the pattern.

        Args:
            s: sequence [B, K, S].
            special_token: value for codes that the sequence does not hold.
            keep_only_valid_steps: the sequence has only steps 0..T.

        Returns:
            Codes [B, K, T], indexes [K, T] into the flattened [K * S] sequence and mask [K, T].
        """
        self._check(s.shape[1])
        indexes, mask = self._reverse_indexes(s.shape[2], keep_only_valid_steps, False, s.device)
        padded = F.pad(s.flatten(1), (0, 1), value=special_token)
        return padded[:, indexes], indexes, mask

    def revert_pattern_logits(
        self, logits: Tensor, special_token: float, keep_only_valid_steps: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the model's outputs beside the codes that they predict.

        The output at step `s` predicts what stands at step `s + 1`.

        Args:
            logits: [B, card, K, S].
            special_token: value for codes without a prediction, such as NaN.
            keep_only_valid_steps: the outputs have only steps 0..T.

        Returns:
            Logits [B, card, K, T], indexes [K, T] and mask [K, T].
        """
        self._check(logits.shape[2])
        steps = logits.shape[3]
        indexes, mask = self._reverse_indexes(steps, keep_only_valid_steps, True, logits.device)
        # Slices of each codebook, in the order in which a model's heads write them, whose gradient
        # is a copy: that of `indexes` would be sorted and added up.
        outputs = []
        for k, output in enumerate(logits.permute(0, 2, 3, 1).unbind(dim=1)):
            delay = self.delays[k]
            found = output[:, delay : min(delay + self.timesteps, steps - 1)]
            missing = self.timesteps - found.shape[1]
            outputs.append(F.pad(found, (0, 0, 0, missing), value=special_token))
        return torch.stack(outputs, dim=1).permute(0, 3, 1, 2), indexes, mask

    def _check(self, num_codebooks: int, timesteps: int = 0) -> tuple[int, int]:
        if num_codebooks != self.n_q or timesteps > self.timesteps:
            raise InputError(
                f"Codes of {num_codebooks} codebooks and {timesteps} timesteps do not fit a "
                f"pattern of {self.n_q} codebooks and {self.timesteps} timesteps."
            )
        return num_codebooks, timesteps


class DelayedPatternProvider:
    """Makes delay patterns for any number of timesteps.

    Args:
        n_q: number of codebooks.
        delays: delay of each codebook in steps, never falling; 0, 1, 2, ... if not given.
        flatten_first: 0; no MusicGen release uses another value, and it is refused.
        empty_initial: 0, likewise.
    """

    def __init__(
        self,
        n_q: int,
        delays: Sequence[int] | None = None,
        flatten_first: int = 0,
        empty_initial: int = 0,
    ) -> None:
        if flatten_first or empty_initial:
            raise InputError(
                "Delay patterns with flatten_first or empty_initial above 0 are not supported; "
                "every MusicGen release has 0 for both."
            )
        self.n_q = n_q
        self.delays = tuple(range(n_q)) if delays is None else tuple(delays)
        if len(self.delays) != n_q or list(self.delays) != sorted(self.delays):
            raise InputError(f"Delays must be {n_q} numbers that never fall, got {self.delays}.")

    def get_pattern(self, timesteps: int) -> Pattern:
        """The pattern for `timesteps` frames of codes."""
        return Pattern(timesteps, self.delays)
