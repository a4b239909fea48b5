"""Fine-tuned weights: every form of file, adapters, and what is refused."""

import errno
import hashlib
import json
import os

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from audiocraft.errors import AssetError, WeightsError
from audiocraft.models import MusicGen
from audiocraft.models.finetunes import (
    base_sha256,
    file_base_sha256,
    load_full,
    merge_adapter,
    read_finetune,
    sharing_copy,
)
from audiocraft.models.loaders import load_models, read_checkpoint
from audiocraft.models.versions import VERSIONS
from tests.golden_data import GOLDEN
from tests.releases import LORA, adapter, full_finetune, read_release, stand_in, varied

VERSION = "stereo-melody"


@pytest.fixture
def store(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(folder))
    stand_in(folder, VERSION, seed=1)
    return folder


@pytest.fixture
def base(store):
    return read_release(store / VERSIONS[VERSION].source)


def tokens(model):
    model.set_generation_params(duration=1, seed=3)
    return model.generate(["a song"], return_tokens=True)[1]


def from_file(path):
    return MusicGen.get_pretrained(path, device="cpu")


def test_a_full_fine_tune(store, base, tmp_path):
    path = full_finetune(store, VERSION, 5, tmp_path / "tuned.safetensors")
    tuned = read_finetune(path)
    assert (tuned.base, tuned.license, tuned.lora) == (VERSION, "cc-by-nc-4.0", None)
    assert tuned.base_sha256 == base_sha256(base["best_state"])
    model = from_file(path)
    expected = varied(base["best_state"], 5)
    state = model.lm.state_dict()
    assert all(torch.equal(state[key], expected[key].half().float()) for key in expected)
    assert model.audio_channels == 2
    assert not torch.equal(tokens(model), tokens(from_file_of_base()))


def from_file_of_base():
    return MusicGen.get_pretrained(VERSION, device="cpu")


def test_an_adapter_is_added_and_its_base_stays(store, base, tmp_path):
    path = adapter(store, VERSION, 7, tmp_path / "adapter.safetensors")
    lm, _ = load_models(VERSIONS[VERSION].source, "cpu")
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    copy = sharing_copy(lm)
    merge_adapter(copy, read_finetune(path))
    merged, tensors = copy.state_dict(), load_file(path)
    changed = {key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")}
    assert len(changed) == 2 * 3
    for key, value in lm.state_dict().items():
        assert torch.equal(value, before[key])
        if key in changed:
            a, b = (tensors[key + end].double() for end in (".lora_a", ".lora_b"))
            expected = before[key].double() + LORA.alpha / LORA.rank * b @ a
            torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-6)
        else:
            assert merged[key].data_ptr() == value.data_ptr()
    theirs, ours = (
        next(iter(model.condition_provider.conditioners.values())) for model in (lm, copy)
    )
    assert theirs is not ours
    assert all(torch.equal(base["best_state"][key], before[key]) for key in before)


def test_an_adapter_from_its_file(store, tmp_path):
    path = adapter(store, VERSION, 7, tmp_path / "adapter.safetensors")
    tuned, plain = tokens(from_file(path)), tokens(from_file_of_base())
    assert not torch.equal(tuned, plain)
    assert torch.equal(tuned, tokens(from_file(path)))
    assert torch.equal(plain, tokens(from_file_of_base()))


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_a_merge_keeps_the_weights_type(precision):
    from audiocraft.modules.lora import merge

    weight, a, b = (torch.randn(*shape) for shape in ((6, 4), (2, 4), (6, 2)))
    merged = merge(weight.to(precision), a.half(), b.half(), 0.5)
    assert merged.dtype == precision
    expected = weight.to(precision).double() + 0.5 * b.half().double() @ a.half().double()
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[precision]
    torch.testing.assert_close(merged.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", ["export", "safetensors", "checkpoint", "older"])
def test_other_forms_name_no_base(form, base, tmp_path):
    """Official exports, training checkpoints and files of the older fine-tuner."""
    state = varied(base["best_state"], 9)
    path, cfg = tmp_path / "trained_model.tar", OmegaConf.create(base["xp.cfg"])
    if form == "export":
        torch.save({**base, "best_state": state}, path)
    elif form == "safetensors":
        save_file(state, path, {"xp.cfg": base["xp.cfg"]})
    elif form == "checkpoint":
        torch.save(
            {"best_state": {"model": state}, "model": base["best_state"], "xp.cfg": cfg}, path
        )
    else:
        torch.save({"xp.cfg": cfg, "model": state}, path)
    tuned = read_finetune(path, "replicate_weights (trained_model.tar)")
    assert tuned.base is None
    assert all(torch.equal(tuned.checkpoint.state[key], state[key]) for key in state)
    assert tuned.cfg.transformer_lm.n_q == 8


def test_the_bases_hash_is_what_the_format_says(base, tmp_path):
    """Equal for `.bin` and `.safetensors`, for 16 and 32 bit, and for the older names."""
    digest = hashlib.sha256()
    for key, value in sorted(base["best_state"].items()):
        digest.update(f"{key} {list(value.shape)}\n".encode())
        digest.update(value.half().numpy().tobytes())
    expected = digest.hexdigest()
    half = {key: value.half() for key, value in base["best_state"].items()}
    older = {key.replace("_attn.", "_attn.mha."): value for key, value in half.items()}
    for state in (base["best_state"], half, dict(reversed(half.items())), older):
        assert base_sha256(state) == expected
    save_file(half, tmp_path / "a.safetensors", {"xp.cfg": base["xp.cfg"]})
    assert base_sha256(read_checkpoint(tmp_path / "a.safetensors").state) == expected


def test_the_bases_hash_is_computed_once(store, monkeypatch):
    path = store / VERSIONS[VERSION].source / "state_dict.bin"
    first = file_base_sha256(path, read_checkpoint(path))
    assert len(list((store / "base-hashes").iterdir())) == 1
    monkeypatch.setattr("audiocraft.models.finetunes.base_sha256", None)
    assert file_base_sha256(path, read_checkpoint(path)) == first
    monkeypatch.undo()
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(store))
    package = read_release(path.parent)
    torch.save({**package, "best_state": varied(package["best_state"], 2)}, path)
    assert file_base_sha256(path, read_checkpoint(path)) != first


