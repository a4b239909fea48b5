import errno
import inspect
import logging
import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiocraft.data.audio import AudioFileInfo, audio_info, audio_read, audio_write
from audiocraft.errors import AudioFileError, InputError
from tests.golden_data import meta

pytestmark = pytest.mark.filterwarnings("ignore:'audioop' is deprecated:DeprecationWarning")

RATE = 48000
SECONDS = 2
TONES = (440.0, 660.0)

# what ffmpeg writes without loss, and the largest error that the format's steps explain
LOSSLESS = {
    "8bit.wav": (["-c:a", "pcm_u8"], 2**-7),
    "16bit.wav": (["-c:a", "pcm_s16le"], 2**-15),
    "24bit.wav": (["-c:a", "pcm_s24le"], 2**-23),
    "32bit.wav": (["-c:a", "pcm_s32le"], 2**-24),
    "float.wav": (["-c:a", "pcm_f32le"], 0),
    "double.wav": (["-c:a", "pcm_f64le"], 0),
    "16bit.flac": (["-sample_fmt", "s16"], 2**-15),
    "24bit.flac": (["-sample_fmt", "s32", "-bits_per_raw_sample", "24"], 2**-23),
    "16bit.aiff": (["-c:a", "pcm_s16be"], 2**-15),
    "alac.m4a": (["-c:a", "alac", "-sample_fmt", "s32p"], 2**-23),
    "alac.caf": (["-c:a", "alac", "-sample_fmt", "s32p"], 2**-23),
    "24bit.mkv": (["-c:a", "pcm_s24le"], 2**-23),
}
LOSSY = {
    "constant.mp3": ["-b:a", "192k"],
    "variable.mp3": ["-q:a", "4"],
    "aac.m4a": ["-c:a", "aac", "-b:a", "192k"],
    "opus.mp4": ["-c:a", "libopus"],
    "opus.webm": ["-c:a", "libopus"],
    "opus.opus": ["-c:a", "libopus"],
    "vorbis.ogg": ["-c:a", "libvorbis"],
    "windows.wma": ["-c:a", "wmav2", "-b:a", "192k"],
}


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-y", *arguments], check=True)


def tones(rate=RATE, seconds=SECONDS, frequencies=TONES, amplitude=0.5):
    """(C, T), one sine for each channel, fading so that no two moments are alike."""
    times = torch.arange(round(seconds * rate)).double() / rate
    waves = [torch.sin(2 * math.pi * frequency * times) for frequency in frequencies]
    return (amplitude * torch.stack(waves) * (1 - times / (2 * seconds))).float()


def write_source(path, wav, rate=RATE):
    soundfile.write(path, wav.T.numpy(), rate, subtype="FLOAT", format="WAV")
    return path


