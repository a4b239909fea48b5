"""`scripts/benchmark`: real runs on small shapes, and its arithmetic against numbers by hand."""

import argparse
import json
import subprocess
import sys
from abc import ABC
from contextlib import nullcontext
from importlib.metadata import distribution

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from audiocraft.errors import InputError
from audiocraft.models.encodec import EncodecModel
from audiocraft.models.loaders import load_models
from tests.golden_data import GOLDEN
from tools.benchmark import generate, ours, profile, request, start
from tools.benchmark.__main__ import COMMANDS, main
from tools.benchmark.absent import AbsentPackages
from tools.benchmark.generate import Plan, Scratch
from tools.benchmark.processes import BROUGHT, Packages, run_side
from tools.benchmark.shapes import CODEC, DESCRIPTION, PUBLISHED, ROOT, TEXT_TOKENS, Shape
from tools.benchmark.side import Job, StepClock
from tools.benchmark.weights import random_state, write_release

ROW = {
    "system",
    "version",
    "precision",
    "batch",
    "seconds",
    "steps_per_s",
    "real_time_factor",
    "first_step_s",
    "gb_per_s",
    "bandwidth_share",
    "peak_gb",
}


@pytest.fixture
def place(tmp_path):
    """Small models under the released versions' names."""
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    changes = {
        "small": ("transformer_lm", {"dim": 64, "num_heads": 4, "num_layers": 2}),
        "stereo-melody": ("transformer_lm", {"dim": 64, "num_heads": 4, "num_layers": 2}),
        CODEC: ("seanet", {"n_filters": 4}),
    }
    for name, (section, values) in changes.items():
        cfg = yaml.safe_load((PUBLISHED / f"{name}.xp_cfg.yaml").read_text())
        cfg[section].update(values)
        (shapes / f"{name}.xp_cfg.yaml").write_text(yaml.safe_dump(cfg))
    return Scratch(tmp_path / "scratch", shapes, text_layers=1)


@pytest.fixture
def packages(tmp_path):
    """A folder as --packages names it, whose `audiocraft` cannot be imported."""
    folder = tmp_path / "packages"
    (folder / "audiocraft").mkdir(parents=True)
    (folder / "audiocraft/__init__.py").write_text("raise ImportError('this one is broken')\n")
    return Packages(folder, folder)


# Real runs


def test_the_line_of_json(monkeypatch, capsys, place, packages):
    monkeypatch.setattr(generate, "scratch", lambda: nullcontext(place))
    monkeypatch.setattr(generate, "find_packages", lambda *_: packages)
    arguments = ["--version", "small", "--against", "audiocraft", "--seconds", "0.3"]
    arguments += ["--batch", "2", "--device", "cpu", "--rounds", "1", "--precision", "float32"]
    generate.main(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == ["command", "device", "rows"]
    assert result["command"] == " ".join(["scripts/benchmark", "generate", *arguments])
    assert "threads" in result["device"]
    ours, peer = result["rows"]
    assert set(ours) == ROW
    assert (ours["system"], ours["version"], ours["precision"]) == ("ours", "small", "float32")
    assert (ours["batch"], ours["seconds"]) == (2, 0.3)
    assert 0.1 < ours["peak_gb"] < 10
    assert 0 < ours["bandwidth_share"] < 1
    assert ours["first_step_s"] > 0
    # 18 steps and more make the 0.6 s of music.
    assert ours["real_time_factor"] < 0.6 / (17 / ours["steps_per_s"])
    read = Shape.of("small", place.shapes).step_bytes("float32", 2, 15, TEXT_TOKENS)
    assert ours["gb_per_s"] == pytest.approx(ours["steps_per_s"] * read / 1e9, rel=1e-3)
    # The folder's audiocraft is the peer's; ours was found before it.
    assert peer["system"] == "audiocraft"
    assert peer["error"] == "ImportError: this one is broken"
    assert "steps_per_s" not in peer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "rounds", "precisions"),
    [("small", 2, ("float32", "int8")), ("stereo-melody", 1, ("float32",))],
)
def test_transformers_runs_the_same_shape(place, packages, version, rounds, precisions):
    plan = Plan(version, ("transformers",), 0.3, rounds=rounds, precisions=precisions)
    record = generate.measure(plan, packages, place)
    sides = [("ours", precision) for precision in precisions] + [("transformers", "float32")]
    assert [(row["system"], row["precision"]) for row in record["rows"]] == sides
    assert all(set(row) == ROW for row in record["rows"])
    assert len(record["rounds"]) == rounds * len(sides)
    assert record["versions"]["torch"] == torch.__version__
    assert "transformers" in record["versions"]


@pytest.mark.slow
def test_start_of_each_side(place, packages):
    record = start.measure("small", 1, 1, packages, place)
    rows = {(row["system"], row["by"]): row for row in record["rows"]}
    measured = {way for way, row in rows.items() if row.get("start_to_file_s", 0) > 1}
    assert measured == {
        ("ours", "scripts/predict"),
        ("ours", "python"),
        ("transformers", "python"),
    }
    assert "this one is broken" in rows["audiocraft", "python"]["error"]


