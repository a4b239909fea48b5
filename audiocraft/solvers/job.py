"""What a training is asked to do, in a form that its processes hand to each other."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from audiocraft.assets.parts import write_json
from audiocraft.data.labels import Vocabularies
from audiocraft.solvers.optimizers import OptimizerName
from audiocraft.solvers.plan import Plan
from audiocraft.solvers.schedules import ScheduleName

JOB_FILE: Final = "job.json"
"""In the work folder of a training."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a training's result depends on, besides its music.

    Attributes:
        version: to start from, see `audiocraft.models.versions`.
        one_same_description: for every clip, or None.
        vocabularies: of the automatic labels; None goes without them.
        stems: that are kept of the music, such as `("drums", "bass", "other")`; None keeps it all.
        optimizer: which.
        lr: > 0, as `learning_rate` gives it.
        schedule: of the learning rate.
        warmup: updates.
        epochs: >= 1.
        updates_per_epoch: 0 means as many as go once through the music.
        batch_size: clips of an update over all processes, a multiple of their number.
        cfg_p: probability of dropping all conditions.
        lora_rank: 0 trains all weights, above 0 an adapter of that rank.
        seed: of every random choice.
    """

    version: str
    one_same_description: str | None = None
    vocabularies: Vocabularies | None = None
    stems: tuple[str, ...] | None = None
    optimizer: OptimizerName = "dadam"
    lr: float = 1.0
    schedule: ScheduleName = "cosine"
    warmup: int = 8
    epochs: int = 10
    updates_per_epoch: int = 100
    batch_size: int = 3
    cfg_p: float = 0.3
    lora_rank: int = 0
    seed: int = 2036


@dataclass(frozen=True)
class Place:
    """Where a job runs; it changes the result by no more than rounding.

    Attributes:
        dataset: path of the archive, folder or file, as it was given.
        data: folder of what is computed once of each file, shared by all jobs.
        unpacked: folder that archives are unpacked to, see `files.find`.
        weights: folder where the result goes.
        device: `cuda` or `cpu`.
        processes: that train.
        plan: how the training fits into memory.
    """

    dataset: str
    data: str
    unpacked: str
    weights: str
    device: str
    processes: int
    plan: Plan


def write_job(work: Path, job: TrainingJob, place: Place) -> None:
    """Write a job into its work folder, in one step.

    Args:
        work: the folder.
        job: what to do.
        place: where.
    """
    write_json(work / JOB_FILE, {"job": asdict(job), "place": asdict(place)})


def read_job(work: Path) -> tuple[TrainingJob, Place]:
    """The job of a work folder, as `write_job` wrote it."""
    value: dict[str, dict[str, Any]] = json.loads((work / JOB_FILE).read_bytes())
    job, place = value["job"], value["place"]
    if job["vocabularies"] is not None:
        lists = {field: tuple(labels) for field, labels in job["vocabularies"].items()}
        job["vocabularies"] = Vocabularies(**lists)
    if job["stems"] is not None:
        job["stems"] = tuple(job["stems"])
    return TrainingJob(**job), Place(**place | {"plan": Plan(**place["plan"])})
