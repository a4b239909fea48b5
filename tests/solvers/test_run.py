"""From music to a file of weights: what is refused first, and whole trainings of a small model."""

import hashlib
import json
import math
import os
import re
import shutil
import threading
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import soundfile
import torch

from audiocraft.assets.parts import try_lock
from audiocraft.assets.remote import show_size
from audiocraft.assets.tensors import read_safetensors
from audiocraft.data.codes import load_encoded, save_encoded
from audiocraft.data.dataset import load_prepared
from audiocraft.data.labels import Vocabularies
from audiocraft.errors import AssetError, InputError, TrainingError
from audiocraft.models import MusicGen
from audiocraft.models.finetunes import read_finetune
from audiocraft.models.shapes import shape_of
from audiocraft.serving.prediction import PredictionRequest, PredictionService
from audiocraft.solvers import run
from audiocraft.solvers.checkpoints import job_key, work_folder
from audiocraft.solvers.clips import hold_out, load_clips
from audiocraft.solvers.devices import find_devices
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.launch import launch
from audiocraft.solvers.musicgen import TrainSettings, batch_clips
from audiocraft.solvers.needs import check_disk, check_result_folder, training_need
from audiocraft.solvers.result import SAMPLE_FILES, WEIGHTS_FILE
from audiocraft.solvers.run import describe_run, run_job
from audiocraft.solvers.state import read_state
from tests.data.odd_files import leave_open, state_samples
from tests.solvers.trainings import SHORT, SONG, disk, make_music, train

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there a training takes one process for each GPU"
)


@pytest.fixture(scope="module")
def devices():
    """Asked for once: it takes a process with torch in it."""
    return find_devices()


@pytest.fixture(autouse=True)
def found_devices(monkeypatch, devices):
    monkeypatch.setattr("audiocraft.solvers.run.find_devices", lambda: devices)


@pytest.fixture
def no_store(tmp_path, monkeypatch):
    """An empty store, and no network."""
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(job, folder, kind=InputError, dataset=SONG, **options):
    """The sentence, which comes before anything is written or unpacked."""
    before = written(folder)
    with pytest.raises(kind) as caught:
        run_job(
            job,
            dataset,
            runs=folder / "runs",
            weights=folder / "weights",
            log=lambda _: None,
            **options,
        )
    assert written(folder) == before
    assert str(caught.value).count(". ") == 0
    return str(caught.value)


