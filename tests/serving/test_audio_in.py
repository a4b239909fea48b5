"""Audio of every kind as `input_audio`: the right music, or one sentence."""

import logging
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from audiocraft.data import audio
from audiocraft.data.audio import audio_read
from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import InputError
from audiocraft.models import MusicGen
from audiocraft.serving.prediction import PredictionRequest, PredictionService
from tests.data.odd_files import cut, silent_flac, three_hours
from tests.data.signals import convert, ffmpeg, tones, write_source

# A second each: A, C sharp, E.
NOTES = (220.0, 277.18, 329.63)
# How loud each channel is, and its octave; left, right, centre, low frequencies, back pair.
LEVELS = (0.4, 0.2, 0.1, 0.3, 0.05, 0.1)
OCTAVES = (1, 0.5, 2, 1, 4, 0.25)
LOW = 3  # this one hums at 40 Hz

# Sample rate, channels, what ffmpeg is told, and the largest error that the format's steps explain.
LOSSLESS = {
    "8bit.wav": (44100, 2, ["-c:a", "pcm_u8"], 2**-7),
    "16bit.wav": (44100, 2, ["-c:a", "pcm_s16le"], 2**-15),
    "24bit.wav": (44100, 2, ["-c:a", "pcm_s24le"], 2**-22),
    "32bit.wav": (44100, 2, ["-c:a", "pcm_s32le"], 2**-22),
    "float.wav": (44100, 2, ["-c:a", "pcm_f32le"], 0),
    "double.wav": (44100, 2, ["-c:a", "pcm_f64le"], 0),
    "16bit.flac": (44100, 2, ["-sample_fmt", "s16"], 2**-15),
    "24bit.flac": (44100, 2, ["-sample_fmt", "s32", "-bits_per_raw_sample", "24"], 2**-22),
    "alac.m4a": (44100, 2, ["-c:a", "alac"], 2**-15),
    "mono.wav": (44100, 1, ["-c:a", "pcm_s16le"], 2**-15),
    "mono.flac": (44100, 1, ["-sample_fmt", "s16"], 2**-15),
    "5.1.wav": (48000, 6, ["-c:a", "pcm_s16le"], 2**-15),
    "5.1.flac": (48000, 6, ["-sample_fmt", "s16"], 2**-15),
    "192k.flac": (192000, 2, ["-sample_fmt", "s32"], 2**-15),
    **{
        f"{rate}.wav": (rate, 2, ["-c:a", "pcm_s16le"], 2**-15)
        for rate in (8000, 11025, 16000, 22050, 32000, 48000, 88200, 96000, 176400, 192000)
    },
}
LOSSY = {
    "song.mp3": (44100, 2, ["-b:a", "192k"]),
    "vbr.mp3": (44100, 2, ["-q:a", "4"]),
    "song.ogg": (44100, 2, ["-c:a", "libvorbis"]),
    "song.m4a": (44100, 2, ["-c:a", "aac", "-b:a", "192k"]),
    "song.opus": (48000, 2, ["-c:a", "libopus", "-b:a", "192k"]),
    "song.webm": (48000, 2, ["-c:a", "libopus", "-b:a", "192k"]),
    "mono.mp3": (44100, 1, ["-b:a", "128k"]),
    "mono.ogg": (44100, 1, ["-c:a", "libvorbis"]),
    "mono.m4a": (44100, 1, ["-c:a", "aac", "-b:a", "128k"]),
    "5.1.ogg": (48000, 6, ["-c:a", "libvorbis", "-q:a", "6"]),
    "5.1.m4a": (48000, 6, ["-c:a", "aac", "-b:a", "500k"]),
    "8k.mp3": (8000, 2, ["-b:a", "64k"]),
    "8k.ogg": (8000, 2, ["-c:a", "libvorbis"]),
    "8k.m4a": (8000, 2, ["-c:a", "aac"]),
    "96k.m4a": (96000, 2, ["-c:a", "aac", "-b:a", "256k"]),
}
KINDS = {**{name: kind[:3] for name, kind in LOSSLESS.items()}, **LOSSY}


