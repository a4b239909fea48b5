"""What `train.py` asks for: what is refused before anything is done, and what becomes of inputs."""

import logging
from dataclasses import fields
from pathlib import Path

import pytest

import metadata
from audiocraft.errors import InputError
from audiocraft.models.shapes import shape_of
from audiocraft.models.versions import VERSIONS
from audiocraft.serving import training
from audiocraft.serving.schema import build_schema, input_schema
from audiocraft.serving.training import TrainingRequest, describe, rounded_batch, vocabularies_of
from audiocraft.solvers.optimizers import OPTIMIZERS
from audiocraft.solvers.schedules import SCHEDULES

ROOT = Path(__file__).parents[2]
SONG = ROOT / "tests/audio/real_song.ogg"
TINY_DIM = shape_of("tiny").dim
VOCABULARIES = vocabularies_of(vars(metadata))
LR_LIMIT = ", it must be a finite number above 0: leave it at 1 if in doubt."


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("TRAIN_PROCESSES", "ALLOW_CPU", "TRAIN_FRESH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALLOW_LOCAL_FILES", "1")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "audiocraft")
    return caplog


def job(processes=1, **inputs):
    request = TrainingRequest(SONG, **inputs)
    request.check()
    return training._job(request, VOCABULARIES, processes)


def refused(**inputs):
    with pytest.raises(InputError) as caught:
        TrainingRequest(**{"dataset_path": SONG, **inputs}).check()
    return str(caught.value)


# What is refused


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            {"source": "guitar"},
            ("source is 'guitar', it must be one of all, drop-vocals, vocals, bass, drums, other."),
        ),
        (
            {"model_version": "huge"},
            f"model_version is 'huge', it must be one of {', '.join(VERSIONS)}.",
        ),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', it must be one of dadam, adamw, prodigy."),
        (
            {"lr_scheduler": ""},
            f"lr_scheduler is '', it must be one of {', '.join(SCHEDULES)}.",
        ),
        ({"lr": 0.0}, f"lr is 0{LR_LIMIT}"),
        ({"lr": -1.0}, f"lr is -1{LR_LIMIT}"),
        ({"lr": float("inf")}, f"lr is inf{LR_LIMIT}"),
        ({"lr": float("nan")}, f"lr is nan{LR_LIMIT}"),
        ({"epochs": 0}, "epochs is 0, it must be from 1 to 1000000."),
        ({"epochs": 10**18}, f"epochs is {10**18}, it must be from 1 to 1000000."),
        (
            {"updates_per_epoch": -1},
            (
                "updates_per_epoch is -1, it must be from 0 to 1000000; 0 is once through the "
                "dataset."
            ),
        ),
        ({"batch_size": 0}, "batch_size is 0, it must be from 1 to 1000000."),
        (
            {"warmup": -1},
            "warmup is -1, it must be from 0 to 1000000; 0 starts at the full rate.",
        ),
        (
            {"lora_rank": -1},
            "lora_rank is -1, it must be from 0 to 1000000; 0 trains all weights.",
        ),
        (
            {"lora_rank": TINY_DIM + 1, "model_version": "tiny"},
            (
                f"lora_rank is {TINY_DIM + 1}, an adapter of tiny can have 1 to {TINY_DIM}: "
                "beyond, full fine-tuning is cheaper, lora_rank=0."
            ),
        ),
        ({"cfg_p": -0.1}, "cfg_p is -0.1, it must be from 0 to 1; 0.3 suits most music."),
        ({"cfg_p": 1.5}, "cfg_p is 1.5, it must be from 0 to 1; 0.3 suits most music."),
        ({"cfg_p": float("nan")}, "cfg_p is nan, it must be from 0 to 1; 0.3 suits most music."),
        ({"seed": 2**63}, f"seed is {2**63}, it must be from -2^63 to 2^63 - 1."),
        (
            {"dataset_path": Path("")},  # noqa: PTH201 - as `train.py` makes it of an empty text
            (
                "dataset_path is empty or the server's working folder: give a URL, or the path of "
                "your music."
            ),
        ),
    ],
)
def test_an_input_outside_its_limits(inputs, sentence):
    assert refused(**inputs) == sentence


@pytest.mark.parametrize(
    "inputs",
    [
        {"cfg_p": 0.0},
        {"cfg_p": 1.0},
        {"warmup": 0},
        {"updates_per_epoch": 0},
        {"epochs": 1, "batch_size": 1, "lora_rank": 1},
        {"lora_rank": 1536},
        {"seed": 0},
        {"seed": -(2**63)},
        {"lr": 1e-9},
        *({"source": source} for source in training.SOURCES),
        *({"optimizer": name} for name in OPTIMIZERS),
    ],
)
def test_what_is_inside(inputs):
    assert job(**inputs)


