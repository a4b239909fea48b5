"""The command line without a server: reading inputs, the sentences for errors, naming outputs."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.serving import cli, outputs
from audiocraft.serving.arguments import check_inputs, parse_inputs
from audiocraft.serving.device import DeviceCheck, device_warning

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
        (
            "duration=9223372036854775808",
            "duration must be at most 9223372036854775807, not 9223372036854775808.",
        ),
        ("start=-1", "start must be at least 0, not -1."),
        ("start=10", "start must be at most 9, not 10."),
        ("guidance=abc", "guidance must be a number, not 'abc'."),
        ("guidance=nan", "guidance must be a number, not 'nan'."),
        ("guidance=inf", "guidance must be a number, not 'inf'."),
        ("continuation=True", "continuation must be true or false, not 'True'."),
        ("continuation=1", "continuation must be true or false, not '1'."),
        ("format=aac", "format must be one of wav, mp3, not 'aac'."),
        ("numbers=a", "numbers (item 1) must be a whole number, not 'a'."),
        ("audio=@no.wav", "audio must be a file, but there is no 'no.wav'."),
        ("audio=@.", "audio must be a file, but '.' is a folder."),
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
    ]:
        assert len(check_inputs({name: value}, SCHEMA)) == 1, (name, value)


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
    (written,) = outputs.write_files(urls, outputs.check_target(None), number=False)
    assert written == Path(name)
    assert written.read_bytes() == b"sound"


@pytest.mark.parametrize(
    ("given", "one", "two"),
    [
        ("take", "take.wav", ["take.0.wav", "take.1.wav"]),
        ("take.flac", "take.flac", ["take.0.flac", "take.1.flac"]),
        ("folder", "folder/output.wav", ["folder/output.0.wav", "folder/output.1.wav"]),
        ("folder/take", "folder/take.wav", ["folder/take.0.wav", "folder/take.1.wav"]),
    ],
)
def test_where_outputs_go(given: str, one: str, two: list[str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = outputs.check_target(tmp_path / given)
    sound = url(b"sound", "audio/wav")
    assert outputs.write_files([sound], target, number=False) == [tmp_path / one]
    assert outputs.write_files([sound] * 2, target, number=True) == [tmp_path / n for n in two]
    assert outputs.write_files([sound], target, number=True) == [tmp_path / two[0]]


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^-o: there is no folder '.*/no' to write 'x'"):
        outputs.check_target(tmp_path / "no" / "x")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match=r"^-o: '.*/x' must not be written to"):
        outputs.check_target(tmp_path / "x")


def test_half_a_file_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, content: bytes) -> int:
        path.open("wb").write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(InputError, match=r"cannot be written: .*No space left"):
        outputs.write_files([url(b"sound", "audio/wav")], tmp_path / "x", number=False)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["predict", "-i", "tempo=3"], "tempo is not an input of this model"),
        (["predict", "-i", "continuation_start=-1"], "continuation_start must be at least 0"),
        (["predict", "-o", "no-folder/x"], "-o: there is no folder 'no-folder'"),
        (["predict", "-i"], "expected one argument"),
        (["predict", "--bad"], "unrecognized arguments: --bad"),
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
    assert captured.out == ""


# A device that torch cannot use


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, listing: str) -> None:
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_device_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, r"GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_warning() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    warning = device_warning()
    assert warning is not None
    assert warning.startswith("Warning: GPU 0: NVIDIA H200 is there, but torch")


def test_no_device_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, r"No devices were found\n")
    assert device_warning() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert device_warning() is None
    with DeviceCheck() as device:
        assert device.warning() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the device here")
def test_the_check_runs_beside_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, r"GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    with DeviceCheck() as device:
        assert "runs on the CPU" in str(device.warning())