@pytest.mark.slow
def test_request_and_profile(place, packages):
    (row,) = request.measure("small", 1.0, "cpu", packages, place)["rows"]
    assert 0 < row["request_to_file_s"] < 60
    (row,) = profile.measure("small", "cpu", packages, place)["rows"]
    largest = [ms for _, ms, _ in row["largest"]]
    assert largest == sorted(largest, reverse=True)
    assert 0 < sum(largest) <= row["device_ms"] * 1.001
    assert row["kernels"] > 20  # choosing a token cannot do with less
    assert "decoding step" in {name for name, _, _ in row["largest"]}


def test_a_step_is_profiled_without_the_codec(place, monkeypatch):
    monkeypatch.setattr(EncodecModel, "decode", None)
    found = ours.profile(Job("profile", "cpu", release=str(place.release("small"))))
    assert found["kernels"] > 20  # choosing a token cannot do with less
    assert found["device_ms"] > 0


@pytest.mark.gpu
def test_a_gpu(place, packages):
    plan = Plan("small", (), 0.5, device="cuda", rounds=1)
    record = generate.measure(plan, packages, place)
    assert {row["precision"] for row in record["rows"]} >= {"float16", "float32"}
    assert all(set(row) == ROW for row in record["rows"])
    assert record["bandwidth_gb_per_s"] > 50
    assert 0 < record["rounds"][0]["weights_gb"] < record["rounds"][0]["loop_peak_gb"]


def test_a_device_that_is_known_is_not_probed(monkeypatch, place, packages):
    monkeypatch.setattr(generate, "probe_device", None)
    monkeypatch.setattr(generate, "take_turns", lambda jobs, *_: [[{"error": "no"}] for _ in jobs])
    known = {"device": "A", "bandwidth_gb_per_s": 50, "precisions": ["float32"], "versions": {}}
    record = generate.measure(Plan("small", ()), packages, place, None, known)
    assert (record["device"], record["bandwidth_gb_per_s"]) == ("A", 50)
    assert [row["precision"] for row in record["rows"]] == ["float32"]


def test_a_side_that_fails_is_a_row(packages):
    found = run_side(Job("make_file", "cpu", release="/nowhere"), packages)
    assert "/nowhere" in found["error"]
    assert "took longer than 0 s" in run_side(Job("probe", "cpu"), packages, 0.01)["error"]


def test_where_sides_find_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:/elsewhere")
    folders = Packages(tmp_path, tmp_path)
    assert folders.environment("ours")["PYTHONPATH"] == f"{ROOT}:/elsewhere:{tmp_path}"
    assert folders.environment("audiocraft")["PYTHONPATH"] == f"{tmp_path}:{ROOT}:/elsewhere"


def test_peers_do_not_get_what_our_commands_set(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # as `audiocraft.serving` does
    folders = Packages(tmp_path, tmp_path)
    assert folders.environment("ours")["GOMP_SPINCOUNT"] == "10000"
    for system in ("audiocraft", "transformers"):
        assert "GOMP_SPINCOUNT" not in folders.environment(system)


# What is brought to a machine without a network

THERE = {
    *("joblib", "lazy-loader", "msgpack", "numba", "numpy", "packaging", "pyyaml", "requests"),
    *("scikit-learn", "scipy", "torch", "typing-extensions"),
}
"""What they ask for, and such a machine has."""

FOR_FILES = {"audioread", "soundfile", "soxr"}
"""What librosa imports only with its functions for files."""


def test_brought_packages_have_the_projects_versions():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line.partition("  #")[0] for line in lines}
    names = {pin.partition("==")[0] for pin in pins}
    pinned = {line for line in BROUGHT if line.partition("==")[0] in names}
    assert {"omegaconf", "librosa"} < {line.partition("==")[0] for line in pinned}
    assert pinned <= pins


def test_brought_packages_have_what_they_ask_for():
    brought = {canonicalize_name(Requirement(line).name) for line in BROUGHT}
    environment = {"extra": "", "python_version": "3.12"}
    asked = {
        canonicalize_name(line.name)
        for name in brought - {"audiocraft"}
        for line in map(Requirement, distribution(name).requires or [])
        if line.marker is None or line.marker.evaluate(environment)
    }
    assert asked - brought - THERE == FOR_FILES


