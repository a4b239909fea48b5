"""Inputs as JSON, the response as JSON, and files that are written whole."""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from audiocraft.errors import InputError
from audiocraft.serving import cli, outputs
from audiocraft.serving.arguments import parse_json
from tests.serving.test_cli import SCHEMA, url

ROOT = Path(__file__).parents[2]
PREDICTOR = """
import tempfile
from cog import BaseRunner, Input, Path

class Predictor(BaseRunner):
    def run(
        self,
        seed: int | None = Input(default=None, description="d"),
        file: Path | None = Input(default=None, description="d"),
        result: str = Input(default="file", description="d"),
    ) -> Path:
        print("hello")
        path = Path(tempfile.mkdtemp()) / "made.wav"
        if result == "fail":
            raise ValueError("boom")
        if result == "file":
            path.write_text(f"{seed} {file}")
        return path
"""


# Reading inputs


def test_values_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "söng.wav").touch()
    song = str(tmp_path / "söng.wav")
    inputs = {
        "prompt": '"8", Café',
        "duration": 8.0,
        "guidance": 3,
        "continuation": False,
        "seed": 9223372036854775807,
        "tags": ["a", "@söng.wav"],
        "clips": ["@söng.wav", "https://example.org/a.wav"],
        "audio": "@söng.wav",
    }
    read = parse_json(json.dumps(inputs), SCHEMA)
    assert read == inputs | {
        "tags": ["a", song],
        "clips": [song, "https://example.org/a.wav"],
        "audio": song,
    }
    assert type(read["seed"]) is int
    assert parse_json(" {} ", SCHEMA) == {}


@pytest.mark.parametrize("seed", [-(2**63), 2**53 + 1, 2**63 - 1])
def test_seeds_arrive_exactly(seed: int) -> None:
    assert parse_json(f'{{"seed": {seed}}}', SCHEMA) == {"seed": seed}


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "Café"}'.encode(),
        '{"prompt": "Café"}'.encode("utf-8-sig"),
        '{"prompt": "Café"}'.encode("utf-16"),
        b'{"prompt": "Caf\\u00e9"}\n',
    ],
)
def test_from_a_file_and_from_standard_input(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "inputs.json").write_bytes(content)
    assert parse_json(f"@{tmp_path}/inputs.json", SCHEMA) == {"prompt": "Café"}
    assert parse_json("@~/inputs.json", SCHEMA) == {"prompt": "Café"}
    for source in ("-", "@-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert parse_json(source, SCHEMA) == {"prompt": "Café"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ('{"seed": 9223372036854775808}', "seed must be at most 9223372036854775807, not 92"),
        ('{"seed": -9223372036854775809}', "seed must be at least -9223372036854775808, not -92"),
        ('{"seed": 1e300}', "seed must be at most 9223372036854775807, not 1e+300."),
        ('{"seed": null}', "seed must not be null; leave it out instead."),
        ('{"format": null}', "format must not be null; leave it out instead."),
        ('{"tags": [null]}', "tags (item 1) must not be null; leave it out instead."),
        ('{"prompt": 8}', "prompt must be text, not 8."),
        ('{"prompt": {"a": 1}}', 'prompt must be text, not {"a": 1}.'),
        ('{"duration": "8"}', "duration must be a whole number, not '8'."),
        ('{"duration": 8.5}', "duration must be a whole number, not 8.5."),
        ('{"duration": true}', "duration must be a whole number, not true."),
        ('{"guidance": 1e999}', "guidance must be a number, not Infinity."),
        ('{"continuation": "true"}', "continuation must be true or false, not 'true'."),
        ('{"start": 10}', "start must be at most 9, not 10."),
        ('{"format": "aac"}', "format must be one of wav, mp3, not 'aac'."),
        ('{"tags": "a"}', "tags must be a list, not 'a'."),
        ('{"duraton": 3}', "duraton is not an input of this model; did you mean duration?"),
        ('{"prompt": "a", "prompt": "b"}', "prompt is given more than once; give it once."),
        ('{"prompt": "@no.txt"}', "prompt must be a file, but there is no 'no.txt'; "),
        ('{"clips": ["@."]}', "clips (item 1) must be a file, but '.' is a folder; check"),
        ('{"audio": "a.wav"}', "audio must be a URL, or @ and the path of a file, as in audio=@a."),
        ("@no.json", "--json must be a file, but there is no 'no.json'; check the path."),
        ("@.", "--json must be a file, but '.' is a folder; check the path."),
        ("[]", "--json must be a JSON object, with the names of inputs as its keys."),
        ('[{"prompt": "a"}]', "--json must be a JSON object, with the names"),
        ("null", "--json must be a JSON object, with the names"),
        ("", "--json is not valid JSON (Expecting value: line 1 column 1 (char 0)); give an"),
        ("inputs.json", "--json is not valid JSON (Expecting value"),
        ("{'prompt': 1}", "--json is not valid JSON (Expecting property name"),
        ('{"guidance": NaN}', "--json is not valid JSON (NaN is no number)"),
        ('{"guidance": -Infinity}', "--json is not valid JSON (-Infinity is no number)"),
        ("[" * 100_000, "--json is not valid JSON (maximum recursion depth"),
        (f'{{"seed": {"9" * 5000}}}', "--json is not valid JSON (Exceeds the limit"),
    ],
)
def test_what_is_wrong_with_an_object(source: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(source, SCHEMA)
    assert str(caught.value).startswith(sentence)
    assert str(caught.value)[-1] in ".?"
    assert "\n" not in str(caught.value)


def test_every_problem_of_an_object_is_reported() -> None:
    with pytest.raises(InputError) as caught:
        parse_json('{"start": -1, "tempo": 3, "format": null}', SCHEMA)
    names = [line.split()[0] for line in str(caught.value).splitlines()]
    assert names == ["start", "tempo", "format"]


def test_what_is_wrong_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "inputs.json"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match=r"^--json: '.*/inputs.json' is not valid JSON \("):
        parse_json(f"@{path}", SCHEMA)
    path.write_text("3")
    with pytest.raises(InputError, match=r"^--json: '.*/inputs.json' must be a JSON object"):
        parse_json(f"@{path}", SCHEMA)

    def fail(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(InputError, match=r"cannot be read \(Input/output error\); check the path"):
        parse_json(f"@{path}", SCHEMA)


def test_what_is_wrong_with_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    with pytest.raises(InputError, match=r"^--json: standard input is not valid JSON \("):
        parse_json("-", SCHEMA)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"^--json - reads .* not possible \(it is closed\); give"):
        parse_json("-", SCHEMA)


