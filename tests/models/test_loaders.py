import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from audiocraft.errors import AssetError, WeightsError
from audiocraft.models import MusicGen
from audiocraft.models.builders import get_lm_model
from audiocraft.models.encodec import CompressionModel, InterleaveStereoCompressionModel
from audiocraft.models.loaders import load_compression_model, load_lm_model, load_models
from audiocraft.models.versions import VERSIONS
from tests.golden_data import GOLDEN, load, meta
from tests.project import ROOT

KINDS = ["mono", "stereo", "melody", "stereo-melody"]
RELEASED = [name for name in VERSIONS if name != "tiny"]


def package(folder, name="state_dict.bin"):
    return torch.load(folder / name, weights_only=True)


def same(model, state):
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[k], state[k].float()) for k in ours)


@pytest.mark.parametrize("name", RELEASED)
def test_released_versions_have_the_published_shape(name):
    """Names, shapes and counts of the ten versions, without their weights."""
    cfg = OmegaConf.load(GOLDEN / "checkpoints" / f"{name}.xp_cfg.yaml")
    golden = json.loads((GOLDEN / "checkpoints" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = get_lm_model(cfg)
    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: shape for key, (shape, _) in golden["state_dict"].items()
    }
    assert len(state) == golden["n_keys"]
    assert sum(value.numel() for value in state.values()) == golden["n_params_total"]
    assert VERSIONS[name].source == golden["hf_repo"]
    assert VERSIONS[name].melody == model.condition_provider.has_wav_condition
    assert VERSIONS[name].context == cfg.dataset.segment_duration
    assert VERSIONS[name].stereo == cfg.interleave_stereo_codebooks.use
    if VERSIONS[name].melody:
        conditioner = model.condition_provider.conditioners["self_wav"]
        assert conditioner.chroma_len == golden["extra"]["chroma_len"]


def test_the_released_codec_has_the_published_shape():
    from audiocraft.models.builders import get_compression_model
    from audiocraft.models.hf_encodec import build, native_state

    native = json.loads((GOLDEN / "checkpoints/encodec_32khz_native.json").read_text())
    cfg = OmegaConf.load(GOLDEN / "checkpoints/encodec_32khz_native.xp_cfg.yaml")
    hf = json.loads((GOLDEN / "checkpoints/encodec_32khz_hf.json").read_text())
    shapes = {key: shape for key, (shape, _) in native["state_dict"].items()}
    with torch.device("meta"):
        for model in (get_compression_model(cfg), build(hf["config"])):
            state = model.state_dict()
            assert {key: list(value.shape) for key, value in state.items()} == shapes
            for names in (
                "state_dict_transformers_5_23",
                "state_dict_on_disk_old_weight_norm_names",
            ):
                there = {key: torch.empty(shape) for key, (shape, _) in hf[names].items()}
                ours = native_state(model, there)
                assert {key: list(value.shape) for key, value in ours.items()} == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_folder(release, kind):
    folder = release(kind)
    lm, codec = load_models(folder, "cpu")
    assert same(lm, package(folder)["best_state"])
    assert not lm.training
    assert lm.cfg.dataset.segment_duration == 30
    stereo = isinstance(codec, InterleaveStereoCompressionModel)
    assert stereo == ("stereo" in kind)
    mono = codec.model if stereo else codec
    assert same(mono, package(folder, "compression_state_dict.bin")["best_state"])
    assert codec.num_codebooks == lm.num_codebooks


def test_half_precision_weights_and_safetensors_beside_bin(release):
    """fp16 on disk is float32 on the CPU; a .safetensors file wins over a .bin."""
    folder = release("mono")
    exported = package(folder)
    half = {key: value.half() for key, value in exported["best_state"].items()}
    save_file(half, folder / "state_dict.safetensors", {"xp.cfg": exported["xp.cfg"]})
    lm = load_lm_model(folder)
    assert same(lm, half)
    assert lm.out_norm.weight.dtype == torch.float32
    codec = package(folder, "compression_state_dict.bin")
    path = folder / "compression_state_dict.safetensors"
    save_file(codec["best_state"], path, {"xp.cfg": codec["xp.cfg"]})
    assert same(load_compression_model(path), codec["best_state"])


def test_files_by_their_own_path(release):
    folder = release("mono")
    exported = package(folder)
    path = folder / "my weights.th"
    torch.save(exported, path)
    assert same(load_lm_model(path), exported["best_state"])
    assert same(
        load_compression_model(str(folder / "compression_state_dict.bin")),
        package(folder, "compression_state_dict.bin")["best_state"],
    )


def test_pointers(release):
    """`{'pretrained': ...}` leads to a file, a folder or a codec in transformers' form."""
    folder = release("mono")
    codec = package(folder, "compression_state_dict.bin")
    full = folder / "codec.bin"
    torch.save(codec, full)

    def points_to(target):
        pointer = {"pretrained": str(target), "exported": True, "version": "1.4.0a2"}
        torch.save(pointer, folder / "compression_state_dict.bin")
        return load_compression_model(folder)

    assert same(points_to(full), codec["best_state"])
    assert same(points_to("codec.bin"), codec["best_state"])
    torch.save({"pretrained": "codec.bin"}, folder / "pointer.bin")
    assert same(points_to("pointer.bin"), codec["best_state"])
    with pytest.raises(WeightsError, match=r"^compression_state_dict\.bin points to itself"):
        points_to("compression_state_dict.bin")
    assert points_to("debug_compression_model").frame_rate == 25
    hf = folder / "hf"
    hf.mkdir()
    info = meta("encodec_tiny_hf")
    names, state = info["native_to_hf_keys"], load("encodec_tiny/state")
    save_file({names[key]: value for key, value in state.items()}, hf / "model.safetensors")
    (hf / "config.json").write_text(json.dumps(info["info"]["reflect.config"]))
    assert same(points_to(hf), state)
    assert same(CompressionModel.get_pretrained(hf), state)
    save_file({"a": torch.zeros(1)}, hf / "model.safetensors")
    with pytest.raises(
        WeightsError, match=rf"^model\.safetensors of {hf} lacks .*; fetch it again"
    ):
        points_to(hf)
    with pytest.raises(WeightsError, match="dac_44khz is not supported"):
        points_to("dac_44khz")


def test_old_configurations(release):
    """Keys that later versions added may be missing, keys that they dropped present."""
    folder = release("melody")
    exported = package(folder)
    cfg = OmegaConf.create(exported["xp.cfg"])
    del cfg["interleave_stereo_codebooks"], cfg["compression_model_n_q"]
    del cfg.transformer_lm["two_step_cfg"], cfg.conditioners.description.t5["normalize_text"]
    cfg.conditioners.args = {"merge_text_conditions_p": 0.25, "drop_desc_p": 0.5}
    cfg.conditioners.self_wav.chroma_stem.cache_path = "/nowhere"
    old = {"best_state": exported["best_state"], "xp.cfg": OmegaConf.to_yaml(cfg)}
    torch.save(old, folder / "state_dict.bin")
    lm, codec = load_models(folder, "cpu")
    assert same(lm, exported["best_state"])
    assert codec.channels == 1


def test_fewer_codebooks(release):
    folder = release("mono")
    exported = package(folder)
    cfg = OmegaConf.create(exported["xp.cfg"])
    cfg.compression_model_n_q = 3
    torch.save({**exported, "xp.cfg": OmegaConf.to_yaml(cfg)}, folder / "state_dict.bin")
    assert load_models(folder, "cpu")[1].num_codebooks == 3


def test_training_checkpoints_and_older_fine_tunes(release):
    """Their configuration is a pickled OmegaConf object."""
    folder = release("mono")
    exported = package(folder)
    cfg, state = OmegaConf.create(exported["xp.cfg"]), exported["best_state"]
    last = {key: value + 1 for key, value in state.items()}
    checkpoint = {
        "xp.cfg": cfg,
        "history": [{"train": {"ce": 1.0}}],
        "best_state": {"model": state},
        "model": last,
    }
    torch.save(checkpoint, folder / "state_dict.bin")
    assert same(load_lm_model(folder), state)
    part = {"_fsdp_wrapped_module.emb.0._flat_param": torch.zeros(10)}
    for best, whole in (({"model": part}, {"model": state}), ({"model": state}, {})):
        checkpoint |= {"best_state": best, "fsdp_best_state": whole}
        torch.save(checkpoint, folder / "state_dict.bin")
        assert same(load_lm_model(folder), state)
    torch.save({"xp.cfg": cfg, "model": state}, folder / "state_dict.bin")
    assert same(load_lm_model(folder), state)
    deeper = re.compile("(attn|attention)[.]")
    renamed = {deeper.sub(r"\1.mha.", key): value for key, value in state.items()}
    torch.save({"xp.cfg": cfg, "best_state": renamed}, folder / "state_dict.bin")
    assert same(load_lm_model(folder), state)


class Attack:
    def __init__(self, function, trace):
        self.function, self.trace = function, trace

    def __reduce__(self):
        return self.function, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.mkdir, "posix.mkdir"), (os.path.abspath, "posixpath.abspath"), (open, "io.open")],
)
def test_a_pickle_that_runs_code_does_not_run(release, tmp_path, zipped, function, named):
    folder, trace = release("mono"), tmp_path / "ran"
    attack = {**package(folder), "extra": Attack(function, trace)}
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        torch.save(attack, folder / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=f"^state_dict.bin would run {named} while it is read"):
        load_lm_model(folder)
    with pytest.raises(WeightsError, match=f"^compression_state_dict.bin would run {named} "):
        load_compression_model(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not weights at all",
        b"hello world, this is a song",
        b".",
        b"GONE\n",
        b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0",
        pickle.dumps({"a": 1}),
        b"PK\x03\x04broken",
        b"\x08" + b"\0" * 7 + b"{broken}",
    ],
)
def test_what_is_no_weights_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "song.bin"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"song\.bin"):
        load_lm_model(path)


