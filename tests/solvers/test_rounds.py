"""A run in its work folder: what it says, what it keeps, and how it goes on from there."""

import logging
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from audiocraft.assets.tensors import read_safetensors
from audiocraft.errors import TrainingError
from audiocraft.models.finetunes import read_finetune
from audiocraft.modules.lora import attach, lora_config
from audiocraft.solvers import rounds
from audiocraft.solvers.checkpoints import find_checkpoint
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.launch import launch
from audiocraft.solvers.musicgen import Trainer
from audiocraft.solvers.rounds import _all_say, _Base, _Run
from audiocraft.solvers.state import RunState, read_state, weights_file
from tests.solvers.training import SETTINGS, clips, model

JOB = TrainingJob("stereo-melody", epochs=2, updates_per_epoch=20, batch_size=2)
UPDATES = 40


class Stop(BaseException):
    """As an interruption comes."""


@contextmanager
def stopped_at(start):
    """Interrupts where a line is said that begins so."""

    def stop(record):
        if record.getMessage().startswith(start):
            raise Stop
        return True

    rounds.logger.addFilter(stop)
    with pytest.raises(Stop):
        yield
    rounds.logger.removeFilter(stop)


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO, "audiocraft")
    return caplog


def run(work, job=JOB, measured=2, music=None, base="ab"):
    """A run as it begins; where it has begun already it goes on."""
    music = music or clips(6)
    lm = model()
    if job.lora_rank:
        attach(lm, lora_config(job.lora_rank), torch.Generator().manual_seed(0))
    updates = job.epochs * job.updates_per_epoch
    settings = replace(SETTINGS, updates=updates, batch_size=job.batch_size, micro_batch=2)
    state = RunState(
        updates=updates,
        updates_per_epoch=job.updates_per_epoch,
        clips=len(music) - measured,
        songs=4,
        held_out=measured,
        held_out_clips=measured,
        ranks=1,
        sharded=False,
        base_sha256=base,
    )
    trainer = Trainer(lm, settings)
    going = _Run(work, job, trainer, _Base(lm, lm.cfg, Path("none")), state)
    going.train(music[measured:], music[:measured])
    return trainer


def names(work):
    return sorted(path.name for path in work.iterdir())


def test_a_line_for_each_tenth_of_an_epoch(tmp_path, said):
    run(tmp_path)
    lines = [line for line in said.messages if line.startswith("update ")]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == list(range(2, 41, 2))
    losses = read_state(tmp_path).losses
    assert [value.update for value in losses] == list(range(2, 41, 2))
    for line, value in zip(lines, losses, strict=True):
        parts = " ".join(f"{part:.3f}" for part in value.per_codebook)
        expected = (
            rf"update {value.update}/40: loss {value.loss:.4f} \({parts}\), lr {value.lr:.3g}, "
            rf"gradient norm {value.grad_norm:.3g}, [\d.e+]+ steps/s, \d+ s left"
        )
        assert re.fullmatch(expected, line)
        assert value.loss == pytest.approx(sum(value.per_codebook) / 8)
    assert "40 updates x batch 2 = 20 passes over the 4 clips of 4 songs." in said.messages
    assert not any("passes: the model may repeat" in line for line in said.messages)


def test_many_passes_are_warned_of(tmp_path, said):
    run(tmp_path, replace(JOB, epochs=1, batch_size=6))
    assert "20 updates x batch 6 = 30 passes over the 4 clips of 4 songs." in said.messages
    assert any(line.startswith("More than 20 passes: ") for line in said.messages)


@pytest.fixture
def measure(monkeypatch):
    """Takes what is measured after each update."""
    evaluate = Trainer.evaluate

    def take(values):
        def measured(self, *arguments, **options):
            loss = evaluate(self, *arguments, **options)
            return replace(loss, sums=loss.counts.double() * values[self.update])

        monkeypatch.setattr(Trainer, "evaluate", measured)

    return take