def test_a_melody_does_without_what_reads_files():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(FOR_FILES))
    code = (
        f"import sys; {blocked}; from audiocraft.modules.chroma import ChromaExtractor; "
        "assert ChromaExtractor(32000).fbanks.shape == (12, 2049)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_names_what_is_brought():
    parser = argparse.ArgumentParser()
    generate.add_packages(parser)
    assert " ".join(["--target DIR", *BROUGHT]) in " ".join(parser.format_help().split())


# Weights


def test_a_random_release_has_the_published_shapes(tmp_path, place):
    write_release(tmp_path / "small", "small", place.text_encoder)
    path = tmp_path / "small/state_dict.bin"
    state = torch.load(path, weights_only=True)["best_state"]
    published = json.loads((GOLDEN / "checkpoints/small.json").read_text())["state_dict"]
    assert {name: list(value.shape) for name, value in state.items()} == {
        name: shape for name, (shape, _) in published.items()
    }
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert path.stat().st_size < 100e6  # of 841 MB: the numbers are shared


def test_random_matrices_keep_the_scale():
    state = random_state(
        {"norm1.weight": torch.Size([8]), "linear1.weight": torch.Size([512, 256])}
    )
    assert (state["norm1.weight"] == 1).all()
    assert state["linear1.weight"].float().std().item() == pytest.approx(1 / 16, rel=0.02)


def test_the_description_has_as_many_tokens_as_is_said(place):
    lm, _ = load_models(place.release("small"), "cpu")
    tokens = lm.condition_provider.conditioners["description"].tokenize([DESCRIPTION])
    assert tokens["input_ids"].shape == (1, TEXT_TOKENS)
    unknown = 2
    assert (tokens["input_ids"] != unknown).all()


# Arithmetic


def test_bytes_of_small_by_hand():
    shape = Shape.of("small")
    # 24 layers: self-attention 4, of cross-attention 2, feed-forward 8 squares of 1024; 4 heads.
    matrices = 24 * 14 * 1024 * 1024 + 4 * 2048 * 1024
    assert shape.weight_bytes("float32") == 4 * matrices == 1_442_840_576
    assert shape.weight_bytes("int8") == matrices
    # 1503 steps see 1 to 1503 positions, 752 on average, and 21 tokens of text: 773.
    cache = 2 * 24 * 2 * 1024 * 773  # keys and values, layers, rows, width
    assert shape.step_bytes("float16", 1, 1500, 21) == 2 * (matrices + cache)
    assert shape.step_bytes("int8", 1, 1500, 21) == matrices + 2 * cache
    assert shape.step_bytes("float32", 16, 1500, 21) == 4 * (matrices + 16 * cache)


@pytest.mark.parametrize(
    ("version", "weights", "cache"),
    [("small", 0.72, 0.15), ("medium", 3.20, 0.44), ("large", 5.67, 0.59)],
)
def test_bytes_are_about_what_others_count(version, weights, cache):
    """facts of peers: GB a step at 16 bits, guided, over 30 s, without the description."""
    shape = Shape.of(version)
    assert shape.weight_bytes("float16") / 1e9 == pytest.approx(weights, abs=0.01)
    assert shape.cache_bytes("float16", 1, 752) / 1e9 == pytest.approx(cache, abs=0.01)


def test_a_melody_stands_in_front():
    shape = Shape.of("stereo-melody")
    assert (shape.melody_frames, shape.cross_attention, shape.max_delay) == (235, False, 3)
    assert shape.weight_bytes("float16") == 2 * (48 * 12 * 1536**2 + 8 * 2048 * 1536)
    assert shape.positions(1500, 21) == 235 + 21 + 1503


@pytest.mark.parametrize("every", [1, 8])
def test_steps_that_are_told_of_in_groups(monkeypatch, every):
    """The first takes 2 s, each of the others 0.25 s."""
    now = 0.0
    monkeypatch.setattr("tools.benchmark.side.time.perf_counter", lambda: now)
    clock = StepClock("cpu")
    for step in range(1, 49):
        now += 2.0 if step == 1 else 0.25
        if step % every == 0:
            clock(step, 48)
    assert clock.steps == 48
    assert clock.steps_per_s == pytest.approx(4)
    assert clock.first_step_s == pytest.approx(2)


# The command line


def test_what_is_asked_for():
    plan, _ = generate.parse(["--version", "large", "--against", "none", "--device", "cpu"])
    assert plan == Plan("large", (), 30.0, 1, "cpu", 2)
    plan, given = generate.parse(["--version", "small", "--against", "transformers", "--record"])
    assert (plan.against, plan.precisions, given.record) == (("transformers",), (), True)
    assert generate.parse(plan.arguments[1:])[0] == plan


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--version", "huge"], "invalid choice: 'huge'"),
        (["--version", "small", "--against", "riffusion"], "--against is riffusion"),
        (["--version", "small", "--seconds", "31"], "--seconds from 0.04 to 30"),
        (["--version", "small", "--rounds", "0"], "--rounds and --batch must be 1 or more"),
    ],
)
def test_what_cannot_be_asked_for(flags, message):
    with pytest.raises(InputError, match=message):
        generate.parse(flags)


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main(["speed"]) == 1
    assert "speed is no command; there are generate, start" in capsys.readouterr().err


# Stand-ins for packages


def test_stand_ins_serve_as_what_code_needs(monkeypatch):
    finder = AbsentPackages({"nowhere_to_be_found"})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    from nowhere_to_be_found import (  # type: ignore[import-not-found]
        Base,
        decorate,
        part,  # type: ignore[import-not-found]
    )

    class Derived(ABC, Base, part.Mixin):
        pass

    @decorate
    def same():
        return 1

    assert isinstance(Derived(), Base)
    assert same() == 1
    with pytest.raises(ModuleNotFoundError):
        import somewhere_else_not_found  # type: ignore[import-not-found] # noqa: F401
