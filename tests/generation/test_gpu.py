"""The kernels and graphs of a CUDA device: what only a device can show."""

import gc
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from audiocraft.generation import fused
from audiocraft.generation.sampling import RowNoise, SamplingParams
from audiocraft.models import MusicGen
from audiocraft.models.lm import LMModel
from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
from audiocraft.modules.conditioners import (
    ConditionFuser,
    ConditioningAttributes,
    ConditioningProvider,
)
from audiocraft.modules.transformer import TransformerConfig
from tests.generation.cells import BRANCHES, COEFS, cells, codes_of, load_cell
from tests.golden_data import load
from tests.models.test_lm import (
    CHANGES,
    GREEDY,
    STATES,
    codes_beside_others,
    descriptions,
    lm,
    melodies,
)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """Nothing remembered of earlier tests, and no request that had to do without the kernels."""
    process = fused._Process()
    monkeypatch.setattr(fused, "_process", lambda: process)
    yield process
    assert process.failure is None
    assert not process.warned


def on_gpu(kind, dtype=torch.float32):
    return lm(STATES[kind]).to(CUDA, dtype)


def items_of(kind, rows=1):
    items = melodies() if kind == "melody" else descriptions(STATES[kind])
    return items[:rows]


def wide(dim=1024, layers=4, heads=16, codebooks=4, dtype=torch.float16):
    """Random weights of a release's width, without conditions."""
    torch.manual_seed(0)
    model = LMModel(
        TransformerConfig(dim, heads, layers),
        DelayedPatternProvider(codebooks),
        ConditioningProvider({}),
        ConditionFuser({}),
        card=2048,
    )
    return model.to(CUDA, dtype).eval()


def generate(model, length, rows=1, seed=0, **settings):
    noise = RowNoise(seed, rows, CUDA)
    return model.generate(num_samples=rows, max_gen_len=length, noise=noise, **settings)


def without_graphs(monkeypatch, make):
    with monkeypatch.context() as patch:
        patch.setenv("NO_CUDA_GRAPH", "1")
        return make()


def without_kernels(monkeypatch, make):
    with monkeypatch.context() as patch:
        patch.setattr("audiocraft.generation.engine.fused_decoder", lambda *_: None)
        return make()


@pytest.mark.parametrize(
    ("kind", "guided", "prompt"),
    [
        (kind, guided, prompt)
        for kind in STATES
        for guided in COEFS
        for prompt in (0, 9)
        if kind == "melody" or guided != "double"
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("rows", [1, 3])
def test_graphs_change_nothing(kind, guided, prompt, dtype, rows, process, monkeypatch):
    model, (coef, beta) = on_gpu(kind, dtype), COEFS[guided]
    known = torch.arange(3 * 16 * prompt, device=CUDA).view(3, 16, prompt)
    known = known[:rows, : model.num_codebooks] % model.card

    def codes():
        return model.generate(
            known,
            items_of(kind, rows),
            max_gen_len=40,
            top_k=12,
            cfg_coef=coef,
            cfg_coef_beta=beta,
            noise=RowNoise(4, rows, CUDA),
        )

    first = codes()
    assert process.kept.graphs["top_k"] is not None
    kept = process.kept
    assert torch.equal(codes(), first)
    assert process.kept is kept, "the second request made its buffers anew"
    assert torch.equal(without_graphs(monkeypatch, codes), first)
    if dtype == torch.float32:
        assert torch.equal(without_kernels(monkeypatch, codes), first)


@pytest.mark.parametrize(
    "cell", cells("mono", "stereo", "melody", "stereo-melody", "tiny"), ids=str
)
def test_graphs_change_nothing_in_any_cell(cell, release, process, monkeypatch):
    """With two windows and with one, of the type that a GPU computes in."""
    model, replays = load_cell(cell, release, CUDA), []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    for seconds in (1.6, 0.8):
        replays.clear()
        first = codes_of(model, cell, 1.0, seconds)
        assert first.shape[-1] == seconds * 50
        assert len(replays) >= seconds * 50 / 2
        assert process.kept.size.branches == BRANCHES[cell.guidance]
        replays.clear()
        singly = without_graphs(monkeypatch, lambda: codes_of(model, cell, 1.0, seconds))  # noqa: B023
        assert not replays
        assert torch.equal(singly, first)


@pytest.mark.parametrize("kind", ["mono", "stereo", "melody"])
@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"use_sampling": False}, {"temp": 0.7}])
def test_choices(kind, settings, monkeypatch):
    model = on_gpu(kind)

    def codes():
        noise = RowNoise(4, 1, CUDA)
        return model.generate(
            conditions=items_of(kind), max_gen_len=30, cfg_coef=3.0, noise=noise, **settings
        )

    first = codes()
    assert torch.equal(without_graphs(monkeypatch, codes), first)
    assert torch.equal(without_kernels(monkeypatch, codes), first)