@pytest.mark.parametrize("rank", [0, 4])
def test_the_best_weights_alone_are_kept(tmp_path, said, rank, measure):
    """Here the second epoch is made the best of three by what is measured."""
    measure({0: 9.0, 10: 3.0, 20: 2.0, 30: 2.5})
    run(tmp_path, replace(JOB, epochs=3, updates_per_epoch=10, lora_rank=rank))
    assert names(tmp_path) == ["checkpoints", "weights-20.safetensors"]
    state = read_state(tmp_path)
    assert (state.update, state.best, state.best_loss, state.exported) == (30, 20, 2.0, 20)
    assert [(value.update, value.loss) for value in state.validation] == [
        (0, 9.0),
        (10, 3.0),
        (20, 2.0),
        (30, 2.5),
    ]
    tuned = read_finetune(weights_file(tmp_path, 20))
    assert (tuned.base, tuned.base_sha256, tuned.license) == (
        *("stereo-melody", "ab", "cc-by-nc-4.0"),
    )
    assert (tuned.lora is None) == (rank == 0)
    assert "Validation loss of the base: 9.0000." in said.messages
    assert (
        "Validation loss of the averaged weights after update 30: 2.5000 (best: 2.0000)."
        in said.messages
    )


def test_what_is_exported_is_what_was_measured(tmp_path):
    """The averaged weights in 16 bit: their loss is that of the best validation."""
    run(tmp_path)
    state = read_state(tmp_path)
    lm = model()
    exported, _ = read_safetensors(weights_file(tmp_path, state.exported))
    lm.load_state_dict({name: tensor.float() for name, tensor in exported.items()})
    loss = Trainer(lm, SETTINGS).evaluate(clips(6)[:2], averaged=False)
    assert float(loss.total) == pytest.approx(state.best_loss, abs=1e-3)
    assert state.best_loss < state.validation[0].loss


