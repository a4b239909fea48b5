"""How the stereo image of MultiBand Diffusion is measured."""

import json
import sys

import pytest
import torch

from audiocraft.models.multibanddiffusion import load_diffusion_models
from tools import stereo_noise
from tools.make_diffusion import write_diffusion
from tools.stereo_noise import predict_noise
from tools.synthetic_music.midi import missing


def test_the_network_that_is_trained_is_the_one_that_decodes(tmp_path):
    file = tmp_path / "mbd_musicgen_32khz.th"
    write_diffusion(file, codec_dim=8, bands=1, hidden=8, growth=2.0)
    (process,) = load_diffusion_models(file)
    model = process.model
    noisy, latents = torch.randn(2, 1, 1001), torch.randn(2, 8, 3)
    with torch.no_grad():
        heard = [model(noisy, step, model.condition(latents)) for step in (3, 900)]
    ours = predict_noise(model, noisy, torch.tensor([3, 900]), latents)
    torch.testing.assert_close(ours, torch.stack([heard[0][0], heard[1][1]]))


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=f"needs {missing()}")
def test_noise_of_its_own_widens_the_image(monkeypatch, capsys):
    monkeypatch.setattr(stereo_noise, "_TRAINED", 2)
    monkeypatch.setattr(sys, "argv", ["stereo_noise", "--minutes", "0.1", "--pieces", "2"])
    stereo_noise.main()
    *_, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert list(figures) == ["rendered", "codec", "same noise", "noise of its own"]
    assert figures["noise of its own"]["width"] > figures["same noise"]["width"]
    assert figures["codec"] | {"width": 0} == {"width": 0, "middle_db": 0.0, "side_db": 0.0}
