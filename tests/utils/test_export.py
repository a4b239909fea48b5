import errno
import logging
import resource
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf

from audiocraft.errors import InputError, WeightsError
from audiocraft.models import MusicGen
from audiocraft.models.finetunes import load_any
from audiocraft.models.loaders import load_compression_model, load_models
from audiocraft.serving.export import main
from audiocraft.utils.export import (
    export_encodec,
    export_lm,
    export_pretrained_compression_model,
    export_release,
)
from tests.golden_data import GOLDEN
from tests.http_server import FileServer, use_hub
from tests.releases import adapter, full_finetune, read_release, stand_in, varied


def test_a_training_checkpoint_becomes_a_release(tmp_path):
    """Exported, it is read by weights_only and loads as a release folder."""
    release = GOLDEN / "tiny_release/mono"
    exported = {}
    for name, export in (("state_dict", export_lm), ("compression_state_dict", export_encodec)):
        exported[name] = torch.load(release / f"{name}.bin", weights_only=True)
        checkpoint = {
            "xp.cfg": OmegaConf.create(exported[name]["xp.cfg"]),
            "best_state": {"model": exported[name]["best_state"]},
            "model": {},
            "optimizer": {"state": {}},
        }
        torch.save(checkpoint, tmp_path / "checkpoint.th")
        out = export(tmp_path / "checkpoint.th", tmp_path / "release" / f"{name}.bin")
        package = torch.load(out, weights_only=True)
        assert package.keys() == {"best_state", "xp.cfg", "version", "exported"}
        assert isinstance(package["xp.cfg"], str)
        assert package["exported"] is True
    (tmp_path / "release/t5").symlink_to(GOLDEN / "t5_tiny")
    lm, _ = load_models(tmp_path / "release", "cpu")
    for key, value in lm.state_dict().items():
        assert torch.equal(value, exported["state_dict"]["best_state"][key])
    assert sorted(path.name for path in (tmp_path / "release").iterdir()) == [
        "compression_state_dict.bin",
        "state_dict.bin",
        "t5",
    ]


def test_a_pointer(tmp_path):
    out = export_pretrained_compression_model("facebook/encodec_32khz", tmp_path / "pointer.bin")
    package = torch.load(out, weights_only=True)
    assert package.pop("version")
    assert package == {"pretrained": "facebook/encodec_32khz", "exported": True}


def test_a_codec_in_a_file_is_copied(tmp_path):
    """So that a release folder that is moved keeps it; a pointer in a file stays one."""
    release, out = GOLDEN / "tiny_release/mono", tmp_path / "out.bin"
    codec = release / "compression_state_dict.bin"
    for given in (codec, str(codec)):
        assert export_pretrained_compression_model(given, out) == out
        package = torch.load(out, weights_only=True)
        assert package.keys() == {"best_state", "xp.cfg", "version", "exported"}
        expected = load_compression_model(codec).state_dict()
        copied = load_compression_model(out).state_dict()
        assert copied.keys() == expected.keys()
        assert all(torch.equal(copied[key], expected[key]) for key in expected)
    pointer = export_pretrained_compression_model("facebook/encodec_32khz", tmp_path / "pointer")
    export_pretrained_compression_model(pointer, out)
    assert torch.load(out, weights_only=True)["pretrained"] == "facebook/encodec_32khz"
    before = out.read_bytes()
    with pytest.raises(WeightsError, match=r"^state_dict\.bin has no xp\.cfg of a codec; give an"):
        export_pretrained_compression_model(release / "state_dict.bin", out)
    assert out.read_bytes() == before


def test_what_has_no_configuration_is_refused(tmp_path):
    torch.save({"best_state": {"a": torch.zeros(1)}}, tmp_path / "weights.bin")
    with pytest.raises(WeightsError, match=r"weights\.bin has no xp\.cfg"):
        export_lm(tmp_path / "weights.bin", tmp_path / "out.bin")
    assert not (tmp_path / "out.bin").exists()


@pytest.fixture(autouse=True)
def own_log(monkeypatch):
    """A command's log goes to the stderr that one test has."""
    monkeypatch.setattr(logging.getLogger("audiocraft"), "handlers", [])