@pytest.mark.parametrize(
    "content",
    [
        {"model": [1, 2]},
        {"best_state": torch.zeros(2)},
        {"best_state": {"model": 3}},
        {"best_state": {1: torch.zeros(2)}},
        [1],
    ],
)
def test_files_without_a_state_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(WeightsError, match=r"^a\.bin "):
        load_lm_model(tmp_path / "a.bin")


def test_a_configuration_cannot_read_this_machine(release, monkeypatch):
    folder = release("mono")
    exported = package(folder)
    monkeypatch.setenv("TOKEN", "s3cr3t")
    called, named = (
        exported["xp.cfg"].replace("t5-base", value)
        for value in ("${oc.env:TOKEN}", "${${x}:TOKEN}")
    )
    for cfg, message in (
        (called, "asks for values of this"),
        (f"{named}\nx: oc.env\n", "asks for values of this"),
        ("a: [", "cannot be read"),
        ("a: !!int x", "cannot be read"),
        ("a: !!bool x", "cannot be read"),
        ("1", "cannot be read"),
        ("- 1", "is no configuration"),
        ("a: 1", "has no xp.cfg of a language model"),
    ):
        torch.save({**exported, "xp.cfg": cfg}, folder / "state_dict.bin")
        with pytest.raises(WeightsError, match=message) as caught:
            load_lm_model(folder)
        assert "s3cr3t" not in str(caught.value)


