"""Whatever the pieces, a stream gives what the layer makes of the whole."""

import random

import pytest
import torch
from torch import nn

from audiocraft.modules import seanet
from audiocraft.modules.conv import StreamableConv1d, StreamableConvTranspose1d
from audiocraft.modules.lstm import StreamableLSTM
from audiocraft.modules.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder, SEANetResnetBlock
from audiocraft.modules.streaming import chain, collect, run

CLOSE = {"rtol": 0, "atol": 2e-6}


def draws():
    return random.Random(0)  # noqa: S311 - they hide nothing


def pieces(x, rng, sizes):
    """Cuts of `x`, each with whether it is the last; sometimes the end comes after the samples."""
    start = 0
    while start < x.shape[-1]:
        stop = start + rng.choice(sizes)
        yield x[..., start:stop], False
        start = stop
    yield x[..., :0], True


def streamed(layer, x, rng, sizes=(1, 2, 3, 7, 50)):
    stream = layer.stream()
    return torch.cat([stream.push(piece, last) for piece, last in pieces(x, rng, sizes)], dim=-1)


@pytest.mark.parametrize("pad_mode", ["constant", "reflect"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"),
    [(1, 1, 1), (3, 1, 1), (7, 1, 1), (3, 1, 9), (2, 1, 1), (4, 2, 1), (16, 8, 1), (10, 5, 1)],
)
@torch.no_grad()
def test_convolution(pad_mode, causal, kernel_size, stride, dilation):
    rng = draws()
    torch.manual_seed(0)
    conv = StreamableConv1d(2, 3, kernel_size, stride, dilation, causal, pad_mode)
    for samples in range(1, 60):
        x = torch.randn(2, 2, samples)
        torch.testing.assert_close(streamed(conv, x, rng), conv(x), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("trim_right_ratio", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 1), (4, 2), (16, 8), (7, 3), (5, 5)])
@torch.no_grad()
def test_transposed_convolution(causal, trim_right_ratio, kernel_size, stride):
    rng = draws()
    torch.manual_seed(0)
    conv = StreamableConvTranspose1d(2, 3, kernel_size, stride, causal, trim_right_ratio)
    for frames in range(1, 20):
        x = torch.randn(2, 2, frames)
        torch.testing.assert_close(streamed(conv, x, rng), conv(x), **CLOSE)


@torch.no_grad()
def test_a_stream_gives_what_is_final_at_once():
    """A sample of a convolution waits for the taps to its right and no longer."""
    stream = StreamableConv1d(1, 1, 7).stream()
    x = torch.randn(1, 1, 5)
    given = [stream.push(piece, last=False).shape[-1] for piece in x.split(1, dim=-1)]
    assert given == [0, 0, 0, 1, 1]  # three are mirrored to the left of the first
    causal = StreamableConv1d(1, 1, 7, causal=True, pad_mode="constant").stream()
    assert causal.push(x, last=False).shape[-1] == 5


@pytest.mark.parametrize("rows", [1, 2, 3])
@torch.no_grad()
def test_lstm(rows):
    torch.manual_seed(0)
    lstm = StreamableLSTM(8, 2)
    x = torch.randn(rows, 8, 40)
    torch.testing.assert_close(streamed(lstm, x, draws()), lstm(x), **CLOSE)


@torch.no_grad()
def test_a_stream_keeps_no_more_than_its_context():
    block = SEANetResnetBlock(SEANetConfig(pad_mode="reflect"), 8, dilation=4)
    layers = nn.Sequential(block, nn.ELU(), StreamableConv1d(8, 8, 16, 8))
    stream = chain(layers)
    for _ in range(3):
        stream.push(torch.randn(1, 8, 1000), last=False)
    sums, _, conv = stream.streams
    held = [sums.waiting, sums.late.streams[1].held, conv.held]
    assert [x.untyped_storage().nbytes() // (x.shape[1] * 4) for x in held] == [4, 8, 16]


def configurations(count):
    """Shapes drawn at random."""
    rng = draws()
    for _ in range(count):
        yield SEANetConfig(
            channels=rng.choice([1, 2]),
            dimension=8,
            n_filters=4,
            n_residual_layers=rng.choice([0, 1, 3]),
            ratios=rng.choice([(8, 5, 4, 4), (2,), (3, 1, 5), (7, 2)]),
            kernel_size=rng.choice([1, 3, 7]),
            residual_kernel_size=rng.choice([1, 3, 5]),
            last_kernel_size=rng.choice([1, 7]),
            dilation_base=rng.choice([1, 2, 3]),
            causal=rng.random() < 0.5,
            pad_mode=rng.choice(["constant", "reflect"]),
            true_skip=rng.random() < 0.5,
            lstm=rng.choice([0, 1, 2]),
            trim_right_ratio=rng.choice([1.0, 0.5, 0.0]),
        )


@torch.no_grad()
def test_encoder_and_decoder_of_any_shape(monkeypatch):
    rng = draws()
    torch.manual_seed(0)
    for config in configurations(40):
        monkeypatch.setattr(seanet, "_PIECE_FRAMES", rng.choice([2, 4, 6, 100]))
        monkeypatch.setattr(seanet, "_LEAST_PIECE", 1)
        hop = config.hop_length
        encoder, decoder = SEANetEncoder(config), SEANetDecoder(config)
        frames = rng.choice([1, 2, 3, 8, 20, 40])
        wav = torch.randn(2, config.channels, frames * hop - rng.randrange(hop))
        latent = torch.randn(2, config.dimension, frames)
        sizes = [1, 3, hop, 5 * hop, 50 * hop]
        torch.testing.assert_close(streamed(encoder, wav, rng, sizes), encoder.model(wav), **CLOSE)
        torch.testing.assert_close(streamed(decoder, latent, rng), decoder.model(latent), **CLOSE)


@torch.no_grad()
def test_the_end_may_come_with_the_last_samples_or_behind_them():
    decoder = SEANetDecoder(SEANetConfig(n_filters=4, dimension=8))
    z = torch.randn(1, 8, 30)
    whole = decoder.model(z)
    torch.testing.assert_close(collect(run(decoder.stream(), z, 7), 30 * 640), whole, **CLOSE)
    torch.testing.assert_close(streamed(decoder, z, draws()), whole, **CLOSE)


@pytest.mark.parametrize("kind", [SEANetEncoder, SEANetDecoder])
def test_training_and_short_clips_are_computed_whole(kind, monkeypatch):
    """Bit for bit, and so are their gradients."""
    model = kind(SEANetConfig(n_filters=4, dimension=8))
    unit = (1, 640) if kind is SEANetEncoder else (8, 1)
    short = torch.randn(2, unit[0], 50 * unit[1])
    long = torch.randn(2, unit[0], 50 * unit[1] + 1)

    def refuse(_):
        raise AssertionError("streamed")

    streamed = torch.no_grad()(model)(long)
    torch.testing.assert_close(streamed, model.model(long).detach(), **CLOSE)
    monkeypatch.setattr(kind, "stream", refuse)
    for x in (short, long):
        out = model(x)
        assert torch.equal(out, model.model(x))
        assert out.requires_grad
    with torch.no_grad():
        assert torch.equal(model(short), model.model(short))
        with pytest.raises(AssertionError, match="streamed"):
            model(long)
    model.requires_grad_(requires_grad=False)
    with pytest.raises(AssertionError, match="streamed"):
        model(long)
