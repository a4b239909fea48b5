import copy
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import AssetError, InputError, TooLargeError, WeightsError
from audiocraft.models import MultiBandDiffusion, multibanddiffusion
from audiocraft.models.builders import get_compression_model, get_debug_compression_model
from audiocraft.models.encodec import InterleaveStereoCompressionModel
from audiocraft.models.multibanddiffusion import DiffusionProcess, load_diffusion_models
from audiocraft.modules.unet_diffusion import DiffusionUnet
from tests.golden_data import GOLDEN, load, meta
from tools.make_diffusion import BOTTLENECKS, write_diffusion

DATA = load("mbd_tiny/data")
META = meta("mbd_tiny")
FILE = GOLDEN / "mbd_tiny/mbd_tiny.th"
PACKAGE = multibanddiffusion.read_package(FILE, FILE.name)


class Recorded:
    """The noises that the official package drew."""

    def __init__(self, noises):
        self.noises = iter(noises.clone())

    def __call__(self):
        return next(self.noises)


@pytest.fixture(scope="module")
def codec():
    model = get_compression_model(OmegaConf.create(meta("encodec_tiny")["config"]))
    model.load_state_dict(load("encodec_tiny/state"))
    return model.eval()


@pytest.fixture(scope="module")
def mono(codec):
    return MultiBandDiffusion(load_diffusion_models(FILE), codec)


@pytest.fixture(scope="module")
def stereo(codec, mono):
    return MultiBandDiffusion(mono.DPs, InterleaveStereoCompressionModel(codec))


@pytest.fixture
def file(tmp_path):
    """Writes the official layout, changed by a function."""

    def write(change):
        package = copy.deepcopy(PACKAGE)
        change(package)
        path = tmp_path / "changed.th"
        torch.save(package, path)
        return path

    return write