def test_the_language_models_own_path_is_enough(release):
    folder = release("stereo")
    model = MusicGen.get_pretrained(folder / "state_dict.bin", device="cpu")
    assert model.audio_channels == 2
    with pytest.raises(
        WeightsError, match=r"^compression_state_dict\.bin has no xp\.cfg of a lang"
    ):
        load_lm_model(folder / "compression_state_dict.bin")
    with pytest.raises(WeightsError, match=r"^state_dict\.bin has no xp\.cfg of a codec"):
        load_compression_model(folder / "state_dict.bin")


def test_weights_that_do_not_fit_are_refused(release):
    folder = release("mono")
    exported = package(folder)
    state = dict(exported["best_state"])
    torch.save(
        {**exported, "best_state": state | {"emb.0.weight": torch.zeros(2, 2)}}, folder / "a.bin"
    )
    with pytest.raises(WeightsError, match=r"emb\.0\.weight has the shape \[2, 2\], \[33, 32\]"):
        load_lm_model(folder / "a.bin")
    del state["emb.0.weight"]
    torch.save({**exported, "best_state": state}, folder / "a.bin")
    with pytest.raises(WeightsError, match=r"1 tensors are missing \['emb\.0\.weight'\]"):
        load_lm_model(folder / "a.bin")
    cfg = OmegaConf.create(exported["xp.cfg"])
    cfg.transformer_lm.positional_embedding = "rope"
    torch.save({**exported, "xp.cfg": OmegaConf.to_yaml(cfg)}, folder / "a.bin")
    with pytest.raises(WeightsError, match=r"xp\.cfg of a\.bin .*embedding is rope, only sin is"):
        load_lm_model(folder / "a.bin")
    cfg.transformer_lm.num_layers = 10**9  # must not be built
    torch.save({**exported, "xp.cfg": OmegaConf.to_yaml(cfg)}, folder / "a.bin")
    with pytest.raises(WeightsError, match=r"holds \d+ tensors, which do not fit num_layers=10"):
        load_lm_model(folder / "a.bin")
    torch.save({"best_state": exported["best_state"]}, folder / "a.bin")
    with pytest.raises(WeightsError, match=r"a\.bin has no xp\.cfg"):
        load_lm_model(folder / "a.bin")


