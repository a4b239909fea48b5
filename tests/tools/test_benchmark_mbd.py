"""`scripts/benchmark mbd`: real runs with a small file, and what it asks of both sides."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from audiocraft.errors import InputError
from audiocraft.models import multibanddiffusion
from tools.benchmark import mbd, ours
from tools.benchmark.generate import Scratch
from tools.benchmark.mbd import Plan
from tools.benchmark.processes import ENVIRONMENT, Packages
from tools.benchmark.shapes import CODEC, PUBLISHED
from tools.benchmark.side import Job, random_codes
from tools.benchmark.table import tables

ROW = {
    "system",
    "version",
    "precision",
    "batch",
    "seconds",
    "channels",
    "evaluations_per_s",
    "real_time_factor",
    "peak_gb",
}
with_peer = pytest.mark.skipif(not ENVIRONMENT.is_dir(), reason="audiocraft is not installed")


@pytest.fixture
def place(tmp_path):
    """A small codec in the place of the released one."""
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    cfg = yaml.safe_load((PUBLISHED / f"{CODEC}.xp_cfg.yaml").read_text())
    cfg["seanet"]["n_filters"] = 4
    (shapes / f"{CODEC}.xp_cfg.yaml").write_text(yaml.safe_dump(cfg))
    return Scratch(tmp_path / "scratch", shapes)


@pytest.fixture
def broken(tmp_path):
    """A folder whose `audiocraft` cannot be imported."""
    folder = tmp_path / "packages"
    (folder / "audiocraft").mkdir(parents=True)
    (folder / "audiocraft/__init__.py").write_text("raise ImportError('this one is broken')\n")
    return Packages(None, folder)


def test_the_line_of_json(monkeypatch, capsys, place, broken):
    monkeypatch.setattr(mbd, "scratch", lambda: nullcontext(place))
    monkeypatch.setattr(mbd, "find_packages", lambda *_: broken)
    arguments = ["--seconds", "0.3", "--stereo", "--device", "cpu", "--rounds", "1"]
    arguments += ["--hidden", "4"]
    mbd.main(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == ["command", "device", "diffusion", "rows"]
    assert result["command"] == " ".join(["scripts/benchmark", "mbd", *arguments])
    assert result["diffusion"] == {"bands": 4, "hidden": 4, "depth": 4, "growth": 4}
    mine, peer = result["rows"]
    assert set(mine) == ROW
    assert [mine[name] for name in ("system", "version", "precision")] == ["ours", "mbd", "float32"]
    assert [mine[name] for name in ("batch", "seconds", "channels")] == [1, 0.3, 2]
    # Both channels' evaluations are in the time; codec and equaliser are beside them.
    assert 0 < mine["real_time_factor"] < 0.3 / (156 / mine["evaluations_per_s"])
    assert 0.1 < mine["peak_gb"] < 10
    assert peer["error"] == "ImportError: this one is broken"
    assert "evaluations_per_s" not in peer


@pytest.mark.slow
@with_peer
@pytest.mark.parametrize("channels", [1, 2])
def test_both_sides_decode_the_same(place, channels):
    plan = Plan(0.3, channels, rounds=2, hidden=4)
    record = mbd.measure(plan, Packages(None, ENVIRONMENT), place)
    assert [row["system"] for row in record["rows"]] == ["ours", "audiocraft"]
    assert [row["precision"] for row in record["rows"]] == ["float32", "float32"]
    assert all(set(row) == ROW for row in record["rows"])
    assert len(record["rounds"]) == 4
    assert record["versions"]["audiocraft"] == "1.3.0"
    # The clock saw the last evaluation: only there it reads the memory of those before.
    assert all(result["loop_peak_gb"] > 0.05 for result in record["rounds"])


PEER = """
import json, sys, torch
from tools.benchmark.peer_audiocraft import load_diffusion
from tools.benchmark.side import Job

