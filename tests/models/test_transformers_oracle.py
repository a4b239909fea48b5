"""Our models against transformers' own MusicGen and EnCodec, which share no code with ours.

Small random models of transformers are built from a fixed seed, their weights are moved by name
into ours, and both get the same input. Nothing is downloaded.

Two differences of transformers are known and kept out of the comparisons:

- `MusicgenForConditionalGeneration` masks padded text in cross-attention, the official model does
  not (golden test `lm_tiny_text_mono`): its texts have equal numbers of tokens here. The melody
  model of transformers masks nothing, so that it is compared with padding.
- It projects text only where the widths of text encoder and decoder differ: no decoder here has
  the text encoder's width.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    EncodecConfig,
    EncodecModel,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenMelodyForConditionalGeneration,
    T5EncoderModel,
)

from audiocraft.models.builders import get_lm_model
from audiocraft.models.encodec import CompressionModel, InterleaveStereoCompressionModel
from audiocraft.models.lm import LMModel
from audiocraft.models.loaders import load_compression_model, load_models
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition
from audiocraft.utils.export import export_release
from tests.releases import adapter, full_finetune, stand_in

GOLDEN = Path(__file__).parent.parent / "golden"
TEXT_ENCODER = GOLDEN / "t5_tiny"
SAMPLE_RATE = 32000
CARD = 32
CODEBOOKS = 4  # of each channel
FRAMES = 11  # timesteps of codes
GUIDANCE = 3.0
SEED = 5  # leaves that margin in every generation below

LOGITS_TOLERANCE = 1e-4
AUDIO_TOLERANCE = 1e-5
MIN_MARGIN = 5e-4  # between the two most likely tokens, so that rounding cannot decide

SAME_LENGTH = ("happy rock", "sad piano", "slow jazz")
PADDED = ("happy rock", "very slow piano and guitar with drums", None)


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder.

    Attributes:
        dim: its width.
        heads: attention heads.
        layers: layers.
        channels: 1, or 2 for interleaved stereo.
        hidden_scale: width of the feed-forward layer over `dim`.
    """

    dim: int
    heads: int
    layers: int
    channels: int = 1
    hidden_scale: int = 4

    def __str__(self) -> str:
        channels = "stereo" if self.channels == 2 else "mono"
        return f"{channels}-{self.layers}x{self.dim}-{self.heads}heads"

    @property
    def n_q(self) -> int:
        return CODEBOOKS * self.channels

    @property
    def delays(self) -> list[int]:
        return [k // self.channels for k in range(self.n_q)]

    @property
    def steps(self) -> int:
        """Steps of `FRAMES` timesteps in the delay pattern."""
        return 1 + FRAMES + self.delays[-1]


SHAPES = [
    Shape(32, heads=4, layers=2),
    Shape(20, heads=2, layers=1, hidden_scale=2),
    Shape(48, heads=4, layers=3, channels=2),
    Shape(16, heads=2, layers=3, channels=2),
]
MELODY_SECONDS = [0.5, 1.3, 2.0, 2.9]  # the context is 2 s: repeated, repeated, whole, cut

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for other threads, for minutes where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(module: nn.Module) -> None:
    """Random weights with gains and biases that count, unlike those of a fresh model."""
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "embed_tokens" in name:
            value = noise  # as large as positions, so that the codes count
        elif weight.dim() > 1:
            value = noise / weight.shape[1] ** 0.5
        else:
            value = 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
        weight.data.copy_(value)


@torch.no_grad()
def their_codec(**settings: Any) -> Any:
    """A codec of transformers like `facebook/encodec_32khz`, but small."""
    config: dict[str, Any] = {
        "sampling_rate": SAMPLE_RATE,
        "target_bandwidths": [1.0],  # 4 codebooks of 5 bits at 50 Hz
        "codebook_size": CARD,
        "hidden_size": 16,
        "num_filters": 4,
        "upsampling_ratios": [8, 5, 4, 4],
        "use_causal_conv": False,
        "use_conv_shortcut": False,
        "pad_mode": "constant",
    }
    torch.manual_seed(SEED)
    codec: Any = EncodecModel(EncodecConfig(**config | settings))
    codec.eval()
    for name, weight in codec.named_parameters():
        if name.endswith("original0"):  # lengths unlike those of their directions, and no silence
            weight.data *= 1 + torch.rand(weight.shape)
    # Codebooks are zeros in a fresh model. Latents of noise make them such that all codes occur.
    frames = CARD * len(codec.quantizer.layers)
    noise = torch.randn(1, codec.config.audio_channels, frames * codec.config.hop_length)
    residual = codec.encoder(noise)  # (1, hidden_size, frames)
    for layer, latents in zip(codec.quantizer.layers, residual[0].split(CARD, 1), strict=True):
        layer.codebook.embed.copy_(latents.t())
        residual -= layer.decode(layer.encode(residual))
    return codec


def our_codec(codec: EncodecModel, folder: Path, older_names: bool = False) -> CompressionModel:
    """The same codec, by way of a folder as transformers writes it.

    Args:
        codec: transformers' codec.
        folder: where it is saved.
        older_names: name the tensors of weight norm as `facebook/encodec_32khz` does.
    """
    codec.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    newer = {key for key in state if ".parametrizations." in key}
    assert newer, "transformers' present names are one of the two cases"
    if older_names:
        for key in newer:
            older = key.replace("parametrizations.weight.original0", "weight_g")
            older = older.replace("parametrizations.weight.original1", "weight_v")
            state[older] = state.pop(key)
        save_file(state, file)
    return load_compression_model(folder)


def their_model(kind: Callable[[Any], Any], config: Callable[..., Any], shape: Shape) -> Any:
    """A random MusicGen of transformers with the text encoder of the golden tests."""
    text_encoder = T5EncoderModel.from_pretrained(TEXT_ENCODER)
    codec = their_codec()
    decoder = {
        "vocab_size": CARD,
        "hidden_size": shape.dim,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "ffn_dim": shape.hidden_scale * shape.dim,
        "num_codebooks": shape.n_q,
        "audio_channels": shape.channels,
        "pad_token_id": CARD,
        "bos_token_id": CARD,
    }
    model = kind(
        config(
            text_encoder=text_encoder.config.to_dict(),
            audio_encoder=codec.config.to_dict(),
            decoder=decoder,
        )
    )
    randomize(model)
    model.text_encoder.load_state_dict(text_encoder.state_dict())
    model.audio_encoder.load_state_dict(codec.state_dict())
    model.generation_config.update(
        decoder_start_token_id=CARD, pad_token_id=CARD, bos_token_id=CARD
    )
    # Plain matrix products, so that attention has no kernel in common with ours.
    model.decoder.set_attn_implementation("eager")
    return model.eval()


their_text_model = partial(their_model, MusicgenForConditionalGeneration, MusicgenConfig)


def their_melody_model(shape: Shape, chroma_length: int) -> Any:
    config = partial(MusicgenMelodyConfig, chroma_length=chroma_length)
    return their_model(MusicgenMelodyForConditionalGeneration, config, shape)


OFFICIAL_NAMES = {
    "model.decoder.embed_tokens.": "emb.",
    "model.decoder.layers.": "transformer.layers.",
    "model.decoder.layer_norm.": "out_norm.",
    "lm_heads.": "linears.",
    "self_attn_layer_norm": "norm1",
    "encoder_attn_layer_norm": "norm_cross",
    "final_layer_norm": "norm2",
    "encoder_attn.": "cross_attention.",
    "fc1": "linear1",
    "fc2": "linear2",
}
CONDITIONER = "condition_provider.conditioners."
CHROMA_WINDOW = CONDITIONER + "self_wav.chroma.spec.window"


def official_name(key: str) -> str:
    for other, official in OFFICIAL_NAMES.items():
        key = key.replace(other, official)
    return key


def official_state(model: Any) -> dict[str, Tensor]:
    """All weights of transformers' decoder and projections under the official names."""
    projections = {"description": model.enc_to_dec_proj}
    if hasattr(model, "audio_enc_to_dec_proj"):
        projections["self_wav"] = model.audio_enc_to_dec_proj
    state = {
        f"{CONDITIONER}{condition}.output_proj.{name}": weight
        for condition, projection in projections.items()
        for name, weight in projection.state_dict().items()
    }
    theirs: Mapping[str, Tensor] = model.decoder.state_dict()
    for key, weight in theirs.items():
        name = official_name(key)
        if name.endswith("q_proj.weight"):
            qkv = [theirs[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            state[name.replace("q_proj.weight", "in_proj_weight")] = torch.cat(qkv)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = weight
    return state


def our_model(fixture: str, shape: Shape) -> LMModel:
    """Our model of a shape, its configuration derived from that of a golden test."""
    cfg: DictConfig = OmegaConf.create(
        json.loads((GOLDEN / fixture / "meta.json").read_text())["config"]
    )
    cfg.transformer_lm.update(
        dim=shape.dim,
        num_heads=shape.heads,
        num_layers=shape.layers,
        hidden_scale=shape.hidden_scale,
        n_q=shape.n_q,
        card=CARD,
    )
    cfg.codebooks_pattern.delay.delays = shape.delays
    if "self_wav" in cfg.conditioners:
        cfg.conditioners.self_wav.chroma_stem.update(stems="mix", match_len_on_eval=True)
    model = get_lm_model(cfg, text_encoder=TEXT_ENCODER).eval()
    if "self_wav" in cfg.conditioners:
        model.condition_provider.conditioners["self_wav"].use_masking = False  # as the loader does
    return model


def move_weights(theirs: nn.Module, ours: LMModel) -> None:
    """Give our model the weights of transformers' one; no tensor may be left over on a side."""
    missing, unexpected = ours.load_state_dict(official_state(theirs), strict=False)
    assert not unexpected
    assert set(missing) <= {CHROMA_WINDOW}


def take_official_state(model: Any, state: Mapping[str, Tensor]) -> None:
    """The way back: give transformers' model all tensors of a release, none left over."""
    left = {key: weight.float() for key, weight in state.items() if key != CHROMA_WINDOW}
    packed = {key: left.pop(key) for key in list(left) if key.endswith("in_proj_weight")}
    decoder = {}
    for key in model.decoder.state_dict():
        name = official_name(key)
        projection = next((i for i, x in enumerate("qkv") if f".{x}_proj." in key), None)
        if projection is None:
            decoder[key] = left.pop(name)
        else:
            all_three = name.replace(f"{'qkv'[projection]}_proj.weight", "in_proj_weight")
            decoder[key] = packed[all_three].chunk(3)[projection]
    model.decoder.load_state_dict(decoder)
    projections = {"description": model.enc_to_dec_proj}
    if hasattr(model, "audio_enc_to_dec_proj"):
        projections["self_wav"] = model.audio_enc_to_dec_proj
    for condition, projection in projections.items():
        prefix = f"{CONDITIONER}{condition}.output_proj."
        projection.load_state_dict({n: left.pop(prefix + n) for n in projection.state_dict()})
    assert not left


@dataclass(frozen=True)
class Case:
    """Both models of one shape and the same conditions for both.

    Attributes:
        theirs: transformers' model.
        ours: our model with its weights.
        inputs: conditions as transformers takes them.
        conditions: the same as we take them.
    """

    theirs: Any
    ours: LMModel
    inputs: dict[str, Tensor]
    conditions: list[ConditioningAttributes]


def their_text(descriptions: tuple[str | None, ...]) -> dict[str, Tensor]:
    """Token ids and mask; a description that is not given is masked wholly."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT_ENCODER)
    tokens = tokenizer([text or "" for text in descriptions], padding=True, return_tensors="pt")
    given = torch.tensor([text is not None for text in descriptions])[:, None]
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask * given}


def text_case(shape: Shape) -> Case:
    theirs, ours = their_text_model(shape), our_model("lm_tiny_text_mono", shape)
    move_weights(theirs, ours)
    return text_conditions(theirs, ours)


def text_conditions(theirs: Any, ours: LMModel) -> Case:
    inputs = their_text(SAME_LENGTH)
    assert inputs["attention_mask"].all()
    conditions = [ConditioningAttributes({"description": text}) for text in SAME_LENGTH]
    return Case(theirs, ours, inputs, conditions)


def melody_case(shape: Shape, seconds: float) -> Case:
    ours = our_model("lm_tiny_melody", shape)
    conditioner: Any = ours.condition_provider.conditioners["self_wav"]
    theirs = their_melody_model(shape, conditioner.chroma_len)
    move_weights(theirs, ours)
    return melody_conditions(theirs, ours, seconds)


def melody_conditions(theirs: Any, ours: LMModel, seconds: float) -> Case:
    """Melodies for the melody model, with texts of different lengths and one item without text.

    Transformers gets our chroma (its own needs torchaudio; ours has the golden test `chroma`), in
    its true length: both repeat or cut it to the context.
    """
    conditioner: Any = ours.condition_provider.conditioners["self_wav"]
    samples = int(seconds * SAMPLE_RATE)
    wavs = torch.randn(len(PADDED), 1, 1, samples, generator=torch.Generator().manual_seed(1))
    melodies = [WavCondition(wav, torch.tensor([samples]), [SAMPLE_RATE]) for wav in wavs]
    chroma = conditioner._compute_chroma(conditioner.tokenize(melodies))
    conditions = [
        ConditioningAttributes({"description": text}, {"self_wav": melody})
        for text, melody in zip(PADDED, melodies, strict=True)
    ]
    return Case(theirs, ours, {**their_text(PADDED), "input_features": chroma}, conditions)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance)


def delayed_sequence(case: Case, shape: Shape) -> Tensor:
    """Random codes in the delay pattern [B, K, S]; both sides must build the same."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(CARD, (len(case.conditions), shape.n_q, FRAMES), generator=generator)
    pattern = case.ours.pattern_provider.get_pattern(FRAMES)
    sequence, _, _ = pattern.build_pattern_sequence(codes, case.ours.special_token_id)
    started = nn.functional.pad(codes, (1, 0), value=CARD).flatten(0, 1)
    _, theirs = case.theirs.decoder.build_delay_pattern_mask(started, CARD, shape.steps)
    assert torch.equal(sequence.flatten(0, 1), theirs)
    return sequence


@torch.no_grad()
def assert_same_logits(case: Case, shape: Shape, tolerance: float = LOGITS_TOLERANCE) -> None:
    sequence = delayed_sequence(case, shape)
    theirs = case.theirs(**case.inputs, decoder_input_ids=sequence.flatten(0, 1)).logits
    theirs = theirs.unflatten(0, (-1, shape.n_q))[:, :, -shape.steps :]  # a prefix has logits too
    assert_close(case.ours(sequence, case.conditions), theirs, tolerance)


@each_shape
def test_text_model_has_the_logits_of_transformers(shape: Shape) -> None:
    assert_same_logits(text_case(shape), shape)


@each_shape
@pytest.mark.parametrize("seconds", MELODY_SECONDS)
def test_melody_model_has_the_logits_of_transformers(shape: Shape, seconds: float) -> None:
    assert_same_logits(melody_case(shape, seconds), shape)


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("version", ["small", "stereo-small", "melody", "stereo-melody"])
def test_an_exported_fine_tune_has_its_logits_in_transformers(
    version: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "store"))
    stand_in(tmp_path / "store", version, 1)
    make = {"full": full_finetune, "adapter": adapter}[kind]
    weights = make(tmp_path / "store", version, 5, tmp_path / "trained_model.safetensors")
    release = export_release(weights, tmp_path / "release")
    ours, _ = load_models(release, "cpu")
    shape = Shape(32, heads=4, layers=2, channels=1 + VERSIONS[version].stereo)
    package = torch.load(release / "state_dict.bin", weights_only=True)
    if VERSIONS[version].melody:
        conditioner: Any = ours.condition_provider.conditioners["self_wav"]
        theirs = their_melody_model(shape, conditioner.chroma_len)
        case = melody_conditions(theirs, ours, seconds=2.0)
    else:
        theirs = their_text_model(shape)
        case = text_conditions(theirs, ours)
    take_official_state(theirs, package["best_state"])
    # Random adapters make large numbers of which float32 keeps as many digits.
    assert_same_logits(case, shape, 10 * LOGITS_TOLERANCE)


def assert_same_generation(case: Case, shape: Shape, folder: Path) -> None:
    """Greedy generation with guidance, token for token, and the audio of the tokens.

    The layouts agree: transformers starts from one column of its start token, fills codebook `k`
    from column `1 + delay`, and ends after `max_new_tokens` more columns, which are all steps of
    the official pattern after the empty first one.
    """
    decoded: list[Tensor] = []
    decode = case.theirs.audio_encoder.decode

    def record(codes: Tensor, **kwargs: Any) -> Any:
        decoded.append(codes[0])
        return decode(codes, **kwargs)

    case.theirs.audio_encoder.decode = record
    output = case.theirs.generate(
        **case.inputs,
        do_sample=False,
        guidance_scale=GUIDANCE,
        max_new_tokens=shape.steps - 1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    likeliest = torch.stack(output.scores).topk(2).values
    assert (likeliest[..., 0] - likeliest[..., 1]).min() > MIN_MARGIN

    codes = case.ours.generate(
        conditions=case.conditions,
        max_gen_len=FRAMES,
        use_sampling=False,
        cfg_coef=GUIDANCE,
    )
    # Stereo codes are decoded channel by channel.
    assert torch.equal(codes, torch.stack(decoded, dim=2).flatten(1, 2))
    codec = our_codec(case.theirs.audio_encoder, folder)
    if shape.channels == 2:
        codec = InterleaveStereoCompressionModel(codec)
    with torch.no_grad():
        assert_close(codec.decode(codes), output.sequences, AUDIO_TOLERANCE)


@each_shape
def test_text_model_generates_what_transformers_does(shape: Shape, tmp_path: Path) -> None:
    assert_same_generation(text_case(shape), shape, tmp_path)


@each_shape
def test_melody_model_generates_what_transformers_does(shape: Shape, tmp_path: Path) -> None:
    assert_same_generation(melody_case(shape, seconds=1.3), shape, tmp_path)


@pytest.mark.parametrize("pad_mode", ["constant", "reflect"])
@pytest.mark.parametrize("older_names", [False, True], ids=["newer names", "older names"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "audio_channels": 2,
            "normalize": True,
            "num_residual_layers": 2,
            "use_conv_shortcut": True,
        },
    ],
    ids=["like the release", "other settings"],
)
@torch.no_grad()
def test_codec_has_codes_and_audio_of_transformers(
    pad_mode: str, older_names: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = their_codec(pad_mode=pad_mode, **settings)
    ours = our_codec(theirs, tmp_path, older_names)
    generator, apart = torch.Generator().manual_seed(3), 0
    # One sample, around one hop of 640, whole hops, and neither.
    for samples in (1, 639, 640, 641, 12800, 16421):
        wav = torch.randn(2, ours.channels, samples, generator=generator)
        encoded = theirs.encode(wav)
        codes, scale = ours.encode(wav)
        assert codes.shape == encoded.audio_codes[0].shape
        apart += int((codes != encoded.audio_codes[0]).any(dim=1).sum())
        decoded = theirs.decode(encoded.audio_codes, encoded.audio_scales).audio_values
        assert_close(ours.decode(encoded.audio_codes[0], scale), decoded, AUDIO_TOLERANCE)
    # But for one frame: where two vectors are as near, rounding may choose.
    assert apart <= 1
