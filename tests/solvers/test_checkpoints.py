"""The folder of a job: one job at a time, and always a whole checkpoint in it."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from audiocraft.assets.parts import SPARE
from audiocraft.errors import AssetError, InputError, TrainingError
from audiocraft.solvers.checkpoints import (
    clear,
    find_checkpoint,
    job_key,
    load_state,
    read_notes,
    save_checkpoint,
    work_folder,
)

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_same_job_has_the_same_name():
    settings = {"lr": 1.0, "epochs": 10, "prompt": "é"}
    key = job_key("abc", settings)
    assert len(key) == 16
    assert job_key("abc", dict(reversed(settings.items()))) == key
    assert len({key, job_key("abd", settings), job_key("abc", settings | {"lr": 2.0})}) == 3


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_saved_comes_back(tmp_path, mapped):
    assert find_checkpoint(tmp_path) is None
    state = {
        "model": {"a": torch.randn(3, dtype=torch.bfloat16)},
        "update": 7,
        "losses": [0.5, float("inf")],
        "rng": torch.get_rng_state(),
    }
    save_checkpoint(tmp_path, 7, state, {"best": 5})
    checkpoint = find_checkpoint(tmp_path)
    loaded = load_state(checkpoint, mapped=mapped)
    assert torch.equal(loaded["model"]["a"], state["model"]["a"])
    assert torch.equal(loaded["rng"], state["rng"])
    assert (loaded["update"], loaded["losses"]) == (7, [0.5, float("inf")])
    assert read_notes(checkpoint) == {"best": 5}


def test_a_whole_one_takes_the_place_of_those_before(tmp_path):
    for update in (9, 100, 200):
        save_checkpoint(tmp_path, update, {"x": torch.ones(1)}, {})
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / str(update)
        assert names(tmp_path) == [
            f"checkpoints/{update}/notes.json",
            f"checkpoints/{update}/state-0.pt",
        ]


def test_a_failed_write_leaves_the_last_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"update": 1}, {})
    with monkeypatch.context() as patch:
        for call in (1, 2, 3, 4):
            calls = iter(range(10))

            def fail(*_, call=call, calls=calls):
                if next(calls) + 1 == call:
                    raise OSError(28, "No space left on device")

            patch.setattr(os, "fsync", fail)
            with pytest.raises(TrainingError, match=r"^The disk of .* is full before the checkpo"):
                save_checkpoint(tmp_path, 2, {"update": 2}, {})
            # The fourth is that of the folder, when the new one is whole as well.
            assert load_state(find_checkpoint(tmp_path)) == {"update": 2 if call == 4 else 1}
    with work_folder(tmp_path):
        assert names(tmp_path / "checkpoints") == ["2/notes.json", "2/state-0.pt"]


@pytest.mark.parametrize("size", [1, 10**6])
def test_a_disk_that_gets_full(tmp_path, size):
    """What was written of it goes at once."""
    unfinished = tmp_path / "checkpoints/2.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "state-0.pt").symlink_to("/dev/full")
    with pytest.raises(TrainingError) as caught:
        save_checkpoint(tmp_path, 2, {"x": torch.zeros(size)}, {})
    assert str(caught.value) == (
        f"The disk of {tmp_path} is full before the checkpoint of update 2 is written: free some "
        "of it and start the training again, which goes on from there."
    )
    assert list(unfinished.iterdir()) == []


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"update": 1}, {})
    usage = shutil.disk_usage(tmp_path)._replace(free=SPARE + 4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    state = {"weights": {"a": torch.zeros(600_000)}, "optimizer": {0: [torch.zeros(600_000)]}}
    with pytest.raises(TrainingError) as caught:
        save_checkpoint(tmp_path, 2, state, {})
    assert str(caught.value) == (
        f"The checkpoint of update 2 needs 4.8 MB on the disk of {tmp_path}, which has 4.0 MB: "
        "free some, and start the training again, which goes on from the checkpoint before."
    )
    assert load_state(find_checkpoint(tmp_path)) == {"update": 1}
    save_checkpoint(tmp_path, 2, {"a": torch.zeros(900_000)}, {})


def test_one_that_nothing_goes_on_from_is_its_notes_alone(tmp_path, monkeypatch):
    """In place of the one before, whatever room there is."""
    save_checkpoint(tmp_path, 5, {"update": 5}, {})
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    both = threading.Barrier(2)

    def save(rank):
        save_checkpoint(tmp_path, 6, None, {"a": 1}, rank=rank, parts=2, barrier=both.wait)

    other = threading.Thread(target=save, args=(1,))
    other.start()
    save(0)
    other.join()
    assert names(tmp_path) == ["checkpoints/6/notes.json"]
    assert read_notes(find_checkpoint(tmp_path)) == {"a": 1}


def test_parts_count_when_all_are_there(tmp_path):
    """Each process has a part; while one of them writes, there is nothing to be seen."""
    both = threading.Barrier(2)
    seen = []

    def save(rank):
        calls = itertools.count(1)

        def barrier():
            if rank == 1 and next(calls) == 2:  # its part is written, and the other waits
                time.sleep(0.3)
                seen.append(find_checkpoint(tmp_path))
            both.wait()

        state = {"rank": rank}
        save_checkpoint(tmp_path, 5, state, {}, rank=rank, parts=2, barrier=barrier)
        seen.append(find_checkpoint(tmp_path))

    threads = [threading.Thread(target=save, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = tmp_path / "checkpoints/5"
    assert seen == [None, whole, whole]
    assert [load_state(whole, part) for part in (0, 1)] == [{"rank": 0}, {"rank": 1}]


def test_no_part_is_written_where_all_do_not_fit(tmp_path, monkeypatch):
    """The first process looks before another takes of the room; its end is theirs."""
    usage = shutil.disk_usage(tmp_path)._replace(free=SPARE + 1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    both = threading.Barrier(2)

    def save(rank):
        state = {"x": torch.zeros(250_000)}
        save_checkpoint(tmp_path, 5, state, {}, rank=rank, parts=2, barrier=both.wait)

    def wait():
        with pytest.raises(threading.BrokenBarrierError):
            save(1)

    other = threading.Thread(target=wait)
    other.start()
    time.sleep(0.3)
    with pytest.raises(TrainingError, match=r"^The checkpoint of update 5 needs 2\.0 MB on the d"):
        save(0)
    both.abort()
    other.join()
    assert names(tmp_path) == []


def test_a_broken_one_is_named(tmp_path):
    save_checkpoint(tmp_path, 3, {"update": 3}, {})
    checkpoint = find_checkpoint(tmp_path)
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut off"):
        (checkpoint / "state-0.pt").write_bytes(content)
        with pytest.raises(TrainingError, match=r"checkpoints/3 is broken .* --fresh\.$"):
            load_state(checkpoint)
    (checkpoint / "notes.json").write_text("{")
    with pytest.raises(TrainingError, match=r"checkpoints/3 is broken .* --fresh\.$"):
        read_notes(checkpoint)


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


def test_a_folder_that_may_not_be_written_to(tmp_path):
    (tmp_path / "runs").touch()
    folder = tmp_path / "runs/abc"
    sentence = (
        rf"^This training cannot be written to {folder} \(Not a directory\): have a folder there "
        r"that may be written to\.$"
    )
    with pytest.raises(AssetError, match=sentence), work_folder(folder):
        pass


def test_what_was_killed_before_it_removed_the_one_before(tmp_path):
    """Two are what there is room for, and the next is one of them."""
    save_checkpoint(tmp_path, 10, {"update": 10}, {})
    shutil.copytree(tmp_path / "checkpoints/10", tmp_path / "checkpoints/9")
    with work_folder(tmp_path):
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["10"]
    assert load_state(find_checkpoint(tmp_path)) == {"update": 10}


def test_a_folder_that_is_cleared_is_empty_but_for_its_lock(tmp_path):
    folder, beside = tmp_path / "runs/abc", tmp_path / "runs/data"
    beside.mkdir(parents=True)
    (beside / "codes").touch()
    with work_folder(folder):
        save_checkpoint(folder, 3, {"update": 3}, {})
        (folder / "music").symlink_to(beside)
    with work_folder(folder):
        assert find_checkpoint(folder) is not None
        clear(folder)
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert (beside / "codes").exists()


def test_a_cleared_folder_has_no_checkpoint_from_the_first_moment_on(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 3, {"update": 3}, {})
    (tmp_path / "weights-3.safetensors").touch()

    def killed(path, **_options):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        clear(tmp_path)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path) is None
    with work_folder(tmp_path):
        assert not (tmp_path / "checkpoints.unfinished").exists()


HALF = """
import resource, signal, sys, torch
from safetensors.torch import save_file
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
save_file({"weights": torch.ones(10**6)}, sys.argv[1])
"""


def test_what_safetensors_left_when_it_was_killed_is_removed(tmp_path):
    command = [sys.executable, "-c", HALF, str(tmp_path / "a.safetensors")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGXFSZ
    assert len(list(tmp_path.iterdir())) == 1
    with work_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


SAVER = """
import sys, torch
from pathlib import Path
from audiocraft.solvers.checkpoints import save_checkpoint, work_folder
with work_folder(Path(sys.argv[1])) as folder:
    for update in range(int(sys.argv[2]), 10**9):
        save_checkpoint(folder, update, {"x": torch.full((500_000,), update)}, {"update": update})
        print(update, flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_saves(tmp_path):
    """`kill -9` ten times, at any moment: the lock is free and the checkpoint whole."""
    choose = random.Random(1)  # noqa: S311 - a repeatable choice
    last = -1
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(last + 1)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            seen = [int(process.stdout.readline()) for _ in range(2)]
            time.sleep(choose.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            seen += [int(line) for line in process.stdout.read().split()]
        with work_folder(tmp_path):
            checkpoint = find_checkpoint(tmp_path)
            last = read_notes(checkpoint)["update"]
            assert last >= seen[-1]
            assert bool((load_state(checkpoint)["x"] == last).all())
            assert not list(tmp_path.rglob("*.unfinished"))
