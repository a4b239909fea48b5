"""A version in its published shape, with random weights: no download, the real sizes."""

import time

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.models import MusicGen
from audiocraft.models.builders import get_compression_model, get_lm_model
from tests.golden_data import GOLDEN
from tests.memory import peak_mb


@pytest.fixture
def two_cores():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_small_makes_a_second(capsys):
    cfg = OmegaConf.load(GOLDEN / "checkpoints/small.xp_cfg.yaml")
    cfg.conditioners.description.t5.name = str(GOLDEN / "t5_tiny")
    codec = OmegaConf.load(GOLDEN / "checkpoints/encodec_32khz_native.xp_cfg.yaml")
    torch.manual_seed(0)
    lm, codec = get_lm_model(cfg).eval(), get_compression_model(codec).eval()
    assert sum(p.numel() for p in lm.parameters()) > 410e6
    model = MusicGen("small", codec, lm)
    model.set_generation_params(duration=1, seed=1)
    steps = []
    begin = time.perf_counter()
    model.set_custom_progress_callback(lambda *_: steps.append(time.perf_counter() - begin))
    wav = model.generate(["90 bpm piano in C minor"])
    elapsed = time.perf_counter() - begin
    assert list(wav.shape) == [1, 1, 32000]
    assert wav.isfinite().all()
    assert len(steps) == 53
    peak = peak_mb() / 1024
    with capsys.disabled():
        print(
            f"\nsmall, random weights, float32: {(len(steps) - 1) / (steps[-1] - steps[0]):.1f} "
            f"steps/s, first step after {steps[0]:.2f} s, 1 s of audio in {elapsed:.1f} s, "
            f"peak memory {peak:.2f} GiB"
        )
