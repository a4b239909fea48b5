import math
import os
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.errors import InputError, TrainingError
from audiocraft.models.builders import get_compression_model
from audiocraft.models.loaders import load_compression_model
from audiocraft.modules.conv import StreamableConv1d, StreamableConvTranspose1d
from audiocraft.quantization.training import CodebookSettings
from audiocraft.solvers.checkpoints import load_state, save_checkpoint
from audiocraft.solvers.compression import CodecSettings, Trainer, initialize
from tools.synthetic_music.midi import missing
from tools.tiny import codec as tool
from tools.tiny.codec import CODEC, Batches, join, split

RATE = 16000
SETTINGS = CodecSettings(
    seed=3, windows=(64, 256), codebooks=CodebookSettings(decay=0.9, dropout=0.3)
)

DECODER = replace(SETTINGS, decoder_only=True)


def config(n_filters=4):
    cfg = OmegaConf.create(CODEC)
    cfg.sample_rate = cfg.encodec.sample_rate = RATE
    cfg.seanet.n_filters, cfg.seanet.dimension, cfg.seanet.ratios = n_filters, 16, [2, 4, 5]
    cfg.rvq.bins = 32
    return cfg


def trainer(settings=SETTINGS, seed=0, n_filters=4):
    torch.manual_seed(seed)
    return Trainer(get_compression_model(config(n_filters)), settings)


