import pytest
import torch
from omegaconf import OmegaConf

from audiocraft.errors import WeightsError
from audiocraft.models.loaders import load_models
from audiocraft.utils.export import export_encodec, export_lm, export_pretrained_compression_model
from tests.golden_data import GOLDEN


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