def codes_of(codebooks, frames, seed=0, rows=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(32, (rows, codebooks, frames), generator=generator)


@pytest.fixture
def generated(monkeypatch):
    """Generates a case from the noises that the official package drew."""

    def generate(mbd, case):
        noises = DATA["gen.noises"] if case == "gen" else load("mbd_tiny/noises_default")["noises"]
        recorded = Recorded(noises.to(mbd.device))
        monkeypatch.setattr(multibanddiffusion, "_Noise", lambda *_: recorded)
        wav = mbd.generate(DATA["emb"], step_list=META["gen.step_list"] if case == "gen" else None)
        assert next(recorded.noises, None) is None, "the official package draws as often"
        return wav.cpu()

    return generate


@pytest.mark.parametrize("case", ["gen", "gen_default_steps"])
def test_official_audio(mono, case, generated):
    # 1e-5 of the loudest sample, which is 18.
    torch.testing.assert_close(generated(mono, case), DATA[f"{case}.out"], rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["gen", "gen_default_steps"])
def test_official_audio_in_sixteen_bits(codec, case, generated):
    mbd = MultiBandDiffusion(load_diffusion_models(FILE, "cuda"), copy.deepcopy(codec).cuda())
    assert {band.model.dtype for band in mbd.DPs} == {torch.float16}
    expected = DATA[f"{case}.out"]
    # A CPU's float16 has an error of 8e-4 of the norm, its bfloat16 one of 6e-3.
    assert torch.dist(generated(mbd, case), expected) < 3e-3 * expected.norm()


def test_official_equaliser(mono):
    equalised = mono.re_eq(DATA["gen.out"], DATA["re_eq.ref"], n_bands=8)
    torch.testing.assert_close(equalised, DATA["re_eq.out"], rtol=0, atol=1e-5)
    as_it_was = mono.re_eq(DATA["gen.out"], DATA["re_eq.ref"], n_bands=8, strictness=0)
    torch.testing.assert_close(as_it_was, DATA["gen.out"], rtol=0, atol=1e-4)


def test_tokens_become_the_codecs_latent_then_audio_as_loud_as_the_codecs(mono):
    tokens = codes_of(4, 12)
    reference = mono.codec_model.decode(tokens)
    seen = []
    wav = mono.tokens_to_wav(tokens, seed=1, progress=lambda *done: seen.append(done))
    assert wav.shape == reference.shape
    assert seen == [(step, 40) for step in range(1, 41)]
    raw = mono.generate(mono.codec_model.decode_latent(tokens), seeds=[1])
    # 40 steps carry on what is rounded otherwise in another place of the memory: 2e-5 was seen.
    torch.testing.assert_close(wav, mono.re_eq(raw, reference), rtol=0, atol=1e-4)
    assert raw.std() > 10 * reference.std()  # of random weights
    assert 0.5 < wav.std() / reference.std() < 2


def test_a_seed_gives_the_same_audio_and_another_seed_another(mono):
    tokens = codes_of(4, 6, rows=2)
    both = mono.regenerate(mono.codec_model.decode(tokens), 32000, seed=3)
    assert torch.equal(both, mono.regenerate(mono.codec_model.decode(tokens), 32000, seed=3))
    assert (both - mono.regenerate(mono.codec_model.decode(tokens), 32000, seed=5)).std() > 0.1
    # An item's noise does not depend on the items beside it.
    emb = mono.codec_model.decode_latent(tokens)
    pair = mono.generate(emb, seeds=[3, 4])
    torch.testing.assert_close(pair[1:], mono.generate(emb[1:], seeds=[4]), rtol=0, atol=1e-4)
    torch.manual_seed(7)
    first = mono.tokens_to_wav(tokens)
    torch.manual_seed(7)
    assert torch.equal(first, mono.tokens_to_wav(tokens))


def test_each_channel_carries_what_its_own_codes_say(stereo):
    tokens = codes_of(8, 16)
    wav = stereo.tokens_to_wav(tokens, seed=2)
    assert wav.shape == (1, 2, 16 * 640)
    rounding = 1e-5 * wav.abs().max().item()
    assert (wav[:, 0] - wav[:, 1]).abs().max() > 100 * rounding
    swapped = tokens.unflatten(1, (4, 2)).flip(2).flatten(1, 2)
    flipped = stereo.tokens_to_wav(swapped, seed=2)
    torch.testing.assert_close(flipped, wav.flip(1), rtol=0, atol=rounding)


def test_a_channel_hears_nothing_of_the_other(stereo, mono):
    """Before both are equalised."""
    tokens = codes_of(8, 10)
    latents = stereo._latents(tokens)
    both = stereo._generate(latents, 6400, 2, None)
    left, right = stereo.codec_model.get_left_right_codes(tokens)
    for channel, codes in enumerate((left, right)):
        alone = mono.generate(mono.codec_model.decode_latent(codes), seeds=[2])
        torch.testing.assert_close(both[:, channel : channel + 1], alone, rtol=0, atol=1e-4)


def test_the_middle_of_a_stereo_image_stays_in_the_middle(stereo, mono):
    left = codes_of(4, 12)
    wav = stereo.tokens_to_wav(left.repeat_interleave(2, dim=1), seed=2)
    loudest = wav.abs().max().item()
    torch.testing.assert_close(wav[:, 0], wav[:, 1], rtol=0, atol=1e-5 * loudest)
    alone = mono.tokens_to_wav(left, seed=2)
    torch.testing.assert_close(wav[:, :1], alone, rtol=0, atol=1e-3 * loudest)


def test_channels_are_equalised_together(stereo):
    """A quiet channel stays quieter than the other by as much as the diffusion made it."""
    wav = torch.randn(1, 2, 9000, generator=torch.Generator().manual_seed(0))
    wav[:, 1] *= 0.1
    reference = torch.randn(1, 2, 9000, generator=torch.Generator().manual_seed(1))
    left, right = stereo.re_eq(wav, reference)[0]
    assert 0.08 < right.std() / left.std() < 0.12


@pytest.mark.parametrize("kept", [2**30, 0], ids=["kept", "computed again"])
def test_chunked_equals_whole(stereo, kept, monkeypatch):
    """With LSTM and transformer at the bottom, which hear all of the clip."""
    tokens = codes_of(8, 12)
    monkeypatch.setattr("audiocraft.modules.unet_diffusion._WINDOW", {"cpu": 2**26})
    whole = stereo.tokens_to_wav(tokens, seed=4)
    monkeypatch.setattr("audiocraft.modules.unet_diffusion._WINDOW", {"cpu": 2**12})
    monkeypatch.setattr("audiocraft.modules.unet_diffusion._MOST_BYTES", kept)
    monkeypatch.setattr("audiocraft.modules.tracks._FEWEST_FRAMES", 8)
    monkeypatch.setattr("audiocraft.modules.band_filters.CHUNK", 3000)
    chunked = stereo.tokens_to_wav(tokens, seed=4)
    loudest = whole.abs().max().item()
    torch.testing.assert_close(chunked, whole, rtol=0, atol=3e-4 * loudest)


def test_long_clips_are_decoded_one_by_one_to_the_same_audio(stereo, monkeypatch):
    tokens = codes_of(8, 6, rows=2)
    together = stereo.tokens_to_wav(tokens, seed=5)
    monkeypatch.setattr("audiocraft.modules.unet_diffusion._TOGETHER_BYTES", {"cpu": 1})
    seen = []
    apart = stereo.tokens_to_wav(tokens, seed=5, progress=lambda *done: seen.append(done))
    assert seen[-1] == (160, 160)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5 * together.abs().max().item())


