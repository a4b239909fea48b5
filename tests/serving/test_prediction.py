"""Requests on the bundled model, without the server."""

import logging
import math
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch

from audiocraft.assets.store import PARTS
from audiocraft.data.audio import audio_read, audio_write
from audiocraft.errors import AudioFileError, InputError, TooLargeError
from audiocraft.models import MultiBandDiffusion, MusicGen
from audiocraft.models.versions import VERSIONS
from audiocraft.serving import prediction
from audiocraft.serving.models import Selection
from audiocraft.serving.prediction import PredictionRequest, PredictionService
from audiocraft.serving.worker import checked_path
from tools.make_diffusion import write_diffusion


@pytest.fixture(scope="module")
def service():
    return PredictionService()


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """Four tones of a second each, 44.1 kHz stereo, on the right quieter and backwards."""
    time = torch.arange(4 * 44100) / 44100
    pitches = torch.tensor([220.0, 246.9, 277.2, 329.6]).repeat_interleave(44100)
    left = torch.sin(2 * torch.pi * pitches * time) / 2
    right = left.flip(0) * 0.5
    folder = tmp_path_factory.mktemp("song")
    return audio_write(folder / "song", torch.stack([left, right]), 44100, normalize=False)


# As torch says it of a CPU.
NO_MEMORY = partial(
    RuntimeError,
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 80000000000 bytes. Error code 12 (Cannot allocate memory)",
)


def tiny(**inputs):
    return PredictionRequest(model_version="tiny", **inputs)


@pytest.mark.parametrize("output_format", ["wav", "mp3", "flac", "ogg"])
def test_text(service, output_format):
    request = tiny(prompt="a song", duration=2, seed=4, output_format=output_format)
    result = service.predict(request)
    assert result.path.suffix == f".{output_format}"
    wav, sample_rate = audio_read(result.path)
    assert sample_rate == 32000
    assert wav.shape == (2, 64000)
    assert wav.std() > 0.02
    content = result.path.read_bytes()
    again = service.predict(request)
    assert again.path.read_bytes() == content
    assert again.path.name != result.path.name
    assert not result.path.exists()
    other = tiny(prompt="a song", duration=2, seed=5, output_format=output_format)
    assert service.predict(other).path.read_bytes() != content


def test_metrics(service):
    metrics = service.predict(tiny(prompt="a song", duration=1, seed=4)).metrics
    assert metrics["seed"] == 4
    assert metrics["seconds_generated"] == 1
    assert metrics["model_version"] == "tiny"
    steps = 50 + 7
    assert metrics["real_time_factor"] / metrics["steps_per_second"] == pytest.approx(1 / steps)


def test_a_random_seed_makes_its_take_again(service):
    for seed in (None, -1):
        result = service.predict(tiny(prompt="a song", duration=1, seed=seed))
        content, used = result.path.read_bytes(), result.metrics["seed"]
        assert 0 <= used < 2**31
        again = service.predict(tiny(prompt="a song", duration=1, seed=used))
        assert again.path.read_bytes() == content


def test_zero_is_a_seed(service):
    assert service.predict(tiny(prompt="a song", duration=1, seed=0)).metrics["seed"] == 0


def test_a_melody_is_followed(service, song):
    """What is heard depends on the part of the melody that is used."""

    def content(**inputs):
        return service.predict(tiny(duration=1, seed=1, **inputs)).path.read_bytes()

    whole = content(input_audio=song, prompt="a song")
    assert whole != content(prompt="a song")
    assert whole != content(input_audio=song, prompt="a song", continuation_start=2)
    trimmed = content(input_audio=song, prompt="a song", continuation_start=1, continuation_end=2)
    assert trimmed != whole
    assert whole == content(input_audio=song, prompt="a song", continuation_end=-1)
    assert content(input_audio=song)