job = Job(**json.loads(sys.argv[1]))
decode = load_diffusion(job)
torch.manual_seed(5)
steps = []
wav = decode(job.seconds, lambda *done: steps.append(done))
torch.save((wav, steps), sys.argv[2])
"""


@pytest.mark.slow
@with_peer
def test_audiocraft_makes_the_same_audio_of_the_same_noise(place, tmp_path, monkeypatch):
    job, peer = mbd._jobs(Plan(0.5, hidden=8), place)
    assert asdict(replace(peer, system="ours")) == asdict(job)
    path = tmp_path / "peer.pt"
    subprocess.run(
        [sys.executable, "-P", "-c", PEER, peer.to_json(), str(path)],
        env=Packages(None, ENVIRONMENT).environment("audiocraft"),
        check=True,
    )
    theirs, steps = torch.load(path, weights_only=True)

    def noise(_seeds, samples, _device):
        torch.manual_seed(5)
        return lambda: torch.randn(1, 1, samples)

    monkeypatch.setattr(multibanddiffusion, "_Noise", noise)
    seen = []
    mine = ours.load_diffusion(job)(job.seconds, lambda *done: seen.append(done))
    assert seen == steps == [(done, 80) for done in range(1, 81)]
    loudest = theirs.abs().max().item()
    # Of 32 bits: 2e-4, of which the networks make 3e-6 before a band is made louder than others.
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 * loudest)


@pytest.mark.gpu
def test_a_gpu(place):
    record = mbd.measure(
        Plan(0.5, 2, "cuda", rounds=1, hidden=8), Packages(None, ENVIRONMENT), place
    )
    mine = record["rows"][0]
    assert set(mine) == ROW
    assert mine["precision"] == "float16"


@pytest.mark.parametrize(("together", "first"), [(2**20, 2), (1, 1)])
def test_evaluations_are_counted_for_each_channel(place, monkeypatch, together, first):
    """Whether channels are computed side by side or one after the other."""
    monkeypatch.setattr("audiocraft.modules.unet_diffusion._TOGETHER_BYTES", {"cpu": together})
    job = mbd._jobs(Plan(0.1, 2, hidden=4), place)[0]
    seen = []
    ours.load_diffusion(job)(0.1, lambda *done: seen.append(done))
    assert seen[0] == (first, 160)
    assert seen[-1] == (160, 160)


def test_the_codes_of_stereo():
    job = Job("decode", "cpu", channels=2, shapes=str(PUBLISHED))
    codes = random_codes(job, 2.0)
    assert codes.shape == (1, 8, 100)
    assert codes.min() >= 0
    assert 1900 < codes.max() < 2048
    assert not torch.equal(codes[:, 0::2], codes[:, 1::2])
    assert torch.equal(codes, random_codes(job, 2.0))


def test_what_is_asked_for():
    plan, given = mbd.parse(["--device", "cpu", "--record"])
    assert plan == Plan(10.0, 1, "cpu", against=True, rounds=2)
    assert given.record
    assert (plan.name, plan.width) == ("mbd-mono-cpu", 16)
    assert plan.sides == [("ours", "float32"), ("audiocraft", "float32")]
    plan, _ = mbd.parse(["--stereo", "--device", "cuda", "--against", "none", "--seconds", "30"])
    assert (plan.name, plan.width, plan.sides) == ("mbd-stereo-cuda", 64, [("ours", "float16")])
    again, _ = mbd.parse(plan.arguments[1:])
    assert replace(again, hidden=0) == plan


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--seconds", "0.05"], "--seconds 0.1 or more"),
        (["--hidden", "6"], "--hidden a multiple of 4"),
        (["--against", "transformers"], "invalid choice: 'transformers'"),
    ],
)
def test_what_cannot_be_asked_for(flags, message):
    with pytest.raises(InputError, match=message):
        mbd.parse(flags)


def test_the_table_of_a_record():
    row = {
        "system": "ours",
        "version": "mbd",
        "precision": "float32",
        "batch": 1,
        "seconds": 10.0,
        "channels": 2,
        "evaluations_per_s": 1.2345,
        "real_time_factor": 0.0768,
        "peak_gb": 1.234,
    }
    record = {
        "command": "scripts/benchmark mbd --stereo",
        "device": "A CPU, 2 threads of 2",
        "date": "2026-01-02",
        "versions": {"torch": "2.11.0", "audiocraft": "1.3.0"},
        "diffusion": {"bands": 4, "hidden": 16, "depth": 4, "growth": 4},
        "rows": [row, {"system": "audiocraft", "error": "ImportError: there is none"}],
    }
    assert tables({"mbd-stereo-cpu": record}) == (
        "Decoding with MultiBand Diffusion, 4 networks of 4 levels from 16 channels, each 4 times "
        "the one before, on A CPU, 2 threads of 2: torch 2.11.0, audiocraft 1.3.0 "
        "(`scripts/benchmark mbd --stereo`, 2026-01-02):\n"
        "\n"
        "| codes | by | precision | evaluations/s | x real time | peak memory |\n"
        "|---|---|---|---|---|---|\n"
        "| 10 s, stereo | this package | float32 | 1.23 | 0.077 | 1.23 GB |"
    )
