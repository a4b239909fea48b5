"""`scripts/train` as a user runs it, in a copy of this project."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from audiocraft.models.finetunes import read_finetune
from audiocraft.serving import cli
from tests.project import copy_project
from tests.serving.client import assert_gone
from tests.serving.trainings import SHORT, job_processes, make_music

ROOT = Path(__file__).parents[2]


def test_help_lists_the_inputs(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: scripts/train" in text
    assert "dataset_path (file; required) Your music" in text
    assert "lr (number; default 1) Learning rate" in text
    assert "optimizer (dadam, adamw, prodigy; default dadam)" in text
    assert "drop_vocals (true or false; default true)" in text
    flags = ("-i", "NAME=@PATH", "--json JSON", "-o PATH", "-e NAME=VALUE", "--setup-timeout")
    for flag in (*flags, "--dry-run", "--fresh"):
        assert flag in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dry-run", "-i", "dataset_path=https://h/x"], "--dry-run looks into the dataset, so"),
        (["-i", "model_version=tiny"], "dataset_path is required; give it with -i dataset_path="),
        (["-i", "dataset_path=@no.zip"], "dataset_path must be a file or a folder, but there is"),
        (["-i", "dataset_path=no"], "dataset_path must be a URL, or @ and the path of a file or"),
        (["-i", "epochs=two"], "epochs must be a whole number, not 'two'."),
    ],
)
def test_errors_come_before_the_server(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(cli, "CogServer", None)
    assert cli.main(["train", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence)
    assert captured.out == ""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("a project"))


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Where the user stands."""
    folder = tmp_path_factory.mktemp("user")
    make_music(folder / "music")
    return folder


def flags(**inputs):
    values = {"dataset_path": "music", **SHORT, **inputs}
    return [
        part
        for name, value in values.items()
        for part in ("-i", f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    ]


def environment(store, **more):
    kept = {
        name: os.environ[name]
        for name in ("HOME", "LANG", "OMP_NUM_THREADS", "PATH")
        if name in os.environ
    }
    own = {"AUDIOCRAFT_CACHE_DIR": str(store), "HF_HUB_OFFLINE": "1"}
    return {**kept, **own, **more}


def train(project, user, *arguments, **more):
    return subprocess.run(
        [project / "scripts/train", *arguments],
        cwd=user,
        env=environment(user / "models", **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.slow
def test_from_a_folder_to_a_file(project, user):
    """Everything lies in the project but for what `-o` names; a second run has nothing to do."""
    before = set(user.iterdir())
    done = train(project, user, *flags(), "-o", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    weights = project / "weights/trained_model.safetensors"
    assert set(user.iterdir()) - before - {user / "models"} == {user / "mine.safetensors"}
    assert (user / "mine.safetensors").samefile(weights)
    tuned = read_finetune(weights, "weights")
    assert (tuned.base, tuned.lora) == ("tiny", None)
    assert str(weights) in done.stderr
    assert done.stderr.endswith(f"Written output to: {user}/mine.safetensors\n")
    content = weights.read_bytes()

    done = train(project, user, *flags(dataset_path="@music"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{weights}\n"
    assert weights.read_bytes() == content
    assert len(list((project / "runs").glob("*/report.json"))) == 1
    # What was linked before is as it was.
    done = train(project, user, *flags(seed=5), "--fresh")
    assert done.returncode == 0, done.stderr
    assert weights.read_bytes() != content
    assert (user / "mine.safetensors").read_bytes() == content


@pytest.mark.slow
def test_a_dry_run_writes_nothing(project, user):
    before = {path for folder in (project, user) for path in folder.rglob("*")}
    done = train(project, user, *flags(batch_size=3), "--dry-run", TRAIN_PROCESSES="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "batch_size is 3 and becomes 4, a multiple of the 2 processes." in done.stderr
    assert "Nothing is removed from the music" in done.stderr
    after = {path for folder in (project, user) for path in folder.rglob("*")}
    made = {path for path in after - before if "__pycache__" not in path.parts}
    assert made <= {project / ".cog", project / ".cog/openapi_schema.json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0, it must be from 1 to 1000000."),
        ({"dataset_path": "@empty.zip"}, "dataset_path: empty.zip is empty (0 bytes); make or"),
        ({"dataset_path": "no-files"}, "dataset_path: the folder no-files holds no files; put"),
        ({"auto_labeling": True}, "auto_labeling needs discogs-effnet-bs64-1.pb, "),
        (
            {"model_version": "stereo-melody"},
            "All weights of stereo-melody would be trained without",
        ),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_be_is_one_sentence(project, user, inputs, sentence, dry):
    (user / "empty.zip").touch()
    (user / "no-files").mkdir(exist_ok=True)
    more = ["--dry-run"] if dry else []
    done = train(project, user, *flags(**inputs), *more, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(sentence)
    assert last.endswith(".")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_answer_as_json(project, user):
    text = json.dumps(SHORT | {"dataset_path": "@music", "lora_rank": 4, "epochs": 1.0})
    done = train(project, user, "--json", text, "-o", "answer.json")
    assert done.returncode == 0, done.stderr
    answer = json.loads((user / "answer.json").read_text())
    assert answer["status"] == "succeeded"
    assert answer["output"] == {"weights": str(user / "answer.safetensors")}
    tuned = read_finetune(user / "answer.safetensors", "weights")
    assert tuned.lora is not None
    assert tuned.lora.rank == 4


@pytest.mark.slow
def test_stopped_and_gone_on_with(project, user):
    """`kill -9`, then Ctrl-C: nothing is left running, and the same command goes on."""
    arguments = flags(epochs=8, seed=3)
    assert stop(project, user, arguments, signal.SIGKILL, "Epoch 2 of 8 is done") == -9
    assert stop(project, user, arguments, signal.SIGINT, "Epoch 4 of 8 is done") == 130
    done = train(project, user, *arguments, TRAIN_PROCESSES="2")
    assert done.returncode == 0, done.stderr
    (update,) = re.findall(r"Going on after update (\d+) of 16\.", done.stderr)
    assert 8 <= int(update) < 16


def stop(project, user, arguments, number, moment):
    """Send a signal to a training that has said something; returns the command's status."""
    with subprocess.Popen(
        [project / "scripts/train", *arguments],
        cwd=user,
        env=environment(user / "models", TRAIN_PROCESSES="2"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as process:
        assert process.stderr is not None
        text = ""
        while moment not in text:
            line = process.stderr.readline()
            assert line, text
            text += line
        processes = job_processes(project)
        assert len(processes) >= 3  # the agent and two ranks
        process.send_signal(number)
        process.communicate(timeout=120)
    assert_gone(processes, 10)
    assert job_processes(project) == []
    return process.returncode
