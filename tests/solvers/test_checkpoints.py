"""The folder of a job: one job at a time, and always a whole checkpoint in it."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from audiocraft.errors import InputError, TrainingError
from audiocraft.solvers.checkpoints import job_key, load_checkpoint, save_checkpoint, work_folder

ROOT = Path(__file__).parents[2]


def test_the_same_job_has_the_same_name():
    settings = {"lr": 1.0, "epochs": 10, "prompt": "é"}
    key = job_key("abc", settings)
    assert len(key) == 16
    assert job_key("abc", dict(reversed(settings.items()))) == key
    assert len({key, job_key("abd", settings), job_key("abc", settings | {"lr": 2.0})}) == 3


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "last.pt"
    assert load_checkpoint(path) is None
    state = {
        "model": {"a": torch.randn(3, dtype=torch.bfloat16)},
        "update": 7,
        "losses": [0.5, float("inf")],
        "rng": torch.get_rng_state(),
    }
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["a"], state["model"]["a"])
    assert torch.equal(loaded["rng"], state["rng"])
    assert (loaded["update"], loaded["losses"]) == (7, [0.5, float("inf")])
    assert [item.name for item in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_write_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"update": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"update": 2})
    assert load_checkpoint(path) == {"update": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["last.pt"]


def test_a_broken_one_is_named(tmp_path):
    path = tmp_path / "last.pt"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=r"last\.pt is broken .* --fresh\.$"):
            load_checkpoint(path)


def test_one_job_at_a_time(tmp_path):
    folder = tmp_path / "runs/abc"
    with work_folder(folder) as inside:
        assert inside == folder
        with (
            pytest.raises(
                InputError, match=rf"abc is in use by another training \(process {os.getpid()}\)"
            ),
            work_folder(folder),
        ):
            pass
    with work_folder(folder):
        pass


SAVER = """
import sys, torch
from pathlib import Path
from audiocraft.solvers.checkpoints import save_checkpoint, work_folder
with work_folder(Path(sys.argv[1])) as folder:
    for update in range(10**9):
        save_checkpoint(folder / "last.pt", {"update": update, "x": torch.full((500_000,), update)})
        print(update, flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_saves(tmp_path):
    """`kill -9` ten times, at any moment: the lock is free and the checkpoint whole."""
    choose = random.Random(1)  # noqa: S311 - a repeatable choice
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            seen = [int(process.stdout.readline()) for _ in range(2)]
            time.sleep(choose.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            seen += [int(line) for line in process.stdout.read().split()]
        with work_folder(tmp_path):
            state = load_checkpoint(tmp_path / "last.pt")
            assert state["update"] >= seen[-1]
            assert bool((state["x"] == state["update"]).all())
            assert {item.name for item in tmp_path.iterdir()} == {"last.pt", "lock"}
