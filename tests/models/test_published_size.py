"""A version in its published shape, with random weights: no download, the real sizes."""

import time

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.models import MusicGen
from audiocraft.models.builders import get_compression_model, get_lm_model
from audiocraft.modules.conditioners import ConditioningAttributes, nullify
from tests.golden_data import GOLDEN
from tests.memory import peak_mb


@pytest.fixture
def two_cores():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def small():
    cfg = OmegaConf.load(GOLDEN / "checkpoints/small.xp_cfg.yaml")
    cfg.conditioners.description.t5.name = str(GOLDEN / "t5_tiny")
    torch.manual_seed(0)
    lm = get_lm_model(cfg).eval()
    assert sum(p.numel() for p in lm.parameters()) > 410e6
    return lm


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "precision",
    [
        "float16",  # a GPU's default; a CPU computes with it too, but slowly
        "bfloat16",
    ],
)
@torch.no_grad()
def test_first_logits_in_16_bits(precision):
    """Of a request without a prompt and of one with, conditioned on a text and not."""
    lm = small()
    items = [ConditioningAttributes({"description": "90 bpm piano in C minor"})]
    codes = torch.randint(2048, (2, 4, 50), generator=torch.Generator().manual_seed(0))
    codes[..., 0] = lm.special_token_id

    def logits():
        for prompt in (0, 49):
            state = lm.start([*items, *nullify(items)], 51)
            yield lm.advance(state, codes[..., : prompt + 1]).float()

    exact = torch.stack([*logits()])
    lm.set_precision(precision)
    ours = torch.stack([*logits()])
    cosine = torch.nn.functional.cosine_similarity(ours, exact, dim=-1)
    assert not torch.equal(ours, exact)
    assert cosine.min() > 0.9999


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_small_makes_a_second(capsys):
    lm = small()
    codec = OmegaConf.load(GOLDEN / "checkpoints/encodec_32khz_native.xp_cfg.yaml")
    codec = get_compression_model(codec).eval()
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