def written(folder):
    """Files in a folder, but for locks."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


# What is refused


@pytest.mark.usefixtures("no_store")
def test_a_batch_that_cannot_be_divided(tmp_path):
    assert refused(SHORT, tmp_path, processes=4) == (
        "batch_size is 2, it must be a multiple of the 4 processes."
    )


@pytest.mark.usefixtures("no_store")
def test_all_weights_of_a_release_without_a_gpu(tmp_path):
    job = TrainingJob("stereo-melody")
    assert refused(job, tmp_path) == (
        "All weights of stereo-melody would be trained without a GPU, which takes days: set "
        "ALLOW_CPU=1 to do that, or give lora_rank=16 or model_version=tiny."
    )
    places = {"runs": tmp_path / "runs", "weights": tmp_path / "weights"}
    with pytest.raises(InputError, match=r"^All weights of stereo-melody would"):
        describe_run(job, SONG, **places, log=lambda _: None)


@pytest.mark.usefixtures("no_store")
def test_label_models_that_are_missing(tmp_path):
    job = replace(SHORT, vocabularies=Vocabularies(("a",), ("b",), ("c",)))
    sentence = refused(job, tmp_path, AssetError)
    assert sentence.startswith("auto_labeling needs discogs-effnet-bs64-1.pb, ")
    assert sentence.endswith("or set auto_labeling=false.")


@pytest.mark.usefixtures("no_store")
def test_a_version_that_cannot_be_fetched(tmp_path):
    sentence = refused(replace(SHORT, version="small", lora_rank=4), tmp_path, AssetError)
    assert "of facebook/musicgen-small is not in" in sentence
    assert "HF_HUB_OFFLINE" in sentence


@pytest.mark.usefixtures("no_store")
def test_a_separator_that_cannot_be_fetched(tmp_path):
    sentence = refused(replace(SHORT, stems=("drums",)), tmp_path, AssetError)
    assert sentence.startswith("htdemucs.yaml of adefossez/HTDemucs is not in ")


def test_a_folder_in_use(tmp_path):
    music = make_music(tmp_path / "music", 1)
    seen = []

    def log(line):
        """The first line after the key is known; then it is too late to hold the folder."""
        seen.append(line)
        if line.startswith("Work folder: "):
            held.enter_context(work_folder(tmp_path / "runs" / line.rpartition("/")[2]))

    with ExitStack() as held, pytest.raises(InputError) as caught:
        run_job(SHORT, music, runs=tmp_path / "runs", weights=tmp_path / "weights", log=log)
    work = tmp_path / "runs" / seen[-1].rpartition("/")[2]
    assert str(caught.value) == (
        f"{work} is in use by another training (process {os.getpid()}): wait for its end, stop "
        "it, or change the settings."
    )
    assert [path.name for path in work.iterdir()] == ["lock"]


def test_every_setting_makes_a_training_of_its_own():
    changes = {
        "version": "small",
        "one_same_description": "x",
        "vocabularies": Vocabularies(("a",), (), ()),
        "stems": ("drums",),
        "optimizer": "dadam",
        "lr": 2e-3,
        "schedule": "linear_warmup",
        "warmup": 3,
        "epochs": 4,
        "updates_per_epoch": 0,
        "batch_size": 4,
        "cfg_p": 0.2,
        "lora_rank": 1,
        "seed": 1,
    }
    assert changes.keys() == asdict(SHORT).keys()
    jobs = [SHORT, *(replace(SHORT, **{name: value}) for name, value in changes.items())]
    assert len({job_key("abc", asdict(job)) for job in jobs}) == len(jobs)


def test_disk_need():
    """Two checkpoints of weight, average and two moments, two exports in 16 bit."""
    state, _ = read_safetensors(find_tiny())
    trained = sum(tensor.numel() for key, tensor in state.items() if not key.endswith(".window"))
    assert training_need(SHORT) == trained * (2 * (4 + 4 + 8) + 2 * 2)
    assert training_need(replace(SHORT, optimizer="prodigy")) == trained * (2 * (8 + 16) + 2 * 2)
    shape = shape_of("tiny")
    # in_proj, out_proj, linear1, linear2
    layer = shape.dim * ((3 + 1) + (1 + 1) + (1 + 4) + (4 + 1))
    adapter = 4 * shape.num_layers * layer
    assert training_need(replace(SHORT, lora_rank=4)) == adapter * (2 * (4 + 4 + 8) + 2 * 2)


@pytest.mark.parametrize(
    ("more", "needed"),
    [({}, 0), ({"written": 5_000_000}, -5_000_000), ({"dataset": 7_000_000}, 7_000_000)],
)
def test_room_on_the_disk(more, needed, tmp_path, monkeypatch):
    """What is not there yet counts as what lies above it."""
    need = training_need(SHORT) + needed
    folders = tmp_path / "runs/0", tmp_path / "weights"
    disk(monkeypatch, need)
    check_disk(SHORT, *folders, **more)
    disk(monkeypatch, need - 1)
    sentence = rf"^This training needs {show_size(need)} more on the disk of {tmp_path}, which has"
    with pytest.raises(AssetError, match=sentence):
        check_disk(SHORT, *folders, **more)
    assert list(tmp_path.iterdir()) == []


def test_room_for_the_result_on_another_disk(tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    weights.mkdir()
    export = 2 * shape_of("tiny").parameters
    disk(monkeypatch, training_need(SHORT), {weights: export})
    check_disk(SHORT, tmp_path, weights)
    disk(monkeypatch, training_need(SHORT), {weights: export - 1})
    sentence = (
        rf"^The result of this training needs {show_size(export)} more on the disk of {weights}"
    )
    with pytest.raises(AssetError, match=sentence):
        check_disk(SHORT, tmp_path, weights)


def test_a_folder_that_takes_no_result(tmp_path):
    check_result_folder(tmp_path / "new/weights")
    assert list((tmp_path / "new/weights").iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/weights"):
        with pytest.raises(AssetError, match=rf"^The result .* cannot be written to {folder} \("):
            check_result_folder(folder)


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize(
    ("name", "what"), [("runs", "This training"), ("weights", "The result of this training")]
)
def test_a_folder_that_may_not_be_written_to(name, what, tmp_path):
    """It is refused by a description as well."""
    (tmp_path / name).touch()
    sentence = (
        f"{what} cannot be written to {tmp_path / name} (Not a directory): have a folder there "
        "that may be written to."
    )
    assert refused(SHORT, tmp_path, AssetError) == sentence
    places = {"runs": tmp_path / "runs", "weights": tmp_path / "weights"}
    with pytest.raises(AssetError) as caught:
        describe_run(SHORT, SONG, **places, log=lambda _: None)
    assert str(caught.value) == sentence


@pytest.mark.usefixtures("no_store")
def test_the_disk_is_checked_before_anything_is_unpacked_or_fetched(tmp_path, monkeypatch):
    """And by a description as well; the store is empty and stays so."""
    job = replace(SHORT, version="small", lora_rank=4)
    places = {"runs": tmp_path / "runs", "weights": tmp_path / "weights"}
    archive = shutil.make_archive(tmp_path / "music", "zip", make_music(tmp_path / "music", 1))
    disk(monkeypatch, training_need(job) - 1)
    sentence = refused(job, tmp_path, AssetError, Path(archive))
    assert sentence.startswith("This training needs ")
    with pytest.raises(AssetError, match=r"^This training needs "):
        describe_run(job, SONG, **places, log=lambda _: None)
    disk(monkeypatch, training_need(job))  # and nothing for the music
    sentence = refused(job, tmp_path, AssetError, tmp_path / "music")
    assert sentence.startswith("This training needs ")
    disk(monkeypatch, training_need(job) + 10**9)
    assert "of facebook/musicgen-small is not in" in refused(job, tmp_path, AssetError)


def find_tiny():
    from audiocraft.assets.store import BUNDLED

    return BUNDLED / "tiny/state_dict.safetensors"


@pytest.mark.usefixtures("no_store")
def test_what_a_description_says(tmp_path):
    music = make_music(tmp_path / "music", 3)
    before = sorted(tmp_path.rglob("*"))
    lines = []
    places = {"runs": tmp_path / "runs", "weights": tmp_path / "weights"}
    describe_run(SHORT, music, **places, processes=2, log=lines.append)
    text = "\n".join(lines)
    assert re.search(r"^Memory: .* GB of the .* GB that are free", text)
    assert lines[1] == (
        f"Disk: up to {show_size(training_need(SHORT))} in {tmp_path / 'runs'} for checkpoints and "
        "weights, besides the music."
    )
    assert "Dataset: 3 files, 3.2 MB, 18 s of music." in text
    passes = "6 updates x batch 2 = 4 passes over some 3 clips, by the headers of the files."
    assert lines[3:5] == [passes, "2 processes would train."]
    assert re.search(r"The training itself would take about \d+ (s|min)\.$", text)
    (music / "song 9.m4a").write_bytes(b"what libsndfile does not read")
    lines.clear()
    describe_run(replace(SHORT, updates_per_epoch=0), music, **places, log=lines.append)
    assert "18 s of music and 1 not looked into." in lines[2]
    assert lines[-1].startswith("How long it takes depends on the music")
    assert not any("passes" in line for line in lines)
    (music / "song 9.m4a").unlink()
    labelled = replace(SHORT, vocabularies=Vocabularies(("a",), ("b",), ("c",)))
    lines.clear()
    with pytest.raises(AssetError, match=r"^auto_labeling needs .*: run scripts/download"):
        describe_run(labelled, music, **places, processes=2, log=lines.append)
    assert lines[1:-1] == text.splitlines()[1:-1]
    assert lines[-1].startswith("The training itself would take about ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_description_opens_files_as_a_training_does(tmp_path):
    """Whatever bytes or suffix their names have; and no pipe, where it would wait."""
    music = make_music(tmp_path / "music", 1, descriptions=False)
    (music / "song 0.wav").rename(music / os.fsdecode(b"caf\xe9.wav"))
    lines = []
    assert run._look_at(music, 30.0, lines.append) == 1
    assert lines[-1].endswith(", 6 s of music.")
    (tmp_path / "song.raw").write_bytes(bytes(1000))
    assert run._look_at(tmp_path / "song.raw", 30.0, lines.append) is None
    assert lines[-1].startswith("Dataset: 1 file, ")
    pipe, opened = music / "pipe.wav", threading.Event()
    os.mkfifo(pipe)

    def write():
        os.close(os.open(pipe, os.O_WRONLY))  # when somebody reads
        opened.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert run._look_at(music, 30.0, lines.append) is None
    was_read = opened.is_set()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer.join()
    os.close(reader)
    assert not was_read
    assert lines[-1].endswith(", 6 s of music and 1 not looked into.")


@pytest.mark.parametrize("samples", [0, 2**36 - 1])
def test_lengths_that_cannot_be_are_not_added_up(samples, tmp_path):
    """As of music that was streamed, or a recording that was never finished."""
    music = make_music(tmp_path / "music", 4, descriptions=False)
    soundfile.write(music / "song 2.flac", *soundfile.read(music / "song 2.wav"))
    (music / "song 2.wav").unlink()
    lines = []
    assert run._look_at(music, 30.0, lines.append) == 4
    assert lines[-1].endswith(", 24 s of music.")
    state_samples(music / "song 2.flac", samples)
    leave_open(music / "song 3.wav")
    assert run._look_at(music, 30.0, lines.append) is None
    assert lines[-1].endswith(", 12 s of music and 2 not looked into.")


def test_many_passes_are_warned_of_before_the_music_is_prepared(tmp_path, monkeypatch):
    """By the lengths that headers state; what is not known of all files is not said."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fetch_base", lambda _: None)
    monkeypatch.setattr(run, "launch", stop)
    music = make_music(tmp_path / "music", 3)
    lines = []
    places = {"runs": tmp_path / "runs", "weights": tmp_path / "weights"}

    def said(epochs):
        lines.clear()
        with pytest.raises(KeyboardInterrupt):
            run_job(replace(SHORT, epochs=epochs), music, **places, log=lines.append)
        return [line for line in lines if " passes" in line]

    over = "passes over some 3 clips, by the headers of the files."
    assert said(10) == [f"30 updates x batch 2 = 20 {over}"]
    many, warning = said(11)
    assert many == f"33 updates x batch 2 = 22 {over}"
    assert warning.startswith("More than 20 passes: the model may repeat the music rather than ")
    leave_open(music / "song 1.wav")
    assert said(11) == []