@pytest.mark.parametrize("stop", ["update 6/", "update 26/", "Epoch 1 of 2 is done"])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_an_interrupted_run_comes_to_the_same(tmp_path, monkeypatch, said, stop, every):
    """With checkpoints after each update, and at the ends of epochs alone."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    whole.mkdir()
    halved.mkdir()
    expected = run(whole).state_dict()
    monkeypatch.setattr(rounds, "_SAVE_EVERY_S", every)
    with stopped_at(stop):
        run(halved)
    kept = read_state(halved)
    update = int(re.search(r"\d+", stop)[0]) if stop.startswith("update") else 20
    assert (kept.update if kept else 0) == (
        update - (update != 20) if every == 0 else update // 20 * 20
    )
    said.clear()
    assert_same(run(halved).state_dict(), expected)
    assert any(line.startswith("Going on after update ") for line in said.messages) == bool(kept)
    ours, theirs = read_state(halved), read_state(whole)
    assert ours.losses == theirs.losses
    assert ours.validation == theirs.validation
    assert_same(
        read_safetensors(weights_file(halved, ours.exported))[0],
        read_safetensors(weights_file(whole, theirs.exported))[0],
    )
    assert ours.seconds > 0


# A large model, whose updates take 10 s here and whose epochs 40 s

SHORT_EPOCHS = replace(JOB, epochs=5, updates_per_epoch=4)
FALLING = {0: 9.0, 4: 8.0, 8: 7.0, 12: 6.0, 16: 5.0, 20: 4.0}
BEST_IN_BETWEEN = {0: 9.0, 4: 3.0, 8: 2.5, 12: 2.0, 16: 2.2, 20: 3.0}


@pytest.fixture
def large(monkeypatch):
    """Events in their order: what is exported, beside what, and what is saved."""
    clock, events = SimpleNamespace(now=0.0), []
    step, export, save = Trainer._step, rounds.save_finetune, rounds.save_checkpoint

    def slow_step(self, batch):
        clock.now += 10
        return step(self, batch)

    def noted_export(path, *arguments, **options):
        events.append(("export", number_of(path), exports(path.parent)))
        export(path, *arguments, **options)

    def noted_save(work, update, *arguments, **options):
        events.append(("save", update))
        save(work, update, *arguments, **options)

    monkeypatch.setattr(rounds, "_SMALL", 0)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(Trainer, "_step", slow_step)
    monkeypatch.setattr(rounds, "save_finetune", noted_export)
    monkeypatch.setattr(rounds, "save_checkpoint", noted_save)
    return events


def number_of(path):
    return int(re.search(r"\d+", path.name)[0])


def exports(work):
    return sorted(number_of(path) for path in work.glob("weights-*"))


def test_a_large_model_is_saved_once_a_minute(tmp_path, said, large, measure):
    """Every new best is exported, and takes the place of one that no checkpoint names."""
    measure(FALLING)
    run(tmp_path, SHORT_EPOCHS)
    assert large == [
        ("export", 4, []),
        ("export", 8, []),
        ("save", 8),
        ("export", 12, [8]),
        ("export", 16, [8]),
        ("save", 16),
        ("export", 20, [16]),
        ("save", 20),
    ]
    assert exports(tmp_path) == [20]
    assert [line for line in said.messages if line.startswith("Epoch ")] == [
        "Epoch 1 of 5 is done.",
        "Epoch 2 of 5 is done, and saved.",
        "Epoch 3 of 5 is done.",
        "Epoch 4 of 5 is done, and saved.",
        "Epoch 5 of 5 is done, and saved.",
    ]


def test_without_a_best_weights_go_with_a_checkpoint(tmp_path, large):
    run(tmp_path, SHORT_EPOCHS, measured=0)
    assert large == [
        ("export", 8, []),
        ("save", 8),
        ("export", 16, [8]),
        ("save", 16),
        ("export", 20, [16]),
        ("save", 20),
    ]
    assert exports(tmp_path) == [20]


@pytest.mark.parametrize("measured", [2, 0])
def test_epochs_that_were_not_saved_come_to_the_same_again(tmp_path, large, measure, measured):
    """The best of them as well, which is there when it is interrupted, and named by nothing.

    What came after it is not exported.
    """
    measure(BEST_IN_BETWEEN)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    whole.mkdir()
    halved.mkdir()
    expected = run(whole, SHORT_EPOCHS, measured).state_dict()
    before = large[:]
    large.clear()
    with stopped_at("update 15/"):
        run(halved, SHORT_EPOCHS, measured)
    assert read_state(halved).update == 8
    assert exports(halved) == ([8, 12] if measured else [8])
    assert_same(run(halved, SHORT_EPOCHS, measured).state_dict(), expected)
    ours, theirs = read_state(halved), read_state(whole)
    assert ours.notes() | {"seconds": 0} == theirs.notes() | {"seconds": 0}
    assert (ours.best, ours.exported) == ((12, 12) if measured else (None, 20))
    assert exports(halved) == exports(whole) == ([12] if measured else [20])
    for update in exports(whole):
        files = (weights_file(work, update) for work in (halved, whole))
        assert_same(*(read_safetensors(path)[0] for path in files))
    made = [event[:2] for event in before]
    again = [event[:2] for event in large]
    stop = made.index(("save", 8)) + 1
    assert again == made[: stop + bool(measured)] + made[stop:]


def assert_same(ours, theirs):
    """Tensors, numbers, and dictionaries and lists of these."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("measured", [2, 0])
def test_the_last_checkpoint_is_what_a_training_has_come_to(tmp_path, measured):
    """Nothing goes on from it, so it holds no weights and no optimizer."""
    with stopped_at("Epoch 1 of 2 is done"):
        run(tmp_path, measured=measured)
    assert names(find_checkpoint(tmp_path)) == ["notes.json", "state-0.pt"]
    run(tmp_path, measured=measured)
    assert names(tmp_path / "checkpoints") == ["40"]
    assert names(find_checkpoint(tmp_path)) == ["notes.json"]
    state = read_state(tmp_path)
    assert state.has_ended
    assert exports(tmp_path) == [state.chosen]


def test_a_base_that_has_changed(tmp_path):
    with stopped_at("Epoch 1 of 2 is done"):
        run(tmp_path)
    with pytest.raises(TrainingError, match=r"^The weights of stereo-melody are not those that"):
        run(tmp_path, base="other")


def test_a_loss_that_is_not_finite(tmp_path):
    """Before there is a checkpoint, and after."""
    music = clips(6)
    broken = [replace(clip, chroma=clip.chroma * float("nan")) for clip in music]
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, measured=0, music=broken)
    assert re.fullmatch(
        r"The loss of update \d+ is nan: give a lower lr; nothing was saved yet\.",
        str(caught.value),
    )
    with stopped_at("Epoch 1 of 2 is done"):
        run(tmp_path)
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, measured=0, music=broken)
    assert str(caught.value).endswith(
        f" is nan: give a lower lr, or use what is kept in {tmp_path}: the checkpoint of update 20 "
        "and, as replicate_weights takes them, weights-20.safetensors."
    )
    assert read_state(tmp_path).update == 20