@pytest.mark.parametrize("melody", [False, True])
@pytest.mark.parametrize("cfg_coef", [3.0, 1.0])
def test_windows(melody, cfg_coef, process, monkeypatch):
    model = MusicGen.get_pretrained("tiny", device="cuda")
    model.max_duration = 2
    model.set_generation_params(duration=4.5, seed=3, cfg_coef=cfg_coef)
    wav = torch.randn(1, 2, 96000, generator=torch.Generator().manual_seed(0))

    def codes():
        made = (
            model.generate_with_chroma(["a"], wav, 32000, return_tokens=True)
            if melody
            else model.generate(["a"], return_tokens=True)
        )
        return made[1]

    first = codes()
    kept = process.kept
    assert torch.equal(codes(), first)
    assert process.kept is kept
    assert torch.equal(without_graphs(monkeypatch, codes), first)


@pytest.mark.parametrize(
    "case",
    [
        f"{kind}.{name}"
        for kind in STATES
        for name in ("noprompt", "two_step")
        if f"{kind}.{name}" in GREEDY["cases"]
    ],
)
def test_golden_tokens(case):
    kind, info = case.partition(".")[0], GREEDY["cases"][case]
    codes = on_gpu(kind).generate(
        conditions=items_of(kind, 3),
        max_gen_len=info["max_gen_len"],
        use_sampling=False,
        top_k=0,
        cfg_coef=info.get("cfg_coef"),
        two_step_cfg=info.get("two_step_cfg"),
    )
    assert torch.equal(codes.cpu(), load(f"generate_greedy/{kind}")[case])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 2, 16, 48])
@torch.no_grad()
def test_logits_of_a_step(rows, dtype):
    """Against float32 on the CPU; 96 rows are more than one program of the matrix units takes."""
    model, exact = wide(dtype=dtype), wide(dtype=torch.float32).cpu()
    codes = torch.randint(2048, (rows, 4, 12), generator=torch.Generator().manual_seed(0))
    items = [ConditioningAttributes()] * (2 * rows)
    inputs = codes.repeat(2, 1, 1)
    state = exact.start(items, 12)
    exact.advance(state, inputs[..., :10])
    expected = exact.advance(state, inputs[..., 10:11])
    params = SamplingParams(use_sampling=False)
    states = [model.start(items, 12)]
    decoder = fused.fused_decoder(model, states, 2, 12, params, rows)
    model.advance(states[0], inputs[..., :10].to(CUDA))
    decoder.begin(states, codes.to(CUDA), 11, (3.0, 0.0), params)
    decoder.step(RowNoise(0, rows, CUDA))
    ours = decoder._buffers.logits.float().cpu()
    cosine = torch.nn.functional.cosine_similarity(ours, expected, dim=-1)
    assert cosine.min() > 0.9999


