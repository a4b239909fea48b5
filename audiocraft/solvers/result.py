"""What comes of a training: the process that writes the file of weights.

`launch` runs it as a module, with the work folder, when all updates are made. No other training
writes to the folder of weights meanwhile.
"""

import json
import logging
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from audiocraft.data.dataset import load_prepared
from audiocraft.data.report import summarize
from audiocraft.models.finetunes import read_finetune, save_finetune
from audiocraft.models.versions import VERSIONS
from audiocraft.solvers.checkpoints import disk_of
from audiocraft.solvers.clips import LEAST_SONGS, choose_prompts, hold_out
from audiocraft.solvers.conditions import condition_settings
from audiocraft.solvers.job import TrainingJob, read_job
from audiocraft.solvers.output import log_to_stdout
from audiocraft.solvers.prepare import DATASET_FILE
from audiocraft.solvers.state import RunState, read_state, weights_file

logger = logging.getLogger(__name__)

WEIGHTS_FILE: Final = "trained_model.safetensors"
"""In the folder of weights: the result of the last training."""
SAMPLE_FILES: Final = ("sample_base.wav", "sample_tuned.wav")
"""Beside it: the same prompt before and after the training."""


def main() -> None:
    """Writes the weights of the job in a work folder."""
    log_to_stdout()
    work = Path(sys.argv[1])
    job, place = read_job(work)
    state, prepared = read_state(work), load_prepared(work / DATASET_FILE)
    assert state is not None, "the training has ended"
    update, reason = choose_weights(state)
    logger.info("%s", reason)
    tuned = read_finetune(weights_file(work, update))
    cfg = tuned.cfg
    assert cfg is not None, "rounds writes one"
    assert tuned.base_sha256 is not None
    examples, _ = hold_out(prepared.examples, job.seed)
    prompts = choose_prompts(examples, condition_settings(cfg, job.cfg_p), job.seed)
    folder = Path(place.weights)
    set_aside(folder, work.name)
    with disk_of(folder, "the result of this training"):
        save_finetune(
            folder / WEIGHTS_FILE,
            tuned.checkpoint.state,  # read from its file as it is written
            cfg,
            base=job.version,
            base_sha256=tuned.base_sha256,
            license=VERSIONS[job.version].license,
            lora=tuned.lora,
            metadata={
                "run": work.name,
                "dataset": json.dumps(summarize(prepared.report), ensure_ascii=False),
                "training": json.dumps(describe_training(job, state, update)),
                "prompts": json.dumps(prompts, ensure_ascii=False),
            },
        )
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors gives it to this user alone


def choose_weights(state: RunState) -> tuple[int, str]:
    """The update whose weights are the result, and a sentence that says why.

    Args:
        state: of a training that has ended.
    """
    if state.best is None:
        assert state.exported is not None, "where nothing is measured, the last weights are"
        return state.exported, (
            f"The averaged weights of the last update, {state.exported}, are exported: with less "
            f"than {LEAST_SONGS} songs nothing was held out to choose better ones by."
        )
    return state.best, (
        f"The averaged weights of update {state.best} of {state.updates} are exported: their "
        f"validation loss, {state.best_loss:.4f}, is the lowest of all epochs."
    )


def describe_training(job: TrainingJob, state: RunState, update: int) -> dict[str, Any]:
    """What a file of weights says of its training.

    Args:
        job: with its settings; the vocabularies are left out, which are the same for all.
        state: of a training that has ended.
        update: whose weights are exported.
    """
    settings = asdict(job) | {"auto_labeling": job.vocabularies is not None}
    del settings["vocabularies"]
    return {
        "settings": settings,
        "update": update,
        "updates": state.updates,
        "clips": state.clips,
        "songs": state.songs,
        "held_out_songs": state.held_out,
        "seconds": round(state.seconds, 1),
        "losses": [
            {"update": value.update, "loss": round(value.loss, 5)} for value in state.losses
        ],
        "validation": [
            {"update": value.update, "loss": round(value.loss, 5)} for value in state.validation
        ],
    }


def read_metadata(path: Path) -> dict[str, str]:
    """What a file of weights says of itself; nothing where it is none of ours."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
    return metadata


def set_aside(folder: Path, run: str) -> None:
    """Rename the result of another training, so that it is not lost.

    Args:
        folder: of weights.
        run: whose own earlier result may be replaced.
    """
    old = folder / WEIGHTS_FILE
    if not old.exists() or read_metadata(old).get("run") == run:
        return
    date = datetime.fromtimestamp(old.stat().st_mtime).astimezone()
    suffix, number = f"{date:%Y-%m-%d-%H%M%S}", 1
    names = (WEIGHTS_FILE, *SAMPLE_FILES)
    while any(_dated(folder / name, suffix).exists() for name in names):
        number += 1
        suffix = f"{date:%Y-%m-%d-%H%M%S}-{number}"
    for name in names:
        if (folder / name).exists():
            (folder / name).replace(_dated(folder / name, suffix))
    logger.info("The result of an earlier training is kept as %s.", _dated(old, suffix).name)


def _dated(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}.{suffix}{path.suffix}")


if __name__ == "__main__":
    main()
