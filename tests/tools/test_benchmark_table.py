"""Records of benchmarks, the README's tables of them, and what a GPU has still to measure."""

import json
import time

import pytest
import torch

from audiocraft.errors import AudiocraftError, InputError
from tools.benchmark import table, todo
from tools.benchmark.records import load_all, rounded, save
from tools.benchmark.table import BEGIN, END, README, block, tables
from tools.benchmark.targets import TARGETS
from tools.benchmark.todo import ITEMS, Item, Session, missing, run_items

ROW = {
    "system": "ours",
    "version": "small",
    "precision": "int8",
    "batch": 1,
    "seconds": 8.0,
    "steps_per_s": 45.678,
    "real_time_factor": 0.8765,
    "first_step_s": 0.04321,
    "gb_per_s": 23.4,
    "bandwidth_share": 0.512,
    "peak_gb": 2.345,
}
BROKEN = {"system": "audiocraft", "version": "small", "precision": "float32", "batch": 1}
RECORD = {
    "command": "scripts/benchmark generate --version small",
    "device": "A CPU, 2 threads of 2",
    "date": "2026-01-02",
    "versions": {"python": "3.11.7", "torch": "2.11.0"},
    "bandwidth_gb_per_s": 45.67,
    "rows": [ROW, {**BROKEN, "seconds": 8.0, "error": "ImportError: there is none"}],
}


def test_the_tables_of_records():
    start = {"system": "ours", "by": "scripts/predict", "version": "small", "seconds": 5}
    records = {
        "generate-small-batch1-cpu": RECORD,
        "start-small-cpu": RECORD | {"rows": [start | {"start_to_file_s": 23.456}]},
    }
    assert tables(records) == (
        "A CPU, 2 threads of 2: python 3.11.7, torch 2.11.0; memory at 46 GB/s "
        "(`scripts/benchmark generate --version small`, 2026-01-02):\n"
        "\n"
        "| model, pieces | by | precision | steps/s | x real time | first step | of the memory's "
        "speed | peak memory |\n"
        "|---|---|---|---|---|---|---|---|\n"
        "| `small`, 1 of 8 s | this package | int8 | 45.7 | 0.88 | 0.043 s | 51% | 2.3 GB |\n"
        "\n"
        "Start of a process to a finished file of 5 s, on A CPU, 2 threads of 2: python 3.11.7, "
        "torch 2.11.0 (`scripts/benchmark generate --version small`, 2026-01-02):\n"
        "\n"
        "| model | by | seconds |\n"
        "|---|---|---|\n"
        "| `small` | this package, `scripts/predict` | 23.5 |"
    )


def test_the_readme_has_the_tables_of_the_records():
    assert block(README.read_text()) == tables(load_all())


def test_what_is_asked_stands_below_them(monkeypatch, capsys):
    peer = {**ROW, "system": "transformers", "precision": "float32", "steps_per_s": 6.5}
    records = {"generate-small-batch1-cpu": RECORD | {"rows": [ROW, peer]}}
    monkeypatch.setattr(table, "load_all", lambda: records)
    table.main([])
    shown = capsys.readouterr().out
    assert shown.startswith(tables(records))
    name = "`generate-small-batch1-cpu`"
    assert f"| {name} | 8 bits, steps/s: 7 times it | 45.68 | 45.5 | met |\n" in shown
    assert f"| {name} | steps/s: 2.5 times the faster peer |  |  | not measured |\n" in shown


def test_a_readme_without_marks():
    with pytest.raises(InputError, match="lacks the line"):
        block(f"{END}\n{BEGIN}\n")
    assert block(f"a\n{BEGIN}\n\n| b |\n\n{END}\nc") == "| b |"


def test_a_record_replaces_an_older_one_whole(tmp_path):
    save("one", {"rows": [1]}, tmp_path)
    with pytest.raises(TypeError):
        save("one", {"rows": [object()]}, tmp_path)
    assert load_all(tmp_path) == {"one": {"rows": [1]}}
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_four_digits_count():
    assert [rounded(value) for value in (1234.5, 0.00012345, 12)] == [1234, 0.0001234, 12]