@pytest.mark.parametrize("rows", [2, 16])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows):
    """Nor on what was asked for before."""
    model = wide()
    prompt = torch.randint(2048, (rows, 4, 20), device=CUDA)
    settings = {"max_gen_len": 60, "cfg_coef": 1.0}
    first = model.generate(prompt, noise=RowNoise(7, rows, CUDA), **settings)
    prompt[1:] = prompt[1:].flip(-1)
    generate(model, 40, rows, seed=3)
    second = model.generate(prompt, noise=RowNoise(7, rows, CUDA), **settings)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize(("kind", "what"), CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_row_does_not_depend_on_what_the_others_hear(kind, what, dtype, process):
    model = on_gpu(kind, dtype)
    first, second = codes_beside_others(model, kind, what)
    assert process.kept.size.branches == 2
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_a_longer_request_before_changes_nothing(process):
    model = wide()
    first = generate(model, 50)
    kept = process.kept
    generate(model, 400)
    assert process.kept is not kept
    large = process.kept
    assert torch.equal(generate(model, 50), first)
    assert process.kept is large


def test_graphs_are_made_once(caplog):
    """Other settings need no other graph."""
    model = wide()
    with caplog.at_level(logging.INFO, logger=fused.__name__):
        generate(model, 50)
        generate(model, 40, temp=0.5, top_k=3)
        generate(model, 45, top_k=0)
        assert sum("Made the GPU ready" in record.message for record in caplog.records) == 1
        generate(model, 45, top_p=0.5)
        assert sum("Made the GPU ready" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("inside", [True, False])
def test_a_graph_of_inference_mode_and_one_of_outside(inside, process):
    """Torch keeps tensors from the first recording, which the others write."""
    model, codes = wide(), []
    for mode, settings in [(inside, {"top_k": 9}), (not inside, {"top_p": 0.9})] * 2:
        with torch.inference_mode(mode):
            codes.append(generate(model, 30, **settings))
    assert set(process.kept.graphs) == {"top_k", "top_p"}
    assert torch.equal(codes[0], codes[2])
    assert torch.equal(codes[1], codes[3])
    assert torch.rand(1, device="cuda") < 1


def test_requests_at_the_same_time_change_nothing():
    """Of threads, on streams of their own, and of one that comes from a callback."""
    model = wide(dtype=torch.float32)
    alone = [generate(model, 200, seed=seed) for seed in range(4)]

    def in_thread(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            return generate(model, 200, seed=seed).cpu()

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(in_thread, range(4)))
    assert all(torch.equal(ours, codes.cpu()) for ours, codes in zip(together, alone, strict=True))
    within = []

    def callback(done, _):
        if done == 40:
            within.append(generate(model, 200, seed=1))

    assert torch.equal(generate(model, 200, seed=0, callback=callback), alone[0])
    assert torch.equal(within[0], alone[1])


def test_other_weights_are_noticed(monkeypatch):
    model = wide(dtype=torch.float32)

    def greedy():
        return generate(model, 10, use_sampling=False)

    first = greedy()
    layer = model.transformer.layers[0].linear1
    layer.weight = torch.nn.Parameter(layer.weight.flip(0))
    second = greedy()
    assert not torch.equal(first, second)
    assert torch.equal(second, without_kernels(monkeypatch, greedy))


def test_memory_goes_with_the_model(process):
    model = wide()
    generate(model, 10)
    assert process.kept is not None
    before = torch.cuda.memory_allocated()
    del model
    gc.collect()
    assert process.kept is None
    assert torch.cuda.memory_allocated() < before


class Cancelled(Exception):  # noqa: N818 - what a caller raises
    pass


def test_cancel_within_16_steps(process):
    """The steps queued behind the one that a cancel came at are few, and the next request whole."""
    model = wide()
    expected = generate(model, 100)

    def cancel(done, _):
        if done >= 40:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(model, 100, callback=cancel)
    torch.cuda.synchronize()
    last = process.kept.buffers.step.item()
    assert 40 <= last <= 57
    assert torch.equal(generate(model, 100), expected)


def test_progress():
    calls = []
    generate(wide(), 50, callback=lambda *call: calls.append(call))
    total = 50 + 3
    assert calls == [*((done, total) for done in range(8, total, 8)), (total, total)]


@pytest.mark.parametrize("choice", [{}, {"top_p": 0.9}, {"use_sampling": False}])
@torch.no_grad()
def test_a_step_does_not_wait_for_the_gpu(choice):
    model, params = wide(), SamplingParams(**choice)
    states = [model.start([ConditioningAttributes()] * 2, 100)]
    decoder = fused.fused_decoder(model, states, 2, 100, params, 1)
    codes = torch.zeros(1, 4, 100, dtype=torch.long, device=CUDA)
    model.advance(states[0], codes[..., :1].repeat(2, 1, 1))
    decoder.begin(states, codes, 2, (3.0, 0.0), params)
    noise = RowNoise(0, 1, CUDA)
    decoder.step(noise)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            decoder.step(noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [1, 8])
def test_memory_of_the_token_loop(rows, process):
    """The peak behind the prefill is the weights, the cache, and at most a fifth of both."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = wide(layers=12)
    weights = sum(weight.nbytes for weight in model.parameters())

    def after_prefill(done, _):
        if done == 8:
            torch.cuda.reset_peak_memory_stats()

    generate(model, 1500, rows, cfg_coef=3.0, callback=after_prefill)
    buffers = process.kept.buffers
    cache = buffers.keys.nbytes + buffers.values.nbytes
    exact = 2 * 12 * rows * 1504 * 1024 * 2  # one branch: there is nothing to be guided by
    assert cache < 1.05 * exact
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * (weights + cache)
