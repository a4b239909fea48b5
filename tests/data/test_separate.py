"""Stems of files of every kind are those of demucs on the whole file, at the file's own time."""

import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from demucs.apply import apply_model

from audiocraft.data.audio import audio_read
from audiocraft.data.audio_utils import convert_audio_channels
from audiocraft.data.chunks import Chunk
from audiocraft.data.separate import (
    StemChoice,
    StemFile,
    Track,
    choose_stems,
    is_faint,
    read_peaks,
    separate,
)
from audiocraft.errors import AssetError
from audiocraft.modules.stems import StemPart, load_htdemucs
from tests.data.signals import convert, sentence, tones, write_source
from tests.separators import SOURCES, put_htdemucs

RATE = 44100
ALL = ("drums", "bass", "other", "vocals")
MELODY = ("vocals", "other")


@pytest.mark.parametrize(
    ("stems", "melody_stems", "kept", "melody"),
    [
        (None, None, None, None),
        (None, MELODY, None, ("other", "vocals")),
        (("other", "drums", "bass"), None, ("drums", "bass", "other"), None),
        (("drums", "bass", "other"), MELODY, ("drums", "bass", "other"), ("other",)),
        (("vocals",), MELODY, ("vocals",), None),
        (("vocals", "other"), MELODY, ("other", "vocals"), None),
        (("drums",), MELODY, ("drums",), None),
        (("drums", "bass"), MELODY, ("drums", "bass"), None),
        (ALL, MELODY, ALL, ("other", "vocals")),
    ],
)
def test_the_melody_is_what_is_kept_of_its_stems(stems, melody_stems, kept, melody):
    assert choose_stems(stems, melody_stems) == StemChoice(kept, melody)


def test_stems_that_there_are_not():
    message = "The stems to keep are {}; choose among drums, bass, other, vocals."
    assert sentence(choose_stems, ("drums", "choir")) == message.format("drums, choir")
    assert sentence(choose_stems, ()) == message.format("none")


@pytest.fixture
def separator(tmp_path, monkeypatch):
    """A small separator, and its model."""
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "store"))
    model, _ = put_htdemucs(tmp_path / "store")
    return load_htdemucs("cpu"), model


@pytest.mark.parametrize(
    ("rate", "channels", "name"),
    [
        (8000, 1, "a.wav"),
        (44100, 2, "a.flac"),
        (48000, 2, "a.m4a"),
        (48000, 6, "a.flac"),
        (192000, 10, "a.wav"),
    ],
)
def test_any_rate_and_layout(separator, tmp_path, rate, channels, name):
    separator, model = separator
    wav = tones(rate, 5, [100.0 * (n + 1) for n in range(channels)])
    source = write_source(tmp_path / "source.wav", wav, rate)
    path = source if name == "a.wav" else convert(source, tmp_path / name)
    kept, melody = tmp_path / "kept.w64", tmp_path / "melody.w64"
    files = (StemFile(kept, ("drums", "bass")), StemFile(melody, ("other",), 32000))
    separate([Track(path, 5.0, files)], separator)

    wav, rate = audio_read(path)
    stereo = convert_audio_channels(wav)
    if rate != RATE:
        stereo = torch.from_numpy(soxr.resample(stereo.T.numpy(), rate, RATE)).T
    with torch.no_grad():
        stems = dict(zip(SOURCES, apply_model(model, stereo[None], shifts=0)[0], strict=True))
    ours, our_rate = audio_read(kept)
    assert our_rate == RATE
    assert abs(ours.shape[1] - wav.shape[1] * RATE / rate) <= 1
    torch.testing.assert_close(ours, stems["drums"] + stems["bass"], rtol=1e-4, atol=1e-5)
    ours, our_rate = audio_read(melody)
    assert our_rate == 32000
    sung = torch.from_numpy(soxr.resample(stems["other"].mean(0).numpy(), RATE, 32000))[None]
    torch.testing.assert_close(ours, sung, rtol=1e-4, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir() if "unfinished" in path.name} == set()


