"""Long audio through the codec: in bounded memory, and equal to the whole."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.data.audio import audio_read
from audiocraft.data.audio_utils import convert_audio
from audiocraft.models.builders import get_compression_model
from audiocraft.models.encodec import InterleaveStereoCompressionModel
from audiocraft.modules import seanet
from tests.golden_data import GOLDEN
from tests.models.test_encodec import codec
from tests.modules.test_streaming import draws, pieces
from tests.project import ROOT

AUDIO = {"rtol": 0, "atol": 1e-5}
CUDNN = torch.backends.cudnn
CASES = ["len0", "reflect", "causal", "renorm", "nq2"]


@pytest.fixture(scope="module")
def song():
    """Real music, 8 seconds of stereo at 32 kHz, that ends within a frame."""
    wav, rate = audio_read(ROOT / "tests/audio/real_song.ogg")
    return convert_audio(wav, rate, 32000, 2)[None, ..., :-123]


@pytest.fixture
def whole(monkeypatch):
    """Compute in one piece from now on."""
    return lambda: monkeypatch.setattr(seanet, "_PIECE_FRAMES", 10**9)


def tiny_codes(frames, rows=1, books=4):
    return torch.randint(32, (rows, books, frames), generator=torch.Generator().manual_seed(frames))


def assert_same_choices(ours, theirs):
    """But for one frame: where two vectors are as near, rounding may choose."""
    assert ours.shape == theirs.shape
    assert (ours != theirs).any(dim=1).sum() <= 1


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_codes_of_music_are_those_of_the_whole(case, song, whole):
    model, wav = codec(case), song[:, :1]
    codes, scale = model.encode(wav)
    latent = model.encoder(wav)
    whole()
    assert_same_choices(codes, model.encode(wav)[0])
    torch.testing.assert_close(latent, model.encoder(wav), **AUDIO)
    if scale is not None:
        assert torch.equal(scale, model.encode(wav)[1])


@pytest.mark.parametrize("case", ["len0", "reflect"])
@pytest.mark.parametrize("frames", [101, 499, 500, 501, 1000, 1003])
@torch.no_grad()
def test_any_length_is_encoded_as_the_whole(case, frames, song, whole):
    model = codec(case)
    wav = song.reshape(1, 1, -1).repeat(1, 1, 2)[..., : frames * 640 - 77]
    latent, (codes, _) = model.encoder(wav), model.encode(wav)
    assert codes.shape == (1, 4, frames)
    whole()
    torch.testing.assert_close(latent, model.encoder(wav), **AUDIO)
    assert_same_choices(codes, model.encode(wav)[0])


@pytest.mark.parametrize("per_timestep", [False, True])
@pytest.mark.parametrize("case", ["len0", "renorm"])
@torch.no_grad()
def test_stereo(per_timestep, case, song, whole):
    model = InterleaveStereoCompressionModel(codec(case), per_timestep)
    wav = torch.cat([song, song.flip(1) * 0.3])
    codes, scale = model.encode(wav)
    audio = model.decode(codes, scale)
    assert (scale is not None) == (case == "renorm")
    whole()
    assert_same_choices(codes, model.encode(wav)[0])
    torch.testing.assert_close(audio, model.decode(codes, scale), **AUDIO)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frames", [101, 500, 501, 515, 1203])
@torch.no_grad()
def test_decoded_audio_is_that_of_the_whole(case, frames, whole):
    model, codes = codec(case), tiny_codes(frames)
    scale = torch.tensor([[0.5]]) if case == "renorm" else None
    audio = model.decode(codes, scale)
    assert audio.shape == (1, 1, frames * 640)
    whole()
    torch.testing.assert_close(audio, model.decode(codes, scale), **AUDIO)


def published_codec(wav):
    """The released shape; its random weights keep a signal as loud as it is."""
    cfg = OmegaConf.load(GOLDEN / "checkpoints/encodec_32khz_native.xp_cfg.yaml")
    torch.manual_seed(0)
    model = get_compression_model(cfg).eval()
    for name, weight in model.named_parameters():
        if name.endswith("weight_g"):
            weight.mul_(1.75)
    latent = model.encoder(wav)
    for codebook in model.quantizer.codebooks:
        codebook.embed.mul_(latent.std())
    return model


@pytest.mark.slow
@torch.no_grad()
def test_the_published_size_is_coded_as_the_whole(song, whole):
    wav = song.reshape(1, 1, -1).repeat(1, 1, 2)[..., : 1001 * 640 - 77]
    model = published_codec(wav[..., :32000])
    latent, (codes, _) = model.encoder(wav), model.encode(wav)
    audio = model.decode(codes)
    assert audio.std() > 0.1
    assert len(codes.unique()) > 100
    whole()
    torch.testing.assert_close(latent, model.encoder(wav), **AUDIO)
    torch.testing.assert_close(audio, model.decode(codes), **AUDIO)
    # Where two vectors are as near, rounding may choose.
    assert (model.encode(wav)[0] == codes).float().mean() > 0.999


class OlderCudnn:
    """The settings as torch 2.8 has them."""

    def __getattr__(self, name):
        if name == "conv":
            raise AttributeError(name)
        if name == "rnn":  # a module, without settings
            return object()
        return getattr(CUDNN, name)

    def __setattr__(self, name, value):
        setattr(CUDNN, name, value)


@pytest.fixture
def usual_cudnn():
    yield
    CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "tf32"
    CUDNN.allow_tf32 = True


@pytest.mark.usefixtures("usual_cudnn")
@pytest.mark.parametrize("settings", ["as they are", "older names", "newer names", "older torch"])
@torch.no_grad()
def test_a_gpu_rounds_no_more_than_a_cpu(settings, monkeypatch):
    """By cuDNN's settings, which are as they were afterwards, however they were made."""
    model, cudnn, seen = codec("len0"), CUDNN, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = cudnn.conv, cudnn.rnn
    if settings == "older names":
        cudnn.allow_tf32 = False
    elif settings == "newer names":
        cudnn.conv.fp32_precision = "ieee"
    elif settings == "older torch":
        monkeypatch.setattr(torch.backends, "cudnn", OlderCudnn())

    def now():
        return [part.fp32_precision for part in parts], cudnn.deterministic

    def note(inner):
        def noted(*arguments):
            seen.append(now())
            return inner(*arguments)

        return noted

    before = now()
    for name in ("encode", "decode"):
        monkeypatch.setattr(model.quantizer, name, note(getattr(model.quantizer, name)))
    codes, _ = model.encode(torch.zeros(1, 1, 6400))
    model.decode(codes)
    model.stream().push(codes, last=True)
    assert len(seen) == 3
    assert all("tf32" not in precisions and deterministic for precisions, deterministic in seen)
    assert now() == before
    assert not before[1]


