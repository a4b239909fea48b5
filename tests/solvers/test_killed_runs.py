"""A training that is killed goes on as if nothing had been, to the last bit of its result."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from audiocraft.assets.tensors import read_safetensors
from audiocraft.errors import TrainingError
from audiocraft.solvers.checkpoints import find_checkpoint
from audiocraft.solvers.job import read_job, write_job
from audiocraft.solvers.launch import launch
from audiocraft.solvers.plan import Plan
from audiocraft.solvers.prepare import DATASET_FILE
from audiocraft.solvers.state import read_state, weights_file
from tests.serving.client import assert_gone
from tests.solvers.trainings import SHORT, command, make_music, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="its processes compute on the CPU"),
]

ROOT = Path(__file__).parents[2]
JOB = replace(SHORT, epochs=6, updates_per_epoch=2)
PROCESSES = 2
LINES = {"saving": r"^update \d+/", "result": r"^Epoch 6 of 6 is done"}
"""What is said before these moments."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with five songs, one of which is held out."""
    folder = tmp_path_factory.mktemp("trainings")
    make_music(folder / "music", 5)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(place):
    """Tensors and losses of a training that nobody disturbs, and its folder."""
    weights, text = train(JOB, place / "music", place, PROCESSES)
    return *outcome(weights, text), work_of(text)


def work_of(text):
    return Path(re.search(r"Work folder: (.*)", text)[1])


def outcome(weights, text):
    state = read_state(work_of(text))
    tensors = read_safetensors(weights)[0]
    return {name: tensor.clone() for name, tensor in tensors.items()}, state


def assert_same(ours, theirs):
    assert ours[1].losses == theirs[1].losses
    assert ours[1].validation == theirs[1].validation
    assert ours[1].best == theirs[1].best
    assert ours[0].keys() == theirs[0].keys()
    assert [n for n, tensor in ours[0].items() if not torch.equal(tensor, theirs[0][n])] == []


def another(place, folder):
    """A folder of its own for the same training; what is computed once is there."""
    (folder / "runs").mkdir()
    (folder / "runs/data").symlink_to(place / "runs/data")
    return folder


def descendants(pid):
    """Processes below one, with the rank of those that have one."""
    found = {}
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found[child] = rank_of(child)
                found |= descendants(child)
    return found


def rank_of(pid):
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)
    return None


def makes_result(pid):
    """Whether a process, one with a rank, makes the file of weights."""
    with contextlib.suppress(OSError):
        return b"audiocraft.solvers.result" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def kill(place, folder, victim, moment):
    """Start the training and `kill -9` one of its processes at a moment.

    Args:
        place: of the music.
        folder: of the training.
        victim: `rank 0`, `rank 1`, `agent` or `caller`.
        moment: a pattern of a line, or `saving`: while a checkpoint is being written, or `result`:
            while the file of weights is made.

    Returns:
        Whether a checkpoint was left unfinished.
    """
    caller = subprocess.Popen(
        command(JOB, place / "music", folder, PROCESSES),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    text, awaited = "", LINES.get(moment, moment)
    while not re.search(awaited, text, re.MULTILINE):
        line = caller.stdout.readline()
        assert line, text
        text += line
    below = descendants(caller.pid)
    # With the ranks as they were listed: a process gets its rank only when it runs its program.
    while moment == "result" and not any(
        rank is not None and makes_result(pid) for pid, rank in below.items()
    ):
        assert caller.poll() is None
        below = descendants(caller.pid)
    while moment == "saving" and not any(folder.glob("runs/*/checkpoints/*.unfinished")):
        assert caller.poll() is None
    ranks = {rank: pid for pid, rank in below.items() if rank is not None}
    (agent,) = (pid for pid, rank in below.items() if rank is None)
    pids = {"caller": caller.pid, "agent": agent}
    target = pids.get(victim) or ranks[int(victim[-1]) if len(ranks) > 1 else 0]
    os.kill(target, signal.SIGKILL)
    left = any(folder.glob("runs/*/checkpoints/*.unfinished"))
    assert_gone([*below], 10.0)
    rest = caller.communicate(timeout=60)[0]
    assert caller.returncode != 0
    if victim != "caller":
        assert "was killed by SIGKILL" in rest
    return left


KILLS = (
    ("rank 0", r"^update 1/"),
    ("agent", "saving"),
    ("rank 1", r"^update 3/"),
    ("caller", "saving"),
    ("rank 0", "saving"),
    ("caller", r"^update ([5-9]|1\d)/"),  # the checkpoint may have been whole
    ("agent", r"^update ([7-9]|1\d)/"),
    ("rank 1", "saving"),
    ("caller", r"^Epoch 5 of 6 is done"),
    ("rank 0", "result"),
)


def test_ten_kills(place, uninterrupted, tmp_path):
    """`kill -9` of each process in turn, inside saving too."""
    folder = another(place, tmp_path)
    unfinished = [kill(place, folder, victim, moment) for victim, moment in KILLS]
    assert sum(unfinished) >= 2
    (work,) = (path.parent for path in folder.glob("runs/*/job.json"))
    assert find_checkpoint(work) is not None
    weights, text = train(JOB, place / "music", folder, PROCESSES)
    assert_same(outcome(weights, text), uninterrupted)
    assert not [*work.rglob("*.unfinished")]


def test_another_number_of_processes_goes_on(place, uninterrupted, tmp_path):
    """To the same but for rounding."""
    folder = another(place, tmp_path)
    kill(place, folder, "caller", r"^Epoch 2 of 6 is done")
    weights, text = train(JOB, place / "music", folder, 1)
    assert int(re.search(r"Going on after update (\d+) of 12\.", text)[1]) in {4, 6, 8, 10}
    tensors, state = outcome(weights, text)
    assert [value.update for value in state.losses] == list(range(1, 13))
    for ours, theirs in zip(state.losses, uninterrupted[1].losses, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-4)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, uninterrupted[0][name], rtol=0, atol=2e-3)


class Stop(BaseException):
    """As Cog's cancelation is one."""


def test_a_sharded_training(uninterrupted, tmp_path):
    """Each process keeps its part, and all together go on from them."""

    def go_on(work, stop=None, processes=PROCESSES):
        lines = []

        def log(line):
            lines.append(line)
            if stop is not None and line.startswith(stop):
                raise Stop

        launch("audiocraft.solvers.rounds", [str(work)], processes, log)
        return lines

    works = [tmp_path / name for name in ("whole", "halved")]
    for work in works:
        work.mkdir()
        shutil.copy(uninterrupted[2] / DATASET_FILE, work)
        job, place = read_job(uninterrupted[2])
        write_job(work, job, replace(place, plan=Plan(sharded=True)))
    whole, halved = works
    go_on(whole)
    with pytest.raises(Stop):
        go_on(halved, "Epoch 3 of 6 is done")
    parts = sorted(path.name for path in find_checkpoint(halved).iterdir())
    assert parts == ["notes.json", "state-0.pt", "state-1.pt"]
    write_job(halved, job, replace(place, processes=1))
    with pytest.raises(TrainingError, match=r"was sharded over 2 processes and would now be in 1"):
        go_on(halved, processes=1)
    write_job(halved, job, replace(place, plan=Plan(sharded=True)))
    assert "Going on after update 6 of 12." in go_on(halved)
    outcomes = []
    for work in works:
        state = read_state(work)
        outcomes.append((read_safetensors(weights_file(work, state.best))[0], state))
    assert_same(*outcomes)
    for ours, theirs in zip(outcomes[0][1].losses, uninterrupted[1].losses, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-4)