@pytest.mark.parametrize(
    ("update", "every", "kept"),
    [
        (10, 1e9, r"; nothing was saved yet\."),
        (26, 0.0, r": the checkpoint of update 25 and, .* weights-20\.safetensors\."),
        (40, 1e9, r": the checkpoint of update 20 and, .* weights-20\.safetensors\."),
    ],
)
@pytest.mark.parametrize("measured", [0, 2])
def test_weights_that_an_update_breaks_are_not_kept(
    tmp_path, monkeypatch, update, every, kept, measured
):
    """In an epoch or at its end, where no loss of another update would tell."""
    step = Trainer._step

    def breaking(self, batch):
        made = step(self, batch)
        if made.number == update:
            with torch.no_grad():
                self.lm.out_norm.weight[0] = float("nan")
        return made

    monkeypatch.setattr(Trainer, "_step", breaking)
    monkeypatch.setattr(rounds, "_SAVE_EVERY_S", every)
    job = replace(JOB, updates_per_epoch=10, epochs=1) if update == 10 else JOB
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, job, measured)
    assert re.fullmatch(
        rf"The norm of the weights after update {update} is nan: give a lower lr(, or use what is "
        rf"kept in {tmp_path})?{kept}",
        str(caught.value),
    )
    assert exports(tmp_path) == ([] if update == 10 else [20])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_not_finite(tmp_path, measure, value):
    measure({0: 9.0, 10: value})
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, replace(JOB, updates_per_epoch=10))
    assert str(caught.value) == (
        f"The validation loss after update 10 is {value}: give a lower lr; nothing was saved yet."
    )
    assert names(tmp_path) == []
    measure({0: 9.0, 10: 3.0, 20: value})
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, replace(JOB, updates_per_epoch=10))
    assert str(caught.value) == (
        f"The validation loss after update 20 is {value}: give a lower lr, or use what is kept in "
        f"{tmp_path}: the checkpoint of update 10 and, as replicate_weights takes them, "
        "weights-10.safetensors."
    )
    state = read_state(tmp_path)
    assert (state.update, state.best, exports(tmp_path)) == (10, 10, [10])


def test_a_base_whose_loss_is_not_finite(tmp_path, measure):
    measure({0: float("nan")})
    with pytest.raises(TrainingError) as caught:
        run(tmp_path)
    assert str(caught.value) == (
        "The validation loss of stereo-melody is nan before its first update: give another "
        "model_version, or other music."
    )


def test_what_is_exported_and_in_no_checkpoint_is_named_as_well(tmp_path, large, measure):
    """A loss that is not finite comes before the first checkpoint of a large model."""
    measure({0: 9.0, 4: 3.0, 8: float("nan")})
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, SHORT_EPOCHS)
    assert str(caught.value).endswith(
        f", or use what is kept in {tmp_path}: as replicate_weights takes them, "
        "weights-4.safetensors."
    )
    assert large == [("export", 4, [])]


def test_a_disk_that_gets_full(tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(rounds, "save_finetune", full)
    with pytest.raises(TrainingError) as caught:
        run(tmp_path)
    assert str(caught.value) == (
        f"The disk of {tmp_path} is full before the export of update 20 is written: free some of "
        "it and start the training again, which goes on from there."
    )


def test_a_process_alone_has_its_say():
    cpu = torch.device("cpu")
    assert _all_say(True, 1, cpu)
    assert not _all_say(False, 1, cpu)


@pytest.mark.slow
@pytest.mark.parametrize(("unable", "expected"), [(1, False), (2, True)])
def test_processes_do_what_all_of_them_say(unable, expected):
    """Such as computing in bfloat16, which older GPUs cannot."""
    lines = []
    launch("tests.solvers.job", ["agree", str(unable)], 2, lines.append)
    assert lines.count(f"all say so: {expected}") == 2
