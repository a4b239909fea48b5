import _thread
import ctypes
import hashlib
import itertools
import logging
import math
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from audiocraft.assets.exchange import start_thread
from audiocraft.data import chunks
from audiocraft.data.audio import audio_blocks, audio_read
from audiocraft.data.chunks import (
    SILENCE,
    Chunk,
    cut,
    each,
    header_duration,
    read_chunks,
    read_tags,
    stated_duration,
)
from audiocraft.data.files import AudioFile
from tests.data.odd_files import cut as cut_off
from tests.data.odd_files import leave_open, silent_flac, state_samples
from tests.data.signals import convert, ffmpeg, tones, write_source

SONG = Path(__file__).parent.parent / "audio" / "real_song.ogg"
TAGS = {"title": "Tïtle 曲", "artist": "Ärtist", "genre": "Rock", "comment": "a slow; cömment"}


def audio_file(path, name=None):
    return AudioFile(name or path.name, path, hashlib.sha256(path.read_bytes()).hexdigest())


def noise(path, seconds, rate=8000, channels=1, amplitude=0.5):
    generator = torch.Generator().manual_seed(round(seconds * rate))
    wav = amplitude * (2 * torch.rand(channels, round(seconds * rate), generator=generator) - 1)
    return write_source(path, wav, rate)


def lengths(cut_files):
    return {clip.file.name: [chunk.duration for chunk in clip.chunks] for clip in cut_files.clips}


def reasons(cut_files):
    return {left.name: left.reason for left in cut_files.left_out}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (4.999, None),
        (5, [5]),
        (29.5, [29.5]),
        (30, [30]),
        (34.999, [30]),
        (35, [30, 5]),
        (60, [30, 30]),
        (66.125, [30, 30, 6.125]),
    ],
)
def test_thirty_seconds_and_a_remainder_of_five(tmp_path, seconds, expected):
    file = audio_file(noise(tmp_path / "a.wav", seconds))
    found = cut([file], tmp_path / "work")
    if expected is None:
        assert reasons(found) == {"a.wav": "is shorter than 5 s (5.00 s)"}
        return
    assert lengths(found) == {"a.wav": expected}
    (clip,) = found.clips
    assert (clip.duration, clip.sample_rate, clip.channels) == (seconds, 8000, 1)
    wav, _ = audio_read(file.path)
    pieces = [audio_read(chunk.path, chunk.start, chunk.duration)[0] for chunk in clip.chunks]
    for chunk, piece in zip(clip.chunks, pieces, strict=True):
        assert torch.equal(wav[:, chunk.span(8000)], piece)
    whole = torch.cat(pieces, dim=1)
    assert torch.equal(whole, wav[:, : whole.shape[1]])


def test_chunks_meet_at_any_rate_and_context(tmp_path):
    file = audio_file(noise(tmp_path / "a.wav", 10, rate=11025, channels=2))
    (clip,) = cut([file], tmp_path / "work", context=1.1, shortest=0.05).clips
    spans = [chunk.span(11025) for chunk in clip.chunks]
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert (spans[0].start, spans[-1].stop) == (0, 110250)
    assert len(spans) == math.ceil(10 / 1.1)
    # at the rate of a model as well, within a sample
    model = [chunk.span(32000) for chunk in clip.chunks]
    assert all(abs(b.start - a.stop) <= 1 for a, b in itertools.pairwise(model))


