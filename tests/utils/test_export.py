import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.errors import InputError, WeightsError
from audiocraft.models import MusicGen
from audiocraft.models.finetunes import load_any
from audiocraft.models.loaders import load_models
from audiocraft.serving.export import main
from audiocraft.utils.export import (
    export_encodec,
    export_lm,
    export_pretrained_compression_model,
    export_release,
)
from tests.golden_data import GOLDEN
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


def test_what_has_no_configuration_is_refused(tmp_path):
    torch.save({"best_state": {"a": torch.zeros(1)}}, tmp_path / "weights.bin")
    with pytest.raises(WeightsError, match=r"weights\.bin has no xp\.cfg"):
        export_lm(tmp_path / "weights.bin", tmp_path / "out.bin")
    assert not (tmp_path / "out.bin").exists()


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


def test_the_command(store, tmp_path, capsys):
    weights = full_finetune(store, "stereo-melody", 5, tmp_path / "a.safetensors")
    assert main([str(weights), str(tmp_path / "release")]) == 0
    assert (tmp_path / "release/state_dict.bin").is_file()
    assert main([str(weights), str(tmp_path / "release")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"Written: {tmp_path / 'release'}",
        f"{tmp_path / 'release'} is there already; name a folder that is not, or an empty one.",
    ]