def test_a_folder_without_weights_and_an_unknown_id(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"neither state_dict\.safetensors nor"):
        load_lm_model(tmp_path)
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        AssetError,
        match=r"state_dict.safetensors or state_dict.bin of facebook/musicgen-small is not in",
    ):
        load_lm_model("facebook/musicgen-small")
    with pytest.raises(AssetError, match="neither a file, a folder nor a hub id"):
        load_lm_model("/no/such/folder")


def test_a_hub_id_is_found_in_the_store(release, tmp_path, monkeypatch):
    """`small` is looked up as its hub id, below the store."""
    store = tmp_path / "store"
    stored = store / VERSIONS["small"].source
    stored.parent.mkdir(parents=True)
    folder = release("mono").rename(stored)
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(store))
    assert same(load_lm_model(VERSIONS["small"].source), package(folder)["best_state"])
    monkeypatch.delenv("AUDIOCRAFT_CACHE_DIR")
    lm = load_lm_model(VERSIONS["small"].source, cache_dir=store)
    assert same(lm, package(folder)["best_state"])
    exported = package(folder)
    half = {key: value.half() for key, value in exported["best_state"].items()}
    save_file(half, folder / "state_dict.safetensors", {"xp.cfg": exported["xp.cfg"]})
    assert same(load_lm_model(VERSIONS["small"].source, cache_dir=store), half)


# Bytes of a model's tensors, and of the most anonymous memory that loading it takes.
MEASURE = """
import sys, threading
from pathlib import Path
from audiocraft.assets.store import BUNDLED
from audiocraft.models.loaders import load_lm_model

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

load_lm_model(BUNDLED / "tiny")  # with all that is imported
seen, done = [anonymous()], threading.Event()
thread = threading.Thread(target=watch, daemon=True)
thread.start()
lm = load_lm_model(sys.argv[1])
done.set()
thread.join()
seen.append(anonymous())
print(4 * sum(value.numel() for value in lm.state_dict().values()), max(seen) - seen[0])
"""


def test_weights_are_copied_once(tmp_path):
    """A file of 200 MB costs its float32 tensors and no second copy."""
    cfg = OmegaConf.load(GOLDEN / "checkpoints/small.xp_cfg.yaml")
    cfg.transformer_lm.num_layers = 6
    cfg.conditioners.description.t5.name = str(GOLDEN / "t5_tiny")
    with torch.device("meta"):
        model = get_lm_model(cfg)
    state = {
        key: torch.zeros(value.shape, dtype=torch.float16)
        for key, value in model.state_dict().items()
    }
    needed = 4 * sum(value.numel() for value in state.values())
    torch.save({"best_state": state, "xp.cfg": OmegaConf.to_yaml(cfg)}, tmp_path / "state_dict.bin")
    del state
    command = [sys.executable, "-c", MEASURE, tmp_path / "state_dict.bin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert needed <= size <= peak + needed // 4
    assert peak < 1.25 * needed