def test_a_file_is_used_or_left_out_with_its_reason(tmp_path):
    damaged = tones(8000, 6)
    damaged[1, 40_000] = 1.7e38
    paths = {
        "song.ogg": SONG,
        "whole.flac": convert(SONG, tmp_path / "whole.flac"),
        "mono.mp3": convert(SONG, tmp_path / "mono.mp3", "-ac", "1"),
        "music.m4a": convert(SONG, tmp_path / "music.m4a"),
        "surround.wav": noise(tmp_path / "surround.wav", 6, 48000, channels=6),
        "hot.wav": noise(tmp_path / "hot.wav", 6, amplitude=3),
        "short.wav": noise(tmp_path / "short.wav", 3),
        "silent.wav": noise(tmp_path / "silent.wav", 6, amplitude=SILENCE / 2),
        "quiet.wav": noise(tmp_path / "quiet.wav", 6, amplitude=SILENCE * 2),
        "nan.wav": write_source(tmp_path / "nan.wav", tones().mul(math.nan)),
        "damaged.wav": write_source(tmp_path / "damaged.wav", damaged, 8000),
        "slow.wav": noise(tmp_path / "slow.wav", 6, 999),
        "text.wav": tmp_path / "text.wav",
        "empty.wav": tmp_path / "empty.wav",
        "cut.flac": cut_off(tmp_path / "whole.flac", tmp_path / "cut.flac"),
    }
    paths["text.wav"].write_text("<html>Not found</html>\n" * 50)
    paths["empty.wav"].touch()
    files = [audio_file(path, f"given/{name}") for name, path in paths.items()]
    found = cut(files, tmp_path / "work")
    used = {Path(clip.file.name).name: clip for clip in found.clips}
    assert list(used) == [
        *("song.ogg", "whole.flac", "mono.mp3", "music.m4a", "surround.wav", "hot.wav"),
        "quiet.wav",
    ]
    assert [clip.channels for clip in used.values()] == [2, 2, 1, 2, 6, 1, 1]
    assert used["song.ogg"].chunks == (Chunk(SONG, 0, 8),)
    left = {Path(name).name: reason for name, reason in reasons(found).items()}
    assert list(left) == [
        *("short.wav", "silent.wav", "nan.wav", "damaged.wav", "slow.wav", "text.wav"),
        *("empty.wav", "cut.flac"),
    ]
    assert left["short.wav"] == "is shorter than 5 s (3.00 s)"
    assert left["silent.wav"] == "is silent"
    assert left["nan.wav"].startswith("holds samples that are not numbers")
    assert left["damaged.wav"] == "peaks above 1000 times full scale (1.7e+38); export it again"
    assert left["slow.wav"] == "has a sample rate below 1000 Hz (999 Hz); export it again"
    assert left["text.wav"].startswith("cannot be read as audio")
    assert left["empty.wav"].startswith("is empty (0 bytes)")
    assert left["cut.flac"].startswith("is damaged or cut off")


def test_silent_chunks_of_a_song_are_left_out(tmp_path):
    wav = torch.cat([tones(8000, 10)[:1], torch.zeros(1, 80000), tones(8000, 8)[:1]], dim=1)
    file = audio_file(write_source(tmp_path / "a.wav", wav, 8000))
    (clip,) = cut([file], tmp_path / "work", context=10).clips
    assert [(chunk.start, chunk.duration) for chunk in clip.chunks] == [(0, 10), (20, 8)]
    assert clip.silent == 1


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_chunks_are_read_in_one_go(tmp_path, monkeypatch, name):
    """All, or some of them, from the file or from another of its length and other rate."""
    source = noise(tmp_path / "source.wav", 70, rate=16000, channels=2)
    path = source if name == "a.wav" else convert(source, tmp_path / name)
    (clip,) = cut([audio_file(path)], tmp_path / "work").clips
    opened = []
    monkeypatch.setattr(
        chunks, "audio_blocks", lambda path: opened.append(path) or audio_blocks(path)
    )
    for some in (clip.chunks, clip.chunks[1:], clip.chunks[::2]):
        read = list(read_chunks(path, some))
        assert len(opened) == 1
        opened.clear()
        for chunk, (wav, rate) in zip(some, read, strict=True):
            assert rate == 16000
            assert torch.equal(wav, audio_read(path, chunk.start, chunk.duration)[0])
    other = write_source(tmp_path / "other.wav", tones(8000, 69.99), 8000)
    lengths = [wav.shape[1] for wav, _ in read_chunks(other, clip.chunks)]
    assert lengths == [30 * 8000, 30 * 8000, round(9.99 * 8000)]