def test_a_hash_that_cannot_be_kept_leaves_nothing(store, monkeypatch, caplog):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = store / VERSIONS[VERSION].source / "state_dict.bin"
    checkpoint = read_checkpoint(path)
    monkeypatch.setattr(os, "fsync", full)
    assert file_base_sha256(path, checkpoint) == base_sha256(checkpoint.state)
    assert "The hash of state_dict.bin cannot be kept in the store: " in caplog.text
    assert list((store / "base-hashes").iterdir()) == []


def rewritten(path, metadata=None, drop=(), **tensors):
    """The file with changes to its metadata and tensors."""
    said = {**read_checkpoint(path).metadata, **(metadata or {})}
    state = {key: value for key, value in load_file(path).items() if key not in drop}
    save_file({**state, **tensors}, path, {k: v for k, v in said.items() if v is not None})
    return path


KEY = "transformer.layers.0.linear1.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"base": None}}, "is an adapter that does not name its base"),
        ({"metadata": {"base_sha256": None}}, "is an adapter that does not name its base"),
        (
            {"metadata": {"base": "/etc"}},
            r"was made from '/etc', which is none of small, .*; take a fine-tune of one",
        ),
        ({"metadata": {"lora": "{"}}, "does not say what kind of adapter it is"),
        ({"metadata": {"lora": '{"rank": 4}'}}, "does not say what kind of adapter it is"),
        (
            {"metadata": {"lora": '{"rank": 1e999, "alpha": 4, "targets": []}'}},
            "does not say what kind of adapter it is",
        ),
        ({"metadata": {"lora": "[" * 100_000}}, "does not say what kind of adapter it is"),
        ({"metadata": {"format": "musicgen-finetune/2"}}, "is of the format musicgen-finetune/2"),
        ({"drop": [f"{KEY}.lora_b"]}, "is not a whole adapter of rank 4"),
        ({"other": torch.zeros(4, 4)}, "is not a whole adapter of rank 4"),
        ({f"{KEY}.lora_a": torch.zeros(3, 32)}, "is not a whole adapter of rank 4"),
        ({"drop": [f"{KEY}.lora_a", f"{KEY}.lora_b"]}, "other weights than those of .*, 5 of 5"),
        (
            {f"{KEY}.lora_a": torch.zeros(4, 31)},
            "other weights than those of .*, 5 of 6 fit; train it",
        ),
        (
            {"metadata": {"lora": json.dumps({"rank": 4, "alpha": 4, "targets": ["norm1.bias"]})}},
            "other weights than those of stereo-melody, 0 of 6 fit; train it again",
        ),
        ({"metadata": {"base_sha256": "0" * 64}}, r"for other weights of stereo-melody \(000000"),
    ],
)
def test_adapters_that_do_not_fit(changes, message, store, tmp_path):
    path = rewritten(adapter(store, VERSION, 7, tmp_path / "a.safetensors"), **changes)
    with pytest.raises(WeightsError, match=f"^a.safetensors .*{message}") as caught:
        from_file(path)
    assert str(caught.value).count("\n") == 0


def test_what_is_no_fine_tune(tmp_path):
    path = tmp_path / "a.safetensors"
    codec = GOLDEN / "tiny_release/mono/compression_state_dict.bin"
    with pytest.raises(WeightsError, match=r"^x holds a codec; give the weights of the language"):
        read_finetune(codec, "x")
    torch.save({"pretrained": "facebook/encodec_32khz"}, path)
    with pytest.raises(WeightsError, match=r"^x holds a codec"):
        read_finetune(path, "x")
    save_file({"lora_unet_down.weight": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match=r"^x holds no weights of MusicGen's language model"):
        read_finetune(path, "x")
    path.write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=r"^x is not a file of MusicGen weights"):
        read_finetune(path, "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset.segment_duration", 10**9),
        ("dataset.segment_duration", -1),
        ("dataset.segment_duration", "long"),
        ("conditioners.self_wav.chroma_stem.radix2_exp", 40),
    ],
)
def test_a_configuration_that_can_only_do_harm(key, value, base, tmp_path):
    cfg = OmegaConf.create(base["xp.cfg"])
    OmegaConf.update(cfg, key, value)
    torch.save({**base, "xp.cfg": OmegaConf.to_yaml(cfg)}, tmp_path / "a.bin")
    with pytest.raises(WeightsError, match=f"^a.bin says {key}={value}, it must be above 0"):
        read_finetune(tmp_path / "a.bin")


