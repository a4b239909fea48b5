"""The command line without a server: reading inputs, the sentences for errors, naming outputs."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from audiocraft.errors import InputError
from audiocraft.serving import cli, outputs
from audiocraft.serving.arguments import (
    check_inputs,
    parse_environment,
    parse_inputs,
    parse_json,
)
from audiocraft.serving.server import CogServer, plain_message

SCHEMA: dict[str, Any] = {
    "properties": {
        "prompt": {"type": "string", "description": "What to play."},
        "audio": {"type": "string", "format": "uri", "description": "What to follow."},
        "duration": {"type": "integer", "default": 8, "description": "How long."},
        "start": {"type": "integer", "minimum": 0, "maximum": 9, "description": "From where."},
        "guidance": {"type": "number", "default": 3, "description": "How closely."},
        "continuation": {"type": "boolean", "default": False, "description": "Go on."},
        "format": {"type": "string", "enum": ["wav", "mp3"], "description": "Which file."},
        "tags": {"type": "array", "items": {"type": "string"}, "description": "Words."},
        "seed": {"type": "integer", "description": "Which take."},
        "numbers": {"type": "array", "items": {"type": "integer"}, "description": "Numbers."},
        "clips": {
            "type": "array",
            "items": {"type": "string", "format": "uri"},
            "description": "Files.",
        },
    },
    "required": [],
}


# Reading inputs


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("prompt=piano", "piano"),
        ("prompt=", ""),
        ("prompt=a=b", "a=b"),
        ('prompt="quoted"', "quoted"),
        ('prompt=""twice""', '"twice"'),
        ('prompt="', '"'),
        ("prompt=8", "8"),
        ("prompt=Café, 日本", "Café, 日本"),
        ("duration=8", 8),
        ("duration=8.0", 8),
        ("duration=-1", -1),
        ("duration=9007199254740993", 9007199254740993),
        ("duration=-9223372036854775808", -9223372036854775808),
        ("guidance=3", 3),
        ("guidance=2.5", 2.5),
        ("guidance=1e-3", 0.001),
        ("continuation=true", True),
        ("continuation=false", False),
        ("format=mp3", "mp3"),
        ("audio=https://example.org/a.wav", "https://example.org/a.wav"),
        ("audio=data:audio/wav;base64,AAAA", "data:audio/wav;base64,AAAA"),
        ("tags=one", ["one"]),
        ('tags=["one", "two"]', ["one", "two"]),
        ("numbers=[1, 2]", [1, 2]),
        ("tags=[]", []),
        ("seed=9223372036854775807", 9223372036854775807),
    ],
)
def test_values_get_the_type_of_the_schema(pair: str, value: object) -> None:
    (read,) = parse_inputs([pair], SCHEMA).values()
    assert read == value
    assert type(read) is type(value)


def test_several_inputs_and_lists() -> None:
    pairs = ["prompt=x", "numbers=1", "duration=3", "numbers=2"]
    assert parse_inputs(pairs, SCHEMA) == {"prompt": "x", "numbers": [1, 2], "duration": 3}
    assert parse_inputs([], SCHEMA) == {}


def test_files_become_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    song = tmp_path / "my song.wav"
    song.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("audio=@my song.wav", 'audio="@my song.wav"', "audio=@~/my song.wav"):
        assert parse_inputs([text], SCHEMA) == {"audio": str(song)}
    assert parse_inputs(["prompt=@my song.wav"], SCHEMA) == {"prompt": str(song)}
    assert parse_inputs(["clips=@my song.wav"], SCHEMA) == {"clips": [str(song)]}
    listed = 'clips=["@my song.wav", "https://example.org/a.wav"]'
    assert parse_inputs([listed], SCHEMA) == {"clips": [str(song), "https://example.org/a.wav"]}


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ("prompt", "-i takes name=value, but 'prompt' has no '='."),
        ("duraton=3", "duraton is not an input of this model; did you mean duration?"),
        (
            "xyz=3",
            f"xyz is not an input of this model; there are {', '.join(SCHEMA['properties'])}.",
        ),
        ("duration=abc", "duration must be a whole number, not 'abc'."),
        ("duration=8.5", "duration must be a whole number, not '8.5'."),
        ("duration=", "duration must be a whole number, not ''."),
        ("duration=1e3", "duration must be a whole number, not '1e3'."),
        ("duration=@3", "duration must be a whole number, not '@3'."),
        (
            f"duration={'9' * 5000}",  # more digits than Python reads
            f"duration must be a whole number, not '{'9' * 5000}'.",
        ),
        (
            "duration=-9223372036854775809",
            "duration must be at least -9223372036854775808, not -9223372036854775809.",
        ),
        (
            "duration=9223372036854775808",
            "duration must be at most 9223372036854775807, not 9223372036854775808.",
        ),
        ("start=-1", "start must be at least 0, not -1."),
        ("start=10", "start must be at most 9, not 10."),
        ("guidance=abc", "guidance must be a number, not 'abc'."),
        ("guidance=nan", "guidance must be a number, not 'nan'."),
        ("guidance=inf", "guidance must be a number, not 'inf'."),
        ("guidance=1e999", "guidance must be a number, not '1e999'."),
        ("continuation=True", "continuation must be true or false, not 'True'."),
        ("continuation=1", "continuation must be true or false, not '1'."),
        ("format=aac", "format must be one of wav, mp3, not 'aac'."),
        ("numbers=a", "numbers (item 1) must be a whole number, not 'a'."),
        ("audio=@no.wav", "audio must be a file, but there is no 'no.wav'; check the path."),
        ("audio=@.", "audio must be a file, but '.' is a folder; check the path."),
        (
            "audio=@/dev/null",
            "audio must be a file, but '/dev/null' is none that stays on disk; save it first.",
        ),
        (
            "audio=@~nobody-of-this-name/a.wav",
            (
                "audio must be a file, but '~nobody-of-this-name/a.wav' cannot be looked up; check "
                "the path."
            ),
        ),
        (
            'clips=["@no.wav"]',
            "clips (item 1) must be a file, but there is no 'no.wav'; check the path.",
        ),
        (
            'clips=["song.wav"]',
            "clips (item 1) must be a URL, or @ and the path of a file, as in clips=@song.wav.",
        ),
        (
            "audio=song.wav",
            "audio must be a URL, or @ and the path of a file, as in audio=@song.wav.",
        ),
    ],
)
def test_what_is_wrong_with_an_input(pair: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_inputs([pair], SCHEMA)
    assert str(caught.value) == sentence


def test_every_problem_is_reported() -> None:
    with pytest.raises(InputError) as caught:
        parse_inputs(["start=-1", "tempo=3", "format=aac"], SCHEMA)
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "start",
        "tempo",
        "format",
    ]


def test_an_input_given_twice() -> None:
    with pytest.raises(InputError, match=r"^prompt is given more than once; give it once\.$"):
        parse_inputs(["prompt=a", "prompt=b"], SCHEMA)


def test_required_inputs() -> None:
    schema = SCHEMA | {"required": ["prompt"]}
    with pytest.raises(InputError, match=r"^prompt is required; give it with -i prompt=\.\.\.$"):
        parse_inputs(["duration=3"], schema)
    assert parse_inputs(["prompt="], schema) == {"prompt": ""}


def test_a_path_too_long_to_look_up() -> None:
    with pytest.raises(
        InputError, match=r"^audio must be a file, but .*name too long\); check the path\.$"
    ):
        parse_inputs([f"audio=@{'a' * 5000}"], SCHEMA)


def test_what_is_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has such a byte as half a character, which the server would not read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caf\udce9.wav").touch()
    problem = "holds bytes that are not UTF-8; rename the file, or type the text anew."
    for name, pair in (
        ("prompt", "prompt=caf\udce9"),
        ("audio", "audio=@caf\udce9.wav"),
        ("tags (item 1)", "tags=caf\udce9"),
    ):
        with pytest.raises(InputError) as caught:
            parse_inputs([pair], SCHEMA)
        assert str(caught.value) == f"{name} {problem}"
    with pytest.raises(InputError, match=f"^prompt {problem}"):
        parse_json('{"prompt": "caf\\udce9"}', SCHEMA)


def test_a_file_that_must_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "song.wav").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read anything
    with pytest.raises(InputError, match=r"must not be read; check its permissions\.$"):
        parse_inputs([f"audio=@{tmp_path}/song.wav"], SCHEMA)


def test_json_values_are_checked_as_the_server_does() -> None:
    good = {"prompt": "x", "duration": 8.0, "guidance": 3, "continuation": True, "tags": []}
    assert check_inputs(good, SCHEMA) == []
    for name, value in [
        ("prompt", None),
        ("prompt", 3),
        ("duration", 8.5),
        ("duration", True),
        ("continuation", 1),
        ("tags", "one"),
        ("tags", [1]),
        ("guidance", 10**400),
        ("guidance", float("nan")),
        ("format", True),
    ]:
        assert len(check_inputs({name: value}, SCHEMA)) == 1, (name, value)


def test_variables_of_the_server() -> None:
    pairs = ["A=1", "B=x=y", "C=", "A=2"]
    assert parse_environment(pairs) == {"A": "2", "B": "x=y", "C": ""}
    for pair, sentence in {
        "NAME": "-e takes NAME=value, but 'NAME' is none.",
        "=x": "-e takes NAME=value, but '=x' is none.",
        "PORT=5000": (
            "-e cannot set PORT, because the server gets a port that is free; leave it out."
        ),
    }.items():
        with pytest.raises(InputError) as caught:
            parse_environment([pair])
        assert str(caught.value) == sentence


# Naming and writing outputs


def url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("audio/wav", "output.wav"),
        ("audio/x-wav", "output.wav"),
        ("audio/mpeg", "output.mp3"),
        ("audio/flac", "output.flac"),
        ("audio/x-flac", "output.flac"),
        ("audio/ogg", "output.ogg"),
        ("image/png", "output.png"),
        ("application/x-unheard-of", "output"),
    ],
)
def test_the_type_gives_the_extension(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    urls = outputs.files_of(url(b"sound", kind))
    (written,) = outputs.write_files(urls, outputs.find_target(None), number=False)
    assert written == Path(name)
    assert written.read_bytes() == b"sound"


@pytest.mark.parametrize(
    ("given", "one", "two"),
    [
        (None, "output.wav", ["output.0.wav", "output.1.wav"]),
        ("", "output.wav", ["output.0.wav", "output.1.wav"]),
        ("take", "take.wav", ["take.0.wav", "take.1.wav"]),
        ("@take", "take.wav", ["take.0.wav", "take.1.wav"]),
        ("~/take", "take.wav", ["take.0.wav", "take.1.wav"]),
        ("take.flac", "take.flac", ["take.0.flac", "take.1.flac"]),
        ("folder", "folder/output.wav", ["folder/output.0.wav", "folder/output.1.wav"]),
        ("folder/", "folder/output.wav", ["folder/output.0.wav", "folder/output.1.wav"]),
        ("folder/take", "folder/take.wav", ["folder/take.0.wav", "folder/take.1.wav"]),
    ],
)
def test_where_outputs_go(
    given: str | None, one: str, two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "output").mkdir()  # is in nobody's way
    target = outputs.find_target(given)
    sound = url(b"sound", "audio/wav")
    written = [
        outputs.write_files([sound], target, number=False),
        outputs.write_files([sound] * 2, target, number=True),
        outputs.write_files([sound], target, number=True),
    ]
    expected = [[tmp_path / name for name in names] for names in ([one], two, [two[0]])]
    assert [[path.absolute() for path in paths] for paths in written] == expected
    assert all(path.read_bytes() == b"sound" for paths in written for path in paths)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("no/x", "-o: there is no folder 'no' to write 'x' into; make it, or choose another path."),
        ("no/", "-o: there is no folder 'no/'; make it, or choose another path."),
        ("take", "-o: 'take.wav' is a folder; choose another path."),
        ("take.wav", "-o: 'take.wav/output.mp3' must not be written to; choose another path."),
        ("x" * 300, r"-o: 'x*' cannot be used \(File name too long\); choose another path."),
        (
            "~nobody-of-this-name/x",
            r"-o: .* cannot be used \(Could not determine home directory\); choose another path.",
        ),
    ],
)
def test_targets_that_cannot_be_written(
    given: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "take.wav").mkdir()
    (tmp_path / "take.wav" / "output.mp3").touch()
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, _: "output.mp3" not in str(path))
    with pytest.raises(InputError, match=f"^{sentence}"):
        outputs.find_target(given)


def test_what_is_a_file() -> None:
    sound = url(b"sound", "audio/wav")
    assert outputs.files_of(sound) == [sound]
    assert outputs.files_of([sound, sound]) == [sound, sound]
    assert outputs.files_of("data:audio/wav;codecs=1;base64,AAAA") != []
    for other in ("text", None, {"weights": sound}, [sound, "text"], 3):
        assert outputs.files_of(other) == []


# The command


def test_help_lists_the_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "duration (whole number; default 8) Length of the result in seconds" in text
    assert "input_audio (file) A recording" in text
    assert "output_format (wav, mp3, flac, ogg; default wav)" in text
    assert "continuation (true or false; default false)" in text
    for flag in ("-i", "NAME=@PATH", "--json JSON", "-o PATH", "-e NAME=VALUE", "--setup-timeout"):
        assert flag in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["predict", "-i", "tempo=3"], "tempo is not an input of this model"),
        (["predict", "-i", "continuation_start=-1"], "continuation_start must be at least 0"),
        (["predict", "-o", "no-folder/x"], "-o: there is no folder 'no-folder'"),
        (
            ["predict", "-o", "song.mp3", "-i", "output_format=wav"],
            "-o: 'song.mp3' ends in .mp3, but output_format is wav; leave output_format out, or",
        ),
        (["predict", "-i"], "expected one argument"),
        (["predict", "--bad"], "unrecognized arguments: --bad"),
        (["predict", "-i", "prompt=x", "--json", "{}"], "not allowed with argument -i/--input"),
        (["predict", "--json", "{}", "-i", "prompt=x"], "not allowed with argument --json"),
        (["predict", "--json", '{"tempo": 3}'], "tempo is not an input of this model"),
        (["predict", "--json"], "expected one argument"),
        (["predict", "-e", "NAME"], "-e takes NAME=value, but 'NAME' is none."),
        (["predict", "--setup-timeout", "0"], "number of seconds above 0, not '0'; scripts/"),
        (["predict", "--setup-timeout", "-1"], "number of seconds above 0, not '-1'"),
        (["predict", "--setup-timeout", "nan"], "number of seconds above 0, not 'nan'"),
        (["predict", "--setup-timeout", "inf"], "number of seconds above 0, not 'inf'"),
        (["predict", "--setup-timeout", "soon"], "number of seconds above 0, not 'soon'"),
        (["predict", "prompt=x"], "unrecognized arguments: prompt=x"),
        (["dance"], "The first argument must be the command"),
        ([], "The first argument must be the command"),
    ],
)
def test_errors_come_before_the_server(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "CogServer", None)
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a server is asked that makes nothing; the user stands in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    seen: list[dict[str, Any]] = []

    def ask(_server: CogServer, inputs: dict[str, Any]) -> dict[str, Any]:
        seen.append(inputs)
        return {"status": "succeeded", "output": None}

    monkeypatch.setattr(CogServer, "__enter__", lambda server: server)
    monkeypatch.setattr(CogServer, "ask", ask)
    return seen


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["-o", "song.mp3"], "mp3"),
        (["-o", "take.1.flac"], "flac"),
        (["-o", "SONG.OGG"], "ogg"),
        (["-o", "song.wav"], "wav"),
        (["-o", "song.mp3", "-i", "output_format=mp3"], "mp3"),
        (["-o", "song", "-i", "output_format=ogg"], "ogg"),
        (["-o", "song.take", "-i", "output_format=ogg"], "ogg"),
        (["-o", "song"], None),
        (["-o", "song.take"], None),
        (["-o", "folder.mp3"], None),
        (["-o", "song.mp3", "--json", "{}"], None),  # it will hold JSON
        ([], None),
    ],
)
def test_the_name_chooses_the_format(
    arguments: list[str], asked: str | None, tmp_path: Path, seen: list[dict[str, Any]]
) -> None:
    (tmp_path / "folder.mp3").mkdir()
    assert cli.main(["predict", *arguments]) == 0
    assert seen == [{} if asked is None else {"output_format": asked}]


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("tuned.safetensors", "{here}/tuned.safetensors"),
        ("weights/tuned.safetensors", "{here}/weights/tuned.safetensors"),
        ("/weights/tuned.safetensors", "/weights/tuned.safetensors"),
        ("https://example.org/tuned.safetensors", "https://example.org/tuned.safetensors"),
        ("data:;base64,AAAA", "data:;base64,AAAA"),
        ("", ""),
    ],
)
def test_weights_without_an_at_are_looked_for_where_the_user_stands(
    given: str, asked: str, tmp_path: Path, seen: list[dict[str, Any]]
) -> None:
    """Not in the project's folder, where the server works."""
    assert cli.main(["predict", "-i", f"replicate_weights={given}"]) == 0
    assert seen == [{"replicate_weights": asked.format(here=tmp_path)}]


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-o", "song.m4a"], "will hold wav, but does not end in .wav"),
        (["-o", "take 2.1", "-i", "output_format=ogg"], "will hold ogg, but does not end in .ogg"),
        (["-o", "song"], None),
        (["-o", "song.flac"], None),
    ],
)
def test_another_ending_is_said(
    arguments: list[str], text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", *arguments]) == 0
    said = capsys.readouterr().err
    warning = "" if text is None else f"Warning: -o '{arguments[1]}' {text}.\n"
    assert said == warning + "Warning: no output was generated.\n"


def test_a_schema_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli, "write_schema", fail)
    assert cli.main(["predict"]) == 1
    assert re.fullmatch(
        r"The schema of .* cannot be written: .*denied\.\n", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Prediction failed: Prediction failed: InputError: Give a prompt.", "Give a prompt."),
        ("Prediction failed: Training failed: ValueError: boom", "ValueError: boom"),
        (
            "worker setup failed (slot 3c382f69): Setup failed: setup failed: AssetError: No.\n",
            "No.",
        ),
        ("Something else failed: here", "Something else failed: here"),
    ],
)
def test_messages_without_wrapping(text: str, message: str) -> None:
    assert plain_message(text) == message


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"GOMP_SPINCOUNT": "77"}, "77")],
)
def test_threads_do_not_spin_for_long_unless_asked_to(given, spins):
    """What libgomp says of itself when torch is loaded."""
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", "from audiocraft.serving import prediction"]
    done = subprocess.run(
        command,
        env=environment | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [spins]
