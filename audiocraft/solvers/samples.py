"""How a fine-tune sounds, and its base with the same prompt: a process of its own.

`launch` runs it as a module, with the work folder, when the weights are written: whatever it takes
or fails for, they are safe.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Final

import torch

from audiocraft.data.audio import audio_write
from audiocraft.models.musicgen import MusicGen
from audiocraft.progress import ProgressLog
from audiocraft.solvers.job import read_job
from audiocraft.solvers.output import log_to_stdout
from audiocraft.solvers.result import SAMPLE_FILES, WEIGHTS_FILE, read_metadata

logger = logging.getLogger(__name__)

DURATION_S: Final = 8.0
_SEED: Final = 2036


def main() -> None:
    """Makes both samples of the job in a work folder."""
    log_to_stdout()
    job, place = read_job(Path(sys.argv[1]))
    folder = Path(place.weights)
    tuned = folder / WEIGHTS_FILE
    prompts: list[str] = json.loads(read_metadata(tuned)["prompts"])
    prompt = prompts[0] if prompts else None
    sources: tuple[str | Path, ...] = (job.version, tuned)
    for source, name in zip(sources, SAMPLE_FILES, strict=True):
        _make(source, prompt, folder / name, place.device)
        if place.device == "cuda":
            torch.cuda.empty_cache()


def _make(source: str | Path, prompt: str | None, path: Path, device: str) -> None:
    """Write a sample; the model is gone afterwards."""
    model = MusicGen.get_pretrained(source, device)
    model.set_generation_params(duration=DURATION_S, seed=_SEED)
    progress = ProgressLog(logger, "steps", path.stem, quiet_s=5.0)
    model.set_custom_progress_callback(progress.update)
    audio = model.generate([prompt])
    assert isinstance(audio, torch.Tensor), "tokens were not asked for"
    audio_write(path.with_suffix(""), audio[0], model.sample_rate, strategy="loudness")


if __name__ == "__main__":
    main()
