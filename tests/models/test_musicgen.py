"""The official package's public interface, and its tokens."""

import math

import pytest
import torch

from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import InputError
from audiocraft.models import MusicGen
from audiocraft.models.loaders import load_compression_model, load_lm_model
from audiocraft.models.versions import VERSIONS
from tests.golden_data import load, meta

GREEDY = meta("generate_greedy")
DESCRIPTIONS = GREEDY["descriptions"]


def golden_model(release, kind):
    model = MusicGen.get_pretrained(str(release(kind)), device="cpu")
    if "melody" in kind:  # the fixtures were made without a separator
        conditioner = model.lm.condition_provider.conditioners["self_wav"]
        conditioner._get_stemmed_wav = lambda wav, rate: convert_audio(wav, rate, 32000, 1)
    return model


@pytest.mark.parametrize("kind", ["mono", "stereo", "melody", "stereo-melody"])
def test_as_loaded(release, kind):
    model, loaded = golden_model(release, kind), GREEDY[f"{kind}.api_as_loaded"]
    assert {name: getattr(model, name) for name in loaded} == loaded
    model.max_duration = 2
    model.set_generation_params()
    api = dict(GREEDY[f"{kind}.api"])
    assert model.generation_params == api.pop("default_generation_params")
    assert {name: getattr(model, name) for name in api} == api
    assert model.extend_stride == pytest.approx(1.2)
    assert model.duration == 30


