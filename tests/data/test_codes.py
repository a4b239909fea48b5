"""Chunks encoded once are what the model would encode each time."""

import pytest
import torch

from audiocraft.data.audio import audio_read
from audiocraft.data.codes import encode_chunk, load_encoded, save_encoded
from audiocraft.models.loaders import load_models
from audiocraft.modules.conditioners import WavCondition
from tests.golden_data import GOLDEN

SONG = GOLDEN.parent / "audio/real_song.ogg"
CONTEXT = 10


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("release") / "release"
    shutil.copytree(GOLDEN / "tiny_release/stereo-melody", folder)
    shutil.copytree(GOLDEN / "t5_tiny", folder / "t5")
    return load_models(folder, "cpu")


@pytest.fixture(scope="module")
def song():
    return audio_read(SONG, 0, 7.5)


def test_codes_are_the_codecs(models, song):
    _, codec = models
    wav, rate = song
    chunk = encode_chunk(codec, wav, rate, CONTEXT)
    assert chunk.codes.shape == (8, CONTEXT * 50)
    assert chunk.codes.dtype == torch.int16
    assert chunk.frames == 375
    assert chunk.chroma is None
    from audiocraft.data.audio_utils import convert_audio

    audio = convert_audio(wav, rate, 32000, 2)
    filled = torch.zeros(2, CONTEXT * 32000)
    filled[:, : audio.shape[-1]] = audio
    with torch.no_grad():
        codes, _ = codec.encode(filled[None])
    assert torch.equal(chunk.codes.long(), codes[0])
    assert len(chunk.codes.unique()) > 4


@pytest.mark.parametrize(("channels", "seconds"), [(1, 5.0), (6, 7.0), (2, 12.0)])
def test_other_layouts_and_lengths(models, channels, seconds):
    _, codec = models
    chunk = encode_chunk(codec, torch.rand(channels, round(seconds * 44100)) - 0.5, 44100, CONTEXT)
    assert chunk.codes.shape == (8, CONTEXT * 50)
    assert chunk.frames == min(CONTEXT, seconds) * 50


def test_chroma_is_the_conditioners(models, song):
    """As in training: frames beyond the melody's end are masked."""
    lm, codec = models
    conditioner = lm.condition_provider.conditioners["self_wav"]
    conditioner._get_stemmed_wav = lambda wav, _: wav
    wav, _ = song
    melody = torch.nn.functional.interpolate(wav[None], size=7 * 32000)[0].mean(dim=0, keepdim=True)
    chunk = encode_chunk(codec, melody, 32000, CONTEXT, conditioner.chroma)
    assert chunk.samples == 7 * 32000
    filled = torch.zeros(1, 1, CONTEXT * 32000)
    filled[0, :, : melody.shape[-1]] = melody
    condition = WavCondition(filled, torch.tensor([melody.shape[-1]]), [32000], [None], [None])
    conditioner.use_masking = True
    conditioner.train()
    with torch.no_grad():
        expected, mask = conditioner(condition)
        lengths = conditioner.length_mask(torch.tensor([chunk.samples]), len(chunk.chroma))
        ours, _ = conditioner.project(chunk.chroma[None], lengths)
    assert torch.equal(lengths, mask)
    assert torch.equal(ours, expected)
    assert 0 < int(mask.sum()) < mask.numel()


def test_what_is_saved_comes_back(models, song, tmp_path):
    lm, codec = models
    conditioner = lm.condition_provider.conditioners["self_wav"]
    for arguments in ((), (conditioner.chroma, (-song[0], 44100))):
        chunk = encode_chunk(codec, *song, CONTEXT, *arguments)
        save_encoded(tmp_path / "a.safetensors", chunk)
        loaded = load_encoded(tmp_path / "a.safetensors")
        assert torch.equal(loaded.codes, chunk.codes)
        assert (loaded.frames, loaded.samples) == (chunk.frames, chunk.samples)
        assert (loaded.chroma is None) == (chunk.chroma is None)
        if chunk.chroma is not None:
            assert torch.equal(loaded.chroma, chunk.chroma)
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
