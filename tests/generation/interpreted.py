"""The GPU's kernels on the CPU, by Triton's interpreter: pytest runs this file only by its name.

The interpreter has to be chosen before the kernels are imported, so `test_fused` gives it a process
of its own.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import gc

import pytest
import torch
from torch import nn
from triton.runtime import interpreter

from audiocraft.generation import fused, step
from audiocraft.generation.engine import Guidance
from audiocraft.generation.sampling import RowNoise, SamplingParams, sample_next
from audiocraft.generation.weights import collect
from audiocraft.models import MusicGen
from audiocraft.modules.conditioners import nullify
from audiocraft.modules.transformer import Norm, Transformer, TransformerConfig
from tests.generation.cells import BRANCHES, COEFS, cells, codes_of, load_cell
from tests.golden_data import load
from tests.models.test_lm import GREEDY, STATES, changed, descriptions, lm, melodies

CPU = torch.device("cpu")
slow = pytest.mark.slow


class Patched:
    def restore(self):
        pass


_patch_lang = interpreter._patch_lang
_patched = set()


def patch_once(fn):
    """The interpreter patches the language again for each call, which takes a third of its time."""
    if id(fn.__globals__) not in _patched:
        _patched.add(id(fn.__globals__))
        _patch_lang(fn)
    return Patched()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(step, "_MAX_SPLITS", 2)  # of attention; more take longer
    process = fused._Process()
    monkeypatch.setattr(fused, "_process", lambda: process)
    yield process
    assert process.failure is None
    assert not process.warned


def items_of(kind, rows):
    items = melodies() if kind == "melody" else descriptions(STATES[kind])
    return items[:rows]


def without_kernels(monkeypatch, make):
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        return make()


def logits_of_steps(model, conditions, codes, prompt):
    """Logits after each step behind a prompt, by the modules and by the kernels."""
    branch, steps = len(conditions) // len(codes), codes.shape[-1]
    inputs = codes.repeat(branch, 1, 1)
    state = model.start(conditions, steps)
    model.advance(state, inputs[..., :prompt])
    expected = [
        model.advance(state, inputs[..., place : place + 1]) for place in range(prompt, steps - 1)
    ]
    states = [model.start(conditions, steps)]
    params = SamplingParams(use_sampling=False)
    decoder = fused.fused_decoder(model, states, branch, steps, params, len(codes))
    model.advance(states[0], inputs[..., :prompt])
    decoder.begin(states, codes, prompt + 1, (1.0, 1.0), params)
    ours = []
    for _ in expected:
        decoder.step(RowNoise(0, len(codes), CPU))
        ours.append(decoder._buffers.logits.clone())
    keys = state.cache.keys[:, :, :, : state.cache.length]
    torch.testing.assert_close(
        decoder._buffers.keys[:, :, :, : state.cache.length], keys, rtol=0, atol=0.01
    )
    return torch.stack(expected).float(), torch.stack(ours).float()


@pytest.mark.parametrize(
    ("kind", "rows", "dtype"),
    [
        ("mono", 1, torch.float32),
        ("melody", 3, torch.float16),
        pytest.param("mono", 3, torch.float32, marks=slow),
        pytest.param("mono", 1, torch.float16, marks=slow),
        pytest.param("stereo", 1, torch.float32, marks=slow),
        pytest.param("stereo", 3, torch.float16, marks=slow),
        pytest.param("melody", 1, torch.float16, marks=slow),
        pytest.param("melody", 3, torch.float32, marks=slow),
    ],
)
@torch.no_grad()
def test_logits(kind, rows, dtype):
    """Two rows by the ordinary units, six by the matrix units where there are any for the type."""
    model = lm(STATES[kind]).to(dtype)
    items = items_of(kind, rows)
    codes = torch.randint(
        32, (rows, model.num_codebooks, 7), generator=torch.Generator().manual_seed(0)
    )
    expected, ours = logits_of_steps(model, [*items, *nullify(items)], codes, prompt=4)
    assert len(ours) == 2
    tolerance = {torch.float32: 1e-5, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_biases_and_many_positions(dtype, monkeypatch):
    """Everything that a configuration can ask for, over more than one block of positions."""
    monkeypatch.setattr(step, "_ATTENTION_BLOCK", 16 * 8)
    model = lm("lm_tiny_text_mono")
    config = TransformerConfig(40, 4, 1, cross_attention=True, bias_attn=True, bias_ff=True)
    generator = torch.Generator().manual_seed(0)
    model.config, model.card = config, 24
    model.transformer, model.out_norm = Transformer(config), Norm(40)
    model.emb = nn.ModuleList(nn.Embedding(25, 40) for _ in range(4))
    model.linears = nn.ModuleList(nn.Linear(40, 24) for _ in range(4))
    text = model.condition_provider.conditioners["description"]
    text.output_proj = nn.Linear(text.output_proj.in_features, 40)
    for name, weight in model.named_parameters():
        weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        if "norm" in name and name.endswith("weight"):
            weight.add_(1)
    model = model.to(dtype).eval()
    codes = torch.randint(24, (1, 4, 42), generator=generator)
    expected, ours = logits_of_steps(model, items_of("mono", 1), codes, prompt=39)
    scale = expected.std()
    torch.testing.assert_close(
        ours / scale, expected / scale, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.01
    )


def sample(logits, guidance, params, noise):
    """One token per row and codebook, by the kernel."""
    rows, codebooks, card = len(logits) // guidance.num_branches, *logits.shape[1:]
    config = TransformerConfig(16, 2, 1)
    heads = nn.ModuleList(nn.Linear(16, card, bias=False) for _ in range(codebooks))
    embeddings = nn.ModuleList(nn.Embedding(card + 1, 16) for _ in range(codebooks))
    weights = collect(embeddings, Transformer(config), Norm(16), heads)
    size = step.Size(rows, guidance.num_branches, 4, 4, 0)
    buffers = dataclasses.replace(step.allocate(weights, size, CPU), logits=logits.clone())
    settings = [guidance.coef or 0, guidance.beta or 0, params.temp, params.top_p]
    buffers.settings.copy_(torch.tensor(settings))
    buffers.top_k.fill_(min(params.top_k, card) or card)
    buffers.sequence.fill_(-1)
    buffers.sequence[0, 0, 2] = 5  # known already
    buffers.step.fill_(2)
    noise.draw(buffers.noise)
    choice = "greedy" if params.greedy else "top_p" if params.top_p else "top_k"
    step._sample(weights, buffers, choice)
    assert buffers.sequence[0, 0, 2] == 5
    assert (buffers.sequence[..., [0, 1, 3]] == -1).all()
    assert buffers.next_step.item() == 3
    return buffers.sequence[..., 2]


def sampling_cases():
    for temp in (1.0, 0.4):
        for top_k in (0, 1, 5, 37, 60):
            yield SamplingParams(temp=temp, top_k=top_k)
        for top_p in (0.01, 0.5, 0.9, 1.0):
            yield SamplingParams(temp=temp, top_p=top_p)
    yield SamplingParams(use_sampling=False)


@pytest.mark.parametrize("guidance", [Guidance(None), Guidance(3.0), Guidance(3.0, 5.0)])
@torch.no_grad()
def test_sampled_tokens(guidance):
    """As `sample_next` chooses them, also where many logits are equal."""
    generator = torch.Generator().manual_seed(0)
    for index, params in enumerate(sampling_cases()):
        logits = 2 * torch.randn(2 * guidance.num_branches, 3, 37, generator=generator)
        if index % 2:
            logits = logits.round()
        expected = sample_next(guidance.combine(logits), params, RowNoise(index, 2, CPU))
        ours = sample(logits, guidance, params, RowNoise(index, 2, CPU))
        expected[0, 0] = 5
        assert torch.equal(ours, expected), params


def short(case):
    """A golden case of few frames, and how many of them the pattern's end does not touch."""
    kind, _, variant = case.partition(".")
    golden = load(f"generate_greedy/{kind}")
    has_prompt = "prompt" in variant and "noprompt" not in variant
    prompt = golden[f"{kind}.prompt"] if has_prompt else None
    exact = 3 if prompt is None else prompt.shape[-1] + 3
    return kind, prompt, exact, golden[case][..., :exact]


