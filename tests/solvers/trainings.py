"""Whole trainings of small models on real music, in this process or in one that can be killed.

As a module it is such a process, see `command`.
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import soundfile

from audiocraft.assets.parts import SPARE
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.run import run_job

SONG = Path(__file__).parents[1] / "audio/real_song.ogg"
SHORT = TrainingJob(
    version="tiny",
    optimizer="adamw",
    lr=1e-3,
    warmup=2,
    epochs=2,
    updates_per_epoch=3,
    batch_size=2,
)
"""Of seconds."""


def make_music(folder, songs, descriptions=True):
    """A folder of songs of 6 s each, each with its own description beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    wav, rate = soundfile.read(SONG)
    for number in range(songs):
        piece = wav[number * rate // 4 :][: 6 * rate]
        soundfile.write(folder / f"song {number}.wav", piece, rate)
        if descriptions:
            (folder / f"song {number}.txt").write_text(f"slow piano, take {number}\n")
    return folder


def disk(monkeypatch, free, elsewhere=None):
    """A disk with so many bytes for a training; folders of others may have their own."""

    def usage(folder):
        left = (elsewhere or {}).get(folder, free)
        return type("Usage", (), {"free": SPARE + left})

    monkeypatch.setattr(shutil, "disk_usage", usage)


def train(job, dataset, folder, processes=1, **options):
    """The weights of a job, and what was said."""
    lines = []
    weights = run_job(
        job,
        dataset,
        runs=folder / "runs",
        weights=folder / "weights",
        processes=processes,
        allow_cpu=True,
        log=lines.append,
        **options,
    )
    return weights, "\n".join(lines)


def command(job, dataset, folder, processes=1):
    """What runs a job in a process of its own."""
    settings = {name: value for name, value in asdict(job).items() if value is not None}
    arguments = (str(dataset), str(folder), str(processes), json.dumps(settings))
    return [sys.executable, "-m", "tests.solvers.trainings", *arguments]


def main():
    dataset, folder, processes, settings = sys.argv[1:]
    run_job(
        TrainingJob(**json.loads(settings)),
        Path(dataset),
        runs=Path(folder) / "runs",
        weights=Path(folder) / "weights",
        processes=int(processes),
        allow_cpu=True,
        log=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
