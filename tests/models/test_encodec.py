import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.models import hf_encodec
from audiocraft.models.builders import get_compression_model
from audiocraft.models.encodec import EncodecModel, InterleaveStereoCompressionModel
from tests.golden_data import load, meta

STATE = load("encodec_tiny/state")
DATA = load("encodec_tiny/data")
META = meta("encodec_tiny")
AUDIO = {"rtol": 0, "atol": 1e-5}


def codec(case="len0"):
    from omegaconf import OmegaConf

    cfg = OmegaConf.create(META["config"])
    cfg.seanet.causal = cfg.encodec.causal = case == "causal"
    cfg.seanet.pad_mode = "reflect" if case == "reflect" else "constant"
    cfg.encodec.renormalize = case == "renorm"
    model = get_compression_model(cfg)
    model.load_state_dict(STATE)
    if case == "nq2":
        model.set_num_codebooks(2)
    return model.eval()


@pytest.mark.parametrize("case", META["min_quantization_margin_sq_dist"])
@torch.no_grad()
def test_encodec(case):
    model, wav = codec(case), DATA[f"{case}.wav"]
    codes, scale = model.encode(wav)
    normalized = wav if scale is None else wav / scale[:, :, None]
    torch.testing.assert_close(model.encoder(normalized), DATA[f"{case}.emb"], **AUDIO)
    assert torch.equal(codes, DATA[f"{case}.codes"])
    torch.testing.assert_close(model.decode_latent(codes), DATA[f"{case}.latent"], **AUDIO)
    torch.testing.assert_close(model.decode(codes, scale), DATA[f"{case}.decoded"], **AUDIO)
    if case == "renorm":
        torch.testing.assert_close(scale, DATA["renorm.scale"], **AUDIO)
    else:
        assert scale is None
    result = model(wav)
    torch.testing.assert_close(result.x, DATA[f"{case}.forward"], **AUDIO)
    assert torch.equal(result.codes, DATA[f"{case}.forward_codes"])
    torch.testing.assert_close(result.bandwidth, DATA[f"{case}.bandwidth"])


def test_rates():
    model = codec()
    assert (model.frame_rate, model.sample_rate, model.channels) == (50, 32000, 1)
    assert (model.num_codebooks, model.total_codebooks, model.cardinality) == (4, 4, 32)


@pytest.mark.parametrize("pad_mode", ["constant", "reflect"])
@pytest.mark.parametrize("case", ["len0", "len1"])
@pytest.mark.parametrize("newer_names", [True, False])
@torch.no_grad()
def test_encodec_in_transformers_form(pad_mode, case, newer_names):
    golden, info = load("encodec_tiny_hf/data"), meta("encodec_tiny_hf")
    names = info["native_to_hf_keys"]
    state = {names[key] if newer_names else hf_encodec.hf_key(key): STATE[key] for key in STATE}
    model = hf_encodec.build(info["info"][f"{pad_mode}.config"])
    model.load_state_dict(hf_encodec.native_state(model, state))
    codes, scale = model.eval().encode(DATA[f"{case}.wav"])
    assert scale is None
    assert torch.equal(codes, golden[f"{pad_mode}.{case}.codes"])
    torch.testing.assert_close(model.decode(codes), golden[f"{pad_mode}.{case}.decoded"], **AUDIO)


@pytest.mark.parametrize("kind", ["per_codebook", "per_timestep"])
@torch.no_grad()
def test_stereo(kind):
    golden, expected = load("encodec_stereo/data"), meta("encodec_stereo")["wrapper"][kind]
    model = InterleaveStereoCompressionModel(codec(), per_timestep=kind == "per_timestep")
    for name, value in expected.items():
        assert getattr(model, name) == value, name
    codes, scale = model.encode(golden["wav"])
    assert scale is None
    assert torch.equal(codes, golden[f"{kind}.codes"])
    left, right = model.get_left_right_codes(codes)
    assert torch.equal(left, golden[f"{kind}.left"])
    assert torch.equal(right, golden[f"{kind}.right"])
    torch.testing.assert_close(model.decode(codes), golden[f"{kind}.decoded"], **AUDIO)


@torch.no_grad()
def test_stereo_keeps_each_channels_volume():
    model = InterleaveStereoCompressionModel(codec("renorm"))
    wav = DATA["len1.wav"][:1].repeat(1, 2, 1) * torch.tensor([1.0, 0.25])[:, None]
    codes, scale = model.encode(wav)
    decoded = model.decode(codes, scale)
    torch.testing.assert_close(decoded[:, 1], decoded[:, 0] * 0.25, rtol=1e-4, atol=1e-5)


def test_wrong_shapes_are_refused():
    model = codec()
    with pytest.raises(InputError, match=r"needs \[B, 1, T\]"):
        model.encode(torch.zeros(1, 2, 100))
    with pytest.raises(InputError, match=r"needs \[B, 2, T\]"):
        InterleaveStereoCompressionModel(model).encode(torch.zeros(1, 1, 100))
    with pytest.raises(InputError, match="1 to 4"):
        model.set_num_codebooks(5)
    assert isinstance(model, EncodecModel)
