"""The real demucs, with small weights in the form in which its own are published."""

import pytest
import torch
from demucs.apply import BagOfModels, apply_model
from demucs.htdemucs import HTDemucs
from safetensors.torch import save_file

from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import WeightsError
from audiocraft.models import MusicGen
from audiocraft.models.loaders import load_lm_model
from audiocraft.modules.stems import (
    StemSeparator,
    htdemucs_files,
    htdemucs_key,
    load_htdemucs,
    load_separator,
)
from tests.separators import SIGNATURE, SMALL, SOURCES, put_htdemucs, save_model


@pytest.fixture
def htdemucs(tmp_path):
    """A small random HTDemucs, and the folder that holds it as a bag of one."""
    model, folder = put_htdemucs(tmp_path)

    def save(klass):
        save_model(folder, model, SMALL, (4, 1), klass)

    return model, folder, save


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


@pytest.mark.parametrize("batch", [1, 3])
def test_tracks_of_any_length_come_out_as_from_demucs(htdemucs, batch):
    """Shorter than a segment (4 s), than what overlaps, at a segment's end, of several."""
    model, folder, _ = htdemucs
    separator = load_separator(folder.joinpath, "htdemucs", "cpu")
    generator = torch.Generator().manual_seed(1)
    seconds = (0.5, 3.0, 3.5, 4.0, 11.3)
    tracks = [torch.randn(2, round(s * 44100), generator=generator) for s in seconds]
    blocks = [track.split(30011, dim=1) for track in tracks]
    stems = [[] for _ in tracks]
    ended = []
    for part in separator.separate_tracks(blocks, batch):
        assert part.track == len(ended)
        stems[part.track].append(part.stems)
        ended += [part.track] if part.last else []
    assert ended == [*range(len(tracks))]
    for track, parts in zip(tracks, stems, strict=True):
        expected = apply_model(model, track[None], shifts=0)[0]
        torch.testing.assert_close(torch.cat(parts, dim=-1), expected)


def test_a_bag_weighs_its_models(htdemucs):
    """As `htdemucs_ft`, whose models are each for a stem."""
    model, _, _ = htdemucs
    torch.manual_seed(7)
    other = HTDemucs(SOURCES, **SMALL, segment=4).eval()
    weights = [[1.0, 0.0, 0.5, 1.0], [0.0, 1.0, 0.5, 3.0]]
    bag = BagOfModels([model, other], weights)
    wav = torch.randn(1, 2, 5 * 44100, generator=torch.Generator().manual_seed(1))
    expected = apply_model(bag, wav, shifts=0)
    torch.testing.assert_close(StemSeparator(bag, "cpu").separate(wav, 44100), expected)


def test_a_long_track_is_asked_for_as_it_is_needed(htdemucs):
    _, folder, _ = htdemucs
    separator = load_separator(folder.joinpath, "htdemucs", "cpu")
    given = 0

    def blocks():
        nonlocal given
        while True:  # for ever
            given += 1
            yield torch.zeros(2, 44100)

    parts = separator.separate_tracks([blocks()])
    for number in range(1, 4):
        next(parts)
        assert given <= 3 * number + 8


def test_the_key_of_the_separator_is_that_of_its_files(htdemucs, tmp_path, monkeypatch):
    _, folder, save = htdemucs
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path))
    first = htdemucs_key()
    assert htdemucs_key() == first
    assert load_htdemucs("cpu").sources == SOURCES
    assert htdemucs_files() == [folder / "htdemucs.yaml", folder / f"{SIGNATURE}.safetensors"]
    save("demucs.hdemucs.HDemucs")
    assert htdemucs_key() != first
    (folder / f"{SIGNATURE}.safetensors").unlink()
    (folder / "htdemucs.yaml").write_text("models: []")
    with pytest.raises(WeightsError, match=r"htdemucs\.yaml lists no demucs models"):
        htdemucs_key()


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