# What a GPU has still to measure


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(todo, "missing", lambda: missing(tmp_path))
    with pytest.raises(InputError) as caught:
        todo.main([])
    said = str(caught.value)
    assert said.startswith("These figures need an NVIDIA GPU")
    assert all(item.name in said for item in ITEMS)
    assert said.count(".") == 1


def test_they_are_all_the_figures_and_fit_the_time():
    assert [item.name for item in ITEMS] == [
        "generate-medium-batch1-cuda",
        "generate-large-batch1-cuda",
        "request-stereo-melody-cuda",
        "generate-small-batch1-cuda",
        "mbd-stereo-cuda",
        "generate-medium-batch16-cuda",
        "generate-large-batch16-cuda",
        "profile-medium-cuda",
    ]
    assert {one.record for one in TARGETS if one.record.endswith("-cuda")} <= {
        item.name for item in ITEMS
    }
    assert sum(item.estimate for item in ITEMS) <= todo.LIMIT_S <= 580


def test_large_meets_the_peer_that_was_faster_with_medium(tmp_path, monkeypatch):
    """Both make so many steps a second because they launch so many kernels, of 48 layers."""
    plans = []
    speeds = {"ours": 700.0, "audiocraft": 45.0, "transformers": 55.0}

    def measure(plan, _packages, _place, _deadline, probe):
        assert probe is known
        plans.append(plan)
        return {
            "rows": [
                ROW | {"system": one, "steps_per_s": speeds[one]} for one in ("ours", *plan.against)
            ]
        }

    monkeypatch.setattr(todo.generate, "measure", measure)
    known = {"device": "a GPU"}
    items = [item for item in ITEMS if item.name.startswith("generate-")]
    assert not run_items(items, Session(None, None, known, tmp_path))
    assert [(plan.version, plan.batch, plan.against) for plan in plans] == [
        ("medium", 1, ("audiocraft", "transformers")),
        ("large", 1, ("transformers",)),
        ("small", 1, ()),
        ("medium", 16, ()),
        ("large", 16, ()),
    ]
    assert not missing(tmp_path, items)
    without = {"generate-medium-batch1-cuda": {"rows": [ROW, BROKEN | {"error": "no"}]}}
    assert todo.peers_to_beat(without) == ("audiocraft", "transformers")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([ROW], True),  # the peers are still to be measured
        ([ROW, {**BROKEN, "error": "no"}], True),
        ([{**ROW, "error": "no"}, BROKEN], True),
        ([ROW, {**BROKEN, "error": "no"}, {**ROW, "system": "transformers"}], False),
    ],
)
def test_what_is_recorded_is_not_measured_again(tmp_path, rows, expected):
    save("generate-medium-batch1-cuda", {"rows": rows}, tmp_path)
    names = [item.name for item in missing(tmp_path)]
    assert ("generate-medium-batch1-cuda" in names) == expected
    assert len(names) == len(ITEMS) - (not expected)


def test_one_that_hangs_costs_itself_alone(tmp_path):
    given = []

    def measure(_session, deadline):
        given.append(deadline - time.monotonic())
        return {"rows": [ROW]}

    session = Session(None, None, {}, tmp_path)
    assert not run_items([Item("first", 10, measure)], session, limit=60)
    assert not run_items([Item("last", 10, measure)], session, limit=15)
    assert given == [pytest.approx(20, abs=1), pytest.approx(15, abs=1)]


def test_each_is_kept_as_it_comes(tmp_path):
    session = Session(None, None, {}, tmp_path)

    def measure(given, deadline):
        assert given is session
        assert deadline > 0
        return {"rows": [ROW], "kept": [path.name for path in tmp_path.glob("*.json")]}

    def fail(*_):
        raise AudiocraftError("no memory")

    items = [
        Item("first", 1, measure),
        Item("broken", 1, fail),
        Item("wrong", 1, lambda *_: {}["missing"]),
        Item("long", 100, measure),
        Item("last", 1, measure),
    ]
    left = run_items(items, session, limit=60)
    assert [item.name for item in left] == ["broken", "wrong", "long"]
    assert sorted(load_all(tmp_path)) == ["first", "last"]
    assert json.loads((tmp_path / "last.json").read_text())["kept"] == ["first.json"]
