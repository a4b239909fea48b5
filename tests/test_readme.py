"""The README as a new user reads it: its commands run, and it says what is so."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiocraft.models.versions import VERSIONS
from audiocraft.serving.schema import build_schema, input_schema, write_schema
from audiocraft.serving.server import CogServer
from tests.http_server import FileServer
from tests.project import copy_project
from tests.releases import full_finetune, stand_in
from tools.memory_table import memory_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HEADINGS = [
    "What MusicGen is",
    "Prediction",
    "Run with Cog",
    "Run on Replicate",
    "Serve it yourself",
    "Fine-tuning",
    "The Replicate API by example",
    "Python",
    "Coming from the older models",
    "References and licences",
]
# Commands that no test of this file runs: they need Docker, an account, or have a test elsewhere.
NOT_HERE = {
    "cog": "needs Docker",
    "docker": "needs Docker",
    "curl -s https://api.replicate.com": "needs an account",
    "scripts/test": "runs this test",
    "scripts/benchmark": "takes minutes; tests/tools/test_benchmark.py",
    "scripts/train -i dataset_path=@music.zip": "needs a GPU",
    "scripts/predict -i replicate_weights=@our_sound": "needs what that one makes",
    "scripts/download stereo-melody --train": "tests/serving/test_download.py",
    "pip install .": "tests/test_packaging.py",
}
FIRST_SECONDS = 30  # that the first command may take where everything is installed


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Each command of the shell examples, its lines joined."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").replace("|\n", "| ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines]


def runs_here(command: str) -> bool:
    return not any(command.startswith(words) for words in NOT_HERE)


def test_headings_stand_in_their_order():
    found = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS
    assert README.index("scripts/predict") < README.index("## ")


def test_every_prompt_is_quoted():
    shell = "".join(blocks("bash"))
    assert len(re.findall("prompt=", shell)) > 5
    assert re.findall(r"prompt=(?!\")", shell) == []
    for command in commands():
        shlex.split(command)  # no quotation mark is left open


@pytest.mark.parametrize("training", [False, True])
def test_the_inputs_are_those_of_the_schema(training):
    heading = "| training input | default |" if training else "| input | default |"
    table = README.partition(heading)[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", table, re.MULTILINE)
    named = {name: row for cell, row in rows for name in re.findall("`([a-z_]+)`", cell)}
    properties = input_schema(build_schema(ROOT), training=training)["properties"]
    assert list(named) == list(properties)
    for name, prop in properties.items():
        default = prop.get("default")
        if default is not None and not isinstance(default, bool):
            assert str(default).removesuffix(".0") in named[name], name


def test_the_versions_are_those_of_the_package():
    table = README.partition("| `model_version` | makes |")[2].partition("\n\n")[0]
    assert set(re.findall("`([a-z-]+)`", table)) == VERSIONS.keys()
    for line in table.splitlines()[2:]:
        for name in re.findall("`([a-z-]+)`", line):
            makes, melody = (cell.strip() for cell in line.split("|")[2:4])
            assert VERSIONS[name].stereo == (makes == "stereo")
            assert VERSIONS[name].melody == (melody == "yes")


def test_its_memory_table_is_the_planners():
    assert memory_table() in README


def test_what_it_names_is_there():
    files = re.findall(r"`((?:scripts|tests|tools|audiocraft)/[\w./]*)`", README)
    assert len(files) > 10
    for name in files:
        assert (ROOT / name).exists(), name


@pytest.fixture
def folder(tmp_path):
    """Where a user stands: the scripts, songs, a fine-tune, and models fetched before."""
    project = copy_project(tmp_path / "project")
    (tmp_path / "scripts").symlink_to(project / "scripts")
    (tmp_path / "models").mkdir()
    store = tmp_path / "models"
    stand_in(store, "stereo-melody", 1)
    full_finetune(store, "stereo-melody", 2, tmp_path / "trained_model.safetensors")
    separator = store / "adefossez/HTDemucs"
    separator.mkdir(parents=True)
    (separator / "htdemucs.yaml").write_text("models: [small]")
    for name in ("adefossez/HTDemucs/small.safetensors", "google-t5/t5-base/config.json"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
    for name in ("model.safetensors", "tokenizer.json"):
        (store / "google-t5/t5-base" / name).touch()
    wav, rate = soundfile.read(ROOT / "tests/audio/real_song.ogg")
    soundfile.write(tmp_path / "song.ogg", np.concatenate([wav] * 5), rate)
    (tmp_path / "music").mkdir()
    for number in range(2):
        name = f"music/song {number}.wav"
        soundfile.write(tmp_path / name, wav[number * rate : (number + 8) * rate], rate)
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    names = ("HOME", "LANG", "OMP_NUM_THREADS", "PATH")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {**kept, "AUDIOCRAFT_CACHE_DIR": str(folder / "models"), "HF_HUB_OFFLINE": "1", **more}


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [text for text in commands() if text.startswith("scripts/") and runs_here(text)],
)
def test_a_command(command, folder):
    before = set(folder.rglob("*"))
    timed = command == commands()[0]
    for _ in range(3 if timed else 1):  # other work on this machine comes and goes
        began = time.monotonic()
        done = shell(command, folder)
        took = time.monotonic() - began
        assert done.returncode == 0, done.stderr
        if took < FIRST_SECONDS:
            break
    assert took < FIRST_SECONDS or not timed
    made = set(folder.glob("project/weights/*.safetensors"))
    assert len(made) == (command.startswith("scripts/train") and "--dry-run" not in command)
    if command.startswith("scripts/predict"):
        files = [path for path in set(folder.rglob("*")) - before if path.parent == folder]
        sounds = [path for path in files if path.suffix != ".json"]
        (sound,) = sounds
        words = shlex.split(command)
        given = words[words.index("-o") + 1] if "-o" in words else "output"
        assert sound.stem == Path(given).stem
        seconds = re.search(r'duration["=: ]+(\d+)', command)
        assert soundfile.info(sound).duration == pytest.approx(
            int(seconds[1]) if seconds else 8, abs=0.1 if sound.suffix == ".mp3" else 0
        )


@pytest.mark.slow
def test_asking_the_server(folder):
    """What a container does, on the same server without Docker."""
    asked = [text for text in commands() if text.startswith("curl") and runs_here(text)]
    assert len(asked) == 3
    write_schema(ROOT)
    with CogServer(ROOT, log=lambda _: None, environment={"ALLOW_LOCAL_FILES": "0"}) as server:
        for command in asked[:2]:
            done = shell(command.replace("5000", str(server.port)), folder)
            assert done.returncode == 0, done.stderr
    assert soundfile.info(folder / "piano.wav").duration == 4


@pytest.mark.slow
def test_asking_the_server_for_a_training(folder):
    (command,) = [text for text in commands() if text.startswith("curl") and ":5001/" in text]
    archive = shutil.make_archive(str(folder / "served/music"), "zip", folder / "music")
    project = folder / "project"
    write_schema(project)
    environment = {"ALLOW_LOCAL_FILES": "0", "WEIGHTS_BY_PATH": "1"}
    with (
        FileServer(Path(archive).parent) as files,
        CogServer(project, training=True, log=print, environment=environment) as server,
    ):
        command = command.replace("5001", str(server.port))
        short = '"epochs": 1, "updates_per_epoch": 2, "drop_vocals"'
        command = command.replace('"drop_vocals"', short)
        done = shell(command.replace("https://example.com", files.url()), folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == {
        "weights": str(project / "weights/trained_model.safetensors")
    }


def test_every_command_is_run_somewhere():
    elsewhere = ("scripts/", "curl -s http://localhost:500")
    for command in commands():
        assert command.startswith(elsewhere) or not runs_here(command), command
    assert shutil.which("curl"), "the examples of the README need curl"