# Whole trainings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of trainings that share what is computed once of six songs."""
    folder = tmp_path_factory.mktemp("trainings")
    make_music(folder / "music", 6)
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """A training of six songs, and what was said."""
    (place / "weights").mkdir()
    (place / "weights" / WEIGHTS_FILE).write_bytes(b"somebody else's")
    weights, text = train(SHORT, place / "music", place)
    return weights, text


def work_of(text):
    return re.search(r"Work folder: (.*)", text)[1]


def report_of(text):
    with open(f"{work_of(text)}/report.json") as file:  # noqa: PTH123
        return json.load(file)


@pytest.mark.slow
def test_what_a_training_says(trained, place):
    weights, text = trained
    assert weights == place / "weights" / WEIGHTS_FILE
    assert "6 updates x batch 2 = 2.4 passes over the 5 clips of 5 songs." in text
    assert "1 songs (1 clips) are held out" in text
    pattern = re.compile(
        r"^update (\d)/6: loss ([\d.]+) \(([\d. ]+)\), lr .*, .* left$", re.MULTILINE
    )
    lines = pattern.findall(text)
    assert [int(number) for number, *_ in lines] == [1, 2, 3, 4, 5, 6]
    for _, loss, parts in lines:
        values = [float(part) for part in parts.split()]
        assert len(values) == 8
        assert sum(values) / 8 == pytest.approx(float(loss), abs=1e-3)
    assert len(re.findall(r"^Validation loss of the averaged weights", text, re.MULTILINE)) == 2
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    size = f"{weights.stat().st_size / 1e6:.1f} MB"
    assert f"Weights: {weights} ({size}, SHA-256 {sha256})" in text
    assert f"scripts/predict -i replicate_weights=@{weights} -i 'prompt=slow piano, take " in text
    prompts = json.loads(read_finetune(weights).checkpoint.metadata["prompts"])
    assert text.splitlines()[-3:] == [f"  {prompt}" for prompt in prompts]
    assert len(set(prompts)) == 3
    for prompt in prompts:
        assert re.fullmatch(r"slow piano, take \d\.", prompt)