def notes(rate, channels, seconds=3):
    """(C, T): in each channel the notes one after the other."""
    times = torch.arange(seconds * rate).double() / rate
    pitches = torch.tensor(NOTES, dtype=torch.float64).repeat_interleave(rate)[: len(times)]
    phases = 2 * torch.pi * torch.cumsum(pitches / rate, dim=0)
    waves = [
        torch.sin(2 * torch.pi * 40 * times if channel == LOW else octave * phases) * level
        for channel, (octave, level) in enumerate(zip(OCTAVES, LEVELS, strict=True))
    ]
    return torch.stack(waves)[:channels].float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("songs")
    for name, (rate, channels, arguments) in KINDS.items():
        source = folder / f"source-{rate}-{channels}.wav"
        if not source.exists():
            write_source(source, notes(rate, channels), rate)
        convert(source, folder / name, *arguments)
    return folder


@pytest.fixture(scope="module")
def service():
    return PredictionService()


@pytest.fixture(scope="module")
def model():
    return MusicGen.get_pretrained("tiny")


@pytest.fixture
def clips(monkeypatch):
    """What the model is given, samples (C, T) and sample rate, request by request."""
    given = []
    melody, continuation = MusicGen.generate_with_chroma, MusicGen.generate_continuation

    def generate_with_chroma(self, descriptions, melody_wavs, melody_sample_rate, **keywords):
        given.append((melody_wavs[0], melody_sample_rate))
        return melody(self, descriptions, melody_wavs, melody_sample_rate, **keywords)

    def generate_continuation(self, prompt, prompt_sample_rate, *arguments, **keywords):
        given.append((prompt[0], prompt_sample_rate))
        return continuation(self, prompt, prompt_sample_rate, *arguments, **keywords)

    monkeypatch.setattr(MusicGen, "generate_with_chroma", generate_with_chroma)
    monkeypatch.setattr(MusicGen, "generate_continuation", generate_continuation)
    return given


@pytest.fixture(autouse=True)
def temporary_folder(monkeypatch, tmp_path):
    """Where the server writes, which must be as empty after the test as a result leaves it."""
    own = tmp_path / "temporary"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    monkeypatch.setenv("ALLOW_LOCAL_FILES", "1")
    return own


def melody(path, **inputs):
    # Only the second note, unless the test wants something else.
    inputs = {"continuation_start": 1, "continuation_end": 2, "duration": 1} | inputs
    return PredictionRequest(
        prompt="a song", model_version="tiny", input_audio=path, seed=3, **inputs
    )


def continuation(path, **inputs):
    inputs = {"continuation": True, "duration": 2, "normalization_strategy": "clip"} | inputs
    return melody(path, **inputs)


def music(service, request):
    """Bytes of the result."""
    return service.predict(request).path.read_bytes()


def refusal(service, request):
    """The message of the error, one sentence, for which nothing is left behind."""
    folder = Path(tempfile.gettempdir())
    before = set(folder.iterdir())
    with pytest.raises(InputError) as caught:
        service.predict(request)
    assert set(folder.iterdir()) <= before
    message = str(caught.value)
    assert re.fullmatch(
        r"(The part of )?(input_audio|continuation_(start|end))\b[^\n]{20,250}\.", message
    )
    return message


def assert_opens_with(model, path, clip, sample_rate):
    """That the music begins with what the codec makes of the clip."""
    result, _ = audio_read(path)
    assert result.shape == (2, 2 * 32000)
    codes, _ = model.compression_model.encode(convert_audio(clip, sample_rate, 32000, 2)[None])
    # Without the last frames, which hear what follows; and as a 16-bit file holds it.
    expected = model.generate_audio(codes)[0, :, :28000].clamp(-1, 1)
    torch.testing.assert_close(result[:, :28000], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_every_format_is_heard(folder, service, model, clips, name):
    rate, channels, _ = KINDS[name]
    expected = music(service, melody(folder / "float.wav"))
    assert music(service, melody(folder / name)) == expected  # the same note, however it is stored
    result = service.predict(continuation(folder / name))
    reference = notes(rate, channels)[:, rate : 2 * rate]
    _, *own = clips
    assert len(own) == 2
    for clip, clip_rate in own:
        assert (clip_rate, clip.shape) == (rate, reference.shape)
        if name in LOSSLESS:
            torch.testing.assert_close(clip, reference, rtol=0, atol=LOSSLESS[name][3])
        else:
            error = (clip - reference).square().mean(dim=1) / reference.square().mean(dim=1)
            allowed = torch.full((channels,), 0.1)  # 2 samples' delay of the left channel is 0.08
            allowed[LOW:][:1] = 0.25  # lossy formats change the level of low frequencies
            assert (error.sqrt() < allowed).all()
    assert_opens_with(model, result.path, *own[1])


def test_notes_differ(folder, service):
    """Else it would say nothing that the music of a note is the same in every format."""
    results = {
        music(service, make(folder / "song.mp3", continuation_start=start, continuation_end=end))
        for make in (melody, continuation)
        for start, end in ((0, 1), (1, 2), (2, 3))
    }
    assert len(results) == 6


@pytest.mark.parametrize("make", [melody, continuation])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("song.m4a", "song.wav"),
        ("16bit.wav", "song.mp3"),
        ("song.mp3", "song.flac"),
        ("16bit.flac", "song.txt"),
        ("song.webm", "song.mp3"),
        ("song.ogg", "song"),
        ("16bit.wav", "tmp8f3a"),
        ("song.m4a", ".m4a"),
        ("song.mp3", "Tür 音楽 %d:🎸.mp3"),
    ],
)
def test_the_name_does_not_matter(folder, service, tmp_path, make, content, name):
    shutil.copy(folder / content, tmp_path / name)
    assert music(service, make(tmp_path / name)) == music(service, make(folder / content))


