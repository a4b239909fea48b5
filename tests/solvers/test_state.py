"""What a training says of itself, and with how many processes it goes on."""

import json
import re
from dataclasses import replace

import pytest

from audiocraft.data.labels import Vocabularies
from audiocraft.errors import InputError
from audiocraft.solvers.checkpoints import save_checkpoint
from audiocraft.solvers.job import Place, TrainingJob, read_job, write_job
from audiocraft.solvers.plan import Plan
from audiocraft.solvers.result import choose_weights
from audiocraft.solvers.state import (
    Measured,
    RunState,
    check_resumable,
    read_state,
    remove_weights,
    show_time,
    weights_file,
)

STATE = RunState(
    updates=40,
    updates_per_epoch=10,
    clips=8,
    songs=4,
    held_out=0,
    held_out_clips=0,
    ranks=2,
    sharded=False,
    base_sha256="ab",
    update=20,
    seconds=0.1 + 0.2,
    exported=20,
    recent=[(1 / 3, 2 / 3)],
    losses=[Measured(19, 0.1 + 0.2, (0.1, 0.2), 1e-5, 0.7)],
)


def test_a_job_comes_back_as_it_was(tmp_path):
    job = TrainingJob(
        "tiny",
        one_same_description="naïve",
        vocabularies=Vocabularies(("a---b",), ("calm",), ("piano", "drums")),
        stems=("drums", "bass"),
        lr=0.1 + 0.2,
        seed=-(2**63),
    )
    place = Place("/x/y.zip", "/d", "/u", "/w", "cpu", 2, Plan(micro_batch=3))
    write_job(tmp_path, job, place)
    assert read_job(tmp_path) == (job, place)
    write_job(tmp_path, TrainingJob("small"), place)
    assert read_job(tmp_path) == (TrainingJob("small"), place)


def test_the_state_comes_back_with_its_checkpoint(tmp_path):
    assert read_state(tmp_path) is None
    save_checkpoint(tmp_path, 20, {}, STATE.notes())
    assert read_state(tmp_path) == STATE
    assert RunState.of(json.loads(json.dumps(STATE.notes()))) == STATE


@pytest.mark.parametrize(
    ("was", "now"),
    [((2, False), (2, False)), ((2, False), (8, False)), ((8, True), (8, True))],
)
def test_processes_that_can_go_on(was, now):
    state = replace(STATE, ranks=was[0], sharded=was[1])
    check_resumable(state, now[0], sharded=now[1])


@pytest.mark.parametrize(
    ("was", "now", "sentence"),
    [
        (
            (2, True),
            (4, True),
            "was sharded over 2 processes and would now be sharded over 4 processes",
        ),
        (
            (8, True),
            (1, False),
            "was sharded over 8 processes and would now be in 1 process",
        ),
    ],
)
def test_processes_that_cannot(was, now, sentence):
    state = replace(STATE, ranks=was[0], sharded=was[1])
    with pytest.raises(InputError) as caught:
        check_resumable(state, now[0], sharded=now[1])
    assert str(caught.value) == (
        f"This training {sentence}: give it as many GPUs as before, or begin again with --fresh."
    )


def test_which_weights_are_exported_and_why():
    update, reason = choose_weights(STATE)
    assert update == 20
    assert re.search(r"last update, 20, are exported: with less than 5 songs nothing", reason)
    measured = [Measured(update, loss, (loss,)) for update, loss in ((0, 1.0), (10, 2.5), (20, 3))]
    update, reason = choose_weights(replace(STATE, best=10, validation=measured))
    assert update == 10
    assert re.search(r"update 10 of 40 are exported: their validation loss, 2\.5000, is", reason)


@pytest.mark.parametrize(
    ("best", "exported", "kept"), [(10, 10, [10]), (None, 20, [20]), (None, None, [])]
)
def test_weights_that_the_checkpoint_names_stay(tmp_path, best, exported, kept):
    """The best, or the last where nothing is measured."""
    save_checkpoint(tmp_path, 30, {}, replace(STATE, best=best, exported=exported).notes())
    updates = (10, 20, 40)
    for update in updates:
        weights_file(tmp_path, update).touch()
    (tmp_path / "job.json").touch()
    remove_weights(tmp_path)
    assert [update for update in updates if weights_file(tmp_path, update).exists()] == kept
    assert (tmp_path / "job.json").exists()


def test_without_a_checkpoint_no_weights_stay(tmp_path):
    weights_file(tmp_path, 10).touch()
    remove_weights(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (130, "2 min"), (5000, "83 min"), (9000, "2 h 30 min")],
)
def test_times(seconds, text):
    assert show_time(seconds) == text
