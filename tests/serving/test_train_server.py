"""Cog's real server in train mode with a small trainer: what arrives, what comes back, where to."""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from audiocraft.serving import cli
from tests.http_server import File, FileServer
from tests.serving.client import Served, start
from tests.serving.test_server import PREDICTOR

ROOT = Path(__file__).parents[2]
TRAINER = """
import json, os, sys, time
from audiocraft.errors import InputError
from cog import BaseModel, Input, Path

class TrainingOutput(BaseModel):
    weights: Path

def train(
    music: Path = Input(description="d"),
    rounds: int = Input(default=3, description="d"),
    action: str = Input(default="", description="d"),
) -> TrainingOutput:
    names = ("WEIGHTS_BY_PATH", "TRAIN_FRESH", "ALLOW_LOCAL_FILES", "TRAIN_PROCESSES")
    values = {name: [type(value).__name__, str(value)] for name, value in locals().items()}
    values["environment"] = {name: os.environ.get(name) for name in names}
    if not isinstance(music, str):
        values["content"] = music.read_text()
    print("training in", os.getcwd(), flush=True)
    exec(action)
    path = Path("weights/trained.safetensors").absolute()
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    return TrainingOutput(weights=str(path) if os.environ.get("WEIGHTS_BY_PATH") else path)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("a project")
    (folder / "predict.py").write_text(PREDICTOR)
    (folder / "train.py").write_text(TRAINER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the trainer imports `audiocraft`
        patch.delenv("TRAIN_PROCESSES", raising=False)
        yield folder


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[Served]:
    with start(project, training=True) as running:
        yield running


def trained(served: Served, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the trainer saw, out of the weights that Cog has put into its answer."""
    status, answer = served.train(inputs)
    assert (status, answer["status"]) == (200, "succeeded"), answer
    content = base64.b64decode(answer["output"]["weights"].partition(";base64,")[2])
    seen: dict[str, Any] = json.loads(content)
    return seen


# The server


def test_it_trains_and_does_not_predict(served: Served) -> None:
    seen = trained(served, {"music": "/some/folder"})
    assert seen["music"] == ["str", "/some/folder"]  # a plain path is no cog.Path
    assert seen["rounds"] == ["int", "3"]
    paths = served.request("GET", "/openapi.json")[1]["paths"]
    assert {"/trainings", "/trainings/{training_id}/cancel"} <= paths.keys()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, '"music" is a required property'),
        ({"music": "x", "rounds": "3"}, '"3" is not of type "integer"'),
        ({"music": "x", "rounds": None}, 'null is not of type "integer"'),
    ],
)
def test_it_validates_against_the_inputs_of_training(
    served: Served, inputs: dict[str, Any], message: str
) -> None:
    status, answer = served.train(inputs)
    assert status == 422
    (problem,) = answer["detail"]
    assert problem["msg"] in (message, "Field required")


def test_music_by_url(served: Served) -> None:
    with FileServer() as files:
        files.files["/my%20music.zip"] = File(b"songs")
        seen = trained(served, {"music": files.url("/my%20music.zip?token=x")})
        assert seen["content"] == "songs"
        kind, path = seen["music"]
        assert kind == "Path"
        assert not Path(path).exists()  # Cog removes what it has fetched
        status, answer = served.train({"music": files.url("/nothing.zip")})
        assert (status, answer["status"]) == (200, "failed")
        assert "404" in answer["error"]


# The command