@slow
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in GREEDY["cases"]
        if case.split(".")[1] in ("noprompt", "prompt_gen", "two_step", "textonly", "one_item")
        or "beta" in case
    ],
)
def test_golden_tokens(case):
    kind, prompt, exact, golden = short(case)
    info = GREEDY["cases"][case]
    items = items_of(kind, 1 if "one_item" in case else 3)
    if "textonly" in case:
        items = descriptions(STATES[kind])
    settings = {
        name: info[name] for name in ("cfg_coef", "cfg_coef_beta", "two_step_cfg") if name in info
    }
    model = lm(STATES[kind])
    codes = model.generate(
        prompt,
        items,
        max_gen_len=exact + max(model.pattern_provider.delays),
        use_sampling=False,
        top_k=0,
        **settings,
    )
    assert torch.equal(codes[..., :exact], golden)


CELLS = [
    pytest.param(kind, guided, prompt, marks=[] if (kind, prompt) == ("mono", 2) else slow)
    for kind in STATES
    for guided in COEFS
    for prompt in (0, 2)
    if kind == "melody" or guided != "double"
]


@pytest.mark.parametrize(("kind", "guided", "prompt"), CELLS)
def test_codes_are_those_of_the_modules(kind, guided, prompt, monkeypatch):
    model, items = lm(STATES[kind]), items_of(kind, 1)
    known = torch.arange(16 * prompt).view(1, 16, prompt)[:, : model.num_codebooks]
    coefs = COEFS[guided]

    def generate():
        noise = RowNoise(3, 1, CPU)
        return model.generate(
            known,
            items,
            max_gen_len=prompt + 2,
            top_k=9,
            cfg_coef=coefs[0],
            cfg_coef_beta=coefs[1],
            noise=noise,
        )

    assert torch.equal(generate(), without_kernels(monkeypatch, generate))