@pytest.fixture
def dataset(tmp_path):
    """Datasets that cannot be, by what is wrong with them."""
    (tmp_path / "nothing/deep/er").mkdir(parents=True)
    (tmp_path / "empty.zip").touch()
    (tmp_path / "loop.zip").symlink_to("loop.zip")
    (tmp_path / "link.zip").symlink_to("nowhere.zip")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "dataset_path: the folder nothing holds no files; put your music into it."),
        (
            "nowhere.zip",
            (
                "dataset_path: there is no file or folder {}: give a URL, or on the command line "
                "the path of one as in dataset_path=@music.zip."
            ),
        ),
        (
            "link.zip",
            (
                "dataset_path: there is no file or folder {}: give a URL, or on the command line "
                "the path of one as in dataset_path=@music.zip."
            ),
        ),
        ("empty.zip", "dataset_path: empty.zip is empty (0 bytes); make or upload it again."),
        ("x" * 300, "dataset_path: "),
        (
            "a\0b",
            "dataset_path is no path that can be followed (embedded null byte); check the path.",
        ),
    ],
)
def test_a_dataset_that_cannot_be(name, sentence, dataset):
    with pytest.raises(InputError) as caught:
        describe(TrainingRequest(dataset / name, model_version="tiny"), VOCABULARIES)
    message = str(caught.value)
    assert message.startswith(sentence.format(dataset / name))
    assert message.endswith(".")
    assert "\n" not in message


def test_a_dataset_of_the_server(monkeypatch, tmp_path):
    """As for predictions: nothing but what lies below the working and the temporary folder."""
    monkeypatch.setenv("ALLOW_LOCAL_FILES", "0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "link").symlink_to("/etc")
    for path in ("/etc", "/etc/passwd", "link", "link/passwd", "../../../../../../etc/passwd"):
        with pytest.raises(InputError, match=r"^dataset_path is a path on the server, which is"):
            describe(TrainingRequest(Path(path), model_version="tiny"), VOCABULARIES)
    # Folders are what a server keeps its own in, such as the music of another training.
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/song.wav").touch()
    for path in ("runs", str(tmp_path), "../" + tmp_path.name):
        with pytest.raises(InputError, match=r"^dataset_path is a folder of the server, which is"):
            describe(TrainingRequest(Path(path), model_version="tiny"), VOCABULARIES)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "65", "٣", " "])
def test_a_number_of_processes_that_cannot_be(text, monkeypatch):
    monkeypatch.setenv("TRAIN_PROCESSES", text)
    with pytest.raises(InputError) as caught:
        describe(TrainingRequest(SONG, model_version="tiny"), VOCABULARIES)
    assert str(caught.value) == (
        f"TRAIN_PROCESSES is {text!r}, it must be a whole number from 1 to 64: leave it out for a "
        "single process."
    )


# What becomes of inputs


def test_the_job_holds_every_input():
    made = job(
        one_same_description="our sound",
        drop_vocals=False,
        model_version="small",
        lr=0.5,
        epochs=2,
        updates_per_epoch=0,
        batch_size=5,
        optimizer="prodigy",
        lr_scheduler="linear_warmup",
        warmup=3,
        cfg_p=0.2,
        lora_rank=16,
        seed=7,
    )
    assert made.vocabularies == VOCABULARIES
    assert [len(getattr(VOCABULARIES, field.name)) for field in fields(VOCABULARIES)] == [
        400,
        56,
        40,
    ]
    values = {field.name: getattr(made, field.name) for field in fields(made)}
    assert values | {"vocabularies": None} == {
        "version": "small",
        "one_same_description": "our sound",
        "vocabularies": None,
        "stems": None,
        "optimizer": "prodigy",
        "lr": 0.5,
        "schedule": "linear_warmup",
        "warmup": 3,
        "epochs": 2,
        "updates_per_epoch": 0,
        "batch_size": 5,
        "cfg_p": 0.2,
        "lora_rank": 16,
        "seed": 7,
    }
    assert job(auto_labeling=False).vocabularies is None


def test_defaults_are_those_of_the_interface():
    properties = input_schema(build_schema(ROOT), training=True)["properties"]
    assert [field.name for field in fields(TrainingRequest)] == list(properties)
    for field in fields(TrainingRequest)[1:]:
        assert field.default == properties[field.name]["default"], field.name


@pytest.mark.parametrize(
    ("source", "drop_vocals", "stems", "sentence"),
    [
        ("all", False, None, "Nothing is removed from the music: source=all, drop_vocals=false."),
        (
            "all",
            True,
            ("drums", "bass", "other"),
            "Vocals will be removed from the music: drop_vocals=true.",
        ),
        (
            "drop-vocals",
            False,
            ("drums", "bass", "other"),
            "Vocals will be removed from the music: source=drop-vocals.",
        ),
        (
            "drop-vocals",
            True,
            ("drums", "bass", "other"),
            "Vocals will be removed from the music: source=drop-vocals.",
        ),
        (
            "bass",
            False,
            ("bass",),
            "All but bass will be removed from the music: source=bass.",
        ),
        (
            "vocals",
            True,
            ("vocals",),
            (
                "All but vocals will be removed from the music: source=vocals, which overrides "
                "drop_vocals=true."
            ),
        ),
    ],
)
def test_what_is_removed(source, drop_vocals, stems, sentence, said):
    assert job(source=source, drop_vocals=drop_vocals).stems == stems
    assert said.messages == [sentence]