def test_a_second_run_decodes_what_is_missing_alone(tmp_path, monkeypatch):
    files = [audio_file(noise(tmp_path / f"{n}.wav", 5 + n)) for n in range(4)]
    decoded = []
    monkeypatch.setattr(
        chunks, "audio_blocks", lambda path: decoded.append(path.name) or audio_blocks(path)
    )
    first = cut(files[:2], tmp_path / "work")
    assert sorted(decoded) == ["0.wav", "1.wav"]
    whole = cut(files, tmp_path / "work")
    assert sorted(decoded) == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert whole.clips[:2] == first.clips
    # equal content under another name is the same file
    again = AudioFile("b/0.wav", shutil.copy(files[0].path, tmp_path / "b.wav"), files[0].sha256)
    (clip,) = cut([again], tmp_path / "work").clips
    assert (clip.file, clip.chunks[0].path, len(decoded)) == (again, again.path, 4)
    # another length of chunks is another result
    cut(files[:1], tmp_path / "work", context=10)
    assert len(decoded) == 5


def test_equal_files_are_decoded_once(tmp_path, monkeypatch):
    source = noise(tmp_path / "a.wav", 5)
    decoded = []
    monkeypatch.setattr(
        chunks, "audio_blocks", lambda path: decoded.append(path.name) or audio_blocks(path)
    )
    found = cut([audio_file(source, "a/x.wav"), audio_file(source, "b/x.wav")], tmp_path / "work")
    assert [clip.file.name for clip in found.clips] == ["a/x.wav", "b/x.wav"]
    assert decoded == ["a.wav"]


def test_progress_names_files_done_total_and_time_left(tmp_path, caplog):
    files = [audio_file(noise(tmp_path / f"{n}.wav", 5 + n / 10)) for n in range(3)]
    with caplog.at_level(logging.INFO):
        cut(files, tmp_path / "work", workers=1)
    lines = [record.message for record in caplog.records]
    assert lines[0].startswith("decoding the dataset:  33 %, 1 of 3 files, ")
    assert lines[-1] == "decoding the dataset: 100 %, 3 of 3 files, 0 s left"


@pytest.mark.parametrize(
    ("suffix", "arguments"),
    [
        ("mp3", ["-id3v2_version", "3"]),
        ("mp3", ["-id3v2_version", "4"]),
        ("flac", []),
        ("ogg", ["-c:a", "libvorbis"]),
        ("opus", []),
        ("m4a", []),
        ("wav", []),
        ("mka", []),
    ],
)
def test_a_file_says_what_it_is(tmp_path, suffix, arguments):
    metadata = [item for pair in TAGS.items() for item in ("-metadata:g", "=".join(pair))]
    path = convert(SONG, tmp_path / f"a.{suffix}", *metadata, *arguments)
    tags = read_tags(path)
    assert {name: tags[name] for name in TAGS} == TAGS


def test_a_picture_within_a_song_says_nothing_of_it(tmp_path):
    cover, path = tmp_path / "cover.png", tmp_path / "a.mp3"
    ffmpeg("-f", "lavfi", "-i", "color=red:size=8x8", "-frames:v", "1", cover)
    says = ("-metadata:s:v", "title=Album cover", "-metadata:s:v", "comment=Cover (front)")
    ffmpeg("-i", SONG, "-i", cover, "-map", "0:a", "-map", "1:v", *says, path)
    assert not {"title", "comment"} & set(read_tags(path))


def test_a_song_without_tags_or_ffprobe_has_none(tmp_path, monkeypatch, caplog):
    assert not set(TAGS) & set(read_tags(SONG))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_tags(SONG) == {}
    assert "ffprobe is not installed" in caplog.text


@pytest.mark.parametrize("suffix", ["mp3", "m4a", "wma", "mka", "mp4", "mpg", "ac3", "eac3"])
def test_a_file_says_how_long_it_is(tmp_path, suffix):
    assert stated_duration(convert(SONG, tmp_path / f"a.{suffix}")) == pytest.approx(8, abs=0.1)