def batch(number, size=4, samples=RATE // 4):
    """Two tones each, a batch of its own for each number."""
    random = torch.Generator().manual_seed(number)
    pitches = 100 * 8 ** torch.rand(2, size, 1, 1, generator=random)
    time = torch.arange(samples) / RATE
    return 0.3 * torch.sin(2 * torch.pi * pitches * time).sum(0)


def test_updates_lower_the_losses_on_a_batch():
    made, wav = trainer(), batch(0, 2)
    updates = [made.train(wav, 3e-3) for _ in range(60)]
    for name, limit in {"time": 0.5, "spectrum": 0.8}.items():
        first, last = (sum(u.losses[name] for u in part) for part in (updates[:5], updates[-5:]))
        assert last < limit * first, name
    assert made.evaluate(list(wav)).si_sdr > 5


def test_a_codec_begins_with_layers_that_pass_the_audio_on():
    made, wav = trainer().model, batch(0)
    initialize(made, wav)
    outputs = []
    for layer in made.modules():
        if isinstance(layer, StreamableConv1d | StreamableConvTranspose1d):
            layer.register_forward_hook(lambda *given: outputs.append(given[2].detach()))
    decoded = made.decoder(made.encoder(wav))
    assert len(outputs) == 2 * (1 + 3 * 3 + 1)
    for output in outputs[:-1]:
        assert output.mean((0, 2)).abs().max() < 1e-3
        assert output.std().item() == pytest.approx(1, rel=1e-2)
    assert decoded.std().item() == pytest.approx(wav.std().item(), rel=1e-2)


def test_gradients_reach_every_weight():
    made = trainer()
    made.train(batch(0), 1e-3)
    for name, weight in made.model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("time", [0.2, 0.8])
def test_losses_share_the_gradient_as_they_are_told(time):
    made = trainer(CodecSettings(windows=(64, 256), shares={"time": time, "spectrum": 1 - time}))
    wav = batch(0)
    decoded = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = made._losses(decoded, wav)
    lengths = {
        name: torch.autograd.grad(loss, [decoded], retain_graph=True)[0].flatten(1).norm(dim=1)
        for name, loss in losses.items()
    }
    expected = sum(
        made.settings.shares[name]
        * torch.autograd.grad(loss, [decoded], retain_graph=True)[0]
        / lengths[name].mean()
        for name, loss in losses.items()
    )
    # The averages of the first update are its own lengths.
    assert torch.allclose(made._balanced(decoded, losses), expected / len(wav), rtol=1e-4)


@pytest.mark.parametrize("settings", [SETTINGS, DECODER])
def test_a_resumed_run_is_the_same_to_the_bit(settings, tmp_path):
    straight = trainer(settings)
    for number in range(12):
        straight.train(batch(number), 1e-3)
        if number == 4:
            save_checkpoint(tmp_path, 5, straight.state_dict(), {})
    resumed = trainer(settings, seed=1)
    resumed.load_state_dict(load_state(tmp_path / "checkpoints" / "5"))
    for number in range(5, 12):
        resumed.train(batch(number), 1e-3)
    for states in (
        (resumed.model.state_dict(), straight.model.state_dict()),
        (resumed.exported_state(), straight.exported_state()),
    ):
        ours, theirs = states
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


def test_an_export_is_the_averaged_codec(tmp_path):
    made = trainer()
    for number in range(25):
        made.train(batch(number), 3e-3)
    made.export(tmp_path / "compression_state_dict.safetensors", config())
    assert [path.name for path in tmp_path.iterdir()] == ["compression_state_dict.safetensors"]
    loaded = load_compression_model(tmp_path)
    assert loaded.sample_rate == RATE
    wav = batch(99)
    with torch.no_grad(), made.ema.applied():
        codes, _ = made.model.encode(wav)
        # The file has 16 bits: a code here and there lies at the border of two.
        assert (loaded.encode(wav)[0] == codes).float().mean() > 0.98
        made.model.load_state_dict(
            {k: v.half().float() for k, v in made.model.state_dict().items()}
        )
        codes, _ = made.model.encode(wav)
        assert torch.equal(loaded.encode(wav)[0], codes)
        assert torch.equal(loaded.decode(codes), made.model.decode(codes))


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        trainer().export(tmp_path / "codec.safetensors", config())
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_learns_alone_and_codes_stay():
    first = trainer()
    for number in range(10):
        first.train(batch(number), 3e-3)
    before = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    made = Trainer(first.model, DECODER, trained=True)
    updates = [made.train(batch(number), 1e-3) for number in range(10, 20)]
    for name, tensor in made.exported_state().items():
        assert torch.equal(tensor, before[name].half()) != name.startswith("decoder."), name
    for name, weight in made.model.decoder.named_parameters():
        assert not torch.equal(weight, before[f"decoder.{name}"]), name
    assert updates[0].losses.keys() == {"time", "spectrum"}


def test_a_codec_is_trained_on(tmp_path):
    """From what was exported: its codebooks are those, and one update changes little."""
    made = trainer()
    for number in range(40):
        made.train(batch(number), 3e-3)
    made.export(tmp_path / "codec.safetensors", config())
    model = get_compression_model(config())
    tool._load(model, tmp_path / "codec.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = Trainer(model, SETTINGS, trained=True)
    made.train(batch(40), 1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=2e-5)
    moved = (
        model.quantizer.codebooks[0].embed - before["quantizer.vq.layers.0._codebook.embed"]
    ).norm() / before["quantizer.vq.layers.0._codebook.embed"].norm()
    assert 0 < moved < 0.5
    with pytest.raises(InputError, match=r"codec\.safetensors is a codec of another shape: give"):
        tool._load(get_compression_model(config(n_filters=8)), tmp_path / "codec.safetensors")


def test_measures_of_a_codec_that_returns_what_it_gets(monkeypatch):
    made = trainer()
    wav = torch.randn(4, 1, RATE, generator=torch.Generator().manual_seed(0))
    encode = made.model.encode
    heard = []
    monkeypatch.setattr(made.model, "encode", lambda x: (heard.append(x), encode(x))[1])
    monkeypatch.setattr(made.model, "decode", lambda *_: 2 * heard[-1])
    measures = made.evaluate(list(wav))
    assert measures.si_sdr > 100  # whatever the scale
    assert measures.log_mel == pytest.approx(20 * math.log10(2), abs=0.1)
    assert len(measures.perplexities) == 4
    assert all(1 <= value <= 32 for value in measures.perplexities)


def test_a_loss_that_is_not_finite_stops_and_changes_no_weight():
    made = trainer()
    made.train(batch(0), 1e-3)
    before = {name: weight.clone() for name, weight in made.model.named_parameters()}
    wav = batch(1)
    wav[0, 0, 0] = math.nan
    with pytest.raises(TrainingError, match="update 2 is nan"):
        made.train(wav, 1e-3)
    assert made.update == 1
    for name, weight in made.model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_a_checkpoint_of_another_shape_is_refused():
    state = trainer(n_filters=8).state_dict()
    with pytest.raises(InputError, match="another shape"):
        trainer().load_state_dict(state)


def test_a_state_in_parts_is_the_state(monkeypatch):
    made = trainer()
    made.train(batch(0), 1e-3)
    monkeypatch.setattr(tool, "_PART_BYTES", 50_000)
    state = made.state_dict()
    parts = split(state)
    for part in parts:
        sizes = [v.nbytes for _, v in part["leaves"] if isinstance(v, torch.Tensor)]
        assert sum(sizes) <= 50_000
    assert len(parts) > 3
    again = trainer(seed=1)
    again.load_state_dict(join(parts))
    assert again.train(batch(1), 1e-3) == made.train(batch(1), 1e-3)


@pytest.mark.skipif(missing() is not None, reason="needs fluidsynth and its sound font")
def test_batches_depend_on_the_update_alone(monkeypatch):
    monkeypatch.setattr(tool, "_FIRST_PIECES", 2)
    monkeypatch.setattr(tool, "_POOL", 3)
    monkeypatch.setattr(tool, "_PIECE_SECONDS", 10.0)
    monkeypatch.setattr(tool, "_UPDATES_PER_PIECE", 2)
    straight = [wav for wav, _ in zip(Batches(0), range(8), strict=False)]
    resumed = [wav for wav, _ in zip(Batches(5), range(3), strict=False)]
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(resumed, straight[5:], strict=True)
    )
    assert straight[0].shape == (8, 1, 32000)
    assert torch.stack(straight).abs().max() <= 1
    assert len({float(wav.sum()) for wav in torch.cat(straight)}) == 8 * 8