def run(project: Path, *arguments: str) -> int:
    return cli.main(["train", *arguments], project=project)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user stands."""
    (tmp_path / "here/music").mkdir(parents=True)
    (tmp_path / "here/music.zip").touch()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_path_of_the_result_is_printed(
    project: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, "-i", "music=@music.zip", "-e", "TRAIN_PROCESSES=2") == 0
    captured = capsys.readouterr()
    weights = project / "weights/trained.safetensors"
    assert captured.out == f"{weights}\n"
    assert f"training in {project}" in captured.err.splitlines()
    seen = json.loads(weights.read_text())
    assert seen["music"] == ["str", str(folder / "music.zip")]
    assert seen["environment"] == {
        "WEIGHTS_BY_PATH": "1",
        "TRAIN_FRESH": None,
        "ALLOW_LOCAL_FILES": "1",
        "TRAIN_PROCESSES": "2",
    }
    assert sorted(path.name for path in folder.iterdir()) == ["music", "music.zip"]


@pytest.mark.parametrize("given", ["@music", "music", "@./music/", "{folder}/music", "~/music"])
def test_a_folder_is_a_dataset(
    given: str, project: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert run(project, "--fresh", "-i", f"music={given.format(folder=folder)}") == 0
    seen = json.loads((project / "weights/trained.safetensors").read_text())
    assert seen["music"] == ["str", str(folder / "music")]
    assert seen["environment"]["TRAIN_FRESH"] == "1"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("mine", "mine.safetensors"),
        ("mine.bin", "mine.bin"),
        ("music", "music/trained_model.safetensors"),
        ("~/mine.safetensors", "mine.safetensors"),
    ],
)
def test_where_the_weights_go(
    given: str,
    name: str,
    project: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / name).write_text("what was there before")
    before = (folder / name).stat().st_ino
    assert run(project, "-i", "music=@music.zip", "-o", given) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(f"Written output to: {folder / name}\n")
    weights = project / "weights/trained.safetensors"
    assert (folder / name).samefile(weights)  # a link, which costs nothing
    assert (folder / name).stat().st_ino != before
    assert not list(folder.rglob(".musicgen-*"))


@pytest.mark.usefixtures("folder")
def test_weights_on_another_file_system(project: Path) -> None:
    other = Path("/dev/shm")  # noqa: S108
    if not other.is_dir() or other.stat().st_dev == project.stat().st_dev:
        pytest.skip("there is only one file system")
    target = other / f"musicgen-test-{os.getpid()}.safetensors"
    try:
        assert run(project, "-i", "music=@music.zip", "-o", str(target)) == 0
        assert target.read_bytes() == (project / "weights/trained.safetensors").read_bytes()
        assert not list(other.glob(".musicgen-*"))
    finally:
        target.unlink(missing_ok=True)


@pytest.mark.usefixtures("folder")
def test_the_result_onto_itself(project: Path) -> None:
    weights = project / "weights/trained.safetensors"
    assert run(project, "-i", "music=music", "-o", str(weights)) == 0
    assert json.loads(weights.read_text())["rounds"] == ["int", "3"]
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]


def test_inputs_and_answer_as_json(
    project: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = project / "weights/trained.safetensors"
    text = json.dumps({"music": "@music", "rounds": 4.0})
    assert run(project, "--json", text) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["output"] == {"weights": str(weights)}
    assert json.loads(weights.read_text())["music"] == ["str", str(folder / "music")]
    assert run(project, "--json", text, "-o", "answer.json") == 0
    answer = json.loads((folder / "answer.json").read_text())
    assert answer["output"] == {"weights": str(folder / "answer.safetensors")}
    assert (folder / "answer.safetensors").samefile(weights)


def test_a_place_that_vanishes_leaves_the_weights(
    project: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "gone").mkdir()
    action = f"action=os.rmdir({str(folder / 'gone')!r})"
    assert run(project, "-i", "music=music", "-i", action, "-o", "gone/x") == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    weights = project / "weights/trained.safetensors"
    assert line.startswith(f"'{folder}/gone/x.safetensors' cannot be written (No such file or ")
    assert line.endswith(f"); choose another path, or take the weights from {weights}.")
    assert weights.exists()


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ("raise InputError('epochs is wrong.')", "epochs is wrong."),
        ("raise ValueError('boom')", "ValueError: boom"),
        (
            "os.kill(os.getpid(), 9)",
            (
                "The model's process was killed while it worked, most likely for lack of memory: "
                "take lora_rank=16 or a smaller model_version."
            ),
        ),
    ],
)
def test_failures(
    action: str, sentence: str, project: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, "-i", "music=music", "-i", f"action={action}", "-o", "mine") == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(sentence)
    assert captured.out == ""
    assert not (folder / "mine.safetensors").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "music is required; give it with -i music=..."),
        (["-i", "music="], "music must be a URL, or @ and the path of a file or a folder, as in"),
        (["-i", "music=@"], "music must be a file or a folder, but there is no path after"),
        (["-i", "music=@no.zip"], "music must be a file or a folder, but there is no 'no.zip'; "),
        (["-i", "music=music.zip"], "music must be a URL, or @ and the path of a file or a folder"),
        (["-i", "music=@/dev/null"], "music must be a file or a folder, but '/dev/null' is none"),
        (["-i", "action=@music", "-i", "music=music"], "action must be a file, but 'music' is a"),
        (["-i", "music=music", "-i", "tempo=3"], "tempo is not an input of this model; there are"),
        (["-i", "music=music", "-o", "no/x"], "-o: there is no folder 'no' to write 'x' into; "),
        (["-i", "music=music", "-o", "folder.safetensors/"], "-o: there is no folder"),
        (["--slow"], "unrecognized arguments: --slow; scripts/train --help shows what there is."),
    ],
)
def test_errors_come_before_the_server(
    arguments: list[str],
    sentence: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "CogServer", None)
    assert run(project, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence)
    assert captured.err.count("\n") == 1
    assert captured.out == ""
