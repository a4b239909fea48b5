"""How the learning rate changes over a run.

Golden test: `train_loss`, table `cosine_lr`.
"""

import math
from typing import Literal, get_args

from torch.optim import Optimizer

from audiocraft.errors import InputError

ScheduleName = Literal["exponential", "cosine", "polynomial_decay", "inverse_sqrt", "linear_warmup"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
# Of the learning rate that the exponential schedule ends at.
_EXPONENTIAL_END = 0.01


def lr_factor(
    name: ScheduleName, update: int, warmup: int, total: int, *, min_ratio: float = 0.0
) -> float:
    """Factor of the learning rate in an update.

    All schedules rise as `t / W` up to `t = W`. With `p = (t - W) / (N - W)` then follow:

    * cosine: `m + (1 - m) (1 + cos(pi p)) / 2`;
    * polynomial_decay: `1 - p`;
    * exponential: `0.01 ** p`;
    * inverse_sqrt: `sqrt(max(W, 1) / t)`;
    * linear_warmup: 1.

    The first update is `t = 1`. (The official table begins with `t = 0`, at a rate of 0: there the
    first update of a million changes nothing.) So at `t = N` cosine and polynomial_decay have come
    to their end, and there the last update changes nothing. After `N` rates stay as they are, but
    for inverse_sqrt.
    With `W >= N` the run ends while rates rise. A run of a single update without warm-up is one at
    the full rate, for it has nothing to come down from.

    Args:
        name: one of `SCHEDULES`.
        update: `t`, number of the update, from 1; 0 is what the official table begins with.
        warmup: `W`, updates, >= 0.
        total: `N`, updates of the run, >= 1.
        min_ratio: `m`, 0 to 1, where cosine ends; the released configurations' `lr_min_ratio`: 0.

    Returns:
        0 to 1.

    Raises:
        InputError: no such schedule, or numbers outside these limits.
    """
    if name not in SCHEDULES:
        raise InputError(f"lr_scheduler is {name!r}, it must be one of {', '.join(SCHEDULES)}.")
    if update < 0 or warmup < 0 or total < 1:
        raise InputError(
            f"A schedule needs update >= 0, warmup >= 0 and total >= 1, got {update}, {warmup} and "
            f"{total}: give a run at least one update."
        )
    if update < warmup:
        return update / warmup
    if name == "linear_warmup" or total == 1:
        return 1.0
    if name == "inverse_sqrt":
        return math.sqrt(max(warmup, 1) / max(update, 1))
    progress = min(1.0, (update - warmup) / max(total - warmup, 1))
    if name == "cosine":
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2
    if name == "polynomial_decay":
        return 1.0 - progress
    return math.pow(_EXPONENTIAL_END, progress)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Use a learning rate from the next step on, in all parameter groups.

    D-Adaptation and Prodigy know one rate only: they refuse groups of different ones.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
