"""Each part keeps its tensors on its device, shown with tensors that claim to be on a GPU.

torch's fake tensors have a shape, a type and a device, and no numbers: an operation gives another
one, or says that what it was given lies on two devices. So a machine without a GPU finds here what
would fail on one. Left out are the kernels of `audiocraft.generation.fused`, since Triton takes no
fake tensors, and backward passes, which need the GPU's own threads.
"""

import copy
import math
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from audiocraft.data import audio_utils
from audiocraft.data.audio_utils import convert_audio, normalize_audio
from audiocraft.data.codes import encode_chunk
from audiocraft.generation.engine import Guidance
from audiocraft.generation.sampling import RowNoise, SamplingParams, sample_next
from audiocraft.models import MultiBandDiffusion, MusicGen, encodec
from audiocraft.models.builders import get_compression_model
from audiocraft.models.encodec import InterleaveStereoCompressionModel
from audiocraft.models.loaders import assign_state, load_models, read_checkpoint
from audiocraft.models.multibanddiffusion import load_diffusion_models
from audiocraft.modules.conditioners import (
    ConditioningAttributes,
    WavCondition,
    null_wav,
    nullify,
)
from audiocraft.modules.lora import adapter_parameters, attach, lora_config, merge
from audiocraft.modules.stems import StemSeparator, load_separator
from audiocraft.quantization.training import begin
from audiocraft.solvers import compression
from audiocraft.solvers.conditions import ConditionSettings
from audiocraft.solvers.musicgen import Trainer
from tests.fake_gpu import CPU, CUDA, PLACES, on_gpu, places, silence
from tests.golden_data import GOLDEN
from tests.models.test_encodec import codec
from tests.separators import put_htdemucs
from tests.solvers.test_compression import DECODER, SETTINGS, config
from tests.solvers.training import CODEBOOKS, Case, clips, model
from tools.make_diffusion import BOTTLENECKS, write_diffusion

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="real tensors show it there")


@pytest.mark.parametrize(
    "mixed",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: torch.cat([cpu, gpu]),
        lambda gpu, cpu: F.conv1d(cpu[None], gpu[None, None]),
        lambda gpu, cpu: F.embedding(cpu.long(), gpu[:, None]),
        lambda gpu, cpu: cpu[gpu.long()],
        lambda gpu, cpu: gpu.index_put_((cpu.long(),), cpu),
        lambda gpu, _: gpu.exponential_(generator=torch.Generator()),
        lambda _, cpu: cpu.normal_(generator=torch.Generator("cuda")),
        lambda gpu, _: gpu.pin_memory(),
        lambda gpu, _: gpu.numpy(),
    ],
)
def test_what_a_gpu_would_refuse_is_refused(mixed):
    with on_gpu(), pytest.raises((RuntimeError, TypeError)):
        mixed(silence(3), silence(3, place="cpu"))


def test_what_a_gpu_would_take_is_taken():
    with on_gpu():
        gpu, cpu = silence(3), silence(3, place="cpu")
        assert places([gpu + torch.tensor(1.0), gpu[cpu.long()], gpu.copy_(cpu)]) == {CUDA}
        assert places(cpu.copy_(gpu)) == {CPU}


def test_weights_are_loaded_onto_the_gpu():
    checkpoint = read_checkpoint(GOLDEN / "tiny_release/mono/compression_state_dict.bin")
    with on_gpu():
        with torch.device("meta"):
            ours = get_compression_model(checkpoint.cfg)
        assign_state(ours, checkpoint.state, "cuda")
        assert places([*ours.parameters(), *ours.buffers()]) == {CUDA}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("rate", "channels"), [(32000, 1), (44100, 2), (48000, 6)])