@pytest.mark.parametrize("make", [melody, continuation])
@pytest.mark.parametrize(
    "name", ["16bit.wav", "float.wav", "16bit.flac", "song.mp3", "song.ogg", "song.webm"]
)
def test_of_a_cut_off_file_what_is_left_is_heard(folder, service, tmp_path, make, name):
    path = cut(folder / name, tmp_path / name, 0.6)
    first = {"continuation_start": 0, "continuation_end": 1}
    assert music(service, make(path, **first)) == music(service, make(folder / name, **first))


@pytest.mark.parametrize("make", [melody, continuation])
@pytest.mark.parametrize("name", ["16bit.wav", "song.mp3", "song.ogg", "song.webm"])
def test_the_end_of_a_cut_off_file_is_named(folder, service, tmp_path, make, name):
    path = cut(folder / name, tmp_path / name, 0.6)
    length = r"but input_audio has only 1\.\d\d s: give an earlier second"
    assert re.fullmatch(
        rf"continuation_end is 3 s, {length}, or -1 for its end\.",
        refusal(service, make(path, continuation_end=3, duration=8)),
    )
    beyond = make(path, continuation_start=2, continuation_end=3)
    assert re.fullmatch(rf"continuation_start is 2 s, {length}\.", refusal(service, beyond))


@pytest.mark.parametrize("make", [melody, continuation])
@pytest.mark.parametrize(
    ("frames", "shown"), [(79984, "9.99"), (79999, "9.99"), (72000, "9.00"), (34800, "4.35")]
)
def test_a_file_that_is_shorter_shows_as_shorter(service, tmp_path, make, frames, shown):
    path = write_source(tmp_path / "x.wav", tones(8000, 10)[:, :frames], 8000)
    length = f"but input_audio has only {shown} s: give an earlier second"
    message = refusal(service, make(path, continuation_end=10, duration=20))
    assert message == f"continuation_end is 10 s, {length}, or -1 for its end."
    beyond = make(path, continuation_start=10, continuation_end=11)
    assert refusal(service, beyond) == f"continuation_start is 10 s, {length}."


@pytest.mark.parametrize("make", [melody, continuation])
@pytest.mark.parametrize(
    ("frames", "start", "remedy"),
    [
        (8001, 1, "an earlier continuation_start"),
        (8159, 1, "an earlier continuation_start"),
        (1, 0, "longer audio"),
        (159, 0, "longer audio"),
    ],
)
def test_less_than_a_frame_of_codes(service, tmp_path, make, frames, start, remedy):
    path = write_source(tmp_path / "x.wav", tones(8000, 2)[:, :frames], 8000)
    message = refusal(service, make(path, continuation_start=start, continuation_end=-1))
    assert message == (
        "The part of input_audio that is used is shorter than 0.02 s, the least that can be heard: "
        f"give {remedy}."
    )


@pytest.mark.parametrize("make", [melody, continuation])
def test_a_frame_of_codes_is_enough(service, clips, tmp_path, make):
    path = write_source(tmp_path / "x.wav", tones(8000, 2)[:, :8160], 8000)
    assert music(service, make(path, continuation_end=-1))
    assert [clip.shape for clip, _ in clips] == [(2, 160)]