@pytest.mark.parametrize("case", [case for case in GREEDY["cases"] if "api" in case])
def test_tokens(release, case):
    kind, _, variant = case.partition(".")
    info, golden = GREEDY["cases"][case], load(f"generate_greedy/{kind}")
    model = golden_model(release, kind)
    model.max_duration = GREEDY["max_duration_override"]
    model.set_generation_params(
        use_sampling=False,
        top_k=0,
        cfg_coef=3,
        duration=info["duration"],
        extend_stride=info.get("extend_stride", 1.2),
    )
    if variant == "api_uncond":
        wav, tokens = model.generate_unconditional(2, return_tokens=True)
    elif "continuation" in variant:
        prompt = golden[f"{kind}.api_prompt_wav"][None]
        wav, tokens = model.generate_continuation(
            prompt, 32000, DESCRIPTIONS[:1], return_tokens=True
        )
        prompt_tokens = golden[f"{kind}.api_prompt_tokens"]
        assert torch.equal(tokens[..., : prompt_tokens.shape[-1]], prompt_tokens)
    elif "chroma" in variant:
        melodies = [golden[f"{kind}.api_melody_wav0"], None][: info["shape"][0]]
        wav, tokens = model.generate_with_chroma(
            DESCRIPTIONS[: len(melodies)], melodies, 32000, return_tokens=True
        )
    else:
        wav, tokens = model.generate(DESCRIPTIONS[: info["shape"][0]], return_tokens=True)
    assert torch.equal(tokens, golden[case])
    whole = [info["shape"][0], 2 if "stereo" in kind else 1, round(32000 * info["duration"])]
    assert list(wav.shape) == info.get("wav_shape", whole)
    if f"{case}_wav" in golden:
        head = golden[f"{case}_wav"]
        torch.testing.assert_close(wav[..., : head.shape[-1]], head, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mono", "stereo"])
def test_official_programs_put_the_models_together_themselves(release, kind):
    """The codec is stereo where the language model is, and only once."""
    folder = release(kind)
    by_hand = MusicGen("mine", load_compression_model(folder), load_lm_model(folder))
    heard = []
    for model in (by_hand, MusicGen.get_pretrained(folder, device="cpu")):
        model.set_generation_params(duration=0.5, seed=3)
        heard.append(model.generate(["a song"]))
    assert list(heard[0].shape) == [1, 2 if kind == "stereo" else 1, 16000]
    assert torch.equal(*heard)
    again = MusicGen("mine", by_hand.compression_model, by_hand.lm)
    assert again.compression_model is by_hand.compression_model


@pytest.fixture(scope="module")
def debug():
    return MusicGen.get_pretrained("debug", device="cpu")


@pytest.fixture(scope="module")
def tiny():
    return MusicGen.get_pretrained("tiny", device="cpu")


def test_debug_model(debug):
    assert (debug.frame_rate, debug.sample_rate, debug.audio_channels) == (25, 32000, 1)
    debug.set_generation_params(duration=2.0, extend_stride=2.0)
    assert list(debug.generate(["youpi", "lapin dort"]).shape) == [2, 1, 64000]
    assert list(debug.generate_unconditional(3).shape) == [3, 1, 64000]
    prompt = torch.randn(2, 1, 32000)
    wav = debug.generate_continuation(prompt, 32000)
    assert list(wav.shape) == [2, 1, 64000]
    wav = debug.generate_continuation(prompt, 32000, ["youpi", "lapin dort"])
    assert list(wav.shape) == [2, 1, 64000]
    with pytest.raises(InputError, match="3 descriptions and 2 prompts"):
        debug.generate_continuation(prompt, 32000, ["youpi", "lapin dort", "one too many"])


def test_debug_model_beyond_its_context():
    debug = MusicGen.get_pretrained("debug", device="cpu")
    debug.max_duration = 3.0
    debug.set_generation_params(duration=4.0, extend_stride=2.0)
    assert list(debug.generate(["youpi", "lapin dort"]).shape) == [2, 1, 128000]


def test_tiny_is_a_stereo_melody_model(tiny):
    assert (tiny.frame_rate, tiny.sample_rate, tiny.audio_channels) == (50, 32000, 2)
    assert tiny.max_duration == VERSIONS["tiny"].context
    tiny.set_generation_params(duration=1.0, seed=1)
    melody = torch.randn(1, 22050, generator=torch.Generator().manual_seed(0))
    wav = tiny.generate_with_chroma(["a"], melody[None], 22050)
    assert list(wav.shape) == [1, 2, 32000]
    assert wav.std() > 0.01
    assert not torch.equal(wav[:, 0], wav[:, 1])
    assert torch.equal(wav, tiny.generate_with_chroma(["a"], [melody], 22050))
    assert torch.equal(wav, tiny.generate_with_chroma(["a"], melody, 22050))
    assert not torch.equal(wav, tiny.generate(["a"]))


def test_seeds(tiny):
    """A take is the same in any batch; without a seed, torch's own generator counts."""
    tiny.set_generation_params(duration=0.5, seed=7)
    _, together = tiny.generate(["a", "a"], return_tokens=True)
    _, first = tiny.generate(["a"], return_tokens=True)
    tiny.set_generation_params(duration=0.5, seed=8)
    _, second = tiny.generate(["a"], return_tokens=True)
    assert torch.equal(together, torch.cat([first, second]))
    tiny.set_generation_params(duration=0.5)
    takes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        takes.append(tiny.generate(["a"], return_tokens=True)[1])
    assert torch.equal(takes[0], takes[1])
    assert not torch.equal(takes[0], takes[2])


def test_a_prompt_of_the_whole_context_slides(tiny):
    tiny.max_duration = 2
    tiny.set_generation_params(duration=3, extend_stride=1.5, seed=0)
    wav, tokens = tiny.generate_continuation(torch.randn(1, 2, 64000), 32000, return_tokens=True)
    tiny.max_duration = VERSIONS["tiny"].context
    assert list(wav.shape) == [1, 2, 96000]
    assert list(tokens.shape) == [1, 8, 150]


def test_progress_runs_once_from_start_to_end(tiny):
    calls = []
    tiny.set_custom_progress_callback(lambda done, total: calls.append((done, total)))
    tiny.max_duration = 2
    tiny.set_generation_params(duration=3, extend_stride=1.5)
    tiny.generate(["a"], progress=True)
    tiny.max_duration = VERSIONS["tiny"].context
    tiny.set_custom_progress_callback(None)
    total = (100 + 7) + (75 - 25 + 7)
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_a_progress_bar(tiny, capfd):
    tiny.set_generation_params(duration=0.5)
    tiny.generate(["a"])
    assert capfd.readouterr() == ("", "")
    tiny.generate(["a"], progress=True)
    captured = capfd.readouterr()
    assert "32/32" in captured.err
    assert captured.out == ""


def test_codes_to_audio(tiny):
    tiny.set_generation_params(duration=0.5, seed=0)
    wav, tokens = tiny.generate(["a"], return_tokens=True)
    assert torch.equal(tiny.generate_audio(tokens), wav)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extend_stride": 30}, "extend_stride is 30 s, .* context of 30 s"),
        ({"extend_stride": 0}, "extend_stride is 0 s"),
        ({"extend_stride": 0.01}, "extend_stride is 0.01 s, it must be from 0.04 s up and below"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"duration": 0}, "duration is 0 s, it must be a finite number from 0.04 s up"),
        ({"duration": math.nan}, "duration is nan s, it must be a finite number"),
        ({"duration": math.inf}, "duration is inf s, it must be a finite number"),
    ],
)
def test_bad_settings_are_refused(debug, settings, message):
    with pytest.raises(InputError, match=message):
        debug.set_generation_params(**settings)


