"""This project's predictor on the real Cog server, asked over HTTP as any client does."""

import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiocraft.data.audio import audio_read, audio_write
from audiocraft.models.versions import VERSIONS
from audiocraft.serving.server import plain_message
from tests.http_server import FileServer
from tests.releases import adapter, full_finetune, read_release, stand_in
from tests.serving.client import start

ROOT = Path(__file__).parents[2]
SONG = ROOT / "tests/audio/real_song.ogg"
FORMATS = ["wav", "mp3", "flac", "ogg"]
MELODY_VERSIONS = "melody, melody-large, stereo-melody, stereo-melody-large, tiny"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    stand_in(folder, "stereo-melody", 1)
    stand_in(folder, "small", 2)
    return folder


@pytest.fixture(scope="module")
def environment(store, tmp_path_factory):
    """A server as a container has it."""
    return {
        "AUDIOCRAFT_CACHE_DIR": str(store),
        "ALLOW_LOCAL_FILES": "0",
        "TMPDIR": str(tmp_path_factory.getbasetemp()),
    }


@pytest.fixture(scope="module")
def served(environment):
    with start(ROOT, environment) as server:
        yield server


def data_url(path: Path) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"


def made(served, **inputs):
    """The answer to a request, and the bytes of its file."""
    status, answer = served.predict(inputs)
    assert status == 200, answer
    assert answer["status"] == "succeeded", answer
    return answer, base64.b64decode(answer["output"].partition(";base64,")[2])


def refused(served, **inputs):
    status, answer = served.predict(inputs)
    assert status == 200, answer
    assert answer["status"] == "failed", answer
    return answer["error"]


def decoded(content, tmp_path):
    path = tmp_path / "result"
    path.write_bytes(content)
    return audio_read(path)


# What is made


@pytest.mark.parametrize("output_format", FORMATS)
def test_text_in_every_format(served, output_format, tmp_path):
    inputs = {"prompt": "a song", "duration": 35, "seed": 0, "output_format": output_format}
    answer, content = made(served, **inputs)
    kind = {"wav": "wav|x-wav", "mp3": "mpeg", "flac": "flac|x-flac", "ogg": "ogg"}[output_format]
    assert re.match(f"data:audio/({kind});base64,", answer["output"])
    wav, rate = decoded(content, tmp_path)
    assert (rate, len(wav)) == (32000, 2)
    # Only MP3 has no exact length: whole frames, and the encoder's delay.
    assert abs(wav.shape[1] - 35 * 32000) <= (2304 if output_format == "mp3" else 0)
    assert wav.std() > 0.01
    assert (wav[0] - wav[1]).std() > 0.003  # stereo, not twice the same
    short = inputs | {"duration": 2}
    content = made(served, **short)[1]
    assert made(served, **short)[1] == content
    assert made(served, **short | {"seed": 1})[1] != content
    metrics = answer["metrics"]
    assert metrics["seed"] == 0
    assert metrics["seconds_generated"] == 35
    assert metrics["model_version"] == "stereo-melody"
    assert metrics["real_time_factor"] > 0
    assert metrics["steps_per_second"] > 0


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_melody_in_every_format(served, output_format, tmp_path):
    """A real recording, uploaded; the same request makes the same file."""
    inputs = {
        "prompt": "a string quartet",
        "input_audio": data_url(SONG),
        "duration": 35 if output_format == "wav" else 2,
        "seed": 3,
        "output_format": output_format,
    }
    _, content = made(served, **inputs)
    wav, rate = decoded(content, tmp_path)
    assert (rate, len(wav)) == (32000, 2)
    assert abs(wav.shape[1] - inputs["duration"] * 32000) <= 2304
    assert made(served, **inputs)[1] == content
    assert (
        made(served, **{key: inputs[key] for key in inputs if key != "input_audio"})[1] != content
    )
    assert made(served, **inputs, continuation_start=4)[1] != content


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_continuation_in_every_format(served, output_format, tmp_path):
    """It opens with the real recording, as the codec hears it."""
    inputs = {
        "prompt": "heavy guitars",
        "input_audio": data_url(SONG),
        "continuation": True,
        "continuation_start": 1,
        "continuation_end": 5,
        "duration": 35 if output_format == "wav" else 6,
        "seed": 3,
        "output_format": output_format,
        "normalization_strategy": "clip",
    }
    _, content = made(served, **inputs)
    wav, rate = decoded(content, tmp_path)
    assert (rate, len(wav)) == (32000, 2)
    assert abs(wav.shape[1] - inputs["duration"] * 32000) <= 2304
    inputs["duration"] = 6
    content = made(served, **inputs)[1]
    wav, _ = decoded(content, tmp_path)
    assert made(served, **inputs)[1] == content
    shifted = made(served, **inputs | {"continuation_start": 2, "continuation_end": 6})[1]
    assert shifted != content
    other = decoded(made(served, **inputs | {"seed": 4})[1], tmp_path)[0]
    # What the recording gave is the same whatever was drawn, what goes on is not.
    same = (wav - other).abs()
    assert same[:, : int(3.9 * 32000)].max() < (1e-3 if output_format in {"wav", "flac"} else 0.2)
    assert same[:, 5 * 32000 :].std() > 0.01


