"""The same numbers on a CUDA device, within half precision."""

import pytest
import torch

from audiocraft.models import MusicGen, encodec
from audiocraft.models.loaders import load_models
from audiocraft.modules.conditioners import ConditioningAttributes
from tests.golden_data import load

pytestmark = pytest.mark.gpu
DEVICES = ["cpu", "cuda"]
KINDS = ["mono", "stereo", "melody", "stereo-melody"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision_logits_are_close(release, kind):
    folder = release(kind)
    items = [ConditioningAttributes(text={"description": text}) for text in ("happy rock", None)]
    logits = {}
    for device in DEVICES:
        lm, _ = load_models(folder, device)
        codes = torch.arange(2 * lm.num_codebooks * 17).view(2, -1, 17) % lm.card
        logits[device] = lm(codes.to(device), items).float().cpu()
    assert next(lm.parameters()).dtype == torch.float16
    scale = logits["cpu"].std()
    assert (logits["cuda"] - logits["cpu"]).abs().max() < 0.02 * scale


def test_greedy_tokens_in_float32(release):
    model = MusicGen.get_pretrained(str(release("mono")), "cuda", "float32")
    model.max_duration = 2
    model.set_generation_params(use_sampling=False, top_k=0, duration=1)
    descriptions = ["happy rock", "sad slow piano ballad with strings, 120 bpm", None]
    _, tokens = model.generate(descriptions, return_tokens=True)
    golden = load("generate_greedy/mono")["mono.api_short"]
    assert torch.equal(tokens.cpu(), golden)


@torch.no_grad()
def test_the_codec_is_as_exact_as_on_a_cpu(monkeypatch):
    wav = torch.randn(1, 2, 20 * 32000, generator=torch.Generator().manual_seed(0)) / 4
    cpu, gpu = (MusicGen.get_pretrained("tiny", device).compression_model for device in DEVICES)
    codes, _ = cpu.encode(wav)
    found, _ = gpu.encode(wav.cuda())
    assert (found.cpu() == codes).float().mean() > 0.999
    audio = gpu.decode(codes.cuda())
    torch.testing.assert_close(audio.cpu(), cpu.decode(codes), rtol=0, atol=1e-4)
    monkeypatch.setattr(encodec, "BLOCK_FRAMES", 100)
    torch.testing.assert_close(gpu.decode(codes.cuda()), audio, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["text", "melody", "continuation", "windows"])
def test_tiny_on_the_gpu(method):
    model = MusicGen.get_pretrained("tiny", device="cuda")
    model.max_duration = 2
    model.set_generation_params(duration=3 if method == "windows" else 1.5, seed=3)
    wav = torch.randn(1, 2, 32000, generator=torch.Generator().manual_seed(0))

    def make():
        if method == "melody":
            return model.generate_with_chroma(["a"], wav, 32000)
        if method == "continuation":
            return model.generate_continuation(wav, 32000, ["a"])
        return model.generate(["a"])

    first = make()
    assert first.device.type == "cuda"
    assert first.isfinite().all()
    assert first.std() > 0.01
    assert torch.equal(first, make())