def test_bad_inputs_are_refused(debug):
    debug.set_generation_params(duration=2)
    with pytest.raises(InputError, match="give a list of texts"):
        debug.generate("one text")
    with pytest.raises(InputError, match="follows no melody"):
        debug.generate_with_chroma(["a"], torch.zeros(1, 1, 100), 32000)
    with pytest.raises(InputError, match="give at least one description"):
        debug.generate([])
    with pytest.raises(InputError, match=r"prompt has the shape \[5\]"):
        debug.generate_continuation(torch.zeros(5), 32000)
    with pytest.raises(InputError, match="shorter than the result's 2 s"):
        debug.generate_continuation(torch.zeros(1, 1, 64000), 32000)
    debug.set_generation_params(duration=60)
    with pytest.raises(InputError, match="at most the context of 30 s"):
        debug.generate_continuation(torch.zeros(1, 1, 31 * 32000), 32000)


def test_the_context_may_be_assigned():
    """The default stride follows it, and short music asks for no stride."""
    debug = MusicGen.get_pretrained("debug", device="cpu")
    debug.set_generation_params(duration=1)
    debug.max_duration = 2
    assert debug.extend_stride == pytest.approx(1.2)
    assert list(debug.generate(["a"]).shape) == [1, 1, 32000]
    debug.duration = 3
    assert list(debug.generate(["a"]).shape) == [1, 1, 96000]
    debug.set_generation_params(duration=1, extend_stride=1.5)
    debug.max_duration = 1.2
    debug.generate(["a"])
    debug.duration = 2
    with pytest.raises(InputError, match=r"extend_stride is 1\.5 s, .* context of 1\.2 s"):
        debug.generate(["a"])


def test_any_text_is_a_description(tiny):
    """Such as the names of tokens that large T5s have, or what no tokenizer knows."""
    tiny.set_generation_params(duration=0.1)
    wav = tiny.generate(["<extra_id_3>", "</s> <pad>", "\U0001f3b8 ピアノ \0", "x" * 1000])
    assert wav.shape == (4, 2, 3200)
    assert wav.isfinite().all()


def test_melodies_have_two_dimensions(tiny):
    with pytest.raises(InputError, match=r"each of melody_wavs has the shape \[100\]"):
        tiny.generate_with_chroma(["a"], [torch.zeros(100)], 32000)
    with pytest.raises(InputError, match=r"each of melody_wavs has the shape \[1, 1, 100\]"):
        tiny.generate_with_chroma(["a"], [torch.zeros(1, 1, 100)], 32000)


@pytest.mark.parametrize("duration", [0.3, 0.8])
def test_a_melody_without_samples_is_none(tiny, monkeypatch, duration):
    """Within the context and beyond it, where melodies are looped."""
    monkeypatch.setattr(tiny, "max_duration", 0.5)
    tiny.set_generation_params(duration=duration, seed=0)
    codes = [
        tiny.generate_with_chroma(["a"], [melody], 32000, return_tokens=True)[1]
        for melody in (None, torch.zeros(1, 0))
    ]
    assert torch.equal(codes[0], codes[1])


def test_melodies_and_descriptions_must_be_as_many(tiny):
    with pytest.raises(InputError, match="2 descriptions and 1 melodies"):
        tiny.generate_with_chroma(["a", "b"], [torch.zeros(1, 100)], 32000)


@pytest.mark.parametrize("name", ["AudioGen", "MAGNeT", "JASCO"])
def test_other_models_are_not_here(name):
    import audiocraft.models

    with pytest.raises(ImportError, match=f"{name} is not part of this package"):
        getattr(audiocraft.models, name)
