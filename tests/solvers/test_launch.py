"""Jobs of real processes: nothing of them lives on, whichever of them ends first."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from audiocraft.errors import TrainingError
from audiocraft.solvers.launch import _environment, launch
from tests.serving.client import assert_gone, is_alive

ROOT = Path(__file__).parents[2]
JOB = "tests.solvers.job"
KILLED = "was killed by SIGKILL, most likely for lack of memory"
GO_ON = r": start the training again, which goes on from its last checkpoint if there is one\."
FREE_MEMORY = r": end what else uses memory, and start the training again\."


def run(action, who=0, processes=2, log=lambda _line: None):
    lines = []

    def note(line):
        lines.append(line)
        log(line)

    try:
        launch(JOB, [action, str(who)], processes, note)
    finally:
        assert_gone(pids("\n".join(lines)), 1.0)
    return "\n".join(lines)


def pids(text):
    return [int(pid) for pid in re.findall(r"(?:pid|agent) (\d+)", text)]


def test_ranks_find_each_other_and_their_lines_arrive():
    text = run("end")
    assert {f"rank {rank} of 2" for rank in (0, 1)} <= set(re.findall(r"rank \d of \d", text))
    assert re.findall(r"sum (\d+)", text) == ["3", "3"]


@pytest.mark.slow
def test_eight_processes():
    text = run("end", processes=8)
    assert re.findall(r"sum (\d+)", text) == ["36"] * 8


def test_a_single_process():
    assert "rank 0 of 1" in run("end", processes=1)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("raise", r"^batch_size is wrong\.$"),
        ("exit", rf"^Training process 0 ended with status 3{GO_ON}$"),
        ("fill", rf"^Training process 0 ran out of memory{FREE_MEMORY}$"),
        ("kill", rf"^Training process 0 {KILLED}{FREE_MEMORY}$"),
    ],
)
def test_a_single_process_that_fails(action, message):
    with pytest.raises(TrainingError, match=message):
        run(action, processes=1)


def test_a_caller_knows_what_takes_less_memory():
    sentence = r"^Training process 0 ran out of memory: a smaller model takes less\.$"
    with pytest.raises(TrainingError, match=sentence):
        launch(JOB, ["fill", "0"], 1, lambda _: None, memory_remedy="a smaller model takes less")


def test_threads_are_those_of_the_cpus_that_may_be_used(monkeypatch):
    """As a cpuset leaves them, and at least one; OMP_NUM_THREADS comes first."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    threads = [_environment(processes)["OMP_NUM_THREADS"] for processes in (1, 2, 3, 8)]
    assert threads == ["4", "2", "1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _environment(2)["OMP_NUM_THREADS"] == "5"


def test_the_log_has_all_of_an_error():
    lines = []
    with pytest.raises(
        TrainingError, match=rf"^Training process 0 failed \(shapes differ\){GO_ON}$"
    ):
        run("fail", processes=1, log=lines.append)
    assert lines[-2:] == ["RuntimeError: shapes differ:", "[1] and [2]"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        pytest.param(
            "raise",
            r"^batch_size is wrong\.$",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "exit",
            rf"^Training process 1 ended with status 3{GO_ON}$",
            marks=pytest.mark.slow,
        ),
        ("kill", rf"^Training process 1 {KILLED}{FREE_MEMORY}$"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_its_reason(action, message):
    lines = []
    with pytest.raises(TrainingError, match=message):
        run(action, who=1, log=lambda line: lines.append((line, time.monotonic())))
    begin = max(at for line, at in lines if line.startswith("rank "))
    assert time.monotonic() - begin < 25  # torch's launcher waits 30 s for the other rank


@pytest.mark.slow
def test_a_module_that_is_not_there():
    with pytest.raises(
        TrainingError, match=r"failed \(No module named tests\.solvers\.nothing\): start the"
    ):
        launch("tests.solvers.nothing", [], 1, lambda _: None)


class Stop(BaseException):
    """As Cog's cancelation is one."""


@pytest.mark.slow
def test_what_is_raised_meanwhile_ends_all():
    lines = []

    def log(line):
        lines.append(line)
        if line == "ready":
            raise Stop

    with pytest.raises(Stop):
        launch(JOB, ["wait", "0"], 2, log)
    assert_gone(pids("\n".join(lines)), 1.0)


@pytest.mark.slow
def test_what_is_raised_from_outside_ends_all():
    """While nothing is printed, by the way that Cog takes."""
    import ctypes

    lines, raised = [], []

    def work():
        try:
            launch(JOB, ["wait", "0"], 2, lines.append)
        except Stop:
            raised.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    while "ready" not in lines:
        assert thread.is_alive(), lines
        time.sleep(0.05)
    time.sleep(0.5)
    begin = time.monotonic()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Stop))
    thread.join(15)
    assert raised
    assert raised[0] - begin < 10
    assert_gone(pids("\n".join(lines)), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "agent", "caller"])
@pytest.mark.parametrize(("processes", "moment"), [(1, "working"), (2, "working"), (2, "starting")])
def test_whoever_is_killed_takes_the_others_along(victim, processes, moment, tmp_path):
    """`kill -9`; within 10 s no process of the job lives, and its temporary files are gone."""
    code = (
        "from audiocraft.solvers.launch import launch\n"
        f"launch({JOB!r}, ['wait', '0'], {processes}, lambda line: print(line, flush=True))"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    text = ""
    if moment == "working":
        while "ready" not in text:
            line = caller.stdout.readline()
            assert line, text
            text += line
        job = set(pids(text))
        (agent,) = {int(pid) for pid in re.findall(r"agent (\d+)", text)}
        rank = next(iter(job - {agent}))
    else:
        agent = rank = None
        while rank is None:
            agent = agent or next(iter(children(caller.pid)), None)
            rank = next(iter(children(agent)), None) if agent else None
            assert caller.poll() is None
        job = {agent, *children(agent)}
    os.kill({"rank": rank, "agent": agent, "caller": caller.pid}[victim], signal.SIGKILL)
    assert_gone([*job, caller.pid] if victim == "caller" else [*job], 10.0)
    rest = caller.communicate(timeout=10)[0]
    expected = {
        "rank": "was killed by SIGKILL, most likely",
        "agent": "The launcher of the training processes was killed by SIGKILL: start the training",
        "caller": "",
    }
    assert expected[victim] in rest
    assert not any(map(is_alive, job))
    if moment == "working":  # else torch may be about to make a folder
        assert list(tmp_path.iterdir()) == []


def children(pid):
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
