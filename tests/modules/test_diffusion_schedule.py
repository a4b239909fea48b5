import math

import pytest
import torch
from julius import SplitBands

from audiocraft.models.multibanddiffusion import load_diffusion_models
from audiocraft.modules.band_filters import band_stds, low_pass_filters, weighted_bands
from audiocraft.modules.diffusion_schedule import NoiseSchedule
from tests.golden_data import GOLDEN, load, meta

BANDS = load("mbd_tiny/bands")
META = meta("mbd_tiny")
SCHEDULE = NoiseSchedule(1e-5, 2.9e-2, 7.5)


@pytest.mark.parametrize("band", [0, 1])
def test_betas(band):
    assert torch.equal(SCHEDULE.betas, BANDS[f"band{band}.betas"])


def test_default_steps():
    assert SCHEDULE.default_steps == META["default_step_list"]


def test_noise_is_taken_away_where_the_network_knows_it():
    """With a network that hears the noise exactly, each step keeps what the audio is."""
    audio = torch.linspace(-1, 1, 50)[None, None]
    left = (1 - SCHEDULE.betas).cumprod(0)
    generator = torch.Generator().manual_seed(0)

    def estimate(sample, step):
        return (sample - left[step].sqrt() * audio) / (1 - left[step]).sqrt()

    def noise():
        return torch.randn(1, 1, 50, generator=generator)

    result = SCHEDULE.generate(estimate, noise, SCHEDULE.default_steps)
    # What is left is the noise of the first step of all, with a variance of 1e-5.
    torch.testing.assert_close(result, audio, rtol=0, atol=0.02)


def test_noise_is_scaled_and_audio_clipped():
    schedule = NoiseSchedule(1e-5, 2.9e-2, 7.5, clip=0.5, noise_scale=2.0)
    seen = []

    def estimate(sample, step):
        seen.append((step, sample.clone()))
        return torch.zeros_like(sample)

    result = schedule.generate(estimate, lambda: torch.ones(1, 1, 3), [999, 500, 0])
    assert [step for step, _ in seen] == [999, 500]
    assert torch.equal(seen[0][1], 2 * torch.ones(1, 1, 3))
    assert seen[1][1].max() == 0.5
    assert result.max() == 0.5


def test_bands_are_given_back_their_level():
    processor = load_diffusion_models(GOLDEN / "mbd_tiny/mbd_tiny.th")[1].sample_processor
    y = processor(BANDS["band1.unet_in"])
    torch.testing.assert_close(y, BANDS["band1.return_sample_out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [100, 7000, 2**18])
def test_bands_in_chunks_equal_those_of_the_whole(chunk, monkeypatch):
    monkeypatch.setattr("audiocraft.modules.band_filters.CHUNK", chunk)
    envelope = torch.linspace(0, 1, 9001)
    wav = torch.randn(2, 2, 9001, generator=torch.Generator().manual_seed(0)) * envelope + 0.1
    filters, gains = low_pass_filters(32000, 8, wav.device), torch.arange(8) + 1.0
    bands = SplitBands(32000, n_bands=8)(wav)
    stds = bands.std(dim=(1, 2, 3))
    torch.testing.assert_close(band_stds(wav, filters).float(), stds, rtol=1e-5, atol=0)
    expected = (bands * gains[:, None, None, None]).sum(dim=0)
    torch.testing.assert_close(weighted_bands(wav, filters, gains), expected, rtol=0, atol=1e-5)
    assert math.isclose(band_stds(wav * 0, filters).sum(), 0)