def test_cancelled_within_one_network_evaluation(mono):
    evaluations = []
    model = mono.DPs[0].model
    handle = model.register_forward_hook(lambda *_: evaluations.append(1))

    def progress(done, _total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mono.tokens_to_wav(codes_of(4, 6), progress=progress)
    handle.remove()
    assert len(evaluations) == 3


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_networks_of_another_shape(tmp_path, codec, bottleneck):
    """Width, depth and bottleneck come from the file."""
    path = tmp_path / "other.th"
    write_diffusion(path, 16, bands=3, hidden=16, depth=2, growth=1.5, bottleneck=bottleneck)
    mbd = MultiBandDiffusion(load_diffusion_models(path), codec)
    assert mbd.DPs[1].model.config.channels == [16, 24]
    assert [band.sample_processor is None for band in mbd.DPs] == [True, True, False]
    tokens = codes_of(4, 3)
    wav = mbd.tokens_to_wav(tokens, seed=0)
    assert wav.shape == (1, 1, 3 * 640)
    assert wav.isfinite().all()
    assert (wav - mbd.tokens_to_wav((tokens + 1) % 32, seed=0)).abs().max() > 1e-3 * wav.abs().max()


def test_a_recording_is_regenerated_at_its_own_rate_and_in_the_codecs_channels(stereo):
    wav = stereo.codec_model.decode(codes_of(8, 10))
    same = stereo.regenerate(wav, 32000, seed=3)
    assert same.shape == wav.shape == (1, 2, 6400)
    slow = stereo.regenerate(convert_audio(wav, 32000, 16000, 1), 16000, seed=3)
    assert slow.shape == (1, 2, 3200)


def test_what_cannot_be_decoded_with(mono, codec):
    with pytest.raises(InputError, match="n_bands is 1, it must be 2 or more"):
        mono.re_eq(DATA["gen.out"], DATA["re_eq.ref"], n_bands=1)
    with pytest.raises(InputError, match="n_bands is 1, it must be 2 or more"):
        mono.tokens_to_wav(codes_of(4, 10), n_bands=1, progress=pytest.fail)
    elsewhere = copy.deepcopy(codec).to("meta")
    with pytest.raises(
        InputError, match="The diffusion is on cpu and the codec on meta: give both"
    ):
        MultiBandDiffusion(mono.DPs, elsewhere)


def set_unet(**settings):
    def change(package):
        for key, value in settings.items():
            package[0]["cfg"].diffusion_unet[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda package: package.pop(1), "1"),
        (lambda package: package.pop("n_bands"), "n_bands"),
        (lambda package: package[0].pop("cfg"), "cfg"),
        (lambda package: package[0].update(cfg=None), "a band has no cfg"),
        (lambda package: package[0]["model_state"].popitem(), "1 tensors are missing"),
        (lambda package: package[1].update(processor_state={}), "split_bands"),
        (set_unet(cross_attention=True), "cross_attention is True, only False is supported"),
        (set_unet(hidden=8), "has the shape"),
        (set_unet(hidden=6), "num_channels"),
        (set_unet(transformer=True), "transformer is True, with 0 layers of one"),
        (set_unet(kernel=7), "kernel 7 and stride 4"),
        (set_unet(depth=10**9), "depth is 1000000000"),
        (set_unet(hidden="${oc.env:HOME}"), "asks for values of this machine"),
        (lambda package: package.update(n_bands=0), "n_bands is 0"),
        (lambda package: package[0]["cfg"].schedule.update(clip="loud"), "loud"),
    ],
)
def test_what_is_wrong_with_a_file(file, change, reason):
    with pytest.raises(WeightsError, match=r"changed\.th is not a file of MultiBand.*") as error:
        load_diffusion_models(file(change))
    assert reason in str(error.value)
    assert str(error.value).endswith("): give another.")