def test_no_length_is_known_of_what_is_no_music(tmp_path, monkeypatch):
    """Nor is a playlist followed to the files that it names."""
    song = convert(SONG, tmp_path / "a.m4a")
    piece = convert(SONG, tmp_path / "a.ts")
    playlist = tmp_path / "list.m4a"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:8\n#EXTINF:8,\n{piece}\n#EXT-X-ENDLIST\n")
    (tmp_path / "text.m4a").write_text("<html>Not found</html>\n" * 50)
    (tmp_path / "empty.m4a").touch()
    for path in (playlist, tmp_path / "text.m4a", tmp_path / "empty.m4a"):
        assert stated_duration(path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stated_duration(song) is None


def test_a_header_says_how_long_its_file_is(tmp_path):
    """Of MP3 it is an estimate."""
    flac, mp3 = (convert(SONG, tmp_path / f"a.{suffix}") for suffix in ("flac", "mp3"))
    assert header_duration(flac) == header_duration(flac, exact=True) == 8
    assert header_duration(mp3) == pytest.approx(8, abs=0.1)
    assert header_duration(mp3, exact=True) is None


@pytest.mark.parametrize("samples", [0, 2**36 - 1])
def test_a_length_that_cannot_be_is_none(samples, tmp_path):
    """Where a FLAC states none, libsndfile says 2^63 - 1."""
    flac = convert(SONG, tmp_path / "a.flac")
    assert header_duration(state_samples(flac, samples)) is None
    assert header_duration(state_samples(flac, 8 * 44100)) == 8
    assert header_duration(silent_flac(tmp_path / "b.flac", 60)) is None
    assert header_duration(leave_open(noise(tmp_path / "a.wav", 6))) is None


def test_what_has_no_header_has_no_length(tmp_path):
    (tmp_path / "text.wav").write_text("no music")
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("text.wav", "pipe.wav", "none.wav", "text.wav/a.wav"):
        assert header_duration(tmp_path / name) is None


def test_results_come_from_as_many_threads_as_asked_for():
    barrier = threading.Barrier(3, timeout=10)
    names = {
        thread for _, thread in each(lambda _: (barrier.wait(), _thread.get_ident()), "abc", 3)
    }
    assert len(names) == 3
    assert sorted(each(str, [3, 1, 2], 2)) == [(1, "1"), (2, "2"), (3, "3")]
    assert list(each(str, [], 2)) == []


def test_what_a_thread_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(each(lambda item: 1 / item, [1, 0, 2], 2))


def test_an_error_of_the_machine_is_not_taken_for_a_broken_file(tmp_path, monkeypatch):
    def broken(_path):
        raise MemoryError

    monkeypatch.setattr(chunks, "audio_blocks", broken)
    with pytest.raises(MemoryError):
        cut([audio_file(noise(tmp_path / "a.wav", 5))], tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


class Canceled(BaseException):
    """As Cog's own."""


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("delay", [0, 0.001, 0.05, 0.3])
def test_a_cancelation_is_heard_and_leaves_nothing_running(tmp_path, delay):
    """Raised from outside, as Cog does, at any moment."""
    source = convert(SONG, tmp_path / "a.m4a")
    files = [AudioFile(f"{n}", source, hashlib.sha256(b"%d" % n).hexdigest()) for n in range(8)]
    start_thread(lambda: None)  # the thread that starts others stays
    time.sleep(0.2)
    before, outcome, ready = _thread._count(), [], threading.Event()

    def run():
        try:
            ready.set()
            for _ in range(100):
                shutil.rmtree(tmp_path / "work", ignore_errors=True)
                cut(files, tmp_path / "work", workers=2)
        except Canceled:
            outcome.append("canceled")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    time.sleep(delay)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(Canceled)
    )
    thread.join(10)
    assert outcome == ["canceled"]
    wait_for(lambda: _thread._count() <= before)  # one of an earlier test may end as well
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "ffmpeg" in Path(f"/proc/{pid}/cmdline").read_text()]
    for note in (tmp_path / "work").glob("*-30s.json"):
        assert chunks._read(note).sample_rate == 44100
    assert len(cut(files, tmp_path / "work").clips) == 8
