"""The real demucs, with small weights in the form in which its own are published."""

import json

import pytest
import torch
import yaml
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from safetensors.torch import save_file

from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import WeightsError
from audiocraft.models import MusicGen
from audiocraft.models.loaders import load_lm_model
from audiocraft.modules.stems import load_separator

SOURCES = ["drums", "bass", "other", "vocals"]
KWARGS = {
    "sources": SOURCES,
    "channels": 4,
    "growth": 1,
    "depth": 4,
    "nfft": 4096,
    "t_layers": 1,
    "t_heads": 1,
    "bottom_channels": 0,
    "t_hidden_scale": 1,
    "dconv_comp": 4,
    "dconv_mode": 0,
    "rewrite": False,
}


@pytest.fixture
def htdemucs(tmp_path):
    """A small random HTDemucs, and the folder that holds it as a bag of one."""
    torch.manual_seed(0)
    model = HTDemucs(**KWARGS, segment=4)
    folder = tmp_path / "adefossez/HTDemucs"
    folder.mkdir(parents=True)

    def save(klass="demucs.htdemucs.HTDemucs"):
        segment = {"_type": "fraction", "numerator": 4, "denominator": 1}
        metadata = {
            "klass": klass,
            "args": "[]",
            "kwargs": json.dumps({**KWARGS, "segment": segment}),
        }
        save_file(model.state_dict(), folder / "12345678.safetensors", metadata)

    save()
    (folder / "htdemucs.yaml").write_text(yaml.safe_dump({"models": ["12345678"]}))
    return model.eval(), folder, save


def test_stems_are_those_of_demucs(htdemucs):
    model, folder, _ = htdemucs
    separator = load_separator(folder.joinpath, "htdemucs", "cpu")
    assert separator.sources == SOURCES
    assert (separator.sample_rate, separator.channels) == (44100, 2)
    wav = torch.randn(2, 2, 3 * 44100, generator=torch.Generator().manual_seed(1))
    expected = apply_model(model, wav, shifts=0)
    torch.testing.assert_close(separator.separate(wav, 44100), expected)
    melody = separator.mix(wav, 44100, ["vocals", "other"])
    torch.testing.assert_close(melody, expected[:, 3] + expected[:, 2])


def test_a_class_that_is_not_demucs_is_not_called(htdemucs):
    _, folder, save = htdemucs
    save(klass="os.mkdir")
    with pytest.raises(WeightsError, match=r"12345678\.safetensors names the class 'os\.mkdir'"):
        load_separator(folder.joinpath, "htdemucs", "cpu")
    file = folder / "12345678.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"klass": "demucs.htdemucs.HTDemucs"})
    with pytest.raises(WeightsError, match=r"^12345678\.safetensors does not hold the HTDemucs"):
        load_separator(folder.joinpath, "htdemucs", "cpu")
    file.write_bytes(b"not a model")
    with pytest.raises(WeightsError, match=r"^12345678\.safetensors is broken"):
        load_separator(folder.joinpath, "htdemucs", "cpu")
    (folder / "htdemucs.yaml").write_text("[]")
    with pytest.raises(WeightsError, match=r"htdemucs\.yaml lists no demucs models"):
        load_separator(folder.joinpath, "htdemucs", "cpu")


def test_the_melody_conditioner_separates(htdemucs, release, tmp_path, monkeypatch):
    """A melody version finds htdemucs in the store, and only when a melody comes."""
    model, _, _ = htdemucs
    melody_lm = load_lm_model(release("melody"))
    conditioner = melody_lm.condition_provider.conditioners["self_wav"]
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path))
    wav = torch.randn(1, 1, 2 * 32000, generator=torch.Generator().manual_seed(2))
    stereo = convert_audio(wav, 32000, 44100, 2)
    stems = apply_model(model, stereo, shifts=0)
    expected = convert_audio(stems[:, 2] + stems[:, 3], 44100, 32000, 1)
    with torch.no_grad():
        ours = conditioner._get_stemmed_wav(wav, 32000)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert "demucs" not in " ".join(melody_lm.state_dict())


@pytest.mark.usefixtures("htdemucs")
def test_the_same_melody_gives_the_same_music(release, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path))
    model = MusicGen.get_pretrained(str(release("stereo-melody")), device="cpu")
    model.set_generation_params(duration=0.5, seed=1)
    wav = torch.randn(1, 2, 32000, generator=torch.Generator().manual_seed(2))
    first = model.generate_with_chroma(["a"], wav, 32000)
    assert torch.equal(first, model.generate_with_chroma(["a"], wav, 32000))
