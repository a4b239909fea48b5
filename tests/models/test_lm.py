import copy

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import InputError
from audiocraft.generation.sampling import RowNoise
from audiocraft.models.builders import get_lm_model
from audiocraft.modules.conditioners import (
    ConditioningAttributes,
    WavCondition,
    null_wav,
    nullify,
)
from audiocraft.modules.transformer import sin_embedding
from tests.golden_data import GOLDEN, load, meta

LOGITS = {"rtol": 0, "atol": 1e-4, "equal_nan": True}
TEXT_MODELS = ["lm_tiny_text_mono", "lm_tiny_text_stereo"]
STATES = {"mono": "lm_tiny_text_mono", "stereo": "lm_tiny_text_stereo", "melody": "lm_tiny_melody"}
GREEDY = meta("generate_greedy")


def whole_mix(wav, sample_rate):
    """The fixtures were made without a separator."""
    return convert_audio(wav, sample_rate, 32000, 1)


def lm(name):
    model = get_lm_model(OmegaConf.create(meta(name)["config"]), GOLDEN / "t5_tiny")
    model.load_state_dict(load(f"{name}/state"))
    if model.condition_provider.has_wav_condition:
        conditioner = model.condition_provider.conditioners["self_wav"]
        conditioner._get_stemmed_wav = whole_mix
        conditioner.match_len_on_eval, conditioner.use_masking = True, False
    return model.eval()


def descriptions(name):
    return [
        ConditioningAttributes(text={"description": text}) for text in meta(name)["descriptions"]
    ]


def melodies():
    """Descriptions with two melodies and none."""
    data, items = load("lm_tiny_melody/data"), descriptions("lm_tiny_melody")
    for item, wav in zip(items, (data["wav.0"], data["wav.1"]), strict=False):
        item.wav["self_wav"] = WavCondition(wav[None], torch.tensor([wav.shape[-1]]), [32000])
    items[2].wav["self_wav"] = null_wav()
    return items


CHANGES = [
    (kind, what)
    for kind in STATES
    for what in ("prompt", "text", "melody")
    if what != "melody" or kind == "melody"
]
"""What may be another in the rows beside one, by kind."""


def changed(items, prompts, what):
    """The rows, with other contents of the same length beside the first."""
    items, prompts = copy.deepcopy(items), prompts.clone()
    if what == "prompt":
        prompts[1:] = prompts[1:].flip(-1)
    elif what == "text":
        words = items[1].text["description"].split()
        items[1].text["description"] = " ".join(reversed(words))
    else:
        heard = items[1].wav["self_wav"]
        noise = torch.randn(heard.wav.shape, generator=torch.Generator().manual_seed(0))
        items[1].wav["self_wav"] = heard._replace(wav=noise)
    return items, prompts


def codes_beside_others(model, kind, what):
    """Codes of three guided rows, and of the changed ones after a request for something else."""
    items = melodies() if kind == "melody" else descriptions(STATES[kind])
    prompts = torch.arange(3 * model.num_codebooks * 5).view(3, -1, 5) % model.card

    def generate(items, prompts):
        noise = RowNoise(7, 3, model.device)
        return model.generate(
            prompts, items, max_gen_len=20, cfg_coef=3.0, remove_prompts=True, noise=noise
        )

    others, other_prompts = changed(items, prompts, what)
    before, after = (
        {name: value.shape for name, (value, _) in model.encode_conditions(rows).items()}
        for rows in (items, others)
    )
    assert before == after, "another length pads the first row in another way"
    first = generate(items, prompts)
    model.generate(conditions=items[::-1], max_gen_len=30, cfg_coef=2.0, temp=0.5)
    return first, generate(others, other_prompts)


@pytest.mark.parametrize("name", TEXT_MODELS)
@torch.no_grad()
def test_text_conditions(name):
    model, data, items = lm(name), load(f"{name}/data"), descriptions(name)
    tokens = model.condition_provider.tokenize(items)["description"]
    assert torch.equal(tokens["input_ids"], data["t5.input_ids"])
    assert torch.equal(tokens["attention_mask"], data["t5.attention_mask_used"])
    condition, mask = model.encode_conditions(items)["description"]
    torch.testing.assert_close(condition, data["cond.description"], **LOGITS)
    assert torch.equal(mask, data["cond_mask.description"])


