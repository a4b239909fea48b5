"""A project to train in, real music, and inputs of trainings that take seconds."""

import shutil
from pathlib import Path

import soundfile

ROOT = Path(__file__).parents[2]
SONG = ROOT / "tests/audio/real_song.ogg"
SHORT = {
    "model_version": "tiny",
    "auto_labeling": False,
    "drop_vocals": False,
    "epochs": 1,
    "updates_per_epoch": 2,
    "batch_size": 2,
    "warmup": 0,
}
"""Inputs beside the dataset of a training that takes as long as its processes take to start."""

LONG = SHORT | {"epochs": 1000, "updates_per_epoch": 10}
"""Of one that is to be stopped; it logs every update."""


def make_project(folder: Path) -> Path:
    """A working folder for Cog's server, so that results do not lie in this project's."""
    for name in ("predict.py", "train.py", "metadata.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make_music(folder: Path, songs: int = 2) -> Path:
    """A folder of recordings of 6 s each, the first with a description beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    wav, rate = soundfile.read(SONG)
    for number in range(songs):
        piece = wav[number * rate // 2 :][: 6 * rate]
        soundfile.write(folder / f"song {number}.wav", piece, rate)
    (folder / "song 0.txt").write_text("slow piano\n")
    return folder


def job_processes(project: Path) -> list[int]:
    """Processes that a training of this project has started, and that still run.

    They are told by their arguments: the work folder is below the project's `runs`.
    """
    runs = str(project / "runs")
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if any(argument.startswith(runs) for argument in arguments):
                found.append(int(folder.name))
    return found
