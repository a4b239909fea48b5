import itertools
import logging
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from audiocraft.data import audio
from audiocraft.data.audio import (
    AudioEndError,
    AudioFileInfo,
    audio_blocks,
    audio_info,
    audio_read,
    audio_write,
)
from audiocraft.errors import AudioFileError
from tests.data.odd_files import cut, silent_flac, three_hours
from tests.data.signals import RATE, SECONDS, convert, ffmpeg, sentence, tones, write_source

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
    "vorbis.ogg": ["-c:a", "libvorbis", "-page_duration", "100000"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of each kind, made by ffmpeg from `source.wav`."""
    folder = tmp_path_factory.mktemp("audio")
    source = write_source(folder / "source.wav", tones())
    for name, (arguments, _) in LOSSLESS.items():
        convert(source, folder / name, *arguments)
    for name, arguments in LOSSY.items():
        convert(source, folder / name, *arguments)
    # a picture with sound, with sound that begins later, and without
    video = ("-f", "lavfi", "-i", "testsrc=size=64x64:rate=5")
    ffmpeg(*video, "-i", source, "-c:a", "aac", "-b:a", "192k", "-t", "2", folder / "video.mp4")
    late = ("-itsoffset", "1.5", "-i", folder / "video.mp4", "-map", "0:v", "-map", "1:a")
    ffmpeg("-i", folder / "video.mp4", *late, "-c", "copy", folder / "late.mp4")
    ffmpeg(*video, "-t", "1", folder / "mute.mp4")
    return folder


def read_blocks(path):
    return list(audio_blocks(path))


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY, "video.mp4"])
def test_blocks_make_up_the_file(folder, name, monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK", 20_000)
    blocks = read_blocks(folder / name)
    assert max(wav.shape[1] for wav, _ in blocks) == 10_000
    wav, rate = audio_read(folder / name)
    assert torch.equal(torch.cat([wav for wav, _ in blocks], dim=1), wav)
    assert {rate for _, rate in blocks} == {rate}


@pytest.fixture
def no_ffmpeg(monkeypatch, tmp_path):
    empty = tmp_path / "no programs"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


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


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY, "video.mp4", "late.mp4"])
def test_a_piece_equals_that_piece_of_the_whole(folder, name):
    whole, rate = audio_read(folder / name)
    piece, _ = audio_read(folder / name, seek_time=0.777, duration=0.5)
    start = round(0.777 * rate)
    torch.testing.assert_close(piece, whole[:, start : start + rate // 2], rtol=0, atol=0)
    rest, _ = audio_read(folder / name, seek_time=1.5)
    torch.testing.assert_close(rest, whole[:, 3 * rate // 2 :], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["24bit.wav", "16bit.flac", "vorbis.ogg", "constant.mp3", "aac.m4a"]
)
@pytest.mark.parametrize("block", [1, 1000, 1 << 30])
def test_a_piece_does_not_depend_on_the_blocks_it_is_read_in(folder, monkeypatch, name, block):
    whole, rate = audio_read(folder / name)
    monkeypatch.setattr(audio, "_BLOCK", block)
    for start, stop in ((0, 1), (0, 501), (499, 501), (500, 1000), (90000, whole.shape[1])):
        piece, _ = audio_read(folder / name, start / rate, (stop - start) / rate)
        assert torch.equal(piece, whole[:, start:stop])
    assert torch.equal(audio_read(folder / name, 90000 / rate)[0], whole[:, 90000:])
    info = AudioFileInfo(rate, whole.shape[1] / rate, 2)
    assert audio_info(folder / name) == info


@pytest.mark.parametrize(
    ("suffix", "rate"),
    [
        *itertools.product(["wav", "flac"], [8000, 11025, 22050, 44100, 96000, 192000]),
        *itertools.product(["m4a"], [8000, 44100, 96000]),  # AAC's own limits
    ],
)
def test_sample_rates(tmp_path, suffix, rate):
    wav = tones(rate, 0.2)
    path = convert(write_source(tmp_path / "source.wav", wav, rate), tmp_path / f"x.{suffix}")
    read, read_rate = audio_read(path)
    assert read_rate == rate
    assert 0 <= read.shape[1] - wav.shape[1] < 2048
    torch.testing.assert_close(read[:, 1000:1500], wav[:, 1000:1500], rtol=0, atol=0.1)


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
    loudest = wav[:, RATE // 2 : RATE].amax(dim=1)
    relative = (loudest / loudest[4] * 0.5).tolist()
    relative.pop(3)  # of low frequencies the lossy formats change the level
    assert relative == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.6], rel=0.05)


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
    wav, rate = audio_read(name)
    assert rate == RATE
    assert wav.shape[1] - SECONDS * RATE in range(1024)


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


def test_a_chain_of_ogg_is_read_whole(folder, tmp_path):
    """Two songs one after another in one file, as recordings of a broadcast are."""
    source = write_source(tmp_path / "source.wav", tones(frequencies=(880.0, 330.0)))
    second = convert(source, tmp_path / "second.ogg", "-c:a", "libvorbis")
    parts = [folder / "vorbis.ogg", second]
    path = tmp_path / "x.ogg"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    wav, _ = audio_read(path)
    assert wav.shape[1] == pytest.approx(2 * SECONDS * RATE, abs=1000)
    (first, _), (last, _) = map(audio_read, parts)
    middle = slice(1000, -1000)
    for ours, expected in ((wav[:, : first.shape[1]], first), (wav[:, -last.shape[1] :], last)):
        torch.testing.assert_close(ours[:, middle], expected[:, middle], rtol=0, atol=1e-5)
    assert audio_info(path) == AudioFileInfo(RATE, wav.shape[1] / RATE, 2)
    assert torch.equal(torch.cat([block for block, _ in audio_blocks(path)], dim=1), wav)
    piece, _ = audio_read(path, SECONDS + 0.5, 1)
    assert torch.equal(piece, wav[:, round((SECONDS + 0.5) * RATE) :][:, :RATE])


@pytest.mark.parametrize(
    ("name", "arguments", "field", "size"),
    [
        ("x.wav", ["-c:a", "pcm_f32le"], struct.Struct("<I"), 0),
        ("x.wav", ["-c:a", "pcm_s24le"], struct.Struct("<I"), 0),
        ("x.caf", ["-c:a", "pcm_s24le"], struct.Struct(">q"), -1),
    ],
)
def test_a_recording_whose_header_was_never_finished_is_read_whole(
    folder, tmp_path, name, arguments, field, size
):
    path = convert(folder / "source.wav", tmp_path / name, *arguments)
    expected, _ = audio_read(path)
    content = bytearray(path.read_bytes())
    field.pack_into(content, content.index(b"data") + 4, size)
    path.write_bytes(content)
    assert torch.equal(audio_read(path)[0], expected)
    assert torch.equal(torch.cat([block for block, _ in audio_blocks(path)], dim=1), expected)
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
    with pytest.raises(AudioEndError, match="nothing can be read from 1e\\+09 s on") as caught:
        audio_read(path, 1e308)
    assert caught.value.duration == length / RATE
    assert audio_read(path, 1.5, 1e308)[0].shape == short.shape


def test_times_that_are_no_times(folder):
    path = folder / "16bit.wav"
    assert sentence(audio_read, path, -1) == "seek_time is -1; give 0 or more seconds."
    assert sentence(audio_read, path, math.nan) == "seek_time is nan; give 0 or more seconds."
    assert sentence(audio_read, path, 0, math.inf) == (
        "duration is inf; give seconds, or -1 to read to the end."
    )


# What cannot be read

NO_AUDIO = "; check that it is whole and plays, or convert it to WAV."


@pytest.mark.parametrize("function", [audio_info, audio_read, read_blocks])
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


@pytest.mark.parametrize("function", [audio_info, audio_read, read_blocks])
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


@pytest.mark.parametrize("function", [audio_info, audio_read, read_blocks])
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
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2.0,\nfile://{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
    ],
)
def test_playlists_do_not_open_other_files(folder, tmp_path, playlist):
    (tmp_path / "list.mp3").write_text(playlist.format(folder / "constant.mp3"))
    assert sentence(audio_read, tmp_path / "list.mp3") == (
        "list.mp3 cannot be read as audio (ffmpeg: no container of audio or video)" + NO_AUDIO
    )


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
    assert message.startswith("cut.m4a cannot be read as audio (ffmpeg: ")


def test_a_header_that_promises_too_much(folder, tmp_path):
    content = bytearray((folder / "16bit.flac").read_bytes())
    content[21] |= 0x0F  # STREAMINFO's 36 bits of length
    (tmp_path / "x.flac").write_bytes(content)
    with pytest.raises(AudioFileError, match=r"^x\.flac is damaged or cut off \("):
        audio_read(tmp_path / "x.flac", duration=600)
    assert sentence(audio_read, tmp_path / "x.flac") == (
        "x.flac is longer than 11184.8 s, which is what is read at once of 2 channels at 48000 "
        "Hz; read or cut out a piece."
    )


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


# Long files, and small ones that claim to be


@pytest.mark.parametrize("name", ["16bit.wav", "aac.m4a"])
def test_more_than_memory_holds_is_refused(folder, monkeypatch, name):
    monkeypatch.setattr(audio, "_MOST_READ", 2 * RATE)
    message = (
        f"{name} is longer than 1 s, which is what is read at once of 2 channels at {RATE} Hz; "
        "read or cut out a piece."
    )
    assert sentence(audio_read, folder / name) == message
    assert sentence(audio_read, folder / name, 0.5, 1.01) == message
    assert audio_read(folder / name, 0.9, 1)[0].shape == (2, RATE)
    assert audio_info(folder / name).duration > 1.9


def running_ffmpegs():
    """Process ids of the children of this thread."""
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()


def test_what_never_ends_is_not_decoded_for_ever(tmp_path, monkeypatch):
    bomb = silent_flac(tmp_path / "bomb.flac", 3600)
    assert bomb.stat().st_size < 50_000
    assert audio_info(bomb).duration == pytest.approx(3600, abs=2)
    monkeypatch.setattr(audio, "_MOST_DECODED", 60 * 2 * 48000)
    message = (
        "bomb.flac is longer than 60 s, which is what is decoded at most of 2 channels at 48000 "
        "Hz; cut out the part that is needed."
    )
    for arguments in ((audio_info,), (audio_read,), (audio_read, 70, 1)):
        assert sentence(arguments[0], bomb, *arguments[1:]) == message
        assert not running_ffmpegs()
    assert audio_read(bomb, 50, 1)[0].shape == (2, 48000)


@pytest.mark.slow
def test_a_day_of_silence_in_a_megabyte(tmp_path):
    """Half a minute, with the limit as it is."""
    bomb = silent_flac(tmp_path / "bomb.flac", 25 * 3600)
    assert bomb.stat().st_size < 1_300_000
    message = (
        "bomb.flac is longer than 86400 s, which is what is decoded at most of 2 channels at 48000 "
        "Hz; cut out the part that is needed."
    )
    assert sentence(audio_info, bomb) == message
    assert not running_ffmpegs()


# Prints by how many MB the most memory rose, and the loudest frequency in Hz of the first channel.
READ_A_PIECE = """
import sys
import soundfile, torch
from audiocraft.data.audio import audio_read
from tests.memory import peak_mb

before = peak_mb()
wav, rate = audio_read(sys.argv[1], float(sys.argv[2]), 10)
rise = peak_mb() - before
spectrum = torch.fft.rfft(wav[0] * torch.hann_window(wav.shape[1])).abs()
print(rise, spectrum.argmax().item() * rate / wav.shape[1], wav.shape[1] / rate)
"""


@pytest.mark.parametrize(
    ("name", "rate", "channels", "arguments"),
    [
        ("x.wav", 8000, 1, ["-c:a", "pcm_u8"]),
        pytest.param("x.mp3", 8000, 1, ["-b:a", "8k"], marks=pytest.mark.slow),
        pytest.param("x.m4a", 8000, 1, ["-c:a", "aac"], marks=pytest.mark.slow),
        pytest.param("x.m4a", 44100, 2, ["-c:a", "aac"], marks=pytest.mark.slow),
    ],
)
def test_a_piece_of_three_hours_takes_the_memory_of_the_piece(
    tmp_path, name, rate, channels, arguments
):
    """All of it are 0.35 or 3.8 GB of samples."""
    path = three_hours(tmp_path, name, rate, channels, *arguments)
    for start, frequency in ((10, 440), (3 * 3600 - 20, 660)):
        command = [sys.executable, "-c", READ_A_PIECE, path, str(start)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        rise, loudest, seconds = map(float, result.stdout.split())
        assert rise < 100
        assert loudest == pytest.approx(frequency, rel=0.01)
        assert seconds == 10