# Where the response and its files go


@pytest.mark.parametrize(
    ("given", "response", "one", "second"),
    [
        (None, "output.json", "output.wav", "output.1.wav"),
        ("take.json", "take.json", "take.wav", "take.1.wav"),
        ("take.2.json", "take.2.json", "take.2.wav", "take.2.1.wav"),
        ("take", "take", "take.wav", "take.1.wav"),
        ("take.wav", "take.wav", "take.wav.wav", "take.wav.1.wav"),  # not the response's name
        ("folder", "folder/output.json", "folder/output.wav", "folder/output.1.wav"),
    ],
)
def test_files_lie_beside_the_response(
    given: str | None,
    response: str,
    one: str,
    second: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    target = outputs.find_target(given, as_response=True)
    assert target.path == Path(response)
    assert target.has_json_name == response.endswith(".json")
    sound = url(b"sound", "audio/x-wav")
    assert outputs.write_files([sound], target, number=False) == [Path(one)]
    assert outputs.write_files([sound] * 2, target, number=True)[1] == Path(second)
    unknown = url(b"sound", "application/x-unheard-of")
    (written,) = outputs.write_files([unknown], target, number=False)
    assert written.suffix == ".bin"


def test_a_response_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "take.flac").mkdir()
    with pytest.raises(InputError, match=r"^-o: 'take\.flac' is a folder"):
        outputs.find_target("take.json", as_response=True)


# Files


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, target = tmp_path / "take.wav", outputs.find_target(str(tmp_path / "take"))
    old.write_bytes(b"old")
    link = tmp_path / "link.wav"
    link.symlink_to(old)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        patch.setattr(tempfile, "mkdtemp", fail)
        with pytest.raises(
            InputError, match=r"cannot be written \(No space left .*\); choose another path\.$"
        ):
            outputs.write_files([url(b"sound", "audio/wav")], target, number=False)
    assert sorted(tmp_path.iterdir()) == [link, old]
    assert old.read_bytes() == b"old"
    outputs.write_file(link, b"new")
    assert link.is_symlink()
    assert old.read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == [link, old]


def test_what_cannot_be_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have taken an hour; of several files those that are left are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = outputs.find_target(str(tmp_path / "take"))
    for name in ("take.wav", "take.1.wav"):
        (tmp_path / name).mkdir()
    sounds = [url(content, "audio/wav") for content in (b"a", b"b", b"c")]
    kept = []
    for urls in (sounds[:1], sounds):
        with pytest.raises(InputError) as caught:
            outputs.write_files(urls, target, number=len(urls) > 1)
        said = re.fullmatch(
            r".* written \(Is a directory\); choose another path, or take the result from (.*)\.",
            str(caught.value),
        )
        assert said is not None, caught.value
        kept.append(Path(said[1]))
    assert kept[0].name == "take.wav"
    assert kept[0].read_bytes() == b"a"
    assert (tmp_path / "take.0.wav").read_bytes() == b"a"
    assert {path.name: path.read_bytes() for path in kept[1].iterdir()} == {
        "take.1.wav": b"b",
        "take.2.wav": b"c",
    }


