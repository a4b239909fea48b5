"""Cog's real server with a small predictor: what arrives, what comes back, and that it ends."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from audiocraft.errors import InputError
from audiocraft.serving import cli
from audiocraft.serving.schema import write_schema
from audiocraft.serving.server import CogServer, ServerError, with_absolute_paths
from tests.serving.client import (
    Served,
    assert_gone,
    is_alive,
    members,
    start,
    wait_until,
)

ROOT = Path(__file__).parents[2]
PREDICTOR = """
import json, logging, os, signal, subprocess, sys, tempfile, time
from audiocraft.errors import InputError, WeightsError
from cog import BaseRunner, Input, Path

class Predictor(BaseRunner):
    def setup(self, weights: Path | str | None = None) -> None:
        self.weights = weights
        print("set up in", os.getcwd())
        exec(os.environ.get("TEST_SETUP", ""))

    def run(
        self,
        text: str | None = Input(default=None, description="d"),
        whole: int = Input(default=8, ge=0, le=9, description="d"),
        seed: int | None = Input(default=None, description="d"),
        real: float = Input(default=3, description="d"),
        flag: bool = Input(default=False, description="d"),
        kind: str = Input(default="wav", choices=["wav", "mp3"], description="d"),
        number: int = Input(default=1, choices=[1, 2], description="d"),
        file: Path | None = Input(default=None, description="d"),
        words: list[str] | None = Input(default=None, description="d"),
        files: list[Path] | None = Input(default=None, description="d"),
        action: str = Input(default="", description="d"),
    ) -> Path:
        values = {name: [type(value).__name__, str(value)] for name, value in locals().items()}
        values["folder"] = [tempfile.gettempdir(), os.environ["TMPDIR"]]
        values["weights"] = [type(self.weights).__name__, str(self.weights)]
        print("folder", tempfile.gettempdir())
        print("processes", os.getpid(), os.getppid(), flush=True)
        exec(action)
        self.record_metric("answer", 42)
        path = Path(tempfile.mkdtemp()) / "result.json"
        path.write_text(json.dumps(values))
        return path