@pytest.mark.parametrize("name", TEXT_MODELS)
@torch.no_grad()
def test_text_logits(name):
    model, data, items = lm(name), load(f"{name}/data"), descriptions(name)
    codes = data["codes"]
    output = model.compute_predictions(codes, items)
    torch.testing.assert_close(output.logits, data["logits"], **LOGITS)
    assert torch.equal(output.mask, data["mask"])
    output = model.compute_predictions(codes, items, keep_only_valid_steps=False)
    torch.testing.assert_close(output.logits, data["logits_all_steps"], **LOGITS)
    assert torch.equal(output.mask, data["mask_all_steps"])
    sequence = data["sequence"]
    torch.testing.assert_close(model(sequence, items), data["forward_logits"], **LOGITS)
    torch.testing.assert_close(
        model(sequence.repeat(2, 1, 1), [*items, *nullify(items)]),
        data["cfg.forward_logits"],
        **LOGITS,
    )


@pytest.mark.parametrize("name", TEXT_MODELS)
@torch.no_grad()
def test_padding_counts(name):
    """Nothing masks padded text: an item alone has other logits than in a batch."""
    model, data, items = lm(name), load(f"{name}/data"), descriptions(name)
    alone = model.compute_predictions(data["codes"][:1], items[:1]).logits
    torch.testing.assert_close(alone, data["single.logits"], **LOGITS)
    difference = (alone - data["logits"][:1]).nan_to_num().abs().max().item()
    assert difference == pytest.approx(
        meta(name)["padding_effect_maxdiff_logits_item0_batched_vs_alone"], abs=1e-3
    )


