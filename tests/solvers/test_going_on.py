"""A training that goes on, and one that has ended: the chain of its processes without these."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from audiocraft.data.dataset import Prepared, save_prepared
from audiocraft.data.report import DatasetReport
from audiocraft.errors import AssetError, InputError, TrainingError
from audiocraft.models.shapes import shape_of
from audiocraft.solvers import run
from audiocraft.solvers.checkpoints import save_checkpoint
from audiocraft.solvers.devices import Device
from audiocraft.solvers.job import read_job
from audiocraft.solvers.memory import memory_need
from audiocraft.solvers.needs import training_need
from audiocraft.solvers.plan import Plan
from audiocraft.solvers.prepare import DATASET_FILE
from audiocraft.solvers.result import WEIGHTS_FILE, choose_weights
from audiocraft.solvers.run import describe_run
from audiocraft.solvers.state import Measured, RunState, read_state, weights_file
from tests.solvers.trainings import SHORT, disk, make_music, train

GB = 10**9
UPDATES, BEST = 6, 3  # of `SHORT`
PAIR = replace(SHORT, version="small")
"""For two GPUs, one clip for each."""


class Chain:
    """Leaves what the processes of a training leave, and computes nothing.

    Attributes:
        devices: GPUs that are there.
        host: bytes of memory that the host has.
        until: the update after which a training is stopped.
        fetched: jobs whose files were asked for.
        stages: that were started, by the last part of their module.
        options: of their launches, by stage.
        plan: that the last training had.
    """

    def __init__(self, monkeypatch):
        self.devices = []
        self.host = 64 * GB
        self.until = UPDATES
        self.fetched = []
        self.stages = []
        self.options = {}
        self.plan = None
        monkeypatch.setattr(run, "find_devices", lambda: self.devices)
        monkeypatch.setattr(run, "fetch_base", self.fetched.append)
        monkeypatch.setattr(run, "launch", self.launch)
        monkeypatch.setattr("audiocraft.solvers.memory.host_memory", lambda: self.host)

    def launch(self, module, arguments, processes, _log, **options):
        stage, work = module.rpartition(".")[2], Path(arguments[0])
        self.stages.append(stage)
        self.options[stage] = options
        place = read_job(work)[1]
        if stage == "prepare":
            Path(place.data).mkdir(exist_ok=True)
            prepared = Prepared((), DatasetReport("music", "key", (), (), ()), {})
            save_prepared(work / DATASET_FILE, prepared)
        if stage == "rounds":
            self.plan = place.plan
            self.train(work, processes)
        if stage == "result":
            update, _ = choose_weights(read_state(work))
            tensors = load_file(weights_file(work, update))
            said = {"run": work.name, "training": json.dumps({"update": update}), "prompts": "[]"}
            save_file(tensors, Path(place.weights) / WEIGHTS_FILE, said)

    def train(self, work, processes):
        state = RunState(
            updates=UPDATES,
            updates_per_epoch=3,
            clips=4,
            songs=4,
            held_out=0,
            held_out_clips=0,
            ranks=processes,
            sharded=self.plan.sharded,
            base_sha256="ab",
            update=self.until,
            best=BEST,
            exported=BEST,
            validation=[Measured(BEST, 1.0, (1.0,))],
        )
        save_file({"a": torch.full((1,), float(BEST))}, weights_file(work, BEST))
        own = None if state.has_ended else {"a": torch.zeros(1)}
        save_checkpoint(work, self.until, own, state.notes())
        if not state.has_ended:
            raise KeyboardInterrupt


@pytest.fixture
def chain(monkeypatch):
    disk(monkeypatch, 1000 * GB)
    return Chain(monkeypatch)


@pytest.fixture
def music(tmp_path):
    return make_music(tmp_path / "music", 1)


def work_of(folder):
    (path,) = folder.glob("runs/*/job.json")
    return path.parent


def gpus(number, size):
    return [Device("NVIDIA L4", int(size), bfloat16=True)] * number


def least(*, sharded):
    """Bytes of each of two GPUs."""
    plan = Plan(checkpointing=True, sharded=sharded)
    shape = shape_of(PAIR.version)
    return memory_need(shape, PAIR, plan, 2, gpu=True, bfloat16=True).total


def stopped(chain, job, music, folder):
    """A training that is interrupted after its fourth update."""
    chain.until = 4
    with pytest.raises(KeyboardInterrupt):
        train(job, music, folder)
    chain.until = UPDATES


# Memory


def test_what_was_sharded_stays_so_where_more_memory_is_free(chain, music, tmp_path):
    chain.devices, chain.host = gpus(2, least(sharded=False) - 1), 0
    stopped(chain, PAIR, music, tmp_path)
    assert chain.plan.sharded
    chain.devices = gpus(2, 80 * GB)
    _, text = train(PAIR, music, tmp_path)
    assert chain.plan.sharded
    assert "The weights stay as they were, sharded over the 2 GPUs, with gradients" in text


def test_what_was_not_sharded_asks_for_memory_where_less_is_free(chain, music, tmp_path):
    chain.devices, chain.host = gpus(2, 80 * GB), 0
    stopped(chain, PAIR, music, tmp_path)
    assert not chain.plan.sharded
    need = least(sharded=False)
    chain.devices = gpus(2, need - 1)
    with pytest.raises(InputError) as caught:
        train(PAIR, music, tmp_path)
    assert str(caught.value) == (
        f"model_version=small with full fine-tuning and adamw needs at least {need / GB:.1f} GB of "
        f"memory to go on unsharded as it began, {(need - 1) / GB:.1f} GB are free on NVIDIA L4: "
        "end what else uses it, or begin again with --fresh."
    )
    train(PAIR, music, tmp_path, fresh=True)
    assert chain.plan.sharded


@pytest.mark.parametrize(("number", "now"), [(1, "in 1 process"), (4, "sharded over 4 processes")])
def test_shards_of_another_number_of_gpus(chain, music, tmp_path, number, now):
    job = replace(PAIR, batch_size=4)
    chain.devices, chain.host = gpus(2, least(sharded=False) - 1), 0
    stopped(chain, job, music, tmp_path)
    assert chain.plan.sharded
    chain.devices = gpus(number, 80 * GB)
    sentence = rf"^This training was sharded over 2 processes and would now be {now}: give it as "
    with pytest.raises(InputError, match=sentence):
        train(job, music, tmp_path)


def test_one_that_has_ended_needs_no_memory(chain, music, tmp_path):
    """And none of the disk but for its result; where that is gone it is made again."""
    chain.devices = gpus(2, 80 * GB)
    weights, _ = train(PAIR, music, tmp_path)
    content = load_file(weights)
    weights.unlink()
    chain.devices, chain.host = [], 0
    chain.stages.clear()
    again, _ = train(PAIR, music, tmp_path)
    assert chain.stages == ["result", "samples"]
    assert load_file(again) == content == {"a": torch.tensor([float(BEST)])}


def test_one_that_has_ended_is_refused_nothing(chain, music, tmp_path, monkeypatch):
    """Neither a GPU is asked for then, nor a network, nor room."""
    chain.devices = gpus(2, 80 * GB)
    weights, _ = train(PAIR, music, tmp_path)
    assert chain.fetched == [PAIR]
    chain.fetched.clear()
    monkeypatch.setattr(run, "find_devices", pytest.fail)
    disk(monkeypatch, 0)
    again, text = train(PAIR, music, tmp_path)
    assert again == weights
    assert "This training has ended before: here is its result" in text
    assert chain.fetched == []


@pytest.mark.parametrize("until", [4, UPDATES])
def test_a_training_on_other_music_changes_no_refusal(chain, music, tmp_path, until):
    """Nothing is fetched for what does not fit, whatever has the same settings."""
    chain.devices = gpus(2, 80 * GB)
    if until < UPDATES:
        stopped(chain, PAIR, music, tmp_path)
    else:
        train(PAIR, music, tmp_path)
    chain.fetched.clear()
    chain.devices, chain.host = gpus(2, 2 * GB), 0
    with pytest.raises(InputError) as caught:
        train(PAIR, make_music(tmp_path / "more", 2), tmp_path)
    assert re.search(
        r" needs at least \d+\.\d GB of memory, 2\.0 GB are free .*: give .*, which fits\.$",
        str(caught.value),
    )
    assert chain.fetched == []


def test_what_is_refused_is_not_discarded(chain, music, tmp_path, monkeypatch):
    """`--fresh` removes when nothing stands in its way any more, and counts that as room."""

    def offline(_):
        raise AssetError("There is no network.")

    chain.devices = gpus(1, 80 * GB)
    stopped(chain, SHORT, music, tmp_path)
    work = work_of(tmp_path)
    before = left(work)
    chain.devices = gpus(1, 0.3 * GB)
    with pytest.raises(InputError, match=r" needs at least "):
        train(SHORT, music, tmp_path, fresh=True)
    chain.devices = gpus(1, 80 * GB)
    with monkeypatch.context() as patch:
        patch.setattr(run, "fetch_base", offline)
        with pytest.raises(AssetError, match=r"^There is no network"):
            train(SHORT, music, tmp_path, fresh=True)
    disk(monkeypatch, training_need(SHORT) * 3 // 4)
    with pytest.raises(AssetError, match=r"^This training needs "):
        train(SHORT, music, tmp_path, fresh=True)
    assert left(work) == before
    write_half(work)
    (work / "note").touch()
    train(SHORT, music, tmp_path, fresh=True)
    assert chain.stages == ["prepare", "rounds"] * 2 + ["result", "samples"]
    assert left(work) == ["6", "notes.json", "weights-3.safetensors"]
    assert not (work / "note").exists()


def write_half(work):
    """As if half of what `SHORT` may write were there."""
    with weights_file(work, BEST).open("wb") as file:
        file.truncate(training_need(SHORT) // 2)


def test_what_helps_where_memory_is_short(chain, music, tmp_path):
    """Other settings of the training help the training alone."""
    train(SHORT, music, tmp_path)
    assert {stage: options.get("memory_remedy") for stage, options in chain.options.items()} == {
        "prepare": None,
        "rounds": "lora_rank=16 or a smaller model_version takes less",
        "result": None,
        "samples": "make one with the command below",
    }


# Disk


def test_the_state_goes_when_the_result_is_there(chain, music, tmp_path, monkeypatch):
    weights, _ = train(SHORT, music, tmp_path)
    work = work_of(tmp_path)
    assert left(work) == ["6", "notes.json", "weights-3.safetensors"]
    assert read_state(work).update == UPDATES
    # As one leaves it that was killed after its last checkpoint, before it removed others.
    (work / "checkpoints/5").mkdir()
    for name in ("checkpoints/5/state-0.pt", "checkpoints/5/state-1.pt", "weights-2.safetensors"):
        (work / name).touch()
    chain.stages.clear()
    assert train(SHORT, music, tmp_path)[0] == weights
    assert chain.stages == []
    assert left(work) == ["6", "notes.json", "weights-3.safetensors"]
    (work / "result.json").unlink()
    disk(monkeypatch, 2 * shape_of("tiny").parameters)  # for the result alone
    train(SHORT, music, tmp_path)
    assert chain.stages == ["result", "samples"]


def left(work):
    """Names of what can be large."""
    return sorted(
        path.name for path in (*work.glob("checkpoints/**/*"), *work.glob("weights-*.safetensors"))
    )


def test_what_goes_on_keeps_its_state(chain, music, tmp_path):
    stopped(chain, SHORT, music, tmp_path)
    assert left(work_of(tmp_path)) == [
        "4",
        "notes.json",
        "state-0.pt",
        "weights-3.safetensors",
    ]


def test_what_is_written_counts_as_room(chain, music, tmp_path, monkeypatch):
    """Of one that goes on, and of no other with the same settings."""
    stopped(chain, SHORT, music, tmp_path)
    write_half(work_of(tmp_path))
    disk(monkeypatch, training_need(SHORT) // 2)
    with pytest.raises(AssetError, match=r"^This training needs "):
        train(SHORT, make_music(tmp_path / "more", 2), tmp_path)
    train(SHORT, music, tmp_path)
    assert chain.stages == ["prepare", "rounds"] * 2 + ["result", "samples"]


@pytest.mark.usefixtures("chain")
def test_a_description_looks_at_the_disk_as_a_new_training_does(music, tmp_path, monkeypatch):
    """Whatever has the same settings."""
    train(SHORT, music, tmp_path)
    disk(monkeypatch, training_need(SHORT) - 1)
    places = {"runs": tmp_path / "runs", "weights": tmp_path / "weights"}
    with pytest.raises(AssetError, match=r"^This training needs "):
        describe_run(SHORT, music, **places, log=lambda _: None)


def test_a_full_disk_names_what_may_be_removed(chain, music, tmp_path, monkeypatch):
    disk(monkeypatch, 0)
    with pytest.raises(AssetError, match=r"; free some of it\.$"):  # nothing of ours is there
        train(SHORT, music, tmp_path)
    disk(monkeypatch, 1000 * GB)
    train(SHORT, music, tmp_path)
    disk(monkeypatch, 0)
    with pytest.raises(AssetError) as caught:
        train(replace(SHORT, seed=1), music, tmp_path)
    assert str(caught.value).endswith(
        f"; free some of it: earlier trainings and unpacked archives lie in {tmp_path / 'runs'}."
    )
    assert chain.stages.count("prepare") == 1


def test_a_disk_that_gets_full(chain, music, tmp_path, monkeypatch):
    """It hides no cancelation, and what is lost is made again."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", full)
        stopped(chain, SHORT, music, tmp_path)
        with pytest.raises(TrainingError) as caught:
            train(SHORT, music, tmp_path)
    assert str(caught.value) == (
        f"The disk of {work_of(tmp_path)} is full before the report of this training is written: "
        "free some of it and start the training again, which goes on from there."
    )
    chain.stages.clear()
    train(SHORT, music, tmp_path)
    assert chain.stages == ["result", "samples"]


