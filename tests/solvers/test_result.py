"""The folder of weights: a result takes its name, and no other is lost for it."""

import os
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from audiocraft.assets.store import BUNDLED
from audiocraft.data.dataset import Prepared, save_prepared
from audiocraft.data.report import DatasetReport
from audiocraft.errors import TrainingError
from audiocraft.models.finetunes import read_finetune
from audiocraft.solvers import result
from audiocraft.solvers.checkpoints import save_checkpoint
from audiocraft.solvers.job import Place, TrainingJob, write_job
from audiocraft.solvers.plan import Plan
from audiocraft.solvers.prepare import DATASET_FILE
from audiocraft.solvers.result import SAMPLE_FILES, WEIGHTS_FILE, read_metadata, set_aside
from audiocraft.solvers.state import RunState

MOMENT = 1_700_000_000


def put(folder, run=None, moment=MOMENT):
    """A result with its samples; its content says whose it is."""
    folder.mkdir(exist_ok=True)
    metadata = {} if run is None else {"run": run}
    save_file({"a": torch.zeros(1)}, folder / WEIGHTS_FILE, metadata)
    for name in SAMPLE_FILES:
        (folder / name).write_text(str(run))
    os.utime(folder / WEIGHTS_FILE, (moment, moment))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_result_of_another_training_is_renamed(tmp_path):
    put(tmp_path, "one")
    set_aside(tmp_path, "two")
    kept = names(tmp_path)
    assert len(kept) == 3
    dates = {name.split(".")[1] for name in kept}
    assert len(dates) == 1
    assert dates.pop().startswith("2023-11-1")
    (weights,) = (name for name in kept if name.endswith(".safetensors"))
    assert read_metadata(tmp_path / weights) == {"run": "one"}
    assert {(tmp_path / name).read_text() for name in kept if name.endswith("wav")} == {"one"}


def test_that_of_the_same_training_is_replaced(tmp_path):
    put(tmp_path, "one")
    set_aside(tmp_path, "one")
    assert names(tmp_path) == sorted((WEIGHTS_FILE, *SAMPLE_FILES))


def test_several_of_the_same_second(tmp_path):
    for run in ("one", "two", "three"):
        put(tmp_path, run)
        set_aside(tmp_path, "other")
    kept = list(tmp_path.glob("*.safetensors"))
    assert {read_metadata(path)["run"] for path in kept} == {"one", "two", "three"}
    assert len(names(tmp_path)) == 9


def test_files_that_are_not_ours(tmp_path):
    set_aside(tmp_path, "one")
    assert names(tmp_path) == []
    for content in (b"", b"something else"):
        (tmp_path / WEIGHTS_FILE).write_bytes(content)
        set_aside(tmp_path, "one")
    assert len(names(tmp_path)) == 2
    put(tmp_path)
    set_aside(tmp_path, "one")
    assert len(names(tmp_path)) == 5


def test_a_disk_that_gets_full(tmp_path, monkeypatch):
    work, weights = tmp_path / "work", tmp_path / "weights"
    work.mkdir()
    weights.mkdir()
    places = {name: str(tmp_path) for name in ("dataset", "data", "unpacked")}
    place = Place(**places, weights=str(weights), device="cpu", processes=1, plan=Plan())
    write_job(work, TrainingJob("tiny"), place)
    save_prepared(work / DATASET_FILE, Prepared((), DatasetReport("music", "key", (), (), ()), {}))
    state = RunState(
        updates=1,
        updates_per_epoch=1,
        clips=1,
        songs=1,
        held_out=0,
        held_out_clips=0,
        ranks=1,
        sharded=False,
        base_sha256="ab",
        update=1,
        exported=1,
    )
    save_checkpoint(work, 1, None, state.notes())
    tuned = replace(read_finetune(BUNDLED / "tiny/state_dict.safetensors"), base_sha256="ab")

    def full(*_arguments, **_options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sys, "argv", ["result", str(work)])
    monkeypatch.setattr(result, "log_to_stdout", lambda: None)
    monkeypatch.setattr(result, "read_finetune", lambda _: tuned)
    monkeypatch.setattr(result, "save_finetune", full)
    with pytest.raises(TrainingError) as caught:
        result.main()
    assert str(caught.value) == (
        f"The disk of {weights} is full before the result of this training is written: free some "
        "of it and start the training again, which goes on from there."
    )
