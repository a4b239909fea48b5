import errno
import inspect
import logging
import math
import os
import resource
import shutil
import tempfile
import time

import pytest
import soundfile
import torch

from audiocraft.data.audio import AudioFileInfo, audio_info, audio_read, audio_write
from audiocraft.data.audio_utils import normalize_audio
from audiocraft.errors import AudioFileError
from tests.data.signals import RATE, SECONDS, sentence, tones
from tests.golden_data import meta

MP3_LIMITS = (
    "MP3 takes up to 2 channels at 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000 Hz"
)


@pytest.mark.parametrize("name", ["wav", "mp3", "flac", "ogg"])
@pytest.mark.parametrize("channels", [1, 2])
def test_round_trip(tmp_path, name, channels):
    wav = tones(32000)[:channels]
    path = audio_write(tmp_path / "take.1", wav, 32000, name, normalize=False)
    assert path == tmp_path / f"take.1.{name}"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert audio_info(path) == AudioFileInfo(32000, SECONDS, channels)
    read, rate = audio_read(path)
    assert (rate, read.shape) == (32000, wav.shape)
    tolerance = 0.06 if name in {"mp3", "ogg"} else 2**-16
    torch.testing.assert_close(read, wav, rtol=0, atol=tolerance)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_files_are_16_bit(tmp_path):
    for name in ("wav", "flac"):
        assert soundfile.info(audio_write(tmp_path / "x", tones(), RATE, name)).subtype == "PCM_16"


def test_equal_input_gives_equal_bytes(tmp_path):
    wav = tones(32000)
    formats = ("wav", "mp3", "flac", "ogg")
    first = [audio_write(tmp_path / "first", wav, 32000, name).read_bytes() for name in formats]
    time.sleep(1.1)  # for times in headers
    second = [audio_write(tmp_path / "other", wav, 32000, name).read_bytes() for name in formats]
    assert first == second


def test_bit_rates(tmp_path):
    noise = torch.rand(2, 5 * 44100, generator=torch.Generator().manual_seed(0)) - 0.5
    size = audio_write(tmp_path / "default", noise, 44100, "mp3").stat().st_size
    assert size * 8 / 5 == pytest.approx(320_000, rel=0.03)
    size = audio_write(tmp_path / "lower", noise, 44100, "mp3", mp3_rate=128).stat().st_size
    assert size * 8 / 5 == pytest.approx(128_000, rel=0.03)
    size = audio_write(tmp_path / "vorbis", noise, 44100, "ogg", ogg_rate=96).stat().st_size
    assert size * 8 / 5 == pytest.approx(96_000, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4000,), (1, 4000), (2, 4000)])
def test_any_floating_point_and_shape(tmp_path, dtype, shape):
    wav = torch.linspace(-1.5, 1.5, 4000).expand(shape).to(dtype).requires_grad_()
    read, _ = audio_read(audio_write(tmp_path / "x", wav, 8000))
    expected = torch.atleast_2d(wav.detach()).float() / 1.5 * 10 ** (-1 / 20)
    torch.testing.assert_close(read, expected, rtol=0, atol=2**-15)


def test_samples_beyond_full_scale_are_cut_off_never_wrapped(tmp_path, caplog):
    wav = torch.full((1, 8000), 0.1)
    wav[0, 4000:4040] = 9.0
    wav[0, 4040:4080] = -9.0
    with caplog.at_level(logging.WARNING):
        path = audio_write(tmp_path / "x", wav, 8000, strategy="rms", rms_headroom_db=6)
    assert len(caplog.messages) == 1
    read, _ = audio_read(path)
    assert read[0, 4000:4040].min() > 0.999
    assert read[0, 4040:4080].max() < -0.999


@pytest.mark.parametrize("strategy", ["loudness", "clip", "peak", "rms"])
def test_strategies_reach_the_file(tmp_path, strategy):
    wav = tones(32000) * 0.3
    read, _ = audio_read(audio_write(tmp_path / "x", wav, 32000, strategy=strategy))
    expected = normalize_audio(wav, strategy=strategy, sample_rate=32000)
    torch.testing.assert_close(read, expected, rtol=0, atol=2**-15)


