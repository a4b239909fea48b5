"""The folder of weights: a result takes its name, and no other is lost for it."""

import os

import torch
from safetensors.torch import save_file

from audiocraft.solvers.result import SAMPLE_FILES, WEIGHTS_FILE, read_metadata, set_aside

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