def test_peaks_above_full_scale_survive_and_are_noted(separator, tmp_path):
    separator, _ = separator
    wav = torch.cat([30 * tones(RATE, 2), torch.zeros(2, 8 * RATE)], dim=1)
    kept = tmp_path / "kept.w64"
    path = write_source(tmp_path / "a.wav", wav)
    assert read_peaks(kept) is None
    separate([Track(path, 10.0, (StemFile(kept, ALL),))], separator)
    ours, _ = audio_read(kept)
    assert ours.abs().max() > 2
    peaks = read_peaks(kept)
    expected = [ours[:, n * RATE : (n + 1) * RATE].abs().max() for n in range(10)]
    np.testing.assert_allclose(peaks[:10], expected)
    assert not is_faint(Chunk(kept, 0.0, 5.0), peaks)
    assert not is_faint(Chunk(kept, 1.9, 5.0), peaks)
    assert is_faint(Chunk(kept, 2.0, 3.0), [1.0, 1.0, 9e-4, 9e-4, 9e-4, 1.0])
    assert not is_faint(Chunk(kept, 2.0, 3.0), [1.0, 1.0, 9e-4, 9e-4, 1e-3, 1.0])


def test_a_full_disk_is_a_sentence_and_leaves_nothing(separator, tmp_path):
    separator, _ = separator
    path = write_source(tmp_path / "a.wav", tones(RATE, 5))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(AssetError, match=r"^The stems of the music cannot be written to /"):
            separate([Track(path, 5.0, (StemFile(tmp_path / "kept.w64", ALL),))], separator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("kept*"))


def test_stems_that_are_not_numbers_name_their_file(separator, tmp_path, monkeypatch):
    separator, _ = separator
    stems = torch.zeros(4, 2, 1000)
    stems[1, 1, 500] = math.inf
    monkeypatch.setattr(
        separator, "separate_tracks", lambda *_: iter([StemPart(0, stems, last=True)])
    )
    path = write_source(tmp_path / "a song.wav", tones(RATE, 5))
    files = (StemFile(tmp_path / "0af1.w64", ("vocals",)), StemFile(tmp_path / "0af2.w64", ALL))
    assert sentence(separate, [Track(path, 5.0, files)], separator) == (
        "The stems of a song.wav are not numbers (NaN or infinite); export it again, or leave it "
        "out."
    )
    assert not list(tmp_path.glob("0af*"))


# The lightest of demucs' models, at a low rate: so three hours take a minute.
_LONG = """
import sys
from pathlib import Path
import torch
from demucs.apply import BagOfModels
from demucs.demucs import Demucs
from audiocraft.data.chunks import cut, read_chunks
from audiocraft.data.files import find
from audiocraft.data.separate import StemFile, Track, separate
from audiocraft.modules.stems import StemSeparator
from tests.memory import peak_mb

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
model = Demucs(
    ["drums", "bass", "other", "vocals"], channels=2, growth=1, depth=2, lstm_layers=0,
    dconv_mode=0, dconv_depth=1, rewrite=False, resample=False, segment=10, norm_starts=9,
    samplerate=16000,
)
separator = StemSeparator(BagOfModels([model]), "cpu")
names = ("drums", "bass", "other")
def files(name):
    kept = StemFile(folder / f"{name}.w64", names)
    return kept, StemFile(folder / f"{name}-melody.w64", ("other",), 32000)

torch.set_num_threads(1)
separate([Track(source.with_name("short.wav"), 60.0, files("short"))], separator)
before = peak_mb()
(clip,) = cut(find(source, folder).files, folder / "decoded").clips
separate([Track(source, clip.duration, files("long"))], separator)
for wav, rate in read_chunks(folder / "long.w64", clip.chunks):
    pass
print(len(clip.chunks), wav.shape[1], rate, round(peak_mb() - before))
"""


@pytest.mark.slow
def test_three_hours_take_no_more_memory_than_a_minute(tmp_path):
    from tests.data.odd_files import three_hours

    source = three_hours(tmp_path, "long.m4a", 16000, 2)
    write_source(tmp_path / "short.wav", tones(16000, 60), 16000)
    done = subprocess.run(
        [sys.executable, "-c", _LONG, source, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    chunks, samples, rate, megabytes = map(int, done.stdout.split()[-4:])
    assert chunks >= 360
    assert rate == 16000
    assert 5 * rate <= samples <= 30 * rate
    # Its samples alone are 1.4 GB, its stems four times that.
    assert megabytes < 200