def test_codes_need_no_gradient(song):
    """So that tools which forget `no_grad` encode minutes all the same."""
    model = codec("renorm")
    codes, scale = model.encode(song[:, :1].requires_grad_())
    assert codes.dtype == torch.long
    assert scale.requires_grad


@pytest.mark.parametrize("case", ["len0", "reflect", "causal", "renorm"])
@pytest.mark.parametrize("stereo", ["mono", "per_codebook", "per_timestep"])
def test_streamed_pieces_are_what_decode_gives(case, stereo):
    rng, model = draws(), codec(case)
    if stereo != "mono":
        model = InterleaveStereoCompressionModel(model, per_timestep=stereo == "per_timestep")
    half = 2 if stereo == "per_timestep" else 1
    for frames in (1, 2, 5, 30, 60):
        codes = tiny_codes(frames * half, 2, model.num_codebooks)
        scale = torch.rand(2, model.channels) if case == "renorm" else None
        expected = model.decode(codes, scale).detach()
        for sizes in ([1], [frames * half], [1, 2, 7, 60], [0, 3]):
            decoder = model.stream(scale)
            audio = [decoder.push(piece, last) for piece, last in pieces(codes, rng, sizes)]
            assert not audio[-1].requires_grad
            torch.testing.assert_close(torch.cat(audio, dim=-1), expected, **AUDIO)