RELEASES = ("mono", "stereo", "melody", "stereo-melody")


@slow
@pytest.mark.parametrize(
    "cell", [cell for cell in cells(*RELEASES) if cell.melody == ("melody" in cell.kind)], ids=str
)
def test_every_cell_with_two_windows(cell, release, interpreted, monkeypatch):
    """The first is what a request of one window is."""
    model = load_cell(cell, release, CPU)
    ours = codes_of(model, cell, 0.08, 0.12)
    assert ours.shape[-1] == 6
    assert interpreted.kept.size.branches == BRANCHES[cell.guidance]
    expected = without_kernels(monkeypatch, lambda: codes_of(model, cell, 0.08, 0.12))
    assert torch.equal(ours, expected)


@slow
def test_windows(interpreted, monkeypatch):
    model = MusicGen.get_pretrained("debug", device="cpu")
    model.max_duration = 0.16
    model.set_generation_params(duration=0.24, seed=5, extend_stride=0.08)
    calls = []
    model.set_custom_progress_callback(lambda done, total: calls.append((done, total)))
    _, ours = model.generate(["a"], return_tokens=True)
    assert interpreted.kept is not None
    _, expected = without_kernels(monkeypatch, lambda: model.generate(["a"], return_tokens=True))
    assert torch.equal(ours, expected)
    assert calls[: len(calls) // 2] == [(done, 12) for done in range(1, 13)]


@slow
def test_buffers_stay_for_requests_that_fit(interpreted):
    """And what they hold of an earlier request changes nothing."""
    model, items = lm(STATES["mono"]), items_of("mono", 1)

    def generate(length, **settings):
        return model.generate(
            conditions=items, max_gen_len=length, noise=RowNoise(1, 1, CPU), **settings
        )

    first = generate(2)
    kept = interpreted.kept
    generate(3, cfg_coef=2.0, temp=0.5, top_k=3)
    assert torch.equal(generate(2), first)
    assert interpreted.kept is kept
    generate(1, cfg_coef=1.0)
    assert interpreted.kept is not kept


@slow
def test_other_weights_are_noticed(interpreted, monkeypatch):
    model, items = lm(STATES["mono"]), items_of("mono", 1)

    def generate():
        return model.generate(conditions=items, max_gen_len=1, use_sampling=False)

    generate()
    kept = interpreted.kept
    layer = model.transformer.layers[0].linear1
    layer.weight = nn.Parameter(layer.weight.flip(0))
    assert torch.equal(generate(), without_kernels(monkeypatch, generate))
    assert interpreted.kept is not kept


def short_codes(model, seed, callback=None):
    """Of a request of five steps, all but the first of which are the kernels'."""
    items, noise = items_of("mono", 1), RowNoise(seed, 1, CPU)
    return model.generate(
        conditions=items, max_gen_len=2, cfg_coef=1.0, noise=noise, callback=callback
    )


def test_a_request_within_another_changes_nothing():
    """Such as one that comes from a progress callback, or from another thread."""
    model, within = lm(STATES["mono"]), []

    def callback(done, _):
        if done == 3:
            within.append(short_codes(model, 2))

    alone = short_codes(model, 1)
    assert torch.equal(short_codes(model, 1, callback), alone)
    assert not torch.equal(within[0], alone)


class Cancelled(BaseException):
    pass


def test_a_cancelled_request_leaves_its_buffers_to_the_next(interpreted):
    model, seen = lm(STATES["mono"]), []

    def cancel(done, _):
        if done == 3:
            seen.append(interpreted.kept)
            raise Cancelled

    first = short_codes(model, 1)
    kept = interpreted.kept
    with pytest.raises(Cancelled):
        short_codes(model, 2, cancel)
    assert seen == [None]
    assert interpreted.kept is kept
    assert torch.equal(short_codes(model, 1), first)
    assert interpreted.kept is kept


def test_buffers_go_with_the_model(interpreted):
    model = lm(STATES["mono"])
    model.generate(conditions=items_of("mono", 1), max_gen_len=1, cfg_coef=1.0)
    assert interpreted.kept is not None
    del model
    gc.collect()
    assert interpreted.kept is None


@slow
@pytest.mark.parametrize(
    ("kind", "what"),
    [("mono", "prompt"), ("mono", "text"), ("melody", "text"), ("melody", "melody")],
)
@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it(kind, what):
    model, items = lm(STATES[kind]).half(), items_of(kind, 3)
    codes = torch.arange(3 * 4 * 4).view(3, 4, 4) % model.card
    first, second = (
        logits_of_steps(model, [*rows, *nullify(rows)], rows_codes, prompt=2)[1]
        for rows, rows_codes in ((items, codes), changed(items, codes, what))
    )
    assert torch.equal(first[:, [0, 3]], second[:, [0, 3]])
    assert not torch.equal(first[:, 1], second[:, 1])


def launches(monkeypatch, make):
    """What each step would launch, and on which memory; nothing is computed."""
    steps, run_step = [], step.run_step

    def begin(*args):
        steps.append([])
        run_step(*args)

    def described(value):
        if isinstance(value, torch.Tensor):
            return value.data_ptr(), value.dtype, value.shape, value.stride()
        return value

    def record(kernel, *args, grid, **options):
        options = {name: described(value) for name, value in options.items()}
        steps[-1].append((kernel.__name__, grid, [*map(described, args)], options))

    with monkeypatch.context() as patch:
        patch.setattr(step, "run_step", begin)
        patch.setattr(interpreter.InterpretedFunction, "run", record)
        make()
    return steps


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("choice", [{"top_k": 9}, {"top_p": 0.5}, {"use_sampling": False}])
def test_a_graph_of_one_step_is_one_of_all(kind, choice, interpreted, monkeypatch):
    """What is launched depends neither on the step nor on the request, as long as that fits."""
    model, items = lm(STATES[kind]), items_of(kind, 3)
    prompt = torch.zeros(1, model.num_codebooks, 3, dtype=torch.long)

    def generate(items, **settings):
        noise = RowNoise(1, 1, CPU)
        model.generate(conditions=items, noise=noise, **choice, **settings)

    first = launches(monkeypatch, lambda: generate(items[1:2], max_gen_len=20))
    kept = interpreted.kept
    others = launches(
        monkeypatch,
        lambda: generate(items[:1], prompt=prompt, max_gen_len=12, cfg_coef=2.0, temp=0.5),
    )
    assert interpreted.kept is kept
    assert (len(first), len(others)) == (22, 11)
    assert all(launched == first[0] for launched in first + others)
    kernels = [name for name, *_ in first[0]]
    assert kernels[0] == "embed_kernel"
    assert kernels[-1] == "sample_kernel"