def convert(source, target, *arguments):
    ffmpeg("-i", source, *arguments, target)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of each kind, made by ffmpeg from `source.wav`."""
    folder = tmp_path_factory.mktemp("audio")
    source = write_source(folder / "source.wav", tones())
    for name, (arguments, _) in LOSSLESS.items():
        convert(source, folder / name, *arguments)
    for name, arguments in LOSSY.items():
        convert(source, folder / name, *arguments)
    # 30 seconds of picture to 2 of sound, and none
    video = ("-f", "lavfi", "-i", "testsrc=size=64x64:rate=5")
    ffmpeg(*video, "-i", source, "-c:a", "aac", "-t", "2", folder / "video.mp4")
    ffmpeg(*video, "-t", "1", folder / "mute.mp4")
    return folder


@pytest.fixture
def no_ffmpeg(monkeypatch, tmp_path):
    empty = tmp_path / "no programs"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


def sentence(function, *arguments, **keywords):
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


# Reading


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_are_read_exactly(folder, name):
    wav, rate = audio_read(folder / name)
    assert (rate, wav.dtype) == (RATE, torch.float32)
    torch.testing.assert_close(wav, tones(), rtol=0, atol=LOSSLESS[name][1])
    assert audio_info(folder / name) == AudioFileInfo(RATE, SECONDS, 2)


@pytest.mark.parametrize("name", [*LOSSY, "video.mp4"])
def test_lossy_formats_are_read_in_time(folder, name):
    wav, rate = audio_read(str(folder / name))
    assert rate == RATE
    assert wav.shape[0] == 2
    # a last frame may be filled up with silence; m4a does not say by how much
    assert SECONDS * RATE * 0.98 < wav.shape[1] < SECONDS * RATE + 2048
    middle = slice(RATE // 2, RATE)
    error = (wav - torch.nn.functional.pad(tones(), (0, 4096))[:, : wav.shape[1]])[:, middle]
    assert error.square().mean().sqrt() < 0.01  # of 0.3; a delay of one sample is 0.02
    info = audio_info(folder / name)
    assert info == AudioFileInfo(RATE, wav.shape[1] / RATE, 2)


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY, "video.mp4"])
def test_a_piece_equals_that_piece_of_the_whole(folder, name):
    whole, rate = audio_read(folder / name)
    piece, _ = audio_read(folder / name, seek_time=0.777, duration=0.5)
    start = round(0.777 * rate)
    torch.testing.assert_close(piece, whole[:, start : start + rate // 2], rtol=0, atol=0)
    rest, _ = audio_read(folder / name, seek_time=1.5)
    torch.testing.assert_close(rest, whole[:, 3 * rate // 2 :], rtol=0, atol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 96000, 192000])
@pytest.mark.parametrize("suffix", ["wav", "flac", "m4a"])
def test_sample_rates(tmp_path, rate, suffix):
    if (rate, suffix) == (192000, "m4a"):
        pytest.skip("AAC ends at 96 kHz")
    wav = tones(rate, 0.2)
    path = convert(write_source(tmp_path / "source.wav", wav, rate), tmp_path / f"x.{suffix}")
    read, read_rate = audio_read(path)
    assert read_rate == rate
    assert 0 <= read.shape[1] - wav.shape[1] < 2048
    torch.testing.assert_close(read[:, 1000:1500], wav[:, 1000:1500], rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.m4a", "x.mp3", "x.ogg", "x.opus"])
def test_mono(tmp_path, name):
    path = convert(write_source(tmp_path / "source.wav", tones()[:1]), tmp_path / name)
    assert audio_read(path)[0].shape[0] == 1
    assert audio_info(path).channels == 1


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.m4a", "x.ogg", "x.opus"])
def test_channels_of_5_1_come_in_one_order(tmp_path, name):
    levels = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # left, right, centre, low frequencies, back pair
    layout = ("FL", "FR", "FC", "LFE", "BL", "BR")
    pan = "|".join(f"{speaker}={level}*c0" for speaker, level in zip(layout, levels, strict=True))
    source = write_source(tmp_path / "source.wav", tones(frequencies=(100.0,), amplitude=1.0))
    wav, _ = audio_read(convert(source, tmp_path / name, "-af", f"pan=5.1|{pan}"))
    loudest = wav[:, RATE // 2 : RATE].amax(dim=1) / wav[4, RATE // 2 : RATE].max() * 0.5
    # Opus keeps the level of the low frequencies least
    torch.testing.assert_close(loudest, torch.tensor(levels), rtol=0.25, atol=0)
    assert loudest[[0, 1, 2, 4, 5]].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.6], rel=0.05)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("aac.m4a", "song.wav"),
        ("16bit.wav", "song.raw"),
        ("16bit.wav", "song.mp3"),
        ("constant.mp3", "song.flac"),
        ("16bit.flac", "song.txt"),
        ("vorbis.ogg", "song"),
        ("video.mp4", "song.mp3"),
    ],
)
def test_the_suffix_does_not_matter(folder, tmp_path, content, name):
    shutil.copy(folder / content, tmp_path / name)
    assert torch.equal(audio_read(tmp_path / name)[0], audio_read(folder / content)[0])


@pytest.mark.parametrize(
    "name",
    ["-i", "-y.m4a", "Tür 音楽 \N{GUITAR}.m4a", "a b%03d.m4a", "pipe:0", "concat:a|b", 'it\'s "x"'],
)
@pytest.mark.parametrize("content", ["aac.m4a", "16bit.wav"])
def test_odd_names(folder, tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / content, tmp_path / name)
    assert torch.equal(audio_read(name)[0], audio_read(folder / content)[0])
    assert audio_info(name) == audio_info(folder / content)


def test_peaks_above_full_scale_survive(tmp_path):
    source = write_source(tmp_path / "hot.wav", tones(amplitude=1.7))
    assert audio_read(source)[0].abs().max() > 1.6
    wav, _ = audio_read(convert(source, tmp_path / "hot.m4a", "-c:a", "aac", "-b:a", "256k"))
    assert wav.abs().max() > 1.6
    clipped = (wav.abs() - 1).abs() < 1e-4
    assert clipped.float().mean() < 1e-3


def test_mp3_without_a_length_is_read_whole(tmp_path):
    """libsndfile estimates its length from the first frame, and stops there."""
    quiet_end = torch.cat([tones(), torch.zeros(2, 4 * RATE)], dim=1)
    source = write_source(tmp_path / "source.wav", quiet_end)
    path = convert(source, tmp_path / "x.mp3", "-q:a", "4", "-write_xing", "0")
    assert audio_read(path)[0].shape[1] / RATE == pytest.approx(6, abs=0.1)
    assert audio_info(path).duration == pytest.approx(6, abs=0.1)


def test_flac_without_a_length_is_read_whole(folder, tmp_path):
    arguments = ["ffmpeg", "-v", "error", "-nostdin", "-i", folder / "16bit.wav", "-f", "flac", "-"]
    path = tmp_path / "x.flac"
    path.write_bytes(subprocess.run(arguments, capture_output=True, check=True).stdout)
    assert torch.equal(audio_read(path)[0], audio_read(folder / "16bit.wav")[0])
    assert audio_info(path) == AudioFileInfo(RATE, SECONDS, 2)


@pytest.mark.parametrize("name", ["16bit.wav", "aac.m4a"])
def test_end_of_the_file(folder, name):
    path = folder / name
    length = audio_read(path)[0].shape[1]
    short, _ = audio_read(path, 1.5, 5)
    assert short.shape == (2, length - 3 * RATE // 2)
    padded, _ = audio_read(path, 1.5, 5, pad=True)
    assert padded.shape == (2, 5 * RATE)
    assert torch.equal(padded[:, : short.shape[1]], short)
    assert not padded[:, short.shape[1] :].any()
    assert audio_read(path, pad=True)[0].shape[1] == length
    assert audio_read(path, duration=0)[0].shape[1] == length
    assert audio_read(path, duration=1e-9)[0].shape[1] == 1
    assert sentence(audio_read, path, 2.5) == (
        f"{name} is {length / RATE:.2f} s long, so nothing can be read from 2.5 s on; start "
        "earlier."
    )


def test_times_that_are_no_times(folder):
    path = folder / "16bit.wav"
    assert sentence(audio_read, path, -1) == "seek_time is -1; give 0 or more seconds."
    assert sentence(audio_read, path, math.nan) == "seek_time is nan; give 0 or more seconds."
    assert sentence(audio_read, path, 0, math.inf) == (
        "duration is inf; give seconds, or -1 to read to the end."
    )


# What cannot be read

NO_AUDIO = "; check that it is whole and plays, or convert it to WAV."


@pytest.mark.parametrize("function", [audio_info, audio_read])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.wav", b"", "empty.wav is empty (0 bytes); export or upload it again."),
        (
            "text.mp3",
            b"This is not music.\n" * 99,
            "text.mp3 cannot be read as audio (ffmpeg: Invalid data found when processing input)"
            + NO_AUDIO,
        ),
        (
            "noise.wav",
            bytes(np.random.default_rng(0).integers(0, 256, 9999, dtype=np.uint8)),
            "noise.wav cannot be read as audio (ffmpeg: Invalid data found when processing input)"
            + NO_AUDIO,
        ),
        (
            "stub.wav",
            b"RIFF",
            "stub.wav cannot be read as audio (ffmpeg: Invalid data found when processing input)"
            + NO_AUDIO,
        ),
    ],
)
def test_what_is_no_audio(tmp_path, function, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert sentence(function, tmp_path / name) == message


@pytest.mark.parametrize("function", [audio_info, audio_read])
def test_what_is_no_file(tmp_path, function):
    assert sentence(function, tmp_path / "none.wav") == (
        "none.wav cannot be opened (No such file or directory); check the path."
    )
    assert sentence(function, tmp_path / "nu\0ll") == (
        "nu\0ll cannot be opened (embedded null byte); check the path."
    )
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "fifo.wav")
    for name in ("folder.wav", "fifo.wav"):
        assert sentence(function, tmp_path / name) == (
            f"{name} is not a file; give the path of an audio file."
        )


@pytest.mark.parametrize("function", [audio_info, audio_read])
def test_files_without_samples(folder, tmp_path, function):
    assert sentence(function, folder / "mute.mp4") == (
        "mute.mp4 has no audio stream; choose a file with sound."
    )
    write_source(tmp_path / "nothing.wav", torch.zeros(2, 0))
    assert sentence(function, tmp_path / "nothing.wav") == (
        "nothing.wav holds no audio samples; export it again."
    )


def test_samples_that_are_not_numbers(tmp_path):
    write_source(tmp_path / "x.wav", torch.tensor([[0.0, math.nan, 0.0]]))
    assert sentence(audio_read, tmp_path / "x.wav") == (
        "x.wav holds samples that are not numbers (NaN or infinite); export it again."
    )


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:2.0,\nfile://{}\n"
        "#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
    ],
)
def test_playlists_do_not_open_other_files(folder, tmp_path, playlist):
    (tmp_path / "list.mp3").write_text(playlist.format(folder / "constant.mp3"))
    assert sentence(audio_read, tmp_path / "list.mp3") == (
        "list.mp3 cannot be read as audio (ffmpeg: no container of audio or video)" + NO_AUDIO
    )


def cut(path, target, share=0.5):
    target.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return target


@pytest.mark.parametrize("name", ["16bit.wav", "constant.mp3", "vorbis.ogg", "opus.webm"])
def test_cut_off_files_yield_what_is_left(folder, tmp_path, name):
    left, _ = audio_read(cut(folder / name, tmp_path / name))
    assert 0.2 * RATE < left.shape[1] < 1.5 * RATE
    whole = audio_read(folder / name)[0][:, : left.shape[1]]
    torch.testing.assert_close(left[:, :-3000], whole[:, :-3000], rtol=0, atol=1e-6)


def test_cut_off_files_that_their_decoder_refuses(folder, tmp_path):
    assert sentence(audio_read, cut(folder / "16bit.flac", tmp_path / "cut.flac")) == (
        "cut.flac is damaged or cut off (flac decoder lost sync); export or download it again."
    )
    assert sentence(audio_read, cut(folder / "aac.m4a", tmp_path / "cut.m4a")) == (
        "cut.m4a cannot be read as audio (ffmpeg: Invalid data found when processing input)"
        + NO_AUDIO
    )
    index_first = tmp_path / "index_first.m4a"
    ffmpeg("-i", folder / "aac.m4a", "-c", "copy", "-movflags", "+faststart", index_first)
    message = sentence(audio_read, cut(index_first, tmp_path / "cut.m4a", 0.7))
    assert message.startswith("cut.m4a cannot be read as audio (ffmpeg: corrupt input packet")


def test_a_header_that_promises_too_much(folder, tmp_path):
    content = bytearray((folder / "16bit.flac").read_bytes())
    content[21] |= 0x0F  # STREAMINFO's 36 bits of length
    (tmp_path / "x.flac").write_bytes(content)
    with pytest.raises(AudioFileError, match=r"^x\.flac is damaged or cut off \("):
        audio_read(tmp_path / "x.flac")


def test_mp3_with_an_unknown_tag_is_read_with_a_warning(folder, tmp_path, caplog):
    tagged = tmp_path / "x.mp3"
    tagged.write_bytes((folder / "constant.mp3").read_bytes() + b"LYRICSBEGIN" + b"la la\r\n" * 999)
    with caplog.at_level(logging.WARNING):
        wav, _ = audio_read(tagged)
    length = audio_read(folder / "constant.mp3")[0].shape[1]
    assert 0 <= wav.shape[1] - length < 3000
    assert caplog.messages[0].startswith("x.mp3 was read, but its decoder reported: ")


@pytest.mark.usefixtures("no_ffmpeg")
def test_without_ffmpeg(folder, tmp_path):
    for name in ("16bit.wav", "24bit.flac", "vorbis.ogg", "opus.opus"):
        assert audio_read(folder / name)[0].shape[0] == audio_info(folder / name).channels
    remedy = "needs ffmpeg, which is not installed; install it, or use WAV or FLAC."
    for name in ("aac.m4a", "constant.mp3"):
        assert sentence(audio_read, folder / name) == f"{name} {remedy}"
        assert sentence(audio_info, folder / name) == f"{name} {remedy}"
    assert sentence(audio_write, tmp_path / "x", tones(), RATE, "ogg") == f"x.ogg {remedy}"
    assert not list(tmp_path.glob("*x*"))


# Writing


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
    tolerance = 0.02 if name in {"mp3", "ogg"} else 2**-16
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
    from audiocraft.data.audio_utils import normalize_audio

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
            "Audio holds samples that are not numbers (NaN or infinite).",
        ),
        (
            torch.zeros(1, 9),
            {"sample_rate": 0},
            "sample_rate is 0 Hz; give a positive whole number.",
        ),
        (
            torch.zeros(6, 9),
            {"format": "mp3", "sample_rate": 44100},
            "MP3 takes up to 2 channels at 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, "
            "48000 Hz, not 6 at 44100 Hz: convert the audio or choose wav or flac.",
        ),
        (
            torch.zeros(1, 9),
            {"format": "mp3", "sample_rate": 96000},
            "MP3 takes up to 2 channels at 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, "
            "48000 Hz, not 1 at 96000 Hz: convert the audio or choose wav or flac.",
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


def test_a_failing_encoder_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # pydub leaves its own files
    out = tmp_path / "out"
    message = sentence(audio_write, out / "x", tones(), RATE, "ogg", ogg_rate=9999)
    assert message.startswith("x.ogg cannot be written (ffmpeg: ")
    assert not list(out.iterdir())


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_file_appears_when_it_is_whole(tmp_path, monkeypatch, failure):
    path = audio_write(tmp_path / "x", tones(), RATE)
    before = path.read_bytes()

    def half(file, *_, **__):
        file.write(b"RIFF")
        assert len(list(Path(tmp_path).iterdir())) == 2
        raise failure

    monkeypatch.setattr(soundfile, "write", half)
    expected = AudioFileError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"x\.wav cannot be written \(No space left\)|^$"):
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
