"""Moving average of the weights, which is evaluated and exported in place of the last ones.

Golden test: `train_loss`, keys `ema.*`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from audiocraft.errors import InputError, WeightsError
from audiocraft.solvers.sharding import local

# TensorFlow's rule: `num_updates` of tf.train.ExponentialMovingAverage.
_WARM_UP_FROM, _WARM_UP_OVER = 1, 10
_OFFICIAL_EVERY, _LEAST_STEPS = 10, 30


def updates_per_step(updates: int) -> int:
    """Updates from step to step of the average: officially 10, fewer in a run of less than 300.

    What comes after the last step is in no average; like this it is under a thirtieth of the run.

    Args:
        updates: of the whole run.
    """
    return min(_OFFICIAL_EVERY, max(1, updates // _LEAST_STEPS))


class Ema:
    """Exponential moving average of float32 weights, without bias to where they began.

    The official rule. At each step `count = decay * count + 1`, and the average moves by
    `1 / count` of the way to the weights. So it is the mean of the weights at all steps, of which
    one `n` steps ago has the weight `decay ** n`, and what was there before the first step has
    none. Officially a step follows every 10 updates, with a decay of 0.99: the mean reaches back
    1000 updates.

    A fine-tune has a few hundred updates in all, and such a mean would be one over everything since
    its start. With `warmup` the decay of step `n` is `min(decay, (1 + n) / (10 + n))`: the mean
    reaches back some `(10 + n) / 9` steps, the last ninth of the run, until at step 890 it comes to
    the official rule. Source: `num_updates` of TensorFlow's `tf.train.ExponentialMovingAverage`.

    Args:
        weights: name to float32 weight; those that are trained. Of spread ones each process
            averages its part.
        decay: 0 to 1, per step.
        every: updates from step to step, see `updates_per_step`.
        warmup: lower decays at first.
        device: where the average is kept, such as `cpu` to save a GPU's memory; beside each weight
            if not given.

    Raises:
        InputError: a weight is not float32.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        decay: float = 0.99,
        every: int = 10,
        warmup: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        for name, weight in weights.items():
            if weight.dtype != torch.float32:
                raise InputError(
                    f"The average of {name} needs float32, got {weight.dtype}: in 16 bit its small "
                    "steps would be lost, so train float32 weights under autocast."
                )
        self._weights = dict(weights)
        self.decay = decay
        self.every = every
        self.warmup = warmup
        self.steps = 0
        self.count = 0.0
        # To hold the memory from the start. Before the first step it is what the weights are.
        self.average = {
            name: local(weight).detach().to(device, copy=True) for name, weight in weights.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Take the weights into the average."""
        self.steps += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (_WARM_UP_FROM + self.steps) / (_WARM_UP_OVER + self.steps))
        self.count = self.count * decay + 1
        for name, weight in self._weights.items():
            average = self.average[name]
            average.lerp_(local(weight).detach().to(average.device), 1 / self.count)

    def after(self, update: int) -> None:
        """Take a step where one is due.

        Args:
            update: number of the update that is finished, from 1.
        """
        if update % self.every == 0:
            self.step()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own ones, bit for bit, afterwards.

        Weights and averages change places, so that no further copy of the model is needed. Before
        the first step there is no average, and the weights stay. Not for training inside.
        """
        if self.steps == 0:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            own, average = local(weight), self.average[name]
            kept = own.detach().clone()
            own.copy_(average)  # in place: optimizer, DDP and CUDA graphs hold this storage
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the average itself, not copied."""
        return {"steps": self.steps, "count": self.count, "average": dict(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            WeightsError: it is of other weights.
        """
        average: Mapping[str, Tensor] = state["average"]
        shapes = {name: value.shape for name, value in average.items()}
        if shapes != {name: value.shape for name, value in self.average.items()}:
            raise WeightsError(
                f"The averages of {len(shapes)} weights are not those of this model's "
                f"{len(self.average)}: resume with the settings that the run began with."
            )
        self.steps, self.count = int(state["steps"]), float(state["count"])
        for name, value in average.items():
            self.average[name].copy_(value)