@pytest.mark.parametrize("make", [melody, continuation])
def test_the_end_is_checked_beyond_what_is_read(service, tmp_path, make):
    """A melody is read for a minute more than the result lasts."""
    path = write_source(tmp_path / "x.wav", tones(8000, 100), 8000)
    message = refusal(service, make(path, continuation_start=0, continuation_end=101))
    assert message == (
        "continuation_end is 101 s, but input_audio has only 100.00 s: give an earlier second, or "
        "-1 for its end."
    )


def test_a_long_recording_to_continue_is_measured(service, tmp_path):
    path = write_source(tmp_path / "x.wav", tones(8000, 100), 8000)
    message = refusal(service, continuation(path, continuation_end=-1, duration=20))
    assert message == (
        "The part of input_audio to continue has 99.00 s and duration is 20 s, which counts it "
        "too: raise duration, or shorten the part with continuation_start and continuation_end."
    )


UNREADABLE = (
    "cannot be read as audio (ffmpeg: {}); check that it is whole and plays, or convert it to WAV."
)
NO_AUDIO = UNREADABLE.format("Invalid data found when processing input")
EXPORT = "export it again, for example as 24-bit WAV."
NOT_NUMBERS = "holds samples that are not numbers (NaN or infinite); export it again."


@pytest.fixture(scope="module")
def broken(folder, tmp_path_factory):
    """Files that are no music."""
    broken = tmp_path_factory.mktemp("broken")
    (broken / "empty.wav").touch()
    (broken / "text.mp3").write_text("This is not music.\n" * 99)
    (broken / "noise").write_bytes(np.random.default_rng(0).bytes(9999))
    (broken / "stub.wav").write_bytes(b"RIFF")
    (broken / "list.mp3").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2.0,\n"
        f"file://{folder / 'song.mp3'}\n#EXT-X-ENDLIST\n"
    )
    (broken / "folder.wav").mkdir()
    (broken / "link.wav").symlink_to("nowhere.wav")
    picture = ("-f", "lavfi", "-i", "testsrc=size=64x64:rate=5", "-t", "1")
    ffmpeg(*picture, "-frames:v", "1", broken / "picture.png")
    ffmpeg(*picture, broken / "mute.mp4")
    cut(folder / "song.m4a", broken / "cut.m4a")
    write_source(broken / "nothing.wav", torch.zeros(2, 0))
    for name, sample in (("nan", math.nan), ("infinite", math.inf), ("loud", 32767.0)):
        wav = notes(44100, 2)
        wav[1, 60000] = sample
        write_source(broken / f"{name}.wav", wav, 44100)
    return broken


@pytest.mark.parametrize("make", [melody, continuation])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.wav", ": empty.wav is empty (0 bytes); export or upload it again."),
        ("text.mp3", f": text.mp3 {NO_AUDIO}"),
        ("noise", f": noise {NO_AUDIO}"),
        ("stub.wav", f": stub.wav {NO_AUDIO}"),
        ("cut.m4a", f": cut.m4a {NO_AUDIO}"),
        ("picture.png", f": picture.png {UNREADABLE.format('no container of audio or video')}"),
        ("list.mp3", f": list.mp3 {UNREADABLE.format('no container of audio or video')}"),
        ("mute.mp4", ": mute.mp4 has no audio stream; choose a file with sound."),
        ("nothing.wav", ": nothing.wav holds no audio samples; export it again."),
        ("nan.wav", f": nan.wav {NOT_NUMBERS}"),
        ("infinite.wav", f": infinite.wav {NOT_NUMBERS}"),
        (
            "loud.wav",
            f" peaks at 3.277e+04, where full scale is 1: {EXPORT}",
        ),
        ("folder.wav", ": folder.wav is not a file; give the path of an audio file."),
        ("none.wav", ": none.wav cannot be opened (No such file or directory); check the path."),
        ("link.wav", ": nowhere.wav cannot be opened (No such file or directory); check the path."),
    ],
)
def test_what_cannot_be_heard_is_named(broken, service, make, name, message):
    assert refusal(service, make(broken / name)) == f"input_audio{message}"