def test_paths(tmp_path):
    wav = torch.zeros(1, 100)
    assert audio_write(str(tmp_path / "a/b/x"), wav, 8000).is_file()
    exact = tmp_path / "exact.name"
    assert audio_write(exact, wav, 8000, "flac", add_suffix=False) == exact
    assert soundfile.info(exact).format == "FLAC"
    assert sentence(audio_write, tmp_path / "none/x", wav, 8000, make_parent_dir=False) == (
        "x.wav cannot be written (No such file or directory); choose another path or format."
    )
    assert sentence(audio_write, exact / "x", wav, 8000, make_parent_dir=False) == (
        "x.wav cannot be written (Not a directory); choose another path or format."
    )
    (tmp_path / "taken.wav").mkdir()
    assert sentence(audio_write, tmp_path / "taken", wav, 8000) == (
        "taken.wav cannot be written (Is a directory); choose another path or format."
    )
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("wav", "keywords", "message"),
    [
        (
            torch.zeros(1, 9),
            {"format": "m4a"},
            "format must be one of wav, mp3, flac, ogg, not 'm4a'.",
        ),
        (
            torch.zeros(1, 9),
            {"strategy": "max"},
            "strategy must be one of loudness, clip, peak, rms, not 'max'.",
        ),
        (
            torch.zeros(9, dtype=torch.int16),
            {},
            "Audio is torch.int16; give it as floating point.",
        ),
        (
            torch.zeros(1, 1, 9),
            {},
            "Audio has the shape (1, 1, 9); give it as (channels, samples), not empty.",
        ),
        (
            torch.zeros(2, 0),
            {},
            "Audio has the shape (2, 0); give it as (channels, samples), not empty.",
        ),
        (
            torch.tensor([0.0, math.inf]),
            {},
            "Audio holds samples that are not numbers (NaN or infinite); give it without them.",
        ),
        (
            torch.zeros(1, 9),
            {"sample_rate": 0},
            "sample_rate is 0 Hz; give a positive whole number.",
        ),
        (
            torch.zeros(6, 9),
            {"format": "mp3", "sample_rate": 44100},
            f"{MP3_LIMITS}, not 6 at 44100 Hz: convert the audio or choose wav or flac.",
        ),
        (
            torch.zeros(1, 9),
            {"format": "mp3", "sample_rate": 96000},
            f"{MP3_LIMITS}, not 1 at 96000 Hz: convert the audio or choose wav or flac.",
        ),
        (
            torch.zeros(9, 9),
            {"format": "flac"},
            "x.flac cannot be written (Format not recognised); choose another path or format.",
        ),
    ],
)
def test_what_cannot_be_written(tmp_path, wav, keywords, message):
    keywords = {"sample_rate": 8000} | keywords
    assert sentence(audio_write, tmp_path / "x", wav, **keywords) == message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folder of the file and the one of temporary files; both must be empty in the end."""
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    out.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    yield out, temporary
    assert not [*out.iterdir(), *temporary.iterdir()]


def put_ffmpeg(folder, monkeypatch, *lines):
    """Let a script stand for ffmpeg."""
    command = folder / "bin" / "ffmpeg"
    command.parent.mkdir()
    command.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)


def test_a_failing_encoder_leaves_nothing_behind(folders):
    message = sentence(audio_write, folders[0] / "x", tones(), RATE, "ogg", ogg_rate=9999)
    assert message.startswith("x.ogg cannot be written (ffmpeg: ")


@pytest.mark.parametrize("name", ["mp3", "ogg"])
def test_an_encoder_that_runs_out_of_disk(folders, tmp_path, monkeypatch, name):
    """It says so with the last bytes, after which ffmpeg would by itself call that a success."""
    real = shutil.which("ffmpeg")
    put_ffmpeg(tmp_path, monkeypatch, "trap '' XFSZ", "ulimit -f 2", f'exec {real} "$@"')
    message = sentence(audio_write, folders[0] / "x", tones(), RATE, name)
    assert message.startswith(f"x.{name} cannot be written (ffmpeg: ")
    assert message.endswith("File too large); choose another path or format.")


@pytest.mark.parametrize("missing", [1000, -20])  # pydub's own copy has a header of 44 bytes
@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "ogg"])
def test_a_file_that_the_system_refuses(folders, name, missing):
    wav = tones()
    size = 2 * wav.numel() // (10 if name == "flac" else 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, before[1]))
    try:
        message = sentence(audio_write, folders[0] / "x", wav, RATE, name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"x.{name} cannot be written (")
    assert message.endswith("File too large); choose another path or format.")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_needs_room(folders, tmp_path, monkeypatch, number):
    out, _ = folders

    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(soundfile, "write", full)
    said = f"Error writing trailer of /tmp/x: {os.strerror(number)}"
    put_ffmpeg(tmp_path, monkeypatch, f"echo '{said}' >&2", "exit 1")
    for name in ("wav", "ogg"):
        assert sentence(audio_write, out / "x", tones(), RATE, name) == (
            f"x.{name} does not fit on the disk of {out}; free some of it."
        )


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input error"), KeyboardInterrupt()])
def test_a_file_appears_when_it_is_whole(tmp_path, monkeypatch, failure):
    path = audio_write(tmp_path / "x", tones(), RATE)
    before = path.read_bytes()

    def half(file, *_, **__):
        file.write(b"RIFF")
        assert len(list(tmp_path.iterdir())) == 2
        raise failure

    monkeypatch.setattr(soundfile, "write", half)
    expected = AudioFileError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"x\.wav cannot be written \(Input error\)|^$"):
        audio_write(tmp_path / "x", torch.zeros(1, 9), RATE)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_signature_of_the_official_package():
    expected = meta("normalize_audio")["audio_write_defaults"]
    parameters = inspect.signature(audio_write).parameters
    assert list(parameters) == list(expected)
    assert {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in parameters.items()
    } == expected