def test_settings_that_a_file_leaves_out_are_the_official_ones(file):
    def forget(package):
        for band in (0, 1):
            for name in ("clip", "noise_scale"):
                package[band]["cfg"].schedule.pop(name, None)

    bands = load_diffusion_models(file(forget))
    assert [(b.noise_schedule.clip, b.noise_schedule.noise_scale) for b in bands] == [(5, 1)] * 2


def test_memory_that_runs_out_does_not_make_a_file_wrong(monkeypatch):
    def of_a_gpu(*_):
        raise torch.OutOfMemoryError

    def of_a_cpu(*_):
        torch.empty(2**60, dtype=torch.uint8)

    for run_out, kind in ((of_a_gpu, torch.OutOfMemoryError), (of_a_cpu, RuntimeError)):
        monkeypatch.setattr(multibanddiffusion, "assign_state", run_out)
        with pytest.raises(kind):
            load_diffusion_models(FILE)


def test_files_of_another_kind(tmp_path):
    release = GOLDEN / "tiny_release/mono/state_dict.bin"
    (tmp_path / "noise").write_bytes(b"no file of torch")

    class Code:
        def __reduce__(self):
            return exec, ("raise SystemExit",)

    torch.save({"n_bands": Code()}, tmp_path / "code")
    for path in (release, tmp_path / "noise", tmp_path / "code"):
        with pytest.raises(WeightsError, match=f"{path.name} is not a file of MultiBand"):
            load_diffusion_models(path)
    with pytest.raises(WeightsError, match=r"There is no .*/mbd_musicgen_32khz\.th"):
        load_diffusion_models(tmp_path)


def test_the_codec_must_be_the_one_that_it_was_made_for(mono, file):
    with pytest.raises(InputError, match="16 channels to audio at 32000 Hz, the codec has 32 chan"):
        MultiBandDiffusion(mono.DPs, get_debug_compression_model())
    bands = load_diffusion_models(file(lambda package: package.update(sample_rate=24000)))
    with pytest.raises(InputError, match="at 24000 Hz, the codec has 16 channels at 32000 Hz"):
        MultiBandDiffusion(bands, mono.codec_model)


def test_memory_is_asked_for_in_gigabytes(mono, stereo, monkeypatch):
    minute = 60 * 50
    assert mono.memory(10 * minute) > 2 * mono.memory(minute)
    need = stereo.memory(10 * minute)
    stereo.check_memory(10 * minute, need)
    said = (
        rf"multi_band_diffusion needs {need / 1e9:.1f} GB of memory for 600 s of music, "
        r"0\.0 GB are free on cpu: make duration shorter, or switch it off\."
    )
    with pytest.raises(InputError, match=said):
        stereo.check_memory(10 * minute, 10**6)

    def of_a_gpu(*_, **_more):
        raise torch.OutOfMemoryError

    def of_a_cpu(*_, **_more):
        torch.empty(2**60, dtype=torch.uint8)

    for too_large in (of_a_gpu, of_a_cpu):
        monkeypatch.setattr(DiffusionProcess, "generate", too_large)
        with pytest.raises(
            TooLargeError, match=r"needs .* GB of memory for 0\.2 s of music on cpu"
        ):
            mono.tokens_to_wav(codes_of(4, 10))

    def otherwise_wrong(*_, **_more):
        raise RuntimeError("something else")

    monkeypatch.setattr(DiffusionProcess, "generate", otherwise_wrong)
    with pytest.raises(RuntimeError, match="something else"):
        mono.tokens_to_wav(codes_of(4, 10))


