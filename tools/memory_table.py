"""Print the README's table of the memory that fine-tuning takes, as the planner computes it.

    python -m tools.memory_table

GB of each GPU, in bfloat16 with dadam and the default batch: with all clips at once, and the least
with which it goes.
"""

import sys
from dataclasses import replace
from typing import Final

from audiocraft.models.shapes import shape_of
from audiocraft.models.versions import VERSIONS
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.memory import memory_need
from audiocraft.solvers.plan import Plan

RANK: Final = 16
GPUS: Final = 8
BATCH: Final = TrainingJob("tiny").batch_size
_LEAST = Plan(checkpointing=True, ema_on_host=True)
_SHARDED = Plan(checkpointing=True, sharded=True, ema_on_host=True)


def memory_table() -> str:
    """The table in Markdown, one line for each version."""
    whole = Plan(micro_batch=BATCH)
    columns = [
        "`model_version`",
        "all weights",
        "at the least",
        f"on each of {GPUS} GPUs, at the least",
        f"`lora_rank={RANK}`",
        "at the least",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for version in VERSIONS:
        sizes = [
            _need(version, whole),
            _least(version, _LEAST),
            _least(version, _SHARDED, gpus=GPUS),
            _need(version, whole, RANK),
            _least(version, _LEAST, RANK),
        ]
        lines.append(f"| `{version}` | {' | '.join(f'{size:.1f}' for size in sizes)} |")
    return "\n".join(lines)


def _need(version: str, plan: Plan, rank: int = 0, gpus: int = 1) -> float:
    job = TrainingJob(version, lora_rank=rank)
    need = memory_need(shape_of(version), job, plan, gpus, gpu=True, bfloat16=True)
    return need.total / 1e9


def _least(version: str, plan: Plan, rank: int = 0, gpus: int = 1) -> float:
    """With the number of clips at once that takes least."""
    clips = range(1, max(1, BATCH // gpus) + 1)
    return min(_need(version, replace(plan, micro_batch=n), rank, gpus) for n in clips)


if __name__ == "__main__":
    sys.stdout.write(memory_table() + "\n")