"""
DEFAULTS = {
    "text": ["NoneType", "None"],
    "whole": ["int", "8"],
    "seed": ["NoneType", "None"],
    "real": ["int", "3"],
    "flag": ["bool", "False"],
    "kind": ["str", "wav"],
    "number": ["int", "1"],
    "file": ["NoneType", "None"],
    "words": ["NoneType", "None"],
    "files": ["NoneType", "None"],
    "weights": ["NoneType", "None"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("a project")
    (folder / "predict.py").write_text(PREDICTOR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the predictor imports `audiocraft`
        patch.delenv("COG_WEIGHTS", raising=False)
        yield folder


def values(served: Served, inputs: dict[str, Any]) -> dict[str, list[str]]:
    """Type and text of every input, as the predictor saw it."""
    status, answer = served.predict(inputs)
    assert (status, answer["status"]) == (200, "succeeded"), answer
    seen: dict[str, list[str]] = json.loads(
        base64.b64decode(answer["output"].partition(";base64,")[2])
    )
    return {name: value for name, value in seen.items() if name in DEFAULTS}


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[Served]:
    with start(project) as running:
        yield running


def processes(text: str) -> list[int]:
    """The worker and the server, as the predictor printed them."""
    found = re.search(r"processes (\d+) (\d+)", text)
    assert found is not None, text
    return [int(found[1]), int(found[2])]


# The schema in use


def test_the_server_shows_our_schema(served: Served, project: Path) -> None:
    assert served.request("GET", "/openapi.json") == (200, write_schema(project))


def test_inputs_arrive(served: Served, tmp_path: Path) -> None:
    assert values(served, {}) == DEFAULTS
    song = str(tmp_path / "söng.wav")
    inputs = {
        "text": "Café, 日本\n",
        "whole": 3,
        "seed": 9007199254740993,
        "real": 2.5,
        "flag": True,
        "kind": "mp3",
        "number": 2,
        "file": song,
        "words": ["a", "b"],
        "files": [song],
    }
    assert values(served, inputs) == DEFAULTS | {
        "text": ["str", "Café, 日本\n"],
        "whole": ["int", "3"],
        "seed": ["int", "9007199254740993"],
        "real": ["float", "2.5"],
        "flag": ["bool", "True"],
        "kind": ["str", "mp3"],
        "number": ["int", "2"],
        "file": ["str", song],  # a plain path is no cog.Path
        "words": ["list", "['a', 'b']"],
        "files": ["list", str([song])],
    }


def test_numbers_keep_their_json_type(served: Served) -> None:
    """Why `predict.py` converts: 8.0 passes for an integer and arrives as a float."""
    assert values(served, {"whole": 8.0, "real": 1})["whole"] == ["float", "8.0"]
    assert values(served, {"whole": 8.0, "real": 1})["real"] == ["int", "1"]
    assert values(served, {"seed": -(2**63)})["seed"] == ["int", str(-(2**63))]


def test_uploaded_files_become_paths(served: Served) -> None:
    kind, path = values(served, {"file": "data:audio/x-wav;base64,UklGRg=="})["file"]
    assert kind == "Path"
    assert path.endswith(".wav")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"whole": -1}, "-1 is less than the minimum of 0"),
        ({"whole": 10}, "10 is greater than the maximum of 9"),
        ({"whole": "8"}, '"8" is not of type "integer"'),
        ({"whole": 8.5}, '8.5 is not of type "integer"'),
        ({"real": "3"}, '"3" is not of type "number"'),
        ({"flag": 1}, '1 is not of type "boolean"'),
        ({"text": None}, 'null is not of type "string"'),
        ({"kind": "aac"}, '"aac" is not one of ["wav","mp3"]'),
        ({"number": 3}, "3 is not one of [1,2]"),
        ({"words": "a"}, '"a" is not of type "array"'),
    ],
)
def test_the_server_validates(served: Served, inputs: dict[str, Any], message: str) -> None:
    status, answer = served.request("POST", "/predictions", {"input": inputs})
    assert status == 422
    (problem,) = answer["detail"]
    assert problem["loc"][:2] == ["body", "input"]
    assert problem["msg"] == message
    (name,) = inputs
    with pytest.raises(ServerError, match=f"^{name}.*: {re.escape(message)}"):
        served.server.ask(inputs)


def test_unknown_inputs_are_dropped(served: Served) -> None:
    assert values(served, {"tempo": 3}) == DEFAULTS


def test_metrics_and_logs(served: Served) -> None:
    del served.lines[:]
    action = (
        "print('to stdout'); print('to stderr', file=sys.stderr)\n"
        "logging.warning('by logging')\n"
        "sys.stderr.write('first half, '); time.sleep(0.3); print('last half', file=sys.stderr)\n"
        "subprocess.run(['echo', 'by a child'])"
    )
    answer = served.server.ask({"action": action})
    assert answer["metrics"]["answer"] == 42
    printed = {
        "to stdout",
        "to stderr",
        "WARNING:root:by logging",
        "first half, last half",
        "by a child",
    }
    # They come by another way than the answer, and so may those of the request before.
    wait_until(lambda: printed <= set(served.lines))


def test_logs_come_while_the_model_works(served: Served, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    action = "print('now')\nwhile not os.path.exists(text): time.sleep(0.02)\nprint('later')"
    del served.lines[:]
    running = served.start_prediction("slow", {"text": str(go_on), "action": action})
    served.wait_for("^now$")
    assert "later" not in served.lines
    assert not running.done
    go_on.touch()
    assert running.answer()[1]["status"] == "succeeded"
    served.wait_for("^later$")


def test_a_busy_server_and_a_cancelled_prediction(served: Served) -> None:
    del served.lines[:]
    action = "print('begun')\nwhile True: time.sleep(0.02)"
    running = served.start_prediction("endless", {"action": action})
    served.wait_for("^begun$")
    worker, server = processes("\n".join(served.lines))
    assert (served.worker_pid, served.server_pid) == (worker, server)
    assert served.predict({})[0] == 409
    assert served.cancel("endless")[0] == 200
    assert running.answer() == (200, running.answer()[1] | {"status": "canceled"})
    assert served.cancel("endless")[0] == 404
    assert values(served, {}) == DEFAULTS


def test_a_client_that_goes_away(served: Served) -> None:
    del served.lines[:]
    served.drop({"action": "print('begun')\nwhile True: time.sleep(0.02)"}, after="^begun$")
    # Asked once each time; `predict` would try again for a minute.
    wait_until(lambda: served.request("POST", "/predictions", {"input": {}})[0] == 200)


# The command on a real server


def run_cli(project: Path, *arguments: str) -> int:
    return cli.main(["predict", *arguments], project=project)


def test_from_the_command_line(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my song.wav").touch()
    (tmp_path / "tuned.safetensors").touch()
    monkeypatch.setenv("COG_WEIGHTS", "tuned.safetensors")
    inputs = ["text=x", "seed=9007199254740993", "file=@my song.wav", "words=a", "words=b"]
    status = run_cli(project, *(part for pair in inputs for part in ("-i", pair)))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert captured.out == ""
    assert f"set up in {project}" in captured.err
    assert captured.err.endswith("Written output to: output.json\n")
    seen = json.loads((tmp_path / "output.json").read_text())
    assert seen["seed"] == ["int", "9007199254740993"]
    assert seen["file"] == ["str", str(tmp_path / "my song.wav")]
    assert seen["words"] == ["list", "['a', 'b']"]
    assert seen["weights"] == ["str", str(tmp_path / "tuned.safetensors")]
    assert not any(map(is_alive, processes(captured.err)))
    (folder,) = set(seen["folder"])
    assert folder != tempfile.gettempdir()
    assert not Path(folder).exists()


def test_variables_of_the_command_line_win(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned.safetensors").touch()
    monkeypatch.setenv("COG_WEIGHTS", "other.safetensors")
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", "/elsewhere")
    names = ["ALLOW_LOCAL_FILES", "AUDIOCRAFT_CACHE_DIR", "TMPDIR", "EMPTY"]
    variables = ["ALLOW_LOCAL_FILES=0", "AUDIOCRAFT_CACHE_DIR=/models", f"TMPDIR={tmp_path}"]
    variables += ["EMPTY=", "COG_WEIGHTS=tuned.safetensors"]
    flags = [part for variable in variables for part in ("--env", variable)]
    action = f"action=print([os.environ[name] for name in {names}])"
    assert run_cli(project, *flags, "-e", "COG_WEIGHTS=tuned.safetensors", "-i", action) == 0
    assert str(["0", "/models", str(tmp_path), ""]) in capsys.readouterr().err.splitlines()
    seen = json.loads((tmp_path / "output.json").read_text())
    assert seen["weights"] == ["str", str(tmp_path / "tuned.safetensors")]


def test_the_home_of_nobody_is_no_store() -> None:
    with pytest.raises(InputError, match=r"^AUDIOCRAFT_CACHE_DIR is '~nobody-here/x', and there"):
        with_absolute_paths({"AUDIOCRAFT_CACHE_DIR": "~nobody-here/x"})


def test_relative_paths_are_of_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether there is such a file or not: the project may have one of that name."""
    monkeypatch.chdir(tmp_path)
    names = ("COG_WEIGHTS", "HF_HOME", "HF_HUB_CACHE")
    relative = dict.fromkeys(names, "models/x")
    assert with_absolute_paths(relative) == dict.fromkeys(names, f"{tmp_path}/models/x")
    as_they_are = {"COG_WEIGHTS": "https://h/x", "HF_HOME": "$HOME/x", "HF_HUB_CACHE": "~/x"}
    for given in (as_they_are, dict.fromkeys(names, "/x"), dict.fromkeys(names, ""), {}):
        assert with_absolute_paths(given) == given
    long = "x" * 300  # more than a name may have
    assert with_absolute_paths({"COG_WEIGHTS": long}) == {"COG_WEIGHTS": f"{tmp_path}/{long}"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [("models", "{here}/models"), ("~/models", "{home}/models"), ("/models", "/models"), ("", "")],
)
def test_the_store_is_where_other_commands_have_it(
    given: str,
    expected: str,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A relative folder is one of the user's, though the server works in another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", given)
    assert run_cli(project, "-i", "action=print([os.environ['AUDIOCRAFT_CACHE_DIR']])") == 0
    store = expected.format(here=tmp_path, home=Path.home())
    assert str([store]) in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ("raise InputError('duration is too long.')", "duration is too long."),
        ("raise ValueError('boom')", "ValueError: boom"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "The model's process was killed while it worked"),
        ("os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)", "The server ended before it"),
    ],
    ids=["own error", "other error", "exit", "worker killed", "server killed"],
)
def test_failures(
    action: str,
    sentence: str,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(project, "-i", f"action=print('before'); time.sleep(1); {action}") == 1
    error = capsys.readouterr().err
    assert "\nbefore\n" in error
    assert error.splitlines()[-1].startswith(sentence)
    assert list(tmp_path.iterdir()) == []
    assert_gone(processes(error), 1.0)


@pytest.mark.parametrize(
    ("setup", "sentence"),
    [
        (
            "raise WeightsError('These are no weights.')",
            "Model setup failed: These are no weights.",
        ),
        ("import nothing_of_the_kind", "Model setup failed: ModuleNotFoundError: No module named"),
        ("os._exit(3)", "Model setup failed: worker crashed"),
        ("os.kill(os.getppid(), signal.SIGKILL)", "The server ended before the model was set up."),
        ("time.sleep(60)", "Model setup took longer than 5 seconds"),
    ],
    ids=["own error", "other error", "worker gone", "server gone", "too slow"],
)
def test_setup_failures(
    setup: str,
    sentence: str,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = tmp_path / "said"  # a worker that exits at once may take its lines along
    who = f"print('processes', os.getpid(), os.getppid(), file=open({str(said)!r}, 'w'), flush=True"
    monkeypatch.setenv("TEST_SETUP", f"{who}); {setup}")
    seconds = "5" if "sleep(60)" in setup else "30"
    assert run_cli(project, "--setup-timeout", seconds) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(sentence)
    assert_gone(processes(said.read_text()), 1.0)


@contextlib.contextmanager
def command(
    project: Path, folder: Path, *flags: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and what it said until the model was ready."""
    code = (
        "import signal, sys; from pathlib import Path; from audiocraft.serving import cli; "
        # Whoever runs the tests may ignore them, as nohup does.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "sys.exit(cli.main(sys.argv[2:], project=Path(sys.argv[1])))"
    )
    arguments = [sys.executable, "-c", code, str(project), "predict", *flags]
    with subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        text = ""
        while "ready" not in text:
            line = process.stderr.readline()
            assert line, text
            text += line
        yield process, text


def assert_nothing_left(text: str, group: list[int], folder: Path) -> None:
    assert_gone([*processes(text), *group])
    scratch = Path(text.partition("folder ")[2].splitlines()[0])
    wait_until(lambda: not scratch.exists())
    assert list(folder.iterdir()) == []


# The model is busy, has a child, and cannot be interrupted.
BUSY = "subprocess.Popen(['sleep', '60']); print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 130), (signal.SIGKILL, -9)],
)
def test_no_way_out_leaves_processes(
    number: signal.Signals, status: int, project: Path, tmp_path: Path
) -> None:
    with command(project, tmp_path, "-i", f"action={BUSY}") as (process, text):
        group = members(processes(text)[1])
        assert len(group) == 3
        process.send_signal(number)
        assert process.wait(10) == status
    assert_nothing_left(text, group, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nor_does_one_while_the_model_is_set_up(
    number: signal.Signals, project: Path, tmp_path: Path
) -> None:
    setup = "print('folder', tempfile.gettempdir()); "
    setup += "print('processes', os.getpid(), os.getppid(), flush=True); "
    with command(project, tmp_path, "-e", f"TEST_SETUP={setup}{BUSY}") as (process, text):
        group = members(processes(text)[1])
        assert len(group) == 3
        process.send_signal(number)
        assert process.wait(10) == (-9 if number == signal.SIGKILL else 130)
    assert_nothing_left(text, group, tmp_path)


def test_nor_does_impatience(project: Path, tmp_path: Path) -> None:
    """Another Ctrl-C does not interrupt the stop, which a server that hangs makes long."""
    with command(project, tmp_path, "-i", f"action={BUSY}") as (process, text):
        server = processes(text)[1]
        group = members(server)
        os.kill(server, signal.SIGSTOP)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.05)
        assert process.poll() is None
        assert process.wait(10) == 130
    assert_nothing_left(text, group, tmp_path)


def test_a_result_that_cannot_be_written(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # While the model works, the folder of the result goes.
    gone = tmp_path / "gone"
    gone.mkdir()
    action = "action=import shutil; shutil.rmtree(text)"
    assert run_cli(project, "-i", action, "-i", f"text={gone}", "-o", f"{gone}/x") == 1
    error = capsys.readouterr().err
    said = re.fullmatch(
        r"'.*/gone/x.json' cannot be written \(.*\); choose another path, or take the result from "
        r"(.*/musicgen-\w+/x\.json)\.",
        error.splitlines()[-1],
    )
    assert said is not None, error
    assert json.loads(Path(said[1]).read_text())["text"] == ["str", str(gone)]
    assert not any(map(is_alive, processes(error)))


def test_stopping_twice(project: Path) -> None:
    write_schema(project)
    lines: list[str] = []
    with CogServer(project, log=lines.append) as server:
        server.stop()
        server.stop()


def test_a_server_that_cannot_be_started(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"^The server cannot be started: .*No such file"),
        CogServer(tmp_path / "nowhere", log=print),
    ):
        pass