def test_weights_are_not_copied_onto_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a link in a folder that takes no other file, so that it would be written into."""
    weights, link = tmp_path / "weights", tmp_path / "link"
    weights.write_bytes(b"weights")
    link.symlink_to(weights)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    outputs.put_file(link, weights)
    assert weights.read_bytes() == b"weights"
    assert link.is_symlink()


def test_devices_are_written_into() -> None:
    outputs.write_file(Path("/dev/null"), b"sound")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(InputError, match=r"^'/dev/full' cannot be written \(No space left"):
        outputs.write_file(Path("/dev/full"), b"sound")


def test_content_that_did_not_arrive(tmp_path: Path) -> None:
    target = outputs.find_target(str(tmp_path / "x"))
    with pytest.raises(
        InputError, match=r"^The content of .* did not arrive whole \(.*\); try again\.$"
    ):
        outputs.write_files(["data:audio/wav;base64,A"], target, number=False)
    assert list(tmp_path.iterdir()) == []


# The command on a real server


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("project")
    (folder / "predict.py").write_text(PREDICTOR)
    return folder


@pytest.fixture
def run(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """Runs the command in an empty folder: status, standard output, lines of standard error."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, list[str]]:
        status = cli.main(["predict", *arguments], project=project)
        captured = capsys.readouterr()
        return status, captured.out, captured.err.splitlines()

    return command


def test_the_response_on_standard_output(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.ogg").touch()
    status, out, err = run("--json", '{"seed": 9007199254740993, "file": "@a.ogg"}')
    assert status == 0
    response = json.loads(out)
    assert out == json.dumps(response, indent=2) + "\n"
    assert response["status"] == "succeeded"
    assert response["output"] == "output.wav"
    assert "hello" in response["logs"]
    assert response["metrics"]["predict_time"] >= 0
    assert (tmp_path / "output.wav").read_text() == f"9007199254740993 {tmp_path}/a.ogg"
    assert err == ["hello", "Written output to: output.wav"]


def test_the_response_in_a_file(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.TextIOWrapper(io.BytesIO(b'{"seed": -9223372036854775808}'))
    monkeypatch.setattr(sys, "stdin", text)
    status, out, err = run("--json", "-", "-o", "@take.json")
    assert (status, out) == (0, "")
    assert err == ["hello", "Written output to: take.wav", "Written output to: take.json"]
    assert json.loads((tmp_path / "take.json").read_text())["output"] == "take.wav"
    assert (tmp_path / "take.wav").read_text() == "-9223372036854775808 None"
    status, out, err = run("--json", "{}", "-o", "take.txt")
    assert status == 0
    assert err[0] == "Warning: -o 'take.txt' will hold JSON, but does not end in .json."
    assert json.loads((tmp_path / "take.txt").read_text())["output"] == "take.txt.wav"


def test_the_response_of_a_failure(run: Any, tmp_path: Path) -> None:
    status, out, err = run("--json", '{"result": "fail"}')
    assert status == 1
    assert json.loads(out)["status"] == "failed"
    assert json.loads(out)["error"].endswith("ValueError: boom")
    assert err[-1] == "ValueError: boom"
    status, out, err = run("--json", '{"result": "fail"}', "-o", "take.json")
    assert (status, out) == (1, "")
    assert json.loads((tmp_path / "take.json").read_text())["status"] == "failed"
    assert err[-2:] == ["Written output to: take.json", "ValueError: boom"]
    assert [path.name for path in tmp_path.iterdir()] == ["take.json"]


def test_no_output_is_a_warning(run: Any, tmp_path: Path) -> None:
    """Cog answers null where the file that was named is not there."""
    status, out, err = run("--json", '{"result": "nothing"}')
    assert status == 0
    assert json.loads(out)["output"] is None
    assert err[-1] == "Warning: no output was generated."
    assert run("-i", "result=nothing") == (0, "", ["hello", "Warning: no output was generated."])
    assert list(tmp_path.iterdir()) == []


COMMAND = "from pathlib import Path; import sys; from audiocraft.serving import cli; "
COMMAND += "sys.exit(cli.main(sys.argv[2:], project=Path(sys.argv[1])))"


@pytest.mark.parametrize(
    ("redirection", "flags", "status", "error"),
    [
        ("<&-", "", 0, "Written output to: output.wav\n"),
        ("<&- >&-", "", 0, "Written output to: output.wav\n"),
        ("2>&-", "", 0, ""),
        (">&-", "--json {}", 1, "Standard output is closed; name a file with -o.\n"),
        (">/dev/full", "--json {}", 1, "No space left on device.\n"),
        ("2> >(exec >&- <&-)", "", 0, ""),  # nobody reads on
    ],
)
def test_streams_that_are_closed(
    redirection: str, flags: str, status: int, error: str, project: Path, tmp_path: Path
) -> None:
    """The prediction is made all the same, and the server ends."""
    script = f'exec "$0" -c "$1" "$2" predict {flags} {redirection}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, COMMAND, str(project)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.endswith(error)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert (tmp_path / "output.wav").read_text() == "None None"
