import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.models import MusicGen
from audiocraft.modules.precision import int8_bytes, offered_precisions
from tests.models.test_lm import CHANGES, STATES, codes_beside_others, descriptions, lm, melodies

CPU = torch.device("cpu")


def conditions(kind):
    return melodies() if kind == "melody" else descriptions(STATES[kind])


def test_float32_is_the_cpus_default():
    assert offered_precisions(CPU)[0] == "float32"
    assert MusicGen.get_pretrained("tiny", device="cpu").lm.precision == "float32"


@pytest.mark.parametrize("precision", ["float16", "fp8"])
def test_what_a_device_does_not_offer(precision):
    with pytest.raises(InputError, match=f"^precision is {precision}, cpu offers float32, .*"):
        MusicGen.get_pretrained("tiny", device="cpu", precision=precision)


@pytest.mark.parametrize("kind", STATES)
@torch.no_grad()
def test_int8_logits_are_close(kind):
    """Of narrow random layers, whose rounding errors average out less than in a real width."""
    exact, ours = lm(STATES[kind]), lm(STATES[kind])
    ours.set_precision("int8")
    codes = torch.arange(3 * exact.num_codebooks * 17).view(3, -1, 17) % exact.card
    expected, logits = exact(codes, conditions(kind)), ours(codes, conditions(kind))
    assert not torch.equal(logits, expected)
    assert (logits - expected).std() < 0.05 * expected.std()


def test_int8_replaces_every_projection():
    model = lm("lm_tiny_text_mono")
    dim, layers = model.dim, model.config.num_layers
    # Attention has four matrices, twice; the feed-forward layers have eight together.
    projections = layers * 16 * dim * dim + model.num_codebooks * model.card * dim
    norms_and_embeddings = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if "emb" in name or "norm" in name
    )
    text = sum(weight.numel() for weight in model.condition_provider.parameters())
    model.set_precision("int8")
    left = sum(weight.numel() for weight in model.parameters())
    assert left == norms_and_embeddings + text
    assert int8_bytes(model) == projections
    assert model.precision == "int8"


@pytest.mark.parametrize("precision", offered_precisions(CPU))
@pytest.mark.parametrize(("kind", "what"), CHANGES)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind, what, precision):
    """Nor on what was asked for before."""
    model = lm(STATES[kind])
    model.set_precision(precision)
    first, second = codes_beside_others(model, kind, what)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("precision", [p for p in offered_precisions(CPU) if p != "float32"])
@pytest.mark.parametrize("version", ["tiny"])
def test_music_in_fewer_bits(version, precision):
    model = MusicGen.get_pretrained(version, device="cpu", precision=precision)
    assert model.lm.precision == precision
    model.set_generation_params(duration=1, seed=1)
    wav = model.generate(["90 bpm piano in C minor"])
    assert wav.dtype == torch.float32
    assert wav.std() > 0.01
    assert torch.equal(wav, model.generate(["90 bpm piano in C minor"]))