def test_a_streaming_decoder_waits_for_few_frames():
    """Audio is given but for what the next frames change."""
    decoder = codec().stream()
    given = [decoder.push(tiny_codes(1), last=False).shape[-1] for _ in range(30)]
    assert max(given) == 640
    assert sum(given) > 24 * 640
    assert given[-1] == 640


def test_the_last_codes_may_end_the_clip():
    model, codes = codec(), tiny_codes(30)
    decoder = model.stream()
    audio = [decoder.push(codes[..., :10], last=False), decoder.push(codes[..., 10:], last=True)]
    torch.testing.assert_close(torch.cat(audio, dim=-1), model.decode(codes), **AUDIO)


@torch.no_grad()
def test_long_work_reports_itself(caplog, monkeypatch, song):
    for name in ("_QUIET_ENCODING_S", "_QUIET_DECODING_S"):
        monkeypatch.setattr(f"audiocraft.models.encodec.{name}", 0.0)
    caplog.set_level(logging.INFO)
    model = codec()
    model.decode(tiny_codes(1203))
    wav = song.reshape(1, 1, -1)
    model.encode(wav)
    assert [record.message.partition(" frames,")[0] for record in caplog.records] == [
        "decoding:  41 %, 496 of 1203",
        "decoding:  82 %, 996 of 1203",
        "decoding: 100 %, 1203 of 1203",
        "encoding audio:  62 %, 496 of 800",
        "encoding audio: 100 %, 800 of 800",
    ]


# Anonymous memory that encoding and decoding take at most, beyond what was there, in MB.
MEASURE = """
import json, sys, threading, time
import torch
from audiocraft.models.encodec import EncodecModel, InterleaveStereoCompressionModel
from audiocraft.modules.seanet import SEANetConfig
from audiocraft.quantization.vq import ResidualVectorQuantizer

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith("RssAnon"))

def peak(work):
    before, most, done = anonymous(), [0.0], threading.Event()
    def watch():
        while not done.is_set():
            most[0] = max(most[0], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return most[0] - before, result

torch.set_num_threads(1)
filters, seconds, channels = map(int, sys.argv[1:])
quantizer = ResidualVectorQuantizer(128, 4, 2048)
mono = EncodecModel(SEANetConfig(n_filters=filters), quantizer, 32000)
codec = mono if channels == 1 else InterleaveStereoCompressionModel(mono)
codec = codec.eval().requires_grad_(False)
codec.decode(codec.encode(torch.randn(1, channels, 32000))[0])
wav = torch.rand(1, channels, seconds * 32000)
encoding, (codes, _) = peak(lambda: codec.encode(wav))
decoding, audio = peak(lambda: codec.decode(codes))
assert audio.shape == wav.shape
print(json.dumps([encoding, decoding]))
"""


def peak_mb(filters, seconds, channels=2):
    """Encoding and decoding, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, *map(str, (filters, seconds, channels))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_memory_is_bounded():
    """As a whole the outermost layer alone has 82 MB, several times."""
    encoding, decoding = peak_mb(8, 40)
    audio = 40 * 32000 * 2 * 4 / 1e6
    assert encoding < 120
    assert decoding < audio + 120


@pytest.mark.slow
def test_ten_minutes_take_no_more_than_one():
    encoding, decoding = peak_mb(8, 600)
    audio = 600 * 32000 * 2 * 4 / 1e6
    assert encoding < 120
    assert decoding < audio + 120


@pytest.mark.slow
def test_memory_is_bounded_at_the_published_size():
    encoding, decoding = peak_mb(64, 40)
    audio = 40 * 32000 * 2 * 4 / 1e6
    assert encoding < 400
    assert decoding < audio + 400


@pytest.mark.slow
def test_ten_minutes_at_the_published_size():
    """Of mono: stereo takes twice as long, in pieces of half the length."""
    encoding, decoding = peak_mb(64, 600, channels=1)
    audio = 600 * 32000 * 4 / 1e6
    assert encoding < 500
    assert decoding < audio + 400
