"""Models in memory: the right one, within the budget, and none lost to a failed load."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.assets.store import PARTS
from audiocraft.errors import InputError, TooLargeError, WeightsError
from audiocraft.models import MusicGen
from audiocraft.models.builders import get_lm_model
from audiocraft.models.finetunes import read_finetune
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.precision import int8_bytes
from audiocraft.serving import models
from audiocraft.serving.models import ModelCache, Selection
from audiocraft.solvers.devices import host_memory
from tests.golden_data import GOLDEN
from tests.releases import adapter, full_finetune, read_release, stand_in
from tests.solvers.test_devices import MIB, V1, V2, machine
from tools.make_diffusion import write_diffusion

RELEASED = [name for name in VERSIONS if name != "tiny"]
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(folder))
    return folder


def tokens(model: MusicGen) -> list[int]:
    model.set_generation_params(duration=0.3, seed=3)
    codes = model.generate(["a song"], return_tokens=True)[1]
    assert isinstance(codes, torch.Tensor)
    return codes.flatten().tolist()


def anonymous_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def tuned(path: Path) -> Selection:
    read = read_finetune(path)
    assert read.base is not None
    return Selection(read.base, read, path.stem)


@pytest.mark.slow
def test_ten_versions_in_turn_within_a_budget(store):
    """Each gives what it gives alone, and memory does not grow with the number of them."""
    alone = {}
    for seed, version in enumerate(RELEASED):
        stand_in(store, version, seed, size=(256, 4))
        alone[version] = tokens(MusicGen.get_pretrained(version, device="cpu"))
    assert len({str(codes) for codes in alone.values()}) == 10
    budget = 50_000_000  # of models with some 16 MB each
    cache = ModelCache(CPU, budget)
    after = []
    for _ in range(3):
        for version in RELEASED:
            assert tokens(cache.get(Selection(version))) == alone[version]
            assert cache.used <= budget
        after.append(anonymous_megabytes())
    assert cache.used > 30_000_000  # the budget is made use of
    assert max(after[1:]) - after[0] < 25  # one model that is left each time would take 32


def test_the_last_used_stay(store):
    for seed, version in enumerate(("small", "medium", "large")):
        stand_in(store, version, seed)
    cache = ModelCache(CPU)
    first = cache.get(Selection("small"))
    size = cache.used
    cache = ModelCache(CPU, 5 * size // 2)
    first, second = cache.get(Selection("small")), cache.get(Selection("medium"))
    assert cache.get(Selection("small")) is first
    cache.get(Selection("large"))
    assert cache.get(Selection("small")) is first
    assert cache.get(Selection("medium")) is not second


def test_fine_tunes_beside_their_base(store, tmp_path):
    """An adapter shares what it does not change, and leaves its base as it was."""
    stand_in(store, "stereo-small", 1, size=(128, 2))
    cache = ModelCache(CPU)
    base = cache.get(Selection("stereo-small"))
    before = {key: value.clone() for key, value in base.lm.state_dict().items()}
    plain, alone = tokens(base), cache.used
    adapters = [
        tuned(adapter(store, "stereo-small", seed, tmp_path / f"{seed}.safetensors"))
        for seed in (2, 3)
    ]
    full = tuned(full_finetune(store, "stereo-small", 4, tmp_path / "4.safetensors"))
    heard = [tokens(cache.get(selection)) for selection in (*adapters, full)]
    assert len({str(codes) for codes in (plain, *heard)}) == 4
    assert [tokens(cache.get(selection)) for selection in (*adapters, full)] == heard
    assert tokens(cache.get(Selection("stereo-small"))) == plain
    assert cache.get(Selection("stereo-small")) is base
    assert all(torch.equal(value, before[key]) for key, value in base.lm.state_dict().items())
    assert cache.used < 4 * alone


def test_eight_bits(store, tmp_path):
    """A version, an adapter and a full fine-tune, each as it is when it is loaded alone."""
    stand_in(store, "small", 1, size=(128, 2))
    cache = ModelCache(CPU, precision="int8")
    exact = ModelCache(CPU)
    lora = tuned(adapter(store, "small", 2, tmp_path / "a.safetensors"))
    full = tuned(full_finetune(store, "small", 3, tmp_path / "b.safetensors"))
    names = ("small", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    for selection, name in zip((Selection("small"), lora, full), names, strict=True):
        heard = tokens(cache.get(selection))
        alone = MusicGen.get_pretrained(name, device="cpu", precision="int8")
        assert heard == tokens(alone)
    model = cache.get(lora)
    cache.evict_others(model)
    exact.evict_others(exact.get(lora))
    weights = int8_bytes(model.lm)
    assert weights > 100_000
    assert exact.used - cache.used == 3 * weights


def test_an_adapter_where_its_base_has_no_room_beside_it(store, tmp_path):
    """The base gives way; what is heard is the same."""
    stand_in(store, "small", 1, size=(256, 4))
    selection = tuned(adapter(store, "small", 2, tmp_path / "a.safetensors"))
    cache = ModelCache(CPU)
    expected = tokens(cache.get(selection))
    both = cache.used
    cache.evict_others(cache.get(selection))
    alone = cache.used
    assert alone < both
    plain = tokens(ModelCache(CPU).get(Selection("small")))
    tight = ModelCache(CPU, (alone + both) // 2)
    assert tokens(tight.get(selection)) == expected
    assert tight.used == alone
    assert tokens(tight.get(Selection("small"))) == plain
    assert tokens(tight.get(selection)) == expected


def test_what_does_not_fit_is_refused_and_nothing_is_lost(store):
    stand_in(store, "small", 1)
    stand_in(store, "large", 2, size=(512, 6))
    cache = ModelCache(CPU)
    cache.get(Selection("small"))
    cache = ModelCache(CPU, 2 * cache.used)
    expected = tokens(cache.get(Selection("small")))
    with pytest.raises(
        InputError, match=r"^model_version large needs 0\.1 GB of memory, 0\.0 GB are free on cpu"
    ):
        cache.get(Selection("large"))
    assert tokens(cache.get(Selection("small"))) == expected


@pytest.mark.usefixtures("store")
def test_what_does_not_fit_is_not_fetched(monkeypatch):
    """From the published sizes, at 2 and 4 bytes a weight."""
    monkeypatch.setattr(models, "find_file", None)
    for precision, need in (("float32", "13.7"), ("bfloat16", "7.2")):
        with pytest.raises(
            InputError, match=rf"^model_version large needs {need} GB of memory, 1\.0 GB are free"
        ):
            ModelCache(CPU, 10**9, precision).get(Selection("large"))


def test_memory_that_runs_out_while_a_model_is_loaded(store, monkeypatch):
    """What is free was taken by another program in between, say."""
    stand_in(store, "small", 1)

    def run_out(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(models, "load_models", run_out)
    with pytest.raises(InputError) as caught:
        ModelCache(CPU).get(Selection("small"))
    assert str(caught.value) == (
        "model_version small does not fit the memory of cpu: choose a smaller model_version, or "
        "free some."
    )


def test_what_takes_less_than_weights_that_name_their_base(store, tmp_path):
    """Another model_version would not: the base overrides it."""
    stand_in(store, "small", 1)
    own = tuned(full_finetune(store, "small", 2, tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match=r"on cpu: take weights made from a smaller model_version"):
        ModelCache(CPU, 1).get(own)
    with pytest.raises(InputError, match=r"on cpu: choose a smaller model_version"):
        ModelCache(CPU, 1).get(Selection("small"))


def test_the_diffusion_makes_room_and_comes_again(store):
    stand_in(store, "small", 1)
    stand_in(store, "large", 2, size=(512, 6))
    repo_id, (filename,) = PARTS["mbd"]
    (store / repo_id).mkdir()
    write_diffusion(store / repo_id / filename, 16, 2, hidden=8, depth=3, growth=2)
    cache = ModelCache(CPU)
    small = cache.get(Selection("small"))
    alone = cache.used
    bands = cache.diffusion(small).DPs
    with_bands = cache.used
    assert with_bands - alone == sum(
        weight.nbytes for band in bands for weight in band.model.parameters()
    )
    cache.get(Selection("large"))
    everything = cache.used

    tight = ModelCache(CPU, everything - (with_bands - alone) // 2)
    tight.diffusion(tight.get(Selection("small")))
    tight.get(Selection("large"))
    assert tight.used == everything - (with_bands - alone)
    tight.diffusion(tight.get(Selection("large")))  # `small` gives way
    assert tight.used == everything - alone

    # Long silence behind a file, which is refused before it is read.
    os.truncate(store / repo_id / filename, 2_000_000_000)
    small_only = ModelCache(CPU, alone + 1_000_000_000)
    expected = tokens(small_only.get(Selection("small")))
    with pytest.raises(InputError, match=r"^multi_band_diffusion needs 2\.0 GB of memory, 1\.0 GB"):
        small_only.diffusion(small_only.get(Selection("small")))
    assert tokens(small_only.get(Selection("small"))) == expected


def test_a_clip_too_long_to_be_decoded_by_the_diffusion(store):
    stand_in(store, "small", 1)
    repo_id, (filename,) = PARTS["mbd"]
    (store / repo_id).mkdir()
    write_diffusion(store / repo_id / filename, 16, 2, hidden=8, depth=3, growth=2)
    cache = ModelCache(CPU, 1_000_000_000)
    model = cache.get(Selection("small"))
    diffusion = cache.diffusion(model)
    need = diffusion.memory(600 * 50)
    cache.make_room(model, 60, melody=False, diffusion=diffusion)
    assert need > 1_000_000_000
    said = (
        rf"^multi_band_diffusion needs {need / 1e9:.1f} GB of memory for 600 s of music, "
        r"1\.0 GB are free on cpu: make duration shorter, or switch it off\.$"
    )
    with pytest.raises(TooLargeError, match=said):
        cache.make_room(model, 600, melody=False, diffusion=diffusion)


def test_a_failed_load_leaves_what_was_served(store, tmp_path):
    stand_in(store, "small", 1)
    stand_in(store, "stereo-small", 2)
    cache = ModelCache(CPU)
    model = cache.get(Selection("small"))
    package = read_release(store / VERSIONS["small"].source)
    cfg = OmegaConf.create(package["xp.cfg"])
    cfg.transformer_lm.card = 16
    state = get_lm_model(cfg, GOLDEN / "t5_tiny").state_dict()
    torch.save({"xp.cfg": cfg, "model": state}, tmp_path / "a.tar")
    other_codes = Selection("small", read_finetune(tmp_path / "a.tar"), "a")
    with pytest.raises(WeightsError, match=r"^a\.tar writes 4 codebooks of 16 codes, the codec of"):
        cache.get(other_codes)
    wrong = read_finetune(full_finetune(store, "stereo-small", 3, tmp_path / "a.safetensors"))
    with pytest.raises(WeightsError, match=r"^a\.safetensors does not fit its configuration"):
        cache.get(Selection("tiny", wrong, "b"))
    other = adapter(store, "small", 3, tmp_path / "b.safetensors", base_sha256="0" * 64)
    with pytest.raises(WeightsError, match="is an adapter for other weights of small"):
        cache.get(tuned(other))
    assert cache.get(Selection("small")) is model


def test_a_long_request_makes_others_give_way(store):
    stand_in(store, "small", 1)
    stand_in(store, "medium", 2)
    cache = ModelCache(CPU, 30_000_000)
    cache.get(Selection("small"))
    model = cache.get(Selection("medium"))
    both = cache.used
    cache.make_room(model, duration=1, melody=False)
    assert cache.used == both
    cache.make_room(model, duration=60, melody=False)
    assert cache.used < both
    assert cache.get(Selection("medium")) is model


@pytest.mark.parametrize(
    ("groups", "group", "limit", "used"),
    [
        pytest.param(V2, "job/rank", "memory.max", "memory.current", id="nested group"),
        pytest.param(V2, "job", "memory.max", "memory.current", id="group above"),
        pytest.param(
            V1, "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", id="version 1"
        ),
    ],
)
def test_a_containers_limit_is_heeded(store, tmp_path, monkeypatch, groups, group, limit, used):
    stand_in(store, "small", 1)
    files = {f"{group}/{limit}": 300 * MIB, f"{group}/{used}": 300 * MIB}
    kernel = machine(tmp_path / "machine", 1000, groups, files)
    monkeypatch.setattr(models, "host_memory", partial(host_memory, *kernel))
    with pytest.raises(
        InputError, match=r"^model_version small needs 0\.0 GB of memory, 0\.0 GB are free on cpu: "
    ):
        ModelCache(CPU).get(Selection("small"))


@pytest.mark.gpu
def test_on_a_gpu_adapters_leave_their_base(store, tmp_path):
    """In 16 bit: fine-tunes differ from their base, which is as it was, and memory comes back."""
    stand_in(store, "stereo-small", 1, size=(256, 4))
    selection = tuned(adapter(store, "stereo-small", 2, tmp_path / "a.safetensors"))
    cache = ModelCache()
    base = cache.get(Selection("stereo-small"))
    before = {key: value.clone() for key, value in base.lm.state_dict().items()}
    plain = tokens(base)
    heard = tokens(cache.get(selection))
    assert heard != plain
    assert tokens(cache.get(Selection("stereo-small"))) == plain
    assert tokens(cache.get(selection)) == heard
    assert all(torch.equal(value, before[key]) for key, value in base.lm.state_dict().items())
    allocated, both = torch.cuda.memory_allocated(), cache.used
    cache.evict_others(cache.get(selection))
    alone = cache.used
    del base
    cache.evict_others(cache.get(selection))
    assert torch.cuda.memory_allocated() <= allocated - (both - alone) // 2


@pytest.mark.gpu
def test_on_a_gpu_versions_share_a_budget(store):
    for seed, version in enumerate(RELEASED):
        stand_in(store, version, seed, size=(256, 4))
    budget = 50_000_000
    cache = ModelCache(budget=budget)
    first = {version: tokens(cache.get(Selection(version))) for version in RELEASED}
    allocated = torch.cuda.memory_allocated()
    for version in RELEASED:
        assert tokens(cache.get(Selection(version))) == first[version]
        assert cache.used <= budget
    assert torch.cuda.memory_allocated() <= allocated + 20_000_000
