"""How a diffusion model's noise is taken away, and what undoes the scaling it was trained with.

Golden test: `mbd_tiny`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from audiocraft.modules.band_filters import weighted_bands

Estimate = Callable[[Tensor, int], Tensor]
"""The noise (R, 1, T) that a network hears in audio (R, 1, T) at a step."""

_STRIDE = 50  # between the steps that are taken, of a thousand


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise of each step of the diffusion, and the way back (DDPM, Ho et al. 2020).

    Attributes:
        beta_t0: variance of the noise that the first step adds.
        beta_t1: that of the last step.
        beta_exp: between them the variance's root of this order grows evenly.
        num_steps: steps that the network knows.
        clip: audio is held within plus and minus this.
        noise_scale: of all noise.
    """

    beta_t0: float
    beta_t1: float
    beta_exp: float
    num_steps: int = 1000
    clip: float = 5.0
    noise_scale: float = 1.0

    @property
    def betas(self) -> Tensor:
        """Variance that each step adds, (num_steps,)."""
        root = 1 / self.beta_exp
        ends = self.beta_t0**root, self.beta_t1**root
        return torch.linspace(*ends, self.num_steps) ** self.beta_exp

    @property
    def default_steps(self) -> list[int]:
        """From the noisiest step down in strides of 50, then 0: 21 entries for 1000 steps."""
        return [*range(self.num_steps - 1, -1, -_STRIDE), 0]

    def generate(
        self, estimate: Estimate, noise: Callable[[], Tensor], step_list: Sequence[int]
    ) -> Tensor:
        """From noise to audio (R, 1, T), by one network evaluation for each step but the last.

        Args:
            estimate: the network.
            noise: draws (R, 1, T) from a normal distribution; what it returns is written to.
            step_list: steps to take, falling; the last is where the audio arrives.
        """
        left = (1 - self.betas).cumprod(0)[list(step_list)].tolist()  # of the signal's power
        current = noise() * self.noise_scale
        for index, step in enumerate(step_list[:-1]):
            # The variance that leads from one entry of the list to the next.
            beta = 1 - left[index] / left[index + 1]
            noisy, after = 1 - left[index], 1 - left[index + 1]
            current -= estimate(current, step) * (self.noise_scale * beta / noisy**0.5)
            current /= (1 - beta) ** 0.5
            if index < len(step_list) - 2:  # the last evaluation leaves no noise
                current += noise().mul_(self.noise_scale * (after / noisy * beta) ** 0.5)
            current.clamp_(-self.clip, self.clip)
        return current


class MultiBandProcessor(nn.Module):
    """Undoes the levelling of frequency bands that a network was trained with.

    Args:
        n_bands: bands.
        taps: of the filters that split them.
        power_std: how far the bands were levelled, 1 is wholly.
    """

    def __init__(self, n_bands: int, taps: int, power_std: float) -> None:
        super().__init__()
        self.power_std = power_std
        for name in ("sum_x", "sum_x2", "sum_target_x2"):
            self.register_buffer(name, torch.zeros(n_bands))
        self.register_buffer("counts", torch.zeros(1))
        lowpass = nn.Module()
        lowpass.register_buffer("filters", torch.zeros(n_bands - 1, 1, taps))
        self.split_bands = nn.Module()
        self.split_bands.lowpass = lowpass

    def forward(self, sample: Tensor) -> Tensor:
        """Audio (R, 1, T) at the level of the training's music, from the network's."""
        state = self.state_dict()
        count = state["counts"].double()
        mean = state["sum_x"].double() / count
        std = (state["sum_x2"].double() / count - mean**2).clamp_min(0).sqrt()
        # A mean square where one would expect its root: so the files were made.
        target = state["sum_target_x2"].double() / count
        gains = (std / target) ** self.power_std
        offset: Tensor = mean.sum().to(sample.dtype)
        return weighted_bands(sample, state["split_bands.lowpass.filters"], gains) + offset