@pytest.fixture
def limit_files():
    """Sets the bytes that a file may have: what is beyond fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def store(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(folder))
    stand_in(folder, "stereo-melody", 1)
    return folder


def heard(source):
    model = MusicGen.get_pretrained(source, device="cpu")
    model.set_generation_params(duration=0.5, seed=3)
    return model.generate(["a song"], return_tokens=True)


@pytest.mark.parametrize("kind", ["full", "adapter", "older"])
def test_a_fine_tune_becomes_a_release(kind, store, tmp_path):
    """Official names, shapes and types; loaded again it is the fine-tune, to 16 bit."""
    weights = tmp_path / "trained_model.safetensors"
    base = read_release(store / "facebook/musicgen-stereo-melody")
    if kind == "full":
        full_finetune(store, "stereo-melody", 5, weights)
    elif kind == "adapter":
        adapter(store, "stereo-melody", 5, weights)
    else:
        cfg = OmegaConf.create(base["xp.cfg"])
        torch.save({"xp.cfg": cfg, "model": varied(base["best_state"], 5)}, weights)
    out = export_release(
        weights, tmp_path / "release", "stereo-melody" if kind == "older" else None
    )
    package = torch.load(out / "state_dict.bin", weights_only=True)
    assert package.keys() == {"best_state", "xp.cfg", "version", "exported"}
    shapes = {key: value.shape for key, value in base["best_state"].items()}
    assert {key: value.shape for key, value in package["best_state"].items()} == shapes
    assert {value.dtype for value in package["best_state"].values()} == {torch.float16}
    codec = torch.load(out / "compression_state_dict.bin", weights_only=True)
    assert codec.keys() == {"best_state", "xp.cfg", "version", "exported"}
    lm, _ = load_models(out, "cpu")
    if kind == "full":
        for ours, theirs in zip(heard(out), heard(weights), strict=True):
            assert torch.equal(ours, theirs)
    elif kind == "adapter":
        tuned, _ = load_any(str(weights), "cpu", "float32")
        for key, value in tuned.state_dict().items():
            torch.testing.assert_close(lm.state_dict()[key], value, rtol=1e-3, atol=1e-3)
            assert torch.equal(lm.state_dict()[key], value.half().float())
    else:
        expected = varied(base["best_state"], 5)
        assert all(torch.equal(v, expected[k].half().float()) for k, v in lm.state_dict().items())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"store", "trained_model.safetensors", "release"}


def test_a_codec_that_is_pointed_to_stays_a_pointer(store, tmp_path):
    folder = store / "facebook/musicgen-stereo-melody"
    export_pretrained_compression_model(
        "facebook/encodec_32khz", folder / "compression_state_dict.bin"
    )
    weights = full_finetune(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    out = export_release(weights, tmp_path / "release")
    package = torch.load(out / "compression_state_dict.bin", weights_only=True)
    assert package["pretrained"] == "facebook/encodec_32khz"


def test_what_cannot_be_exported(store, tmp_path):
    weights = full_finetune(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InputError, match="full is there already; name a folder that is not"):
        export_release(weights, tmp_path / "full")
    with pytest.raises(InputError, match=r"There is no file .*b; give a file of"):
        export_release(tmp_path / "b", tmp_path / "out")
    base = read_release(store / "facebook/musicgen-stereo-melody")
    torch.save(base, tmp_path / "c.bin")
    with pytest.raises(InputError, match=r"^c\.bin does not name its base: give --version, one"):
        export_release(tmp_path / "c.bin", tmp_path / "out")
    other = adapter(store, "stereo-melody", 5, tmp_path / "d.safetensors", base_sha256="0" * 64)
    with pytest.raises(WeightsError, match="is an adapter for other weights of stereo-melody"):
        export_release(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_must_not_be_read(tmp_path, monkeypatch):
    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.safetensors").touch()
    monkeypatch.setattr(Path, "open", closed)  # root may read anything
    with pytest.raises(
        InputError, match=r"a\.safetensors cannot be read \(Permission denied\); give a file of"
    ):
        export_release(tmp_path / "a.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("folder", "reason", "above"),
    [
        ("a.safetensors/release", "Not a directory", "a.safetensors"),
        ("a.safetensors/new/release", "Not a directory", "a.safetensors/new"),
        ("/proc/release", ".*", "/proc"),  # where root may not write either
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_first(
    store, tmp_path, monkeypatch, folder, reason, above
):
    weights = full_finetune(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    before = weights.read_bytes()
    monkeypatch.setattr("audiocraft.utils.export.read_finetune", pytest.fail)
    said = (
        rf"^{tmp_path / folder} cannot be written \({reason}\): make {tmp_path / above} a folder "
        r"that may be written to, with room on its disk, or name another\.$"
    )
    with pytest.raises(InputError, match=said) as error:
        export_release(weights, tmp_path / folder)
    assert isinstance(error.value.__cause__, OSError)
    assert weights.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"store", "a.safetensors"}


@pytest.mark.parametrize("size", [50_000, 500_000], ids=["language model", "codec"])
@pytest.mark.parametrize("folder", ["release", "new/deep/release"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(store, tmp_path, limit_files, size, folder):
    """The empty folder that was there stays, and those that were made for the release go."""
    weights = full_finetune(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    (tmp_path / "release").mkdir()
    limit_files(size)
    said = rf"^{tmp_path / folder} cannot be written \(File too large\): make .*, with room on its "
    with pytest.raises(InputError, match=said) as error:
        export_release(weights, tmp_path / folder)
    assert isinstance(error.value.__cause__, OSError | RuntimeError)
    assert not list((tmp_path / "release").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"store", "a.safetensors", "release"}


def test_an_empty_folder_stays_where_the_release_cannot_take_its_name(store, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    weights = full_finetune(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    (tmp_path / "release").mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"release cannot be written \(Device or resource busy\)"):
        export_release(weights, tmp_path / "release")
    assert not list((tmp_path / "release").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"store", "a.safetensors", "release"}


def test_a_file_that_cannot_be_written(tmp_path, limit_files):
    """What was there before is as it was."""
    checkpoint = GOLDEN / "tiny_release/mono/state_dict.bin"
    out = tmp_path / "out.bin"
    out.write_bytes(b"before")
    with pytest.raises(InputError, match=r"out\.bin/new/x cannot be written \(Not a directory\): "):
        export_lm(checkpoint, out / "new/x")
    limit_files(50_000)
    with pytest.raises(InputError, match=r"out\.bin cannot be written \(File too large\): make "):
        export_lm(checkpoint, out)
    with pytest.raises(InputError, match=r"new/out\.bin cannot be written \(File too large\): "):
        export_encodec(checkpoint.with_name("compression_state_dict.bin"), tmp_path / "new/out.bin")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"before"


def test_the_command(store, tmp_path, capsys):
    weights = full_finetune(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    (tmp_path / "release").mkdir()  # an empty one will do
    assert main([str(weights), str(tmp_path / "release")]) == 0
    assert (tmp_path / "release/state_dict.bin").is_file()
    assert main([str(weights), str(tmp_path / "release")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"Written: {tmp_path / 'release'}",
        f"{tmp_path / 'release'} is there already; name a folder that is not, or an empty one.",
    ]


def test_the_command_tells_what_it_fetches(store, tmp_path, monkeypatch, capsys):
    weights = adapter(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with FileServer(store) as server:
        use_hub(monkeypatch, server)
        assert main([str(weights), str(tmp_path / "release")]) == 0
    said = capsys.readouterr().err.splitlines()
    for name in ("compression_state_dict.bin", "state_dict.bin"):
        begun = f"Fetching {name} of facebook/musicgen-stereo-melody from "
        assert [line.startswith(begun) for line in said].count(True) == 1
    assert said[-1] == f"Written: {tmp_path / 'release'}"


def test_the_command_says_that_it_cannot_write(store, tmp_path, capsys):
    weights = full_finetune(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    assert main([str(weights), str(weights / "release")]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{weights / 'release'} cannot be written (Not a directory): make ")