def test_positions():
    golden = load("lm_tiny_text_mono/data")["pos_emb_64"][0]
    torch.testing.assert_close(sin_embedding(torch.arange(64), 32), golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("null", ["", "allnull."])
@pytest.mark.parametrize("mode", ["train_cfg", "inference"])
@torch.no_grad()
def test_melody(mode, null):
    model, data = lm("lm_tiny_melody"), load("lm_tiny_melody/data")
    conditioner = model.condition_provider.conditioners["self_wav"]
    conditioner.match_len_on_eval = mode == "inference"
    conditioner.use_masking = mode == "train_cfg"
    items = nullify(melodies()) if null else melodies()
    conditions = model.encode_conditions(items)
    assert list(conditions) == meta("lm_tiny_melody")["condition_dict_order"]
    for name, (condition, mask) in conditions.items():
        key = f"{mode}.{null}"
        torch.testing.assert_close(condition, data[f"{key}cond.{name}"], **LOGITS)
        assert torch.equal(mask, data[f"{key}cond_mask.{name}"].long())
    logits = model.compute_predictions(data["codes"], items).logits
    torch.testing.assert_close(logits, data[f"{mode}.{null}logits"], **LOGITS)


def test_no_melody_needs_no_separator():
    model = lm("lm_tiny_melody")
    conditioner = model.condition_provider.conditioners["self_wav"]

    def never(*_):
        raise AssertionError

    conditioner._get_stemmed_wav = never
    model.encode_conditions(nullify(melodies()))


def greedy_cases():
    return [case for case in GREEDY["cases"] if "api" not in case]


@pytest.mark.parametrize("case", greedy_cases())
def test_greedy_generation(case):
    kind, _, variant = case.partition(".")
    info, golden = GREEDY["cases"][case], load(f"generate_greedy/{kind}")
    items = melodies() if kind == "melody" else descriptions(STATES[kind])
    if variant == "textonly":
        items = descriptions(STATES[kind])
    if variant == "one_item":
        items = items[:1]
    settings = {
        name: info[name] for name in ("cfg_coef", "cfg_coef_beta", "two_step_cfg") if name in info
    }
    if variant == "two_step_prompt_coef_ignored":
        settings["cfg_coef"] = 1.5
    has_prompt = "prompt" in variant and "noprompt" not in variant
    codes = lm(STATES[kind]).generate(
        golden[f"{kind}.prompt"] if has_prompt else None,
        items,
        max_gen_len=info["max_gen_len"],
        use_sampling=False,
        top_k=0,
        remove_prompts=info.get("remove_prompts", False),
        **settings,
    )
    assert torch.equal(codes, golden[case])


@pytest.mark.parametrize("kind", STATES)
def test_decoding_step_by_step_equals_the_whole_sequence(kind):
    """Prefill and cached steps give the logits that one pass over everything gives."""
    model = lm(STATES[kind])
    items = melodies() if kind == "melody" else descriptions(STATES[kind])
    codes = torch.randint(
        32, (3, model.num_codebooks, 20), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        whole = model(codes, items)
        state = model.start(items, max_steps=20)
        steps = [model.advance(state, codes[..., :7])]
        steps += [model.advance(state, codes[..., step : step + 1]) for step in range(7, 20)]
    torch.testing.assert_close(torch.stack(steps, dim=2), whole[:, :, 6:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", STATES)
@torch.no_grad()
def test_half_precision_weights(kind, dtype):
    """Only weights and layer inputs are 16 bit; the residual stream stays float32.

    So does the cache on a CPU whose kernels do not know the type.
    """
    model, half = lm(STATES[kind]), lm(STATES[kind]).to(dtype)
    items = melodies() if kind == "melody" else descriptions(STATES[kind])
    codes = torch.arange(3 * model.num_codebooks * 17).view(3, -1, 17) % model.card
    residual = []
    half.out_norm.register_forward_pre_hook(lambda _, x: residual.append(x[0].dtype))
    exact, ours = model(codes, items), half(codes, items)
    assert residual == [torch.float32]
    assert ours.dtype == dtype
    tolerance = {torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    assert (ours.float() - exact).abs().max() < tolerance * exact.std()
    state = half.start(items, max_steps=20)
    half.advance(state, codes)
    assert state.cache.keys.dtype == {torch.float16: torch.float32}.get(dtype, dtype)
    next_logits = half.advance(state, codes[..., :1])
    whole = half(torch.cat([codes, codes[..., :1]], dim=-1), items)[:, :, -1]
    assert (next_logits.float() - whole.float()).abs().max() < tolerance * exact.std()


def test_progress_counts_finished_steps():
    calls = []
    lm("lm_tiny_text_mono").generate(
        conditions=descriptions("lm_tiny_text_mono")[:1],
        max_gen_len=10,
        callback=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 13) for done in range(1, 14)]


def test_sizes_that_do_not_agree_are_refused():
    model, items = lm("lm_tiny_text_mono"), descriptions("lm_tiny_text_mono")
    with pytest.raises(InputError, match=r"\[2, 3\]"):
        model.generate(torch.zeros(2, 4, 5, dtype=torch.long), items)
    with pytest.raises(InputError, match="shorter than the result"):
        model.generate(torch.zeros(3, 4, 10, dtype=torch.long), items, max_gen_len=10)
    with pytest.raises(InputError, match=r"\[B, 4, T\]"):
        model.compute_predictions(torch.zeros(3, 8, 10, dtype=torch.long), items)
    with pytest.raises(InputError, match="no condition named melody"):
        model.encode_conditions([ConditioningAttributes(text={"melody": "x"})])


def rows_of(model, **arguments):
    """Codes, and the rows that each step computed."""
    rows = set()
    hook = model.emb[0].register_forward_hook(lambda _, x, __: rows.add(len(x[0])))
    codes = model.generate(max_gen_len=12, use_sampling=False, **arguments)
    hook.remove()
    return codes, rows


def test_what_has_nothing_to_be_guided_by_is_computed_once():
    """Without text and melody both branches of guidance are the same."""
    model = lm("lm_tiny_melody")
    null = [ConditioningAttributes({"description": None}, {"self_wav": null_wav()})]
    empty = [ConditioningAttributes({"description": ""}, {"self_wav": null_wav()})]
    told = [ConditioningAttributes({"description": "rock"}, {"self_wav": null_wav()})]
    codes, rows = rows_of(model, conditions=null, cfg_coef=3.0)
    assert rows == {1}
    assert rows_of(model, conditions=empty, cfg_coef=3.0)[1] == {1}
    assert rows_of(model, conditions=empty, cfg_coef=3.0, cfg_coef_beta=2.0)[1] == {1}
    assert rows_of(model, conditions=[*null, *told], cfg_coef=3.0)[1] == {4}
    both, _ = rows_of(model, conditions=[*null, *null], cfg_coef=3.0, two_step_cfg=True)
    assert torch.equal(both, codes.expand(2, -1, -1))
    heard = melodies()[:1]
    heard[0].text["description"] = None
    assert rows_of(model, conditions=heard, cfg_coef=3.0)[1] == {2}


def test_guidance_of_1_is_none():
    model, items = lm("lm_tiny_text_mono"), descriptions("lm_tiny_text_mono")
    codes, rows = rows_of(model, conditions=items, cfg_coef=1.0)
    assert rows == {len(items)}
    model.cfg_coef = 1.0
    two_steps, _ = rows_of(model, conditions=items, two_step_cfg=True)
    # Apart from each other the branches are padded as here.
    assert torch.equal(two_steps, codes)