def test_an_empty_prompt_counts_as_given(served):
    assert made(served, prompt="", duration=1)


def test_eight_point_zero_is_eight(served):
    _, content = made(served, prompt="x", duration=1.0, seed=7.0, top_k=250.0)
    assert content == made(served, prompt="x", duration=1, seed=7)[1]


def test_minus_one_draws_a_seed(served):
    answer, content = made(served, prompt="x", duration=1, seed=-1)
    seed = answer["metrics"]["seed"]
    assert 0 <= seed < 2**31
    assert re.search(rf"Seed: {seed}\b", answer["logs"])
    assert made(served, prompt="x", duration=1, seed=seed)[1] == content


def test_progress_is_logged(served):
    answer, _ = made(served, prompt="x", duration=4)
    lines = re.findall(r"(\d+) %, (\d+) of 203 steps, \d+ s left", answer["logs"])
    assert len(lines) == 10
    assert [int(percent) // 10 for percent, _ in lines] == list(range(1, 11))
    assert all(int(percent) == 100 * int(done) // 203 for percent, done in lines)


# What is refused


def sound(folder: Path, name: str, wav: np.ndarray, rate: int = 8000) -> Path:
    soundfile.write(folder / name, wav, rate, format="WAV")
    return folder / name


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Recordings by name, as data URLs."""
    folder = tmp_path_factory.mktemp("clips")
    tone = np.sin(np.arange(40 * 8000) / 8)
    paths = {
        "tone": sound(folder, "tone", tone[: 4 * 8000]),
        "long": sound(folder, "long", tone[: 31 * 8000]),
        "silent": sound(folder, "silent", np.zeros(4 * 8000)),
        "empty": folder / "empty",
        "text": folder / "text",
    }
    (folder / "empty").touch()
    (folder / "text").write_text("these are words")
    return {name: data_url(path) for name, path in paths.items()}


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "There is nothing to make music from: give a prompt, an input_audio or both."),
        (
            {"prompt": "x", "continuation": True},
            (
                "continuation is on, but there is no input_audio to continue: give one, or switch "
                "continuation off."
            ),
        ),
        (
            {"prompt": "x" * 50000},
            "prompt has 50000 characters, it may have up to 5000: shorten it.",
        ),
        ({"prompt": "x", "duration": 0}, "duration is 0, it must be from 1 to 600 seconds."),
        ({"prompt": "x", "duration": 601}, "duration is 601, it must be from 1 to 600 seconds."),
        ({"prompt": "x", "top_k": -1}, "top_k is -1, it must be 0 or more; 0 lifts the limit."),
        ({"prompt": "x", "top_p": 1.5}, "top_p is 1.5, it must be from 0 to 1."),
        ({"prompt": "x", "temperature": -1}, "temperature is -1, it must be 0 or more."),
        (
            {"prompt": "x", "classifier_free_guidance": -1},
            "classifier_free_guidance is -1, it must be 0 or more.",
        ),
        (
            {"input_audio": "tone", "continuation_start": 3, "continuation_end": 3},
            "continuation_start is 3 s, it must be before continuation_end, 3 s.",
        ),
        (
            {"input_audio": "tone", "continuation_start": 5},
            "continuation_start is 5 s, but input_audio has only 4.00 s: give an earlier second.",
        ),
        (
            {"input_audio": "tone", "continuation_end": 5},
            (
                "continuation_end is 5 s, but input_audio has only 4.00 s: give an earlier second, "
                "or -1 for its end."
            ),
        ),
        (
            {"input_audio": "tone", "model_version": "small"},
            (
                "model_version small cannot follow the melody of input_audio: take one of "
                f"{MELODY_VERSIONS}, or switch continuation on."
            ),
        ),
        (
            {"input_audio": "tone", "continuation": True, "duration": 4},
            (
                "The part of input_audio to continue has 4.00 s and duration is 4 s, which counts "
                "it too: raise duration, or shorten the part with continuation_start and "
                "continuation_end."
            ),
        ),
        (
            {"input_audio": "long", "continuation": True, "duration": 60},
            (
                "The part of input_audio to continue has 31.00 s, model_version stereo-melody "
                "hears at most 30 s: shorten it with continuation_start and continuation_end."
            ),
        ),
        (
            {"input_audio": "silent", "continuation": True},
            (
                "input_audio is silent in the part that is used, so there is nothing to continue: "
                "take another part with continuation_start and continuation_end, or other audio."
            ),
        ),
        ({"input_audio": "empty"}, r"input_audio: \S+ is empty \(0 bytes\); export or upload it"),
        ({"input_audio": "text"}, r"input_audio: \S+ cannot be read as audio .*convert it to WAV"),
    ],
)
def test_a_request_that_cannot_be_met(served, clips, inputs, sentence):
    inputs = {**inputs, **{key: clips[inputs[key]] for key in ("input_audio",) if key in inputs}}
    error = refused(served, **{"seed": 314159265, **inputs})
    # Nothing expensive has started: the seed is said before the first step.
    assert not any("Seed: 314159265" in line for line in served.lines)
    message = plain_message(error)
    assert message == sentence or re.match(sentence, message), message
    assert message.count("\n") == 0
    assert message.endswith(".")
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"duration": "8"}, '"8" is not of type "integer"'),
        ({"duration": 8.5}, '8.5 is not of type "integer"'),
        ({"continuation": 1}, '1 is not of type "boolean"'),
        ({"prompt": None}, 'null is not of type "string"'),
        ({"top_p": "0"}, '"0" is not of type "number"'),
        ({"continuation_start": -1}, "-1 is less than the minimum of 0"),
        ({"output_format": "aac"}, '"aac" is not one of ["flac","mp3","ogg","wav"]'),
        ({"model_version": "huge"}, '"huge" is not one of'),
        ({"normalization_strategy": ""}, '"" is not one of'),
    ],
)
def test_wrong_types_ranges_and_choices(served, inputs, message):
    status, answer = served.predict({"prompt": "x", **inputs})
    assert status == 422
    (problem,) = answer["detail"]
    assert problem["loc"] == ["body", "input", *inputs]
    wanted = set(re.findall("[a-z0-9]+", message))
    assert problem["msg"].startswith(message) or wanted <= set(
        re.findall("[a-z0-9]+", problem["msg"])
    )


def test_files_of_the_server(served):
    """`/etc/passwd`, and a link to it in the working folder, as audio and as weights."""
    link = ROOT / "output-link-to-passwd.wav"
    link.symlink_to("/etc/passwd")
    try:
        for path in ("/etc/passwd", str(link), link.name, "../../../../etc/passwd"):
            for name in ("input_audio", "replicate_weights"):
                error = refused(served, **{"prompt": "x", name: path})
                assert error.endswith(
                    f"{name} is a path on the server, which is not allowed: give a URL, or start "
                    "the server with ALLOW_LOCAL_FILES=1."
                )
    finally:
        link.unlink()


# Fine-tuned weights


def test_weights_of_a_request(served, store, tmp_path):
    """Full, adapter and older: each sounds different, and the next request is the base again."""
    inputs = {"prompt": "x", "duration": 1, "seed": 1}
    plain = made(served, **inputs)[1]
    older = tmp_path / "trained_model.tar"
    package = read_release(full_release(store))
    torch.save(
        {
            "xp.cfg": package["xp.cfg"],
            "model": {k: v * 0.9 for k, v in package["best_state"].items()},
        },
        older,
    )
    files = [
        full_finetune(store, "stereo-melody", 5, tmp_path / "full.safetensors"),
        adapter(store, "stereo-melody", 6, tmp_path / "adapter.safetensors"),
        older,
    ]
    heard = {plain}
    for path in files:
        for weights in (str(path), data_url(path)):  # below the temporary folder
            content = made(served, **inputs, replicate_weights=weights)[1]
            assert made(served, **inputs, replicate_weights=weights)[1] == content
            heard.add(content)
        assert made(served, **inputs)[1] == plain
    assert len(heard) == 4


def full_release(store: Path) -> Path:
    return store / VERSIONS["stereo-melody"].source


def test_weights_override_the_version_only_where_they_name_their_base(served, store, tmp_path):
    inputs = {"prompt": "x", "duration": 1, "seed": 1}
    named = str(full_finetune(store, "small", 5, tmp_path / "full.safetensors"))
    answer, content = made(served, **inputs, replicate_weights=named)
    assert answer["metrics"]["model_version"] == "small"
    assert soundfile.info(io.BytesIO(content)).channels == 1
    package = read_release(store / VERSIONS["small"].source)
    torch.save(package, tmp_path / "export.bin")
    unnamed = str(tmp_path / "export.bin")
    answer, content = made(served, **inputs, replicate_weights=unnamed, model_version="small")
    assert answer["metrics"]["model_version"] == "small"
    assert content == made(served, **inputs, model_version="small")[1]
    error = refused(served, **inputs, replicate_weights=named, input_audio=data_url(SONG))
    assert "replicate_weights (full.safetensors), fine-tuned from small, cannot follow" in error


class Attack:
    def __reduce__(self):
        return os.mkdir, ("/tmp/musicgen-attack-ran",)  # noqa: S108 - must never be there


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"these are no weights", "is not a file of MusicGen weights; take an official export or"),
        (b"RIFF....WAVEfmt ", "is not a file of MusicGen weights"),
        (None, "would run posix.mkdir while it is read, which is never done"),
    ],
)
def test_what_is_no_weights_is_refused_by_name(served, content, sentence, tmp_path):
    path = tmp_path / "weights.tar"
    if content is None:
        torch.save({"xp.cfg": Attack(), "model": {}}, path)
    else:
        path.write_bytes(content)
    error = refused(served, prompt="x", duration=1, replicate_weights=str(path))
    assert f"replicate_weights (weights.tar) {sentence}" in error
    assert not Path("/tmp/musicgen-attack-ran").exists()  # noqa: S108
    assert made(served, prompt="x", duration=1)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "http://127.0.0.1:9/a.safetensors?token=secret",
            r"replicate_weights: http://127\.0\.0\.1:9/a\.safetensors could .*; check the URL .*",
        ),
        (
            "file:///etc/passwd",
            r"replicate_weights: file:// is not supported; give an http\(s\) URL or a path\.",
        ),
        ("data:;base64,%%%", "replicate_weights: The base64 of this data: URL is broken.*"),
    ],
)
def test_weights_that_cannot_be_had(served, source, sentence):
    error = plain_message(refused(served, prompt="x", replicate_weights=source))
    assert re.fullmatch(sentence, error), error
    assert "secret" not in error


def test_weights_for_the_whole_server(environment, store, tmp_path):
    """`COG_WEIGHTS`: what answers is the fine-tune, but for requests that bring their own."""
    path = full_finetune(store, "small", 5, tmp_path / "full.safetensors")
    other = adapter(store, "small", 6, tmp_path / "adapter.safetensors")
    inputs = {"prompt": "x", "duration": 1, "seed": 1}
    with start(ROOT, environment) as server:
        plain = made(server, **inputs, model_version="small")[1]
        tuned = made(server, **inputs, replicate_weights=str(path))[1]
        adapted = made(server, **inputs, replicate_weights=str(other))[1]
    assert len({plain, tuned, adapted}) == 3
    with start(ROOT, {**environment, "COG_WEIGHTS": str(path)}) as server:
        assert made(server, **inputs)[1] == tuned
        assert made(server, **inputs, replicate_weights=str(other))[1] == adapted
        answer, content = made(server, **inputs, model_version="stereo-melody")
        assert content == tuned
        assert answer["metrics"]["model_version"] == "small"


@pytest.mark.parametrize("kind", ["missing", "broken", "for another base"])
def test_weights_that_cannot_be_served_fail_the_setup(kind, environment, store, tmp_path):
    path = tmp_path / "weights.safetensors"
    if kind == "broken":
        path.write_bytes(b"broken")
    elif kind == "for another base":
        adapter(store, "small", 6, path, base_sha256="0" * 64)
    with (
        pytest.raises(Exception, match="Model setup failed: COG_WEIGHTS"),
        start(ROOT, {**environment, "COG_WEIGHTS": str(path)}),
    ):
        pass


def test_a_song_on_the_internet(served, tmp_path):
    """Cog fetches it: its name says nothing, its content does."""
    wav, rate = audio_read(SONG)
    song = audio_write(tmp_path / "song", wav, rate, format="flac", normalize=False)
    song.rename(tmp_path / "song.mp3")
    inputs = {"prompt": "x", "duration": 1, "seed": 1}
    with FileServer(tmp_path) as server:
        by_url = made(served, **inputs, input_audio=server.url("/song.mp3"))[1]
    assert by_url == made(served, **inputs, input_audio=data_url(tmp_path / "song.mp3"))[1]