@pytest.mark.slow
def test_the_report_accounts_for_all(trained):
    report = report_of(trained[1])
    assert [file["name"] for file in report["dataset"]["used"]] == [
        f"song {number}.wav" for number in range(6)
    ]
    assert report["settings"]["lr"] == SHORT.lr
    assert [value["update"] for value in report["history"]["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [value["update"] for value in report["history"]["validation"]] == [0, 3, 6]
    assert report["history"]["losses"][-1]["loss"] < report["history"]["losses"][0]["loss"]
    assert {"decode", "encode", "train", "result", "samples"} <= report["seconds"].keys()
    assert report["result"]["path"] == str(trained[0])


@pytest.mark.slow
def test_the_result_says_what_it_is(trained):
    tuned = read_finetune(trained[0])
    said = tuned.checkpoint.metadata
    assert (tuned.base, tuned.license, tuned.lora) == ("tiny", "apache-2.0", None)
    assert tuned.cfg.transformer_lm.dim == 256
    assert json.loads(said["dataset"])["files"] == 6
    training = json.loads(said["training"])
    assert training["settings"]["optimizer"] == "adamw"
    assert training["settings"]["auto_labeling"] is False
    assert training["held_out_songs"] == 1
    assert len(training["losses"]) == 6
    measured = {value["update"]: value["loss"] for value in training["validation"]}
    del measured[0]  # of the base
    assert training["update"] == min(measured, key=measured.get)
    assert {tensor.dtype for tensor in tuned.checkpoint.state.values()} == {torch.float16}


@pytest.mark.slow
def test_the_result_makes_music(trained):
    """By the library and by the service, and not what its base makes."""
    base, tuned = MusicGen.get_pretrained("tiny"), MusicGen.get_pretrained(trained[0])
    audio = []
    for model in (base, tuned):
        model.set_generation_params(duration=1, seed=3)
        audio.append(model.generate(["slow piano"]))
    assert not torch.equal(*audio)
    request = PredictionRequest(replicate_weights=str(trained[0]), prompt="slow piano", duration=1)
    service = PredictionService()  # its results go with it
    assert soundfile.info(service.predict(request).path).duration == 1


@pytest.mark.slow
def test_samples_lie_beside_it(trained):
    samples = [soundfile.read(trained[0].with_name(name)) for name in SAMPLE_FILES]
    assert [(wav.shape, rate) for wav, rate in samples] == 2 * [((8 * 32000, 2), 32000)]
    assert (samples[0][0] != samples[1][0]).any()


@pytest.mark.slow
def test_a_file_that_was_there_is_kept(trained):
    (kept,) = trained[0].parent.glob("trained_model.*.safetensors")
    assert kept.read_bytes() == b"somebody else's"


@pytest.mark.slow
def test_a_training_that_has_ended(trained, place):
    """Its result is there at once; where it is gone it is made again from what is kept."""
    weights, text = trained
    content = content_of(weights)
    assert [path.name for path in Path(work_of(text)).glob("checkpoints/*/*")] == ["notes.json"]
    again, said = train(SHORT, place / "music", place)
    assert again == weights
    assert "This training has ended before: here is its result" in said
    assert "update" not in said
    assert said.splitlines()[-3:] == text.splitlines()[-3:]
    weights.unlink()
    _, said = train(SHORT, place / "music", place)
    assert "are exported" in said
    assert not re.search(r"^update \d", said, re.MULTILINE)
    assert_equal(content_of(weights), content)


@pytest.mark.slow
def test_a_fresh_one_begins_again(trained, place, monkeypatch):
    """And comes to the same; other settings have a folder of their own, and keep the result."""
    weights, text = trained
    content = content_of(weights)
    _, said = train(SHORT, place / "music", place, fresh=True)
    assert work_of(said) == work_of(text)
    assert "update 1/6: " in said
    assert_equal(content_of(weights), content)
    before = set(weights.parent.glob("trained_model.2*"))
    disk(monkeypatch, training_need(SHORT))  # and nothing for the music, which is there
    _, said = train(replace(SHORT, epochs=1), place / "music", place)
    assert work_of(said) != work_of(text)
    assert "encoding" not in said  # what was computed once
    kept = set(weights.parent.glob("trained_model.2*")) - before
    assert len(kept) == 1
    assert_equal(content_of(kept.pop()), content)


def content_of(path):
    return {name: tensor.clone() for name, tensor in read_safetensors(path)[0].items()}


def assert_equal(some, others):
    assert some.keys() == others.keys()
    differing = [name for name, tensor in some.items() if not torch.equal(tensor, others[name])]
    assert differing == []


@pytest.mark.slow
def test_few_songs_without_descriptions(tmp_path, monkeypatch):
    """Nothing is held out, an adapter is what comes out, and there is nothing to prompt with."""
    music = make_music(tmp_path / "music", 4, descriptions=False)
    job = replace(SHORT, lora_rank=4, epochs=1, updates_per_epoch=0, batch_size=2)
    began, said = [], []

    def stopped(module, arguments, processes, _log, **_):
        """Stop as soon as the weights are there; no other training may replace them."""
        began.append((module.split(".")[-1], try_lock(tmp_path / "weights/.lock") is None))
        if began[-1][0] == "samples":
            raise KeyboardInterrupt
        launch(module, arguments, processes, said.append)

    monkeypatch.setattr(run, "launch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(job, music, tmp_path)
    assert began[-2:] == [("result", True), ("samples", True)]
    assert not (tmp_path / "weights/sample_tuned.wav").exists()
    monkeypatch.undo()
    weights, text = train(job, music, tmp_path)
    assert "Epoch" not in text  # nothing is trained again
    assert "result" in report_of(text)
    text = "\n".join([*said, text])
    assert "2 updates x batch 2 = 1 passes over the 4 clips of 4 songs." in text
    assert "Nothing is held out, for there are less than 5 songs." in text
    assert "The averaged weights of the last update, 2, are exported" in text
    assert "The music has no descriptions" in text
    tuned = read_finetune(weights)
    assert tuned.lora.rank == 4
    assert json.loads(tuned.checkpoint.metadata["prompts"]) == []
    assert MusicGen.get_pretrained(weights).audio_channels == 2
    assert (tmp_path / "weights/sample_tuned.wav").is_file()


@pytest.mark.slow
def test_a_loss_that_is_not_finite(trained, place, tmp_path):
    """What was good is kept and named: here a melody of no numbers comes when some are learnt."""
    shutil.copytree(place / "runs/data", tmp_path / "runs/data")
    job = replace(SHORT, epochs=30, updates_per_epoch=1, batch_size=1)
    prepared = load_prepared(Path(work_of(trained[1])) / "dataset.json")
    clips = load_clips(hold_out(prepared.examples, job.seed)[0])
    settings = TrainSettings(updates=30, batch_size=1, micro_batch=1, seed=job.seed)
    (third,) = batch_clips(clips, settings, 3)
    (broken,) = (example.encoded for example in prepared.examples if example.key == third.key)
    chunk = load_encoded(broken)
    nothing = torch.full_like(chunk.chroma, math.nan)
    save_encoded(tmp_path / "runs/data/codes" / broken.name, replace(chunk, chroma=nothing))
    with pytest.raises(TrainingError) as caught:
        train(job, place / "music", tmp_path)
    said = re.search(
        r"The loss of update (\d+) is nan: give a lower lr, or use what is "
        r"kept in (\S+): the checkpoint of update (\d+) and, as replicate_weights takes them, "
        r"(weights-(\d+)\.safetensors)\.$",
        str(caught.value),
    )
    assert said, str(caught.value)
    number, work, kept, name, best = said.groups()
    assert int(number) >= 3
    assert int(best) <= int(kept) == int(number) - 1
    assert read_state(Path(work)).update == int(kept)
    assert MusicGen.get_pretrained(Path(work) / name).audio_channels == 2
    assert not (tmp_path / "weights" / WEIGHTS_FILE).exists()


@pytest.mark.slow
def test_a_dataset_without_music(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music/song.wav").write_bytes(b"no music")
    with pytest.raises(TrainingError, match=r"music holds no music that can be used"):
        train(SHORT, tmp_path / "music", tmp_path)


@pytest.mark.slow
def test_eight_processes(place, tmp_path):
    (place / "runs/data").mkdir(parents=True, exist_ok=True)  # of the tests before, if any were
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/data").symlink_to(place / "runs/data")
    job = replace(SHORT, epochs=1, updates_per_epoch=1, batch_size=8)
    weights, text = train(job, place / "music", tmp_path, processes=8)
    assert "update 1/1: loss" in text
    assert weights.is_file()