@pytest.mark.parametrize("make", [melody, continuation])
def test_a_flac_that_is_cut_off_within_the_part(folder, service, tmp_path, make):
    path = cut(folder / "16bit.flac", tmp_path / "cut.flac", 0.6)
    message = refusal(service, make(path, continuation_end=-1, duration=8))
    assert message == (
        "input_audio: cut.flac is damaged or cut off (flac decoder lost sync); export or download "
        "it again."
    )


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.mp3", "x.ogg", "x.m4a"])
def test_silence_is_no_melody_and_nothing_to_continue(service, tmp_path, caplog, name):
    source = write_source(tmp_path / "source.wav", torch.zeros(2, 3 * 44100), 44100)
    path = convert(source, tmp_path / name)
    assert refusal(service, continuation(path)) == (
        "input_audio is silent in the part that is used, so there is nothing to continue: take "
        "another part with continuation_start and continuation_end, or other audio."
    )
    with caplog.at_level(logging.WARNING, "audiocraft"):
        silent = music(service, melody(path))
    assert caplog.messages == [
        "input_audio is silent in the part that is used: it gives no melody."
    ]
    assert silent == music(service, melody(source))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x.wav", ["-c:a", "pcm_u8"]),
        ("x.ogg", ["-c:a", "libvorbis"]),
        ("x.m4a", ["-c:a", "aac"]),
        pytest.param("x.mp3", ["-b:a", "8k"], marks=pytest.mark.slow),
    ],
)
def test_near_the_end_of_three_hours(service, model, clips, tmp_path, name, arguments):
    path = three_hours(tmp_path, name, 8000, 1, *arguments)
    late = {"continuation_start": 10790, "continuation_end": 10791}
    service.predict(melody(path, **late))
    result = service.predict(continuation(path, **late))
    for clip, rate in clips:
        assert (rate, clip.shape) == (8000, (1, 8000))
        assert torch.fft.rfft(clip[0]).abs().argmax() == 660
    assert_opens_with(model, result.path, *clips[1])


# Prints by how many MB the most memory of a request rose over that of a first, short one.
TWO_REQUESTS = """
import sys
from pathlib import Path
from audiocraft.serving.prediction import PredictionRequest, PredictionService
from tests.memory import peak_mb

def predict(path, start, continuation):
    service.predict(
        PredictionRequest(
            model_version="tiny",
            input_audio=Path(path),
            continuation_start=start,
            continuation_end=start + 1,
            continuation=continuation,
            duration=2,
        )
    )
    return peak_mb()

service = PredictionService()
for continuation in (False, True):
    before = predict(sys.argv[1], 1, continuation)
    print(predict(sys.argv[2], int(sys.argv[3]), continuation) - before)
"""


@pytest.mark.slow
def test_three_hours_take_no_more_memory_than_a_minute(folder, tmp_path):
    """As samples they are 3.8 GB."""
    path = three_hours(tmp_path, "x.m4a", 44100, 2, "-c:a", "aac")
    command = [sys.executable, "-c", TWO_REQUESTS, folder / "song.m4a", path, "10790"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rises = [float(line) for line in result.stdout.splitlines()]
    assert len(rises) == 2
    assert max(rises) < 100


def test_of_endless_silence_no_more_is_decoded_than_is_used(
    service, clips, tmp_path, monkeypatch, caplog
):
    """A day and more, in 1.4 MB; nor is it waited for the end of it."""
    path = silent_flac(tmp_path / "bomb.flac", 30 * 3600)
    monkeypatch.setattr(audio, "_MOST_DECODED", 120 * 2 * 48000)
    with caplog.at_level(logging.WARNING, "audiocraft"):
        service.predict(melody(path, continuation_start=0, continuation_end=None))
    assert [clip.shape for clip, _ in clips] == [(2, 61 * 48000)]
    limit = (
        "input_audio: bomb.flac is longer than 120 s, which is what is decoded at most of 2 "
        "channels at 48000 Hz; cut out the part that is needed."
    )
    late = {"continuation_start": 86400, "continuation_end": 86401}
    for request in (
        melody(path, **late),
        continuation(path, **late),
        continuation(path, continuation_end=None),  # all of it
    ):
        assert refusal(service, request) == limit


def test_a_song_that_was_recorded(service, model, clips):
    """Guitar and drums, see tests/audio/README.md."""
    song = Path(__file__).parents[1] / "audio" / "real_song.ogg"
    followed = music(service, melody(song, continuation_end=-1, duration=2))
    assert followed != music(service, melody(song, duration=2))
    result = service.predict(continuation(song))
    assert [clip.shape for clip, _ in clips] == [(2, 7 * 44100), (2, 44100), (2, 44100)]
    assert_opens_with(model, result.path, *clips[2])