def test_no_more_of_a_long_melody_is_used_than_is_heard(service, tmp_path):
    """A song of 100 s gives what all of it gives, though its end is not even read."""
    generator = torch.Generator().manual_seed(0)
    tones = 220 * 2 ** (torch.randint(12, (100,), generator=generator) / 12)
    phase = torch.cumsum(tones.repeat_interleave(8000) / 8000, dim=0)
    wav = torch.sin(2 * torch.pi * phase)[None] / 2
    song = audio_write(tmp_path / "long", wav, 8000, normalize=False)
    result = service.predict(tiny(input_audio=song, prompt="x", duration=1, seed=2))
    model = service._models.get(Selection("tiny"))
    expected = model.generate_with_chroma(["x"], audio_read(song)[0][None], 8000)[0]
    whole = audio_write(
        tmp_path / "whole", expected, 32000, strategy="loudness", loudness_compressor=True
    )
    assert result.path.read_bytes() == whole.read_bytes()


def test_a_continuation_opens_with_the_recording(service, song):
    request = tiny(
        input_audio=song,
        continuation=True,
        continuation_start=1,
        continuation_end=3,
        duration=4,
        seed=1,
        normalization_strategy="clip",
    )
    wav, _ = audio_read(service.predict(request).path)
    assert wav.shape == (2, 128000)
    model = service._models.get(Selection("tiny"))
    recording, _ = audio_read(song, 1, 2)
    prompt = model._convert(recording[None], 44100)
    codes, _ = model.compression_model.encode(prompt)
    # The last frames of the decoded prompt hear what follows.
    decoded = model.generate_audio(codes)[0, :, :60000].clamp(-1, 1)
    torch.testing.assert_close(wav[:, :60000], decoded, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_longer_than_the_context(service, song):
    result = service.predict(tiny(prompt="a song", input_audio=song, duration=35, seed=1))
    info = soundfile.info(result.path)
    assert (info.frames, info.samplerate, info.channels) == (35 * 32000, 32000, 2)


def test_progress_is_logged_with_the_time_left(service, caplog):
    with caplog.at_level(logging.INFO, "audiocraft"):
        service.predict(tiny(prompt="a song", duration=1, seed=7))
    assert "Seed: 7" in caplog.messages
    lines = [line for line in caplog.messages if "steps" in line]
    assert len(lines) >= 10
    assert lines[-1] == "100 %, 57 of 57 steps, 0 s left"


def test_a_device_that_torch_cannot_use_is_told_each_time(monkeypatch, caplog):
    warning = "Warning: GPU 0 is there, but torch cannot use it."
    monkeypatch.setattr(prediction, "device_warning", lambda: warning)
    service = PredictionService()
    for number in (1, 2):
        service.predict(tiny(prompt="a song", duration=1))
        assert caplog.messages.count(warning) == number


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "There is nothing to make music from: give a prompt, an input_audio or both."),
        ({"prompt": "x", "continuation": True}, "continuation is on, but there is no input_audio"),
        (
            {"prompt": "x" * 5001},
            "prompt has 5001 characters, it may have up to 5000: shorten it.",
        ),
        ({"prompt": "\ufdfa" * 278}, "prompt has 5004 characters"),  # Unicode says it in 18
        ({"prompt": "x", "duration": 0}, "duration is 0, it must be from 1 to 600 seconds."),
        ({"prompt": "x", "duration": 601}, "duration is 601, it must be from 1 to 600 seconds."),
        ({"prompt": "x", "top_k": -1}, "top_k is -1"),
        ({"prompt": "x", "seed": 2**63}, "it must be from -2^63 to 2^63 - 1."),
        ({"prompt": "x", "top_p": 1.5}, "top_p is 1.5, it must be from 0 to 1."),
        ({"prompt": "x", "temperature": -0.5}, "temperature is -0.5"),
        (
            {"prompt": "x", "temperature": math.nan},
            "temperature is nan, it must be a finite number.",
        ),
        ({"prompt": "x", "top_p": math.inf}, "top_p is inf, it must be a finite number."),
        ({"prompt": "x", "classifier_free_guidance": -1.0}, "classifier_free_guidance is -1"),
        (
            {"prompt": "x", "classifier_free_guidance": 1e39},  # no float32
            "classifier_free_guidance is 1e+39, it may be up to 1e+30; 3 suits most music.",
        ),
        (
            {"input_audio": Path("")},  # noqa: PTH201 - as `predict.py` makes it of an empty text
            "input_audio is empty or a folder: give a URL or a file, or leave it out.",
        ),
        (
            {"prompt": "x", "replicate_weights": "x" * 300},  # more than a name may have
            f"replicate_weights: there is no file {'x' * 100}...: give a URL or the path of a file",
        ),
        (
            {"prompt": "x", "replicate_weights": "no/such/file"},
            "replicate_weights: ",
        ),
        ({"continuation_start": 2, "continuation_end": 2}, "continuation_start is 2 s"),
        ({"continuation_start": 5}, "continuation_start is 5 s, but input_audio has only 4.00 s"),
        ({"continuation_end": 5}, "continuation_end is 5 s, but input_audio has only 4.00 s"),
        ({"continuation": True, "duration": 4}, "has 4.00 s and duration is 4 s, which counts it"),
    ],
)
def test_bad_requests_are_refused(service, song, inputs, message):
    if "prompt" not in inputs and inputs:
        inputs = {"input_audio": song, **inputs}
    with pytest.raises(InputError) as caught:
        service.predict(tiny(**inputs))
    assert message in str(caught.value)


