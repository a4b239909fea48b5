"""Decoding with MultiBand Diffusion through the real Cog server, by a small diffusion file."""

import base64
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.assets.store import PARTS
from audiocraft.data.audio import audio_read, audio_write
from audiocraft.models.finetunes import base_sha256, save_finetune
from audiocraft.models.versions import VERSIONS
from tests.releases import read_release, stand_in
from tests.serving.client import start
from tools.make_diffusion import write_diffusion

ROOT = Path(__file__).parents[2]
WINDOWED = """
import functools
from audiocraft.modules import tracks, unet_diffusion

unet_diffusion._WINDOW = {"cpu": 2**18}
_windows = tracks.Sweep.windows
_tell = functools.cache(lambda count: print("windows:", count, flush=True))


def _counted(self, frames, hop):
    windows = list(_windows(self, frames, hop))
    _tell(len(windows))
    return iter(windows)


tracks.Sweep.windows = _counted
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    stand_in(folder, "stereo-melody", 1)
    stand_in(folder, "small", 2)
    return folder


def diffusion_file(store):
    repo_id, (filename,) = PARTS["mbd"]
    path = store / repo_id / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def environment(store, tmp_path_factory):
    return {
        "AUDIOCRAFT_CACHE_DIR": str(store),
        "ALLOW_LOCAL_FILES": "1",
        "TMPDIR": str(tmp_path_factory.getbasetemp()),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def served(environment):
    with start(ROOT, environment) as server:
        yield server


@pytest.fixture
def windowed(environment, tmp_path):
    """A server whose networks go through what `served` takes whole in windows of 8 s."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "predict.py").write_text((ROOT / "predict.py").read_text() + WINDOWED)
    with start(project, environment | {"PYTHONPATH": str(ROOT)}) as server:
        yield server


@pytest.fixture
def diffusion(store):
    # Not the golden file, whose attention over 40 s takes minutes.
    write_diffusion(diffusion_file(store), 16, 2, hidden=4, depth=3, growth=2, bottleneck="lstm")


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    time = torch.arange(3 * 32000) / 32000
    wav = torch.stack([torch.sin(2 * torch.pi * pitch * time) / 2 for pitch in (220.0, 330.0)])
    return str(audio_write(tmp_path_factory.mktemp("song") / "song", wav, 32000, normalize=False))


def answer_of(served, **inputs):
    status, answer = served.predict({"seed": 1, "multi_band_diffusion": True, **inputs})
    assert status == 200, answer
    return answer


def heard(served, tmp_path, **inputs):
    """Audio of a request, not levelled, and its log."""
    answer = answer_of(served, **{"normalization_strategy": "clip", **inputs})
    assert answer["status"] == "succeeded", answer
    path = tmp_path / "result.wav"
    path.write_bytes(base64.b64decode(answer["output"].partition(";base64,")[2]))
    return audio_read(path)[0], answer["logs"]


def test_without_its_file(served, store):
    """Nothing is generated for a request that could not be decoded."""
    assert not diffusion_file(store).exists()
    answer = answer_of(served, prompt="a song", model_version="small", duration=1)
    assert answer["status"] == "failed"
    assert "scripts/download mbd" in answer["error"] or "multiband-diffusion" in answer["error"]
    assert "steps" not in answer["logs"]


def test_of_a_version_that_it_is_not_for(served, store):
    """Nothing is fetched for it."""
    assert not diffusion_file(store).exists()
    answer = answer_of(served, prompt="a song", model_version="tiny", duration=1)
    assert answer["status"] == "failed"
    assert "tiny has a codec of its own: switch it off, or" in answer["error"]


def test_a_wrong_file(served, store):
    shutil.copy(store / "facebook/musicgen-small/state_dict.bin", diffusion_file(store))
    answer = answer_of(served, prompt="a song", model_version="small", duration=1)
    assert answer["status"] == "failed"
    assert "mbd_musicgen_32khz.th is not a file of MultiBand Diffusion" in answer["error"]
    assert "steps" not in answer["logs"]


@pytest.mark.usefixtures("diffusion")
@pytest.mark.parametrize(
    ("inputs", "channels", "seconds"),
    [
        ({"prompt": "a song", "model_version": "small", "duration": 2}, 1, 2),
        ({"prompt": "a song", "duration": 2}, 2, 2),
        ({"prompt": "a song", "input_audio": "song", "duration": 2}, 2, 2),
        ({"input_audio": "song", "continuation": True, "duration": 5}, 2, 5),
        pytest.param({"prompt": "a song", "duration": 40}, 2, 40, marks=pytest.mark.slow),
    ],
)
def test_what_is_heard(served, song, tmp_path, inputs, channels, seconds):
    """As long and as loud as EnCodec's own, but another sound; the same again for the same seed."""
    if "input_audio" in inputs:
        inputs = {**inputs, "input_audio": song}
    wav, logs = heard(served, tmp_path, **inputs)
    assert wav.shape == (channels, seconds * 32000)
    assert "MultiBand Diffusion: 100 %" in logs
    plain, _ = heard(served, tmp_path, **inputs, multi_band_diffusion=False)
    assert plain.shape == wav.shape
    assert 0.7 < wav.std() / plain.std() < 1.4
    assert (wav - plain).std() > 0.1 * plain.std()
    if channels == 2:
        assert not torch.equal(wav[0], wav[1])
    if seconds == 2:
        assert torch.equal(heard(served, tmp_path, **inputs)[0], wav)


@pytest.mark.slow
@pytest.mark.usefixtures("diffusion")
def test_windows_are_not_heard(served, windowed, tmp_path):
    """At their seams neither; with an LSTM at the bottom, which hears all of the clip."""
    # Levelled, so that a file's 16 bits are fine enough.
    asked = {"prompt": "a song", "duration": 40, "normalization_strategy": "peak"}
    whole, _ = heard(served, tmp_path, **asked)
    wav, logs = heard(windowed, tmp_path, **asked)
    assert re.findall(r"windows: (\d+)", logs) == ["5"]
    torch.testing.assert_close(wav, whole, rtol=0, atol=1e-3 * whole.abs().max().item())


@pytest.mark.usefixtures("diffusion")
def test_swapped_codes_swap_the_channels(served, store, tmp_path):
    """Two fine-tunes, one of which makes the left codes where the other makes the right ones."""
    package = read_release(store / VERSIONS["stereo-melody"].source)
    state = package["best_state"]
    swapped = {
        re.sub(r"^(emb|linears)\.(\d)", lambda at: f"{at[1]}.{int(at[2]) ^ 1}", name): value
        for name, value in state.items()
    }
    assert swapped.keys() == state.keys()
    wavs = []
    for name, weights in {"as it is": state, "swapped": swapped}.items():
        path = tmp_path / f"{name}.safetensors"
        save_finetune(
            path,
            weights,
            OmegaConf.create(package["xp.cfg"]),
            base="stereo-melody",
            base_sha256=base_sha256(state),
            license="cc-by-nc-4.0",
        )
        asked = {"prompt": "a song", "duration": 2, "top_k": 1, "replicate_weights": str(path)}
        wavs.append(heard(served, tmp_path, **asked)[0])
    wav, flipped = wavs[0], wavs[1].flip(0)
    # Random networks make most of their sound of noise, which both channels share.
    assert (wav[0] - wav[1]).std() > 20 / 2**15
    torch.testing.assert_close(flipped, wav, rtol=0, atol=1.1 / 2**15)