@pytest.mark.parametrize(
    ("batch_size", "processes", "rounded"),
    [
        (3, 1, 3),
        (3, 8, 8),
        (1, 8, 8),
        (11, 8, 8),
        (12, 8, 16),  # a tie goes up
        (16, 8, 16),
        (3, 2, 4),
        (4, 3, 3),
        (5, 3, 6),
        (1, 1, 1),
    ],
)
def test_batch_size_is_rounded_to_the_processes(batch_size, processes, rounded, said):
    assert rounded_batch(batch_size, processes) == rounded
    assert job(processes, batch_size=batch_size).batch_size == rounded
    sentence = (
        f"batch_size is {batch_size} and becomes {rounded}, a multiple of the {processes} "
        "processes."
    )
    assert (sentence in said.messages) == (batch_size != rounded)


def test_adamw_has_a_rate_of_its_own(said):
    assert job(optimizer="adamw").lr == 1e-4
    assert any(message.startswith("lr=1 with adamw means 0.0001") for message in said.messages)
    said.clear()
    assert job(optimizer="adamw", lr=3e-4).lr == 3e-4
    assert not any("adamw" in message for message in said.messages)
    assert job(optimizer="adamw", lr=0.5).lr == 0.5
    assert any("is a high rate for adamw" in message for message in said.messages)


def test_a_warmup_longer_than_the_training(said):
    assert job(epochs=1, updates_per_epoch=7).warmup == 8
    assert said.messages[-1] == (
        "warmup is 8 updates and the training has 7, so the learning rate never comes to its full "
        "height: lower warmup, or raise epochs."
    )
    said.clear()
    job(epochs=1, updates_per_epoch=8)
    job(epochs=1, updates_per_epoch=0)  # as many as the dataset has
    assert not any("warmup" in message for message in said.messages)


def test_processes_without_a_gpu(monkeypatch, said):
    monkeypatch.setattr(training, "find_devices", list)
    monkeypatch.setattr(training, "device_warning", lambda: None)
    assert training._processes() == 1
    monkeypatch.setattr(training, "device_warning", lambda: "Warning: GPU 0 is there, but")
    assert training._processes() == 1
    assert said.messages == [
        "There is no GPU: this trains on the CPU.",
        "Warning: GPU 0 is there, but",
    ]
    monkeypatch.setenv("TRAIN_PROCESSES", "3")
    assert training._processes() == 3
    monkeypatch.setenv("TRAIN_PROCESSES", "")
    assert training._processes() == 1


def test_one_process_for_each_gpu(monkeypatch, said):
    monkeypatch.setattr(training, "find_devices", lambda: [object()] * 4)
    assert training._processes() == 4
    assert said.messages == []
    monkeypatch.setenv("TRAIN_PROCESSES", "2")
    assert training._processes() == 4
    assert said.messages[0].startswith("TRAIN_PROCESSES=2 is for machines without a GPU; ")


def test_a_description_looks_where_a_training_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "find_devices", list)
    seen = []

    def note(_job, _dataset, **options):
        seen.append((options["runs"], options["weights"]))
        return tmp_path

    monkeypatch.setattr(training, "run_job", note)
    monkeypatch.setattr(training, "describe_run", note)
    for function in (training.train, describe):
        function(TrainingRequest(SONG, model_version="tiny"), VOCABULARIES)
    assert seen == [(tmp_path / "runs", tmp_path / "weights")] * 2


@pytest.mark.parametrize(("value", "is_allowed"), [("1", True), ("0", False), (None, False)])
def test_a_cpu_trains_all_weights_where_that_is_asked_for(value, is_allowed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "find_devices", list)
    if value is not None:
        monkeypatch.setenv("ALLOW_CPU", value)
    seen = []

    def note(_job, _dataset, **options):
        seen.append(options["allow_cpu"])
        return tmp_path

    monkeypatch.setattr(training, "run_job", note)
    monkeypatch.setattr(training, "describe_run", note)
    for function in (training.train, describe):
        function(TrainingRequest(SONG, model_version="tiny"), VOCABULARIES)
    assert seen == [is_allowed] * 2


@pytest.mark.slow
def test_nothing_is_written_by_a_description(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    request = TrainingRequest(SONG, model_version="tiny", auto_labeling=False, drop_vocals=False)
    describe(request, VOCABULARIES)
    assert request.removal in said.messages[:2]
    assert len(said.messages) > 2
    assert list(tmp_path.iterdir()) == []
