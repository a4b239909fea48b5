"""What a training needs of memory and time, against real updates; and how it is made to fit."""

import dataclasses
import os
import re
import time

import pytest
import torch
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from audiocraft.errors import InputError
from audiocraft.models.builders import get_lm_model
from audiocraft.models.shapes import shape_of
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.lora import attach, lora_config
from audiocraft.solvers.conditions import ConditionSettings
from audiocraft.solvers.devices import Device
from audiocraft.solvers.job import TrainingJob
from audiocraft.solvers.memory import (
    EFFICIENCY,
    TEXT_TOKENS,
    clip_flops,
    estimate_seconds,
    memory_need,
    plan_memory,
)
from audiocraft.solvers.musicgen import Clip, Trainer, TrainSettings
from audiocraft.solvers.optimizers import OPTIMIZERS, OptimizerSettings
from audiocraft.solvers.plan import Plan
from tests.golden_data import GOLDEN

GB = 10**9
DIM, LAYERS, CARD = 64, 6, 64


# The sums against real updates


def narrow(version, layers=LAYERS, dim=DIM):
    """A version with few narrow layers: its shape and its model."""
    cfg = OmegaConf.load(GOLDEN / f"checkpoints/{version}.xp_cfg.yaml")
    cfg.transformer_lm.update(dim=dim, num_layers=layers, num_heads=dim // 32, card=CARD)
    lm = get_lm_model(cfg, GOLDEN / "t5_tiny")
    text = lm.condition_provider.conditioners["description"]
    _, encoder = text.load()
    shape = dataclasses.replace(
        shape_of(version),
        dim=dim,
        num_layers=layers,
        card=CARD,
        text_dim=encoder.config.d_model,
        text_encoder=sum(weight.numel() for weight in encoder.parameters()),
    )
    assert sum(weight.numel() for weight in lm.parameters()) == shape.parameters
    return shape, lm


def longest_description(lm):
    """As many tokens as the sums allow for."""
    text = lm.condition_provider.conditioners["description"]
    words = ["piano"] * TEXT_TOKENS
    while text.tokenize([" ".join(words)])["input_ids"].shape[1] > TEXT_TOKENS:
        words.pop()
    description = " ".join(words)
    assert text.tokenize([description])["input_ids"].shape[1] > TEXT_TOKENS - 5
    return description


def trainer_of(lm, job, plan, *, bfloat16=False):
    """A trainer and its clips, as long as the context."""
    settings = TrainSettings(
        updates=2,
        batch_size=job.batch_size,
        micro_batch=plan.micro_batch,
        seed=1,
        optimizer=OptimizerSettings(job.optimizer, job.lr),
        conditions=ConditionSettings(cfg_p=0.0, word_p=0.0, merge_text_p=0.0),
        bfloat16=bfloat16,
        checkpointing=plan.checkpointing,
    )
    text = longest_description(lm)
    chroma = torch.eye(12)[torch.arange(235) % 12]
    clips = [
        Clip(str(i), torch.randint(CARD, (lm.n_q, 1500)), 1500, text, {}, chroma, 4096 * 235)
        for i in range(job.batch_size)
    ]
    return settings, clips


def measured_peak(run):
    """Most bytes that torch's allocator has given out at once for what `run` keeps or uses."""
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as profiled:
        kept = run()
    total = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    del kept
    return most


CASES = [
    # version, bfloat16, LoRA rank, clips of an update, clips at once, checkpointing, optimizer
    ("small", True, 0, 1, 1, False, "dadam"),
    ("melody", True, 4, 1, 1, True, "dadam"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in [
            ("small", False, 0, 2, 2, False, "dadam"),
            ("small", True, 0, 2, 2, False, "prodigy"),
            ("small", True, 4, 2, 1, False, "dadam"),
            ("small", False, 0, 1, 1, True, "adamw"),
            ("melody", True, 0, 2, 1, False, "adamw"),
            ("melody", False, 4, 2, 2, False, "dadam"),
            ("stereo-melody", True, 4, 1, 1, True, "dadam"),
            ("stereo-small", True, 0, 2, 1, True, "dadam"),
            ("stereo-small", False, 0, 2, 2, True, "dadam"),
        ]
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_need_is_what_updates_take(case):
    version, bfloat16, rank, batch, micro, checkpointing, optimizer = case
    shape, lm = narrow(version)
    if rank:
        attach(lm, lora_config(rank))
        if bfloat16:
            for weight in lm.parameters():
                if not weight.requires_grad:
                    weight.data = weight.data.bfloat16()
    lr = 1e-4 if optimizer == "adamw" else 1.0
    job = TrainingJob(version, batch_size=batch, lora_rank=rank, optimizer=optimizer, lr=lr)
    plan = Plan(micro, checkpointing)
    settings, clips = trainer_of(lm, job, plan, bfloat16=bfloat16)

    def run():
        trainer = Trainer(lm, settings)
        trainer.train(clips, lambda _: None)
        return trainer

    weights = sum(weight.numel() * weight.element_size() for weight in lm.parameters())
    peak = weights + measured_peak(run)
    need = memory_need(shape, job, plan, 1, gpu=False, bfloat16=bfloat16)
    assert need.weights == weights
    assert need.total - need.rest - need.encoder == pytest.approx(peak, rel=0.12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states(name):
    shape, lm = narrow("small", layers=1)
    job = TrainingJob("small", optimizer=name, lr=1e-4 if name == "adamw" else 1.0, batch_size=1)
    settings, clips = trainer_of(lm, job, Plan())
    trainer = Trainer(lm, settings)
    trainer.train(clips, lambda _: None, until=1)
    states = trainer.optimizer.state.values()
    tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
    held = sum(value.numel() * value.element_size() for value in tensors)
    need = memory_need(shape, job, Plan(), 1, gpu=False, bfloat16=False)
    assert need.optimizer == pytest.approx(held, rel=0.01)
    averages = trainer.ema.average.values()
    assert need.average == sum(value.numel() * value.element_size() for value in averages)


def attention_flops(query, key, _value, _dropout=0.0, is_causal=False, **_):
    """Two products, half of which causality masks; from shapes (B, H, S, D)."""
    rows, heads, steps, dim = query
    return 4 * rows * heads * steps * key[2] * dim // (2 if is_causal else 1)


def attention_gradient_flops(_gradient, query, key, value, _out, _sum, dropout, is_causal, **_):
    return 2 * attention_flops(query, key, value, dropout, is_causal=is_causal)


# torch's counter does not know those of the CPU.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_gradient_flops,
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("version", ["small", "stereo-melody"])
def test_operations_are_those_of_an_update(version, rank, checkpointing):
    shape, lm = narrow(version, dim=256, layers=2)
    if rank:
        attach(lm, lora_config(rank))
    plan = Plan(checkpointing=checkpointing)
    job = TrainingJob(version, batch_size=1, lora_rank=rank, optimizer="adamw", lr=1e-4)
    settings, clips = trainer_of(lm, job, plan)
    trainer = Trainer(lm, settings)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        trainer.train(clips, lambda _: None, until=1)
    assert clip_flops(shape, rank, plan) == pytest.approx(counter.get_total_flops(), rel=0.02)


# How a training is made to fit


def gpu(gigabytes, name="NVIDIA L4", *, bfloat16=True):
    return Device(name, int(gigabytes * GB), bfloat16)


def need_of(job, plan, processes=1, *, bfloat16=True, on_gpu=True):
    shape = shape_of(job.version)
    need = memory_need(shape, job, plan, processes, gpu=on_gpu, bfloat16=bfloat16)
    return need.total / GB


def test_nothing_is_given_up_where_there_is_room():
    plan, lines = plan_memory(TrainingJob("stereo-small"), [gpu(80)], 1, 64 * GB)
    assert plan == Plan(micro_batch=3)
    (line,) = lines
    need, have = map(float, re.findall(r"([\d.]+) GB", line))
    assert have == 80.0
    assert need == pytest.approx(need_of(TrainingJob("stereo-small"), plan), abs=0.05)
    assert line.endswith("that are free on NVIDIA L4.")


LARGE = TrainingJob("stereo-large", batch_size=16)


def test_steps_down_on_one_device():
    """From all clips at once to the last resort, as the device gets smaller."""
    job = TrainingJob("stereo-medium", batch_size=4)
    seen = []
    for tenths in range(900, 300, -1):
        device = gpu(tenths / 10)
        try:
            plan, lines = plan_memory(job, [device], 1, 64 * GB)
        except InputError:
            break
        assert need_of(job, plan) * GB <= device.memory
        if not seen or plan != seen[-1][0]:
            seen.append((plan, [line.partition(":")[0] for line in lines]))
    clips = "Memory is short for 4 clips at once"
    activations = "Memory is short for the activations of one clip"
    average = "Memory is short for the moving average"
    assert seen == [
        (Plan(4), ["Memory"]),
        (Plan(2), [clips, "Memory"]),  # three at once would take two turns as well
        (Plan(1), [clips, "Memory"]),
        (Plan(4, checkpointing=True), [activations, "Memory"]),
        # Fewer clips at once take more, since gradients then wait for the other clips.
        (Plan(4, checkpointing=True, ema_on_host=True), [activations, average, "Memory"]),
    ]


@pytest.mark.parametrize(
    ("size", "plan"),
    [
        (110, Plan(2)),
        (80, Plan(2, sharded=True)),
        (24, Plan(2, checkpointing=True, sharded=True)),
        (19.5, Plan(2, checkpointing=True, sharded=True, ema_on_host=True)),
    ],
)
def test_steps_down_on_eight_devices(size, plan):
    found, lines = plan_memory(LARGE, [gpu(size)] * 8, 8, 64 * GB)
    assert found == plan
    assert any("sharded over the 8 GPUs" in line for line in lines) == plan.sharded
    assert need_of(LARGE, plan, 8) <= size


def test_sharding_comes_after_computing_again():
    """It costs traffic between the GPUs: where activations alone are too much, they go first."""
    job = TrainingJob("melody-large", batch_size=8)
    size = need_of(job, Plan(1, checkpointing=True), 8) + 0.1
    assert need_of(job, Plan(1), 8) > size
    plan, _ = plan_memory(job, [gpu(size)] * 8, 8, 64 * GB)
    assert plan == Plan(1, checkpointing=True)


def test_the_smallest_device_counts():
    both = [gpu(80, "NVIDIA H100"), gpu(24)]
    plan, lines = plan_memory(TrainingJob("stereo-small", batch_size=16), both, 2, 64 * GB)
    assert plan.micro_batch < 8
    assert lines[-1].endswith("of the 24.0 GB that are free on NVIDIA L4.")
    assert lines[0].startswith("Memory is short for the 8 clips of each process at once")


def test_a_device_without_bfloat16_needs_more():
    job = TrainingJob("stereo-small", batch_size=4)
    size = need_of(job, Plan(4)) + 0.1
    assert plan_memory(job, [gpu(size)], 1, 64 * GB)[0] == Plan(4)
    older = [gpu(size), gpu(size, bfloat16=False)]
    assert plan_memory(job, older[1:], 1, 64 * GB)[0] != Plan(4)
    assert plan_memory(dataclasses.replace(job, batch_size=8), older, 2, 64 * GB)[0] != Plan(4)


def test_the_average_goes_to_the_host_only_where_it_has_room():
    job = TrainingJob("stereo-large")
    size = need_of(job, Plan(1, checkpointing=True, ema_on_host=True)) + 0.1
    plan, lines = plan_memory(job, [gpu(size)], 1, 64 * GB)
    assert plan.ema_on_host
    assert "its 13.2 GB go to the host's memory" in lines[-2]
    with pytest.raises(InputError, match=r"needs at least \d"):
        plan_memory(job, [gpu(size)], 1, 16 * GB)


@pytest.mark.parametrize("batch_size", [1, 3, 64, 1000])
def test_batch_size_never_decides(batch_size):
    job = TrainingJob("stereo-melody", batch_size=batch_size)
    plan, _ = plan_memory(job, [gpu(48)], 1, 64 * GB)
    assert need_of(job, plan) <= 48


def test_a_large_batch_is_planned_in_few_steps(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return memory_need(*arguments, **options)

    monkeypatch.setattr("audiocraft.solvers.memory.memory_need", counted)
    job = TrainingJob("tiny", batch_size=100_000)
    plan, _ = plan_memory(job, [], 1, 8 * GB)
    turns = -(-job.batch_size // plan.micro_batch)
    fewer = dataclasses.replace(plan, micro_batch=-(-job.batch_size // (turns - 1)))
    on_host = {"bfloat16": False, "on_gpu": False}
    assert need_of(job, plan, **on_host) <= 8 < need_of(job, fewer, **on_host)
    with pytest.raises(InputError, match=r"needs at least "):
        plan_memory(job, [], 1, 1)
    assert len(calls) < 200
    assert shape_of("tiny") is shape_of("tiny")  # its file is read once


def test_gradients_that_ddp_adds_up_are_moved_once():
    job = TrainingJob("large", batch_size=4)
    shape = shape_of("large")
    waits, whole = (
        memory_need(shape, job, Plan(clips, checkpointing=True), 2, gpu=True, bfloat16=True)
        for clips in (1, 2)
    )
    assert whole.working < waits.working == 2 * 4 * shape.parameters


@pytest.mark.parametrize(("rank", "size"), [(0, 4), (16, 2)])
def test_each_process_loads_all_weights_before_they_are_sharded(rank, size):
    job = TrainingJob("stereo-large", batch_size=16, lora_rank=rank)
    shape = shape_of(job.version)
    plan = Plan(checkpointing=True, sharded=True, ema_on_host=True)
    need = memory_need(shape, job, plan, 16, gpu=True, bfloat16=True)
    loaded = need.total - need.rest - need.encoder
    assert loaded == pytest.approx(size * shape.parameters, rel=0.1)  # and adapters
    assert loaded >= size * shape.parameters


def settings_named(message):
    """The changes that a refusal offers."""
    offered = re.search(r": give (.*), which fits?\.$", message)
    assert offered, message
    for choice in offered[1].split(" or "):
        pairs = dict(pair.split("=") for pair in choice.split(" with "))
        rank = {"lora_rank": int(pairs["lora_rank"])} if "lora_rank" in pairs else {}
        yield {"version": pairs["model_version"], **rank} if "model_version" in pairs else rank


@pytest.mark.parametrize(
    ("version", "rank", "size", "offered"),
    [
        ("stereo-large", 0, 24, ["lora_rank=16", "model_version=stereo-small"]),
        ("medium", 0, 24, ["lora_rank=16", "model_version=small"]),
        ("stereo-melody-large", 0, 48, ["lora_rank=16", "model_version=stereo-melody"]),
        ("stereo-large", 64, 8, ["model_version=stereo-small", "model_version=stereo-melody"]),
        ("stereo-melody", 16, 4, ["model_version=stereo-small", "model_version=small"]),
        ("large", 0, 4, ["model_version=small with lora_rank=16", "model_version=tiny"]),
        ("large", 0, 1.5, ["model_version=tiny"]),
    ],
)
def test_refusal(version, rank, size, offered):
    """One sentence: what is needed, what there is, and settings of which each fits by itself."""
    job = TrainingJob(version, lora_rank=rank)
    with pytest.raises(InputError) as caught:
        plan_memory(job, [gpu(size)], 1, 64 * GB)
    message = str(caught.value)
    need, have = map(float, re.findall(r"([\d.]+) GB", message))
    assert need > have == size
    assert message.startswith(f"model_version={version} with ")
    assert "free on NVIDIA L4" in message
    assert not re.search(r"\. ", message)
    for choice in offered:
        assert choice in message
    for changes in settings_named(message):
        plan_memory(dataclasses.replace(job, **changes), [gpu(size)], 1, 64 * GB)


def test_refusal_where_nothing_fits():
    with pytest.raises(InputError, match=r"0\.3 GB are free on NVIDIA L4: take a device with more"):
        plan_memory(TrainingJob("tiny"), [gpu(0.3)], 1, 64 * GB)


def test_what_goes_on_stays_as_it_began():
    """Sharded or not, whatever a new training would be."""
    plan, lines = plan_memory(LARGE, [gpu(110)] * 8, 8, 64 * GB, sharded=True)
    assert plan == Plan(2, sharded=True)
    assert lines[0] == (
        "The weights stay as they were, sharded over the 8 GPUs, with gradients and optimizer "
        "state."
    )
    with pytest.raises(InputError) as caught:
        plan_memory(LARGE, [gpu(80)] * 8, 8, 64 * GB, sharded=False)
    assert re.search(
        r" needs at least \d+\.\d GB of memory to go on unsharded as it began, 80\.0 GB are free "
        r"on NVIDIA L4: end what else uses it, or begin again with --fresh\.$",
        str(caught.value),
    )
    with pytest.raises(InputError, match=r" to go on sharded as it began, 5\.0 GB .* uses it\.$"):
        plan_memory(LARGE, [gpu(5)] * 8, 8, 64 * GB, sharded=True)


def test_what_goes_on_where_nothing_can_be_sharded():
    """Neither other settings nor a new training would help it."""
    job = TrainingJob("stereo-large", batch_size=2)
    for devices, processes, host in (([gpu(24)], 1, 64 * GB), ([], 1, 24 * GB), ([], 2, 48 * GB)):
        with pytest.raises(InputError) as caught:
            plan_memory(job, devices, processes, host, sharded=False)
        assert re.search(
            r" needs at least \d+\.\d GB of memory, 24\.0 GB are free .*: take a device with more, "
            r"or end what else uses it\.$",
            str(caught.value),
        )


def test_what_goes_on_unsharded_may_keep_its_average_on_the_host():
    job = TrainingJob("stereo-large", batch_size=2)
    least = Plan(1, checkpointing=True, ema_on_host=True)
    both = [gpu(need_of(job, least, 2) + 0.1)] * 2
    assert plan_memory(job, both, 2, 64 * GB, sharded=False)[0] == least
    assert plan_memory(job, both, 2, 64 * GB)[0].sharded


# Without a GPU


def test_processes_share_the_host():
    job = TrainingJob("stereo-small", batch_size=2)
    alone, lines = plan_memory(job, [], 1, 22 * GB)
    assert alone == Plan(2)
    assert lines[-1].endswith("that are free in this machine.")
    with pytest.raises(
        InputError, match=r"11\.0 GB are free in this machine for each of 2 process"
    ):
        plan_memory(job, [], 2, 22 * GB)


def test_the_host_computes_in_float32():
    job = TrainingJob("small", batch_size=1)
    on_host = need_of(job, Plan(), bfloat16=False, on_gpu=False)
    assert on_host > need_of(job, Plan())
    plan_memory(job, [], 1, int(on_host * GB) + 1)
    least = need_of(job, Plan(checkpointing=True), bfloat16=False, on_gpu=False)
    with pytest.raises(InputError, match=f"needs at least {least:.1f} GB"):
        plan_memory(job, [], 1, int(least * GB) - 1)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_tiny_trains_anywhere(processes, rank):
    job = TrainingJob("tiny", lora_rank=rank, batch_size=8)
    plan, lines = plan_memory(job, [], processes, processes * GB)
    assert plan.micro_batch == 8 // processes or len(lines) > 1
    assert not plan.sharded
    assert not plan.ema_on_host


def test_this_machine():
    """The host's memory is looked up where it is not given."""
    plan, lines = plan_memory(TrainingJob("tiny"), [], 1)
    assert isinstance(plan, Plan)
    assert "in this machine" in lines[-1]


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_has_a_need(version):
    """An adapter takes less than all weights, and what is given up is worth it."""
    job = TrainingJob(version, batch_size=3)
    whole, least = Plan(3), Plan(1, checkpointing=True, ema_on_host=True)
    assert need_of(job, least) < need_of(job, whole)
    adapter = dataclasses.replace(job, lora_rank=16)
    assert need_of(adapter, whole) < need_of(job, whole)
    if version != "tiny":
        shards = Plan(1, checkpointing=True, sharded=True)
        assert need_of(job, shards, 8) < need_of(job, Plan(1, checkpointing=True), 8) / 2


# Time


@pytest.mark.slow
def test_time_is_that_of_the_updates(monkeypatch):
    """Within a factor of 5, at some moment: other work on this machine comes and goes.

    By one thread, which finds a core where several would wait for one another.
    """
    monkeypatch.setattr("audiocraft.solvers.memory.threads_of", lambda _: 1)
    shape, lm = narrow("small", layers=4, dim=512)
    job = TrainingJob("small", epochs=1, updates_per_epoch=1, batch_size=1)
    settings, clips = trainer_of(lm, job, Plan())
    trainer = Trainer(lm, settings)
    trainer.train(clips, lambda _: None, until=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = []
    while len(ratios) < 5 and not any(1 / 5 < ratio < 5 for ratio in ratios):
        begin = time.perf_counter()
        trainer.train(clips, lambda _: None, until=2 + len(ratios))
        update = time.perf_counter() - begin
        estimate = estimate_seconds(job, [], 1, None)
        estimate *= clip_flops(shape, 0, Plan()) / clip_flops(shape_of("small"), 0, Plan())
        ratios.append(estimate / update)
    torch.set_num_threads(threads)
    assert 1 / 5 < ratios[-1] < 5, ratios


def test_the_speed_is_that_of_a_process_s_threads(monkeypatch):
    """Of the CPUs that a cpuset leaves."""
    asked = []

    def speed(*question):
        asked.append(question)
        return 1e9

    monkeypatch.setattr("audiocraft.solvers.memory.matmul_speed", speed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for processes in (1, 2, 8):
        estimate_seconds(TrainingJob("tiny", batch_size=8), [], processes, None)
    assert asked == [("cpu", 4), ("cpu", 2), ("cpu", 1)]


def test_time_of_passes_through_the_music(monkeypatch):
    """12 chunks in batches of 5 are 3 updates."""
    monkeypatch.setattr("audiocraft.solvers.memory.matmul_speed", lambda *_: 1e9)
    job = TrainingJob("tiny", epochs=2, updates_per_epoch=0, batch_size=5)
    clip = clip_flops(shape_of("tiny"), 0, Plan()) / (1e9 * EFFICIENCY["cpu"])
    assert estimate_seconds(job, [], 1, 12) == pytest.approx(2 * 3 * 5 * clip)
    both = dataclasses.replace(job, batch_size=6)
    assert estimate_seconds(both, [], 2, 12) == pytest.approx(2 * 2 * 3 * clip)
    with pytest.raises(InputError, match="updates_per_epoch=0 means once through the music"):
        estimate_seconds(job, [], 1, None)