def test_the_longest_prompt_is_accepted():
    tiny(prompt="x" * 5000).check()
    tiny(prompt="e\u0301" * 5000).check()  # two characters to write one


@pytest.mark.parametrize(("beyond", "shown"), [(8000, "13.00"), (24, "12.01"), (1, "12.01")])
def test_a_prompt_longer_than_the_context_is_refused(service, tmp_path, beyond, shown):
    """What is longer by a sample shows as longer."""
    assert VERSIONS["tiny"].context == 12
    long = audio_write(tmp_path / "long", torch.rand(1, 12 * 8000 + beyond), 8000)
    sentence = f"has {re.escape(shown)} s, model_version tiny hears at most 12 s"
    with pytest.raises(InputError, match=sentence):
        service.predict(tiny(input_audio=long, continuation=True, duration=60))


def test_a_prompt_that_leaves_nothing_is_refused_before_the_model_is_loaded(service, song):
    request = PredictionRequest(
        input_audio=song, continuation=True, duration=3, model_version="large"
    )
    with pytest.raises(InputError, match=r"has 4\.00 s and duration is 3 s"):
        service.predict(request)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError,
        NO_MEMORY,
        MemoryError,
        partial(RuntimeError, "CUDA error: out of memory"),
        partial(RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_where_memory_runs_out_other_models_go(service, monkeypatch, error):
    request = tiny(prompt="x", duration=1, seed=3)
    expected = service.predict(request).path.read_bytes()
    model = service._models.get(Selection("tiny"))
    service._models._models["other", None] = MusicGen.get_pretrained("tiny")
    generate, calls = MusicGen.generate, []

    def run_out(self, *args, **kwargs):
        calls.append(set(service._models._models))
        if len(calls) == 1:
            raise error()
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(MusicGen, "generate", run_out)
    assert service.predict(request).path.read_bytes() == expected
    assert calls == [{("other", None), ("tiny", None)}, {("tiny", None)}]
    assert service._models.get(Selection("tiny")) is model

    def never_enough(*_, **__):
        raise error()

    monkeypatch.setattr(MusicGen, "generate", never_enough)
    with pytest.raises(InputError, match=r"^1 s of tiny do not .* cpu: .* or a shorter duration"):
        service.predict(request)


def test_another_error_is_no_lack_of_memory(service, monkeypatch):
    calls = []

    def fail(*_, **__):
        calls.append("generate")
        raise RuntimeError("boom")

    monkeypatch.setattr(MusicGen, "generate", fail)
    with pytest.raises(RuntimeError, match="boom"):
        service.predict(tiny(prompt="x", duration=1))
    assert calls == ["generate"]


def test_where_memory_runs_out_in_the_diffusion_nothing_is_generated_again(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path))
    repo_id, (filename,) = PARTS["mbd"]
    (tmp_path / repo_id).mkdir(parents=True)
    write_diffusion(tmp_path / repo_id / filename, 64, 2, hidden=4, depth=2, growth=2)
    service = PredictionService()
    request = tiny(prompt="x", duration=1, seed=3, multi_band_diffusion=True)
    expected = service.predict(request).path.read_bytes()
    bands, calls = service._models._bands, []
    service._models._models["other", None] = MusicGen.get_pretrained("tiny")

    def note(owner, name, failures):
        inner = getattr(owner, name)

        def noted(*args, **kwargs):
            calls.append((name, len(service._models._models)))
            if [called for called, _ in calls].count(name) <= failures:
                raise TooLargeError("It does not fit.")
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(MusicGen, "generate", 0)
    note(MultiBandDiffusion, "tokens_to_wav", 1)
    assert service.predict(request).path.read_bytes() == expected
    assert calls == [("generate", 2), ("tokens_to_wav", 2), ("tokens_to_wav", 1)]
    assert service._models._bands is bands
    note(MultiBandDiffusion, "tokens_to_wav", 99)
    with pytest.raises(TooLargeError, match="It does not fit"):
        service.predict(request)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_music_that_is_no_numbers_is_not_sent(service, monkeypatch, value):
    def broken(*_, **__):
        return torch.full((1, 2, 32000), value), torch.zeros(1, 8, 50)

    monkeypatch.setattr(MusicGen, "generate", broken)
    with pytest.raises(
        InputError, match=r"^The music came out as .*: take another seed or other w"
    ):
        service.predict(tiny(prompt="x", duration=1))


