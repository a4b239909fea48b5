import pytest
import torch
from torch.nn import functional as F

from audiocraft.data.audio_utils import convert_audio
from audiocraft.modules.chroma import ChromaExtractor
from tests.golden_data import load

DATA = load("chroma/data")
WAV = DATA["wav32k_int16"][None, None] / 32768


@pytest.fixture(scope="module", params=[True, False], ids=["argmax", "norm"])
def extractor(request):
    return ChromaExtractor(32000, n_chroma=12, radix2_exp=14, argmax=request.param)


def test_tensors_of_the_checkpoints(extractor):
    assert list(extractor.state_dict()) == ["spec.window"]
    torch.testing.assert_close(extractor.fbanks, DATA["fbanks"])
    assert extractor.num_frames(30 * 32000) == 235


def test_spectrogram(extractor):
    spectrum = extractor.spec(WAV[0])[..., 10]
    torch.testing.assert_close(spectrum, DATA["spec_frame10"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["chroma32k", "chroma44k", "null_1sample", "short5000"])
def test_chroma(extractor, name):
    resampled = convert_audio(load("chroma/wav44k")["wav44k_int16"][None] / 32768, 44100, 32000, 1)
    wav = {
        "chroma32k": WAV[0],
        "chroma44k": resampled,
        "null_1sample": torch.zeros(1, 1),
        "short5000": WAV[0, :, :5000],
    }[name]
    key = name if name.startswith("chroma") else f"chroma_{name}"
    golden = DATA[f"{key}_{'argmax' if extractor.argmax else 'norm'}"]
    torch.testing.assert_close(extractor(wav), golden, rtol=0, atol=1e-4)


def test_resampling_is_that_of_the_fixture():
    wav = convert_audio(load("chroma/wav44k")["wav44k_int16"][None] / 32768, 44100, 32000, 1)
    assert wav.shape[-1] == 384000
    torch.testing.assert_close(wav[:, :4000], DATA["resampled44_head"], rtol=0, atol=1e-5)
    torch.testing.assert_close(wav[:, -4000:], DATA["resampled44_tail"], rtol=0, atol=1e-5)


def test_a_batch_with_a_silent_row():
    extractor = ChromaExtractor(32000, radix2_exp=14, argmax=True)
    wav = WAV[0, :, : int(DATA["batch_in_note"])]
    batch = torch.stack([wav, torch.zeros_like(wav)])
    assert torch.equal(extractor(batch), DATA["chroma_batch_argmax"])


def test_the_pitch_class_is_right():
    time = torch.arange(3 * 32000) / 32000
    for pitch_class in range(12):
        frequency = 440 * 2 ** ((60 + pitch_class - 69) / 12)
        tone = torch.sin(2 * torch.pi * frequency * time)[None]
        chroma = ChromaExtractor(32000, radix2_exp=14, argmax=True)(tone)
        expected = F.one_hot(torch.tensor(pitch_class), 12).float()
        assert torch.equal(chroma[0, 2:-2], expected.expand(chroma.shape[1] - 4, -1))