def test_audio_is_converted_where_it_is(place, rate, channels):
    with on_gpu():
        wav = silence(channels, 20000, place=place)
        converted = convert_audio(wav, rate, 32000, 2)
        assert converted.shape == (2, 20000 * 32000 // rate)
        levelled = [normalize_audio(converted, strategy=way) for way in ("peak", "rms", "clip")]
        assert places([converted, levelled]) == places(wav)


@pytest.fixture
def bag(tmp_path):
    """Models of a stem separator."""
    _, folder = put_htdemucs(tmp_path)
    return load_separator(folder.joinpath, "htdemucs", "cpu")._bag


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("seconds", [0.5, 10.0])
def test_stems_are_where_the_recording_is(bag, place, seconds):
    with on_gpu():
        separator = StemSeparator(bag, "cuda")
        assert places(list(separator.parameters())) == {CUDA}
        samples = round(44100 * seconds)
        wav = silence(2, 2, samples, place=place)
        stems = separator.separate(wav, 44100)
        assert stems.shape == (2, 4, 2, samples)
        melody = separator.mix(silence(1, 1, 32000, place=place), 32000, ["vocals", "other"])
        assert melody.shape == (1, 2, 44100)
        assert places([stems, melody]) == places(wav)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("batch", [1, 3])
def test_stems_of_tracks_are_where_the_separator_is(bag, place, batch):
    """Tracks of a dataset come from files, in blocks on the CPU."""
    lengths = [round(44100 * seconds) for seconds in (0.5, 3.0, 4.0, 11.3)]
    with on_gpu():
        separator = StemSeparator(bag, "cuda")
        blocks = [silence(2, length, place=place).split(30011, dim=1) for length in lengths]
        parts = list(separator.separate_tracks(blocks, batch))
        assert places([part.stems for part in parts]) == {CUDA}
        for track, length in enumerate(lengths):
            assert sum(part.stems.shape[-1] for part in parts if part.track == track) == length


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Language model and codec of a golden release on the CPU."""

    @cache
    def load(kind, dtype):
        folder = tmp_path_factory.mktemp(kind) / kind
        shutil.copytree(GOLDEN / "tiny_release" / kind, folder)
        shutil.copytree(GOLDEN / "t5_tiny", folder / "t5")
        return load_models(folder, "cpu", dtype)

    return lambda kind, dtype=torch.float16: copy.deepcopy(load(kind, dtype))


HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@HALVES
def test_text_is_encoded_on_the_gpu(loaded, dtype):
    """By a T5 that stays in float32."""
    lm, _ = loaded("mono", dtype)
    conditioner = lm.condition_provider.conditioners["description"]
    with on_gpu(lm):
        tokens = conditioner.tokenize(["happy rock", None, "sad slow piano, 120 bpm"])
        encoded, mask = conditioner(tokens)
        weights = [*conditioner.loaded[1].parameters()]
        assert places([tokens, encoded, mask, weights]) == {CUDA}
        assert (encoded.dtype, weights[0].dtype) == (dtype, torch.float32)


def melody_of(seconds, place="cuda", channels=1):
    """A melody, or none where it has no seconds."""
    samples = round(32000 * seconds)
    if not samples:
        return null_wav()
    wav = silence(1, channels, samples, place=place)
    return WavCondition(wav, torch.tensor([samples]), [32000], [None], [None])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("seconds", "separates", "training"),
    [
        ([0], True, False),
        ([0.01], False, True),
        ([2.0, 0.3, 0], False, True),
        ([2.0, 0.3, 0], True, False),
        ([40.0], True, False),
    ],
)
def test_melodies_are_heard_on_the_gpu(loaded, bag, place, seconds, separates, training):
    lm, _ = loaded("stereo-melody")
    conditioner = lm.condition_provider.conditioners["self_wav"].train(training)
    conditioner.use_masking = training
    conditioner._load_separator = (lambda device: StemSeparator(bag, device)) if separates else None
    with on_gpu(lm) as gpu:
        given = conditioner.tokenize([melody_of(length, place, 2) for length in seconds])
        melodies = sum(length > 0 for length in seconds)
        gpu.found = [melodies]
        encoded, mask = conditioner(given)
        assert places([given.wav, given.length, encoded, mask]) == {CUDA}
        assert encoded.shape[0] == len(seconds)
        assert training or encoded.shape[1] == conditioner.chroma_len
        assert encoded.dtype == torch.float16
        if separates and melodies:
            assert places([*conditioner.loaded[0].parameters()]) == {CUDA}


def items_of(lm):
    """Two items, one of which has all that a model follows."""
    items = [ConditioningAttributes(text={"description": text}) for text in ("happy rock", None)]
    for name in lm.condition_provider.wav_conditions:
        lm.condition_provider.conditioners[name]._load_separator = None
        items[0].wav[name], items[1].wav[name] = melody_of(1.5), null_wav()
    return items


@HALVES
@pytest.mark.parametrize("kind", ["mono", "stereo", "stereo-melody"])
@torch.no_grad()
def test_the_language_model_reads_on_the_gpu(loaded, kind, dtype):
    """Sequences as a whole, as training has them, where nothing is remembered."""
    lm, _ = loaded(kind, dtype)
    with on_gpu(lm):
        items = items_of(lm)
        conditions = lm.encode_conditions(items)
        prefix, source = lm.fuser(conditions)
        assert (prefix is None) == ("melody" not in kind)
        assert (source is None) == ("melody" in kind)
        codes = torch.zeros(2, lm.num_codebooks, 17, dtype=torch.long, device="cuda")
        logits = lm(codes, items)
        assert (logits.shape, logits.dtype) == ((2, lm.num_codebooks, 17, lm.card), dtype)
        output = lm.compute_predictions(codes, [], conditions)
        assert places([conditions, prefix, source, logits, output.logits, output.mask]) == {CUDA}


@pytest.mark.parametrize("kind", ["mono", "stereo", "stereo-melody"])
@pytest.mark.parametrize(
    ("dtype", "guidance"),
    [
        (torch.float32, Guidance(3.0)),
        (torch.float16, Guidance(3.0)),
        (torch.float16, Guidance(3.0, 2.0)),
    ],
)
@torch.no_grad()
def test_the_language_model_writes_on_the_gpu(loaded, kind, dtype, guidance):
    """A prompt and then steps, whose keys and values are kept."""
    lm, _ = loaded(kind, dtype)
    with on_gpu(lm):
        items = items_of(lm)
        wav_only = [] if guidance.beta is None else nullify(items, keep_wav=True)
        state = lm.start([*items, *wav_only, *nullify(items)], 8)
        rows = 2 * guidance.num_branches
        sequence = torch.zeros(rows, lm.num_codebooks, 8, dtype=torch.long, device="cuda")
        for start, stop in ((0, 5), (5, 6), (6, 7)):
            logits = lm.advance(state, sequence[..., start:stop])
            guided = guidance.combine(logits)
            assert (logits.dtype, guided.dtype) == (dtype, torch.float32)
            assert places([logits, guided]) == {CUDA}
        cache = state.cache
        assert places([cache.keys, cache.values, state.memory]) == {CUDA}
        assert cache.keys.dtype == cache.values.dtype == dtype


@pytest.mark.parametrize(
    "choice", [{}, {"temp": 0.7, "top_k": 5}, {"top_k": 0}, {"top_p": 0.9}, {"use_sampling": False}]
)
@pytest.mark.parametrize("seed", [None, 3])
def test_tokens_are_drawn_on_the_gpu(choice, seed):
    with on_gpu():
        noise = RowNoise(seed, 2, CUDA)
        tokens = sample_next(silence(2, 4, 300), SamplingParams(**choice), noise)
        assert (tokens.shape, tokens.dtype) == ((2, 4), torch.long)
        assert places(tokens) == {CUDA}


@pytest.fixture
def short_pieces(monkeypatch):
    """The codec decodes blocks of 6 frames, in pieces of 5."""
    for module in ("modules.seanet", "models.encodec", "generation.windows"):
        monkeypatch.setattr(f"audiocraft.{module}.BLOCK_FRAMES", 6)
    monkeypatch.setattr("audiocraft.modules.seanet._PIECE_FRAMES", 1)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    ("case", "form"),
    [
        ("len0", "mono"),
        ("reflect", "mono"),
        ("causal", "mono"),
        ("renorm", "mono"),
        ("len0", "per_codebook"),
        ("renorm", "per_codebook"),
        ("renorm", "per_timestep"),
    ],
)
@pytest.mark.parametrize("frames", [4, 15])
@torch.no_grad()
def test_the_codec_works_on_the_gpu(case, form, frames):
    """A clip as a whole, piece by piece, and streamed."""
    ours = codec(case)
    if form != "mono":
        ours = InterleaveStereoCompressionModel(ours, per_timestep=form == "per_timestep")
    with on_gpu(ours):
        codes, scale = ours.encode(silence(2, ours.channels, frames * 640 - 77))
        audio = ours.decode(codes, scale)
        assert audio.shape == (2, ours.channels, frames * 640)
        decoder = ours.stream(scale)
        cuts = codes.split([1, 0, codes.shape[-1] - 1, 0], dim=-1)
        pieces = [decoder.push(piece, piece is cuts[-1]) for piece in cuts]
        assert torch.cat(pieces, dim=-1).shape == audio.shape
        assert places([codes, scale, audio, pieces]) == {CUDA}
        assert codes.dtype == torch.long


def test_the_codec_is_exact_while_it_works():
    cudnn = torch.backends.cudnn

    def settings():
        return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.deterministic

    before = settings()
    with on_gpu():
        with encodec.exact():
            assert settings() == ("ieee", "ieee", True)
        assert settings() == before


def music(lm, codec):
    """A model with a context of 10 frames."""
    items_of(lm)  # no separator
    return MusicGen("test", codec, lm, max_duration=0.2)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("seconds", [0.1, 0.3])
@pytest.mark.parametrize(
    ("kind", "method", "place"),
    [
        ("mono", "nothing", None),
        ("stereo", "text", None),
        ("mono", "continuation", "cpu"),
        ("stereo", "continuation", "cuda"),
        ("stereo-melody", "melody", "cpu"),
        ("stereo-melody", "melody", "cuda"),
    ],
)
def test_music_is_made_on_the_gpu(loaded, kind, method, place, seconds):
    """In one window and in several, which are decoded on a stream of their own."""
    lm, codec = loaded(kind)
    with on_gpu(lm, codec) as gpu:
        ours, main, reports = music(lm, codec), gpu.stream, []
        ours.set_generation_params(duration=seconds)
        ours.set_custom_progress_callback(lambda *report: reports.append(report))
        wav = silence(2, 1, 1764, place=place)
        texts = ["happy rock", None]
        if method == "nothing":
            audio, codes = ours.generate_unconditional(2, return_tokens=True)
        elif method == "text":
            audio, codes = ours.generate(texts, return_tokens=True)
        elif method == "melody":
            audio, codes = ours.generate_with_chroma(
                texts, [wav[0], None], 44100, return_tokens=True
            )
        else:
            audio, codes = ours.generate_continuation(wav, 44100, texts, return_tokens=True)
        assert audio.shape == (2, ours.audio_channels, seconds * 32000)
        assert codes.shape == (2, lm.num_codebooks, seconds * 50)
        assert places([audio, codes]) == {CUDA}
        assert audio.dtype == torch.float32
        assert reports[-1][0] == reports[-1][1]
        decoding = main.waited_for
        assert len(decoding) == (seconds > ours.max_duration)
        assert all(set(stream.waited_for) == {main} for stream in decoding)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9},
        {"use_sampling": False},
        {"two_step_cfg": True},
        {"cfg_coef_beta": 2.0},
        {"cfg_coef": 1.0},
        {"seed": 3},
    ],
)
def test_each_way_of_choosing_works_on_the_gpu(loaded, settings):
    lm, codec = loaded("stereo-melody")
    with on_gpu(lm, codec) as gpu:
        ours = music(lm, codec)
        if "two_step_cfg" in settings:
            gpu.found = [1, 0]  # of either step, the latter without a melody
        ours.set_generation_params(duration=0.1, **settings)
        _, codes = ours.generate_with_chroma(["a"], silence(1, 9000), 32000, return_tokens=True)
        assert codes.shape == (1, 8, 5)
        assert places(codes) == {CUDA}


@pytest.fixture
def diffusion(tmp_path, monkeypatch):
    """Networks with a processor among them, in 16 bit as on a GPU; each takes two steps."""
    monkeypatch.setattr("audiocraft.modules.diffusion_schedule._STRIDE", 500)

    def load(bottleneck):
        path = tmp_path / "mbd"
        write_diffusion(path, 16, 2, hidden=16, depth=2, growth=1.5, bottleneck=bottleneck)
        bands = load_diffusion_models(path)
        processors = [band.sample_processor for band in bands if band.sample_processor is not None]
        assert processors
        return bands, [*processors, *(band.model.half() for band in bands)]

    return load


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
@pytest.mark.parametrize("stereo", [False, True])
def test_diffusion_works_on_the_gpu(diffusion, bottleneck, stereo):
    bands, networks = diffusion(bottleneck)
    ours = InterleaveStereoCompressionModel(codec()) if stereo else codec()
    with on_gpu(ours, *networks) as gpu:
        mbd = MultiBandDiffusion(bands, ours)
        codes = torch.zeros(2, ours.num_codebooks, 4, dtype=torch.long, device="cuda")
        wav = mbd.tokens_to_wav(codes, n_bands=4)
        assert (wav.shape, places(wav)) == ((2, ours.channels, 4 * 640), {CUDA})
        assert gpu.waits == 2 * 2
        for place in PLACES:
            again = mbd.regenerate(silence(1, 1, 4800, place=place), 48000, seed=1)
            assert (again.shape, places(again)) == ((1, ours.channels, 4800), {CUDA})


def test_what_the_codec_hears_is_resampled_exactly(loaded, diffusion, monkeypatch):
    """A recording on the GPU, so that its codes are those that a CPU finds."""
    lm, own = loaded("mono")
    bands, networks = diffusion("transformer")
    other = codec()
    resample, precisions = audio_utils._resample, []

    def noted(wav, source, target):
        precisions.append(torch.backends.cudnn.conv.fp32_precision)
        return resample(wav, source, target)

    monkeypatch.setattr(audio_utils, "_resample", noted)
    with on_gpu(lm, own, other, *networks):
        ours = music(lm, own)
        ours.set_generation_params(duration=0.1)
        ours.generate_continuation(silence(1, 1, 1764), 44100)
        encode_chunk(other, silence(1, 4410), 44100, 0.2)
        MultiBandDiffusion(bands, other).regenerate(silence(1, 1, 4800), 48000, seed=1)
    assert precisions == ["ieee"] * 4


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kept", [2**30, 0])
def test_diffusion_of_long_clips_works_on_the_gpu(diffusion, monkeypatch, place, kept):
    """Window by window, with activations kept and computed again."""
    monkeypatch.setattr("audiocraft.modules.unet_diffusion._WINDOW", {"cuda": 2**12})
    monkeypatch.setattr("audiocraft.modules.unet_diffusion._MOST_BYTES", kept)
    monkeypatch.setattr("audiocraft.modules.tracks._FEWEST_FRAMES", 8)
    monkeypatch.setattr("audiocraft.modules.band_filters.CHUNK", 3000)
    bands, networks = diffusion("transformer")
    ours = codec()
    with on_gpu(ours, *networks):
        mbd = MultiBandDiffusion(bands, ours)
        sound = mbd.generate(silence(2, 16, 4, place=place), step_list=[999, 0])
        assert (sound.shape, places(sound)) == ((2, 1, 4 * 640), {CUDA})
        wav = silence(1, 2, 9000, place=place)
        assert places(mbd.re_eq(wav, torch.ones_like(wav), 4)) == places(wav)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("kind", "rate", "channels"),
    [
        ("mono", 44100, 2),
        ("mono", 48000, 6),
        ("stereo-melody", 44100, 2),
        ("stereo-melody", 32000, 1),
    ],
)
def test_chunks_are_encoded_on_the_gpu_and_kept_on_the_cpu(loaded, kind, place, rate, channels):
    lm, codec = loaded(kind)
    melodies = lm.condition_provider.wav_conditions
    extractor = lm.condition_provider.conditioners[melodies[0]].chroma if melodies else None
    with on_gpu(codec, *([extractor] if extractor else [])):
        wav = silence(channels, rate, place=place)
        for melody in (None, (silence(2, 44100, place=place), 44100)):
            chunk = encode_chunk(codec, wav, rate, 1.5, extractor, melody)
            assert chunk.codes.shape == (codec.num_codebooks, 75)
            assert chunk.codes.dtype == torch.int16
            assert (chunk.chroma is None) == (extractor is None)
            assert places([chunk.codes, chunk.chroma]) == {CPU}


TRAININGS = [
    Case(sixteen=True),
    Case("dadam", "mono", micro=3, sixteen=True, checkpointing=True),
    Case("prodigy", micro=2, ema_on_host=True),
    Case(kind="mono", lora_rank=4, micro=2, sixteen=True),
    Case("dadam", lora_rank=4, sixteen=True, checkpointing=True, ema_on_host=True),
]


@pytest.mark.parametrize(
    ("case", "conditions"),
    [
        *((case, "given") for case in TRAININGS),
        *((case, "dropped") for case in TRAININGS[:2]),
        (TRAININGS[0], "dropped as generated"),
    ],
)
def test_training_works_on_the_gpu(case, conditions):
    """But for the backward pass: in its place all that the loss depends on has a gradient."""
    lm = model(case.kind, case.lora_rank, frozen16=case.sixteen and case.lora_rank > 0)
    drops = ConditionSettings(
        cfg_p=0.0 if conditions == "given" else 1.0, null_as_generated="as" in conditions
    )
    data, updates = clips(num_codebooks=CODEBOOKS[case.kind]), []
    with on_gpu(lm):
        trainer = Trainer(lm, replace(case.settings(), conditions=drops))
        trainer.train(data, updates.append, 2)
        assert [update.number for update in updates] == [1, 2]
        assert places([(update.loss.sums, update.loss.counts) for update in updates]) == {CPU}
        weights = trainer._weights
        gradients = [weight.grad for weight in weights.values()]
        assert all(gradient is not None for gradient in gradients)
        assert places(weights) == places(gradients) == {CUDA}
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        kept = CPU if case.ema_on_host else CUDA
        assert (trainer.ema.steps, places(trainer.ema.average)) == (2, {kept})
        trainer.check_weights()
        assert math.isfinite(float(trainer.evaluate(data[:3]).total))
        exported = trainer.exported_state()
        assert places(exported) == {CPU}
        assert {half.dtype for half in exported.values()} == {torch.float16}
        state = tree_map_only(torch.Tensor, torch.Tensor.cpu, trainer.state_dict())
        trainer.load_state_dict(state)
        trainer.train(data, updates.append, 3)
        assert (places(weights), places(trainer.ema.average)) == ({CUDA}, {kept})


def test_adapters_are_made_and_merged_where_the_weights_are():
    lm = model("mono")
    with on_gpu(lm):
        attach(lm, lora_config(4), torch.Generator().manual_seed(0))
        assert places(adapter_parameters(lm)) == {CUDA}
        for place in PLACES:
            pair = silence(4, 16, place=place), silence(32, 4, place=place)
            assert places(merge(silence(32, 16), *pair, 1.0)) == {CUDA}


@pytest.mark.parametrize("settings", [SETTINGS, DECODER])
def test_a_codec_is_trained_on_the_gpu(settings):
    """Where codebooks begin is a number, so that they do not begin by themselves here."""
    ours = get_compression_model(config())
    with on_gpu(ours):
        trainer = compression.Trainer(ours, settings)
        for codebook in ours.quantizer.codebooks:
            begin(codebook, silence(40, 16), settings.codebooks, torch.Generator())
        assert trainer.train(silence(2, 1, 4000), 1e-3).number == 1
        assert places(trainer._weights) == places(trainer.ema.average) == {CUDA}
        assert all(weight.grad is not None for weight in trainer._weights.values())
        assert math.isfinite(trainer.evaluate([silence(1, 4000)]).si_sdr)
        assert places(trainer.exported_state()) == {CPU}