def test_a_result_that_somebody_removed_is_no_error(service):
    for _ in range(2):
        result = service.predict(tiny(prompt="x", duration=1))
        shutil.rmtree(result.path.parent)


def test_a_temporary_folder_that_is_not_there_is_told_first(service, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr(MusicGen, "generate", pytest.fail)
    with pytest.raises(InputError) as caught:
        service.predict(tiny(prompt="x", duration=1))
    assert str(caught.value) == (
        f"The temporary folder {tmp_path}/gone cannot be written (No such file or directory): free "
        "some of its disk, or set TMPDIR to another."
    )


def test_no_temporary_folder_at_all(monkeypatch):
    def fail():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.delenv("ALLOW_LOCAL_FILES", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "gettempdir", fail)
    said = r"^The temporary folder cannot be written \(No usable .*\['/tmp'\]\): free some of its "
    with pytest.raises(InputError, match=said):
        checked_path(Path("song.wav"), "input_audio")
    monkeypatch.setenv("ALLOW_LOCAL_FILES", "1")
    assert checked_path(Path("song.wav"), "input_audio") == Path("song.wav").resolve()


def test_a_refused_request_leaves_no_folder(service, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError):
        service.predict(tiny(input_audio=tmp_path / "nothing.wav"))
    assert list(tmp_path.iterdir()) == []


def test_weights_in_a_closed_folder_are_not_found(service, monkeypatch):
    def closed(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", closed)  # root may look anywhere
    with pytest.raises(
        InputError, match=r"^replicate_weights: there is no file closed/x: give a URL or the path"
    ):
        service.predict(tiny(prompt="x", replicate_weights="closed/x"))


def test_broken_audio_is_named(service, tmp_path):
    broken = tmp_path / "tmp8f3file"
    broken.write_text("not a song")
    with pytest.raises(AudioFileError, match=r"^input_audio: tmp8f3file cannot be read as audio"):
        service.predict(tiny(input_audio=broken))


def test_a_version_without_melody_is_refused_before_it_is_loaded(service, song):
    request = PredictionRequest(prompt="x", input_audio=song, model_version="large")
    with pytest.raises(InputError, match="model_version large cannot follow the melody"):
        service.predict(request)


def test_silence(service, tmp_path, caplog):
    silence = audio_write(tmp_path / "silence", torch.zeros(1, 64000), 32000)
    with pytest.raises(AudioFileError, match="there is nothing to continue"):
        service.predict(tiny(input_audio=silence, continuation=True, duration=4))
    with caplog.at_level(logging.WARNING, "audiocraft"):
        service.predict(tiny(input_audio=silence, duration=1))
    assert "it gives no melody" in caplog.text


def test_files_of_the_server_are_refused(service, tmp_path, monkeypatch):
    monkeypatch.delenv("ALLOW_LOCAL_FILES", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.wav").symlink_to("/etc/passwd")
    for path in ("/etc/passwd", "link.wav"):
        with pytest.raises(InputError, match="is a path on the server, which is not allowed"):
            service.predict(tiny(input_audio=type(tmp_path)(path)))


def test_weights_of_a_fine_tune_are_not_ignored():
    with pytest.raises(
        InputError, match=r"^COG_WEIGHTS: \S*trained_model\.safetensors cannot be read"
    ):
        PredictionService("trained_model.safetensors")