def test_memory_is_that_of_the_networks_or_of_the_equaliser(mono, stereo, monkeypatch):
    """Whichever is more: they do not work at once."""
    samples = 60 * 32000
    signals = 4 * 4 * samples
    monkeypatch.setattr(DiffusionUnet, "memory", lambda *_: 0)
    need = mono.memory(60 * 50) - signals
    assert need > 240_000_000  # which were measured
    assert mono.memory(600 * 50) - 10 * signals == need  # a chunk at a time
    assert stereo.memory(60 * 50) - 2 * signals == need  # and a channel
    assert mono.memory(50) < need / 4
    for networks, expected in ((need // 2, need), (2 * need, 2 * need)):
        monkeypatch.setattr(DiffusionUnet, "memory", lambda *_, most=networks: most)
        assert mono.memory(60 * 50) - signals == expected


def test_found_in_the_store_and_fetched_only_when_asked_for(codec, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path))
    with pytest.raises(AssetError, match=r"mbd_musicgen_32khz\.th .* run scripts/download mbd"):
        MultiBandDiffusion.get_mbd_musicgen(codec_model=codec)
    folder = tmp_path / "facebook/multiband-diffusion"
    folder.mkdir(parents=True)
    (folder / "mbd_musicgen_32khz.th").write_bytes(FILE.read_bytes())
    mbd = MultiBandDiffusion.get_mbd_musicgen(codec_model=codec)
    assert len(mbd.DPs) == 2
    assert mbd.sample_rate == 32000


PEAK = """
import sys, torch
from audiocraft.modules import tracks, unet_diffusion as u
from tests.memory import peak_mb
torch.set_num_threads(1)
torch.manual_seed(0)
shape = u.UnetConfig(24, 3, 2, 999, 1, 4, 8, 4, 16, True, False, 0, 0, 1000)
model = u.DiffusionUnet(shape).eval().requires_grad_(False)
seconds, window, kept = (int(argument) for argument in sys.argv[1:])
x, condition = torch.randn(1, 1, 32000 * seconds), model.condition(torch.zeros(1, 16, 5))
model(x[..., :32000], 5, condition)
before = peak_mb()
model(x, 5, condition, tracks.Sweep(1, window, kept))
print(round(peak_mb() - before))
"""


def peak(seconds, window, kept):
    """MB that an evaluation adds."""
    arguments = [sys.executable, "-c", PEAK, *map(str, (seconds, window, kept))]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_memory_of_long_clips():
    """Activations of 80 s at 24 channels have 61 MB each."""
    whole = peak(80, 2**30, 2**30)
    windows = peak(80, 2**17, 2**30)
    assert windows < 0.6 * whole
    # Where none is kept the clip's length counts no more, but for the audio itself; what the
    # allocator holds back differs by some 60 MB from run to run.
    assert peak(80, 2**17, 0) < peak(20, 2**17, 0) + 150


PEAK_OF_DECODING = """
import sys, torch
from omegaconf import OmegaConf
from audiocraft.models.builders import get_compression_model
from audiocraft.models.multibanddiffusion import MultiBandDiffusion, load_diffusion_models
from audiocraft.modules import diffusion_schedule
from tests.golden_data import meta
from tests.memory import peak_mb
path, seconds = sys.argv[1], int(sys.argv[2])
diffusion_schedule._STRIDE = 500  # two evaluations
codec = get_compression_model(OmegaConf.create(meta("encodec_tiny")["config"])).eval()
mbd = MultiBandDiffusion(load_diffusion_models(path), codec)
tokens = torch.zeros(1, codec.num_codebooks, 50 * seconds, dtype=torch.long)
mbd.tokens_to_wav(tokens[..., :50], seed=0)
before = peak_mb()
mbd.tokens_to_wav(tokens, seed=0)
print(round(peak_mb() - before), mbd.memory(50 * seconds) // 2**20)
"""


def peak_of_decoding(path, seconds):
    """MB that it adds, and those that it was said to need."""
    arguments = [sys.executable, "-c", PEAK_OF_DECODING, path, str(seconds)]
    said = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    return map(int, said.split())


@pytest.mark.slow
def test_memory_of_the_equaliser(tmp_path):
    """Of 10 s through small networks, which take less."""
    path = tmp_path / "small.th"
    write_diffusion(path, 16, bands=1, hidden=4, depth=3, growth=2)
    taken, told = peak_of_decoding(path, 10)
    assert told / 3 < taken < told


@pytest.mark.slow
def test_memory_of_decoding(tmp_path):
    """With an LSTM at the bottom, which hears all of the clip, and everything else in windows."""
    path = tmp_path / "lstm.th"
    write_diffusion(path, 16, bands=1, hidden=24, depth=3, growth=2, bottleneck="lstm")
    peaks = []
    for seconds in (40, 120):
        taken, told = peak_of_decoding(path, seconds)
        peaks.append(taken)
    # Activations of 80 s have 61 MB each: 5 of them were seen, and 10 to 13 in a single window.
    assert peaks[1] - peaks[0] < 8 * 61
    assert taken < told  # seconds that are let in do fit