def test_one_that_an_earlier_version_began_goes_on(chain, music, tmp_path):
    """Its job names the dataset twice."""
    stopped(chain, SHORT, music, tmp_path)
    path = work_of(tmp_path) / "job.json"
    value = json.loads(path.read_bytes())
    value["place"]["source"] = "music"
    path.write_text(json.dumps(value))
    train(SHORT, music, tmp_path)
    assert work_of(tmp_path) == path.parent
    assert read_state(path.parent).has_ended


# Another number of processes


def test_another_batch_size_is_not_begun_without_a_word(chain, music, tmp_path):
    """It may come of the number of GPUs alone.

    Other settings and other music are no such case, and with one that has ended none goes on.
    """
    more = make_music(tmp_path / "more", 2)
    other = replace(SHORT, batch_size=8)
    stopped(chain, other, music, tmp_path)
    work = work_of(tmp_path)
    line = (
        f"A training that differs in batch_size=8 alone has begun in {work}: give batch_size=8, "
        "and processes whose number divides it, to go on with that one."
    )
    for job, dataset, fresh, is_said in (
        (SHORT, music, False, True),
        (replace(SHORT, batch_size=4), music, True, False),
        (replace(SHORT, seed=1), music, False, False),
        (SHORT, more, False, False),
        (other, music, False, False),  # it ends
        (replace(SHORT, batch_size=6), music, False, False),
    ):
        text = train(job, dataset, tmp_path, fresh=fresh)[1]
        assert (line in text) == is_said
        assert text.count("batch_size=") == line.count("batch_size=") * is_said