def test_a_configuration_cannot_read_this_machine(base, tmp_path, monkeypatch):
    """Its values stand in messages."""
    monkeypatch.setenv("TOKEN", "s3cr3t")
    cfg = OmegaConf.create(base["xp.cfg"])
    cfg.x, cfg.dataset.segment_duration = "oc.env", "${${x}:TOKEN}"
    torch.save({**base, "xp.cfg": OmegaConf.to_yaml(cfg)}, tmp_path / "a.bin")
    with pytest.raises(WeightsError, match=r"^The xp\.cfg of a\.bin asks for values") as caught:
        read_finetune(tmp_path / "a.bin")
    assert "s3cr3t" not in str(caught.value)


def test_a_pickled_configuration_is_what_it_shows(base, tmp_path, monkeypatch):
    """References lead to a section's parent, which here is none of the file's sections."""
    monkeypatch.setenv("TOKEN", "s3cr3t")
    cfg = OmegaConf.create(base["xp.cfg"])
    cfg.conditioners.self_wav.chroma_stem.n_chroma = "${hidden}"
    for section in (cfg, cfg.conditioners):
        section._metadata.flags = {"no_deepcopy_set_nodes": True}
    section = cfg.conditioners._get_node("self_wav")
    section.__dict__["_parent"] = OmegaConf.create({"hidden": "${oc.env:TOKEN}"})
    torch.save({**base, "xp.cfg": cfg}, tmp_path / "a.bin")
    with pytest.raises(WeightsError, match=r"^The xp\.cfg of a\.bin is not one") as caught:
        read_finetune(tmp_path / "a.bin")
    assert "s3cr3t" not in str(caught.value)


def test_a_fine_tune_cannot_choose_folders_of_this_machine(store, base, tmp_path):
    """Where its base carries no text encoder, the name counts: only a released one's."""
    (store / VERSIONS[VERSION].source / "t5").rename(tmp_path / "t5")
    path = full_finetune(store, VERSION, 5, tmp_path / "a.safetensors")
    cfg = OmegaConf.create(base["xp.cfg"])
    cfg.conditioners.description.t5.name = str(tmp_path / "t5")
    rewritten(path, {"xp.cfg": OmegaConf.to_yaml(cfg)})
    with pytest.raises(
        WeightsError, match=r"names the text encoder .*, it must be one of t5-small"
    ):
        from_file(path)


def test_an_older_fine_tune_alone_asks_for_the_released_codec(store, base, tmp_path, monkeypatch):
    """`//pretrained/facebook/encodec_32khz` in its configuration, and nothing beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cfg = OmegaConf.create(base["xp.cfg"])
    cfg.compression_model_checkpoint = "//pretrained/facebook/encodec_32khz"
    cfg.conditioners.description.t5.name = str(GOLDEN / "t5_tiny")
    path = tmp_path / "trained_model.tar"
    torch.save({"xp.cfg": cfg, "model": base["best_state"]}, path)
    with pytest.raises(AssetError, match="facebook/encodec_32khz"):
        from_file(path)
    small = torch.load(
        store / VERSIONS[VERSION].source / "compression_state_dict.bin", weights_only=True
    )
    torch.save(small, tmp_path / "compression_state_dict.bin")
    assert from_file(path).audio_channels == 2


def paths_of(cfg, prefix=""):
    for key, value in cfg.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from paths_of(value, f"{prefix}{key}.")


SECTIONS = (
    "transformer_lm",
    "conditioners",
    "codebooks_pattern",
    "fuser",
    "dataset",
    "classifier_free_guidance",
    "interleave_stereo_codebooks",
)


@pytest.mark.slow
@pytest.mark.usefixtures("store")
def test_no_configuration_ends_in_another_error(base, tmp_path):
    """Settings that are missing, or of another kind and size, one at a time."""
    whole = OmegaConf.to_container(OmegaConf.create(base["xp.cfg"]))
    paths = [path for path in paths_of(whole) if path.split(".")[0] in SECTIONS]
    assert len(paths) > 80
    values = [None, -1, 0, "x", 1e30, [], {}, 3, True, "${nothing}"]
    path, sentences = tmp_path / "a.tar", []
    for number, setting in enumerate(paths):
        cfg = OmegaConf.create(whole)
        value = values[number % len(values)]
        OmegaConf.update(cfg, setting, value, merge=False, force_add=True)
        torch.save({"model": base["best_state"], "xp.cfg": cfg}, path)
        try:
            load_full(read_finetune(path), VERSION, "cpu")
        except WeightsError as error:
            sentences.append(str(error))
    assert len(sentences) > 20
    assert not any("\n" in sentence for sentence in sentences)
