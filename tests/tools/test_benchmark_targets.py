"""What is asked of recorded figures: met exactly, just missed, and not measured."""

import pytest

from tools.benchmark.targets import TARGETS

CPU = "A CPU (AVX512), 2 threads of 2"
GPU = "NVIDIA H200"


def ours(precision="float16", **figures):
    return {"system": "ours", "precision": precision, **figures}


def peer(system="audiocraft", **figures):
    return {"system": system, "precision": "float16", **figures}


def verdicts(name, records):
    """Of what is asked of a record, in order, with the limit of what is measured."""
    judged = [one.judge(records)[1:] for one in TARGETS if one.record == name]
    return [(float(limit), verdict) if limit else verdict for limit, verdict in judged]


def judge(name, rows, device=None, **more):
    device = device or (CPU if name.endswith("-cpu") else GPU)
    return verdicts(name, {name: {"device": device, "rows": rows, **more}})


BROKEN = {"system": "transformers", "precision": "float32", "error": "no memory"}


@pytest.mark.parametrize(
    ("peers", "expected"),
    [
        ([4.0, 3.0], [(10, "met"), (28, "met")]),
        ([3.0, 4.1], [(10.25, "missed"), (28.7, "missed")]),
        ([], ["not measured", "not measured"]),
    ],
)
def test_small_on_two_cores(peers, expected):
    found = [ours(name, steps_per_s=speed) for name, speed in (("float32", 10.0), ("int8", 28.0))]
    found += [peer(steps_per_s=speed) for speed in peers]
    assert judge("generate-small-batch1-cpu", [*found, BROKEN]) == expected
    on_others = judge("generate-small-batch1-cpu", found, "A CPU (AVX512), 32 threads of 32")
    assert on_others == ["not measured", "not measured"]


@pytest.mark.parametrize(("seconds", "verdict"), [(60.0, "met"), (60.1, "missed")])
def test_the_slower_of_our_starts_is_no_later_than_the_faster_peers(seconds, verdict):
    times = [("ours", 20.0), ("ours", seconds), ("audiocraft", 78.0), ("transformers", 60.0)]
    found = [{"system": system, "start_to_file_s": time} for system, time in times]
    assert judge("start-small-cpu", found) == [(60, verdict)]


def test_diffusion():
    found = [
        ours("float32", real_time_factor=0.3, peak_gb=2.0),
        peer(real_time_factor=0.3, peak_gb=1.9),
    ]
    assert judge("mbd-mono-cpu", found) == [(0.3, "met"), (1.9, "missed")]
    assert judge("mbd-stereo-cuda", found) == [(0.9, "missed")]
    found[0]["real_time_factor"] = 0.9
    assert judge("mbd-stereo-cuda", found) == [(0.9, "met")]


@pytest.mark.parametrize(
    ("version", "share", "peers", "expected"),
    [
        ("medium", 0.5, [50.0, 60.0], (600, "met")),
        ("medium", 0.5, [50.0, 60.1], (601, "missed")),
        ("medium", 0.5, [90.0], (720, "missed")),  # 60 % of the bandwidth are 720 steps/s
        ("medium", 0.6, [90.0], (600, "met")),
        ("medium", 0.6, [], (600, "met")),  # whatever the peers do
        ("medium", 0.5, [], "not measured"),
        ("large", 0.5, [100.0], (600, "met")),
        ("large", 0.5, [101.0], (606, "missed")),
    ],
)
def test_peers_or_bandwidth(version, share, peers, expected):
    found = [ours(steps_per_s=600.0, bandwidth_share=share, peak_gb=9.0)]
    found += [peer(steps_per_s=speed) for speed in peers]
    name = f"generate-{version}-batch1-cuda"
    assert judge(name, found)[0] == expected
    assert judge(name, found, "Tesla T4")[0] == "not measured"


@pytest.mark.parametrize(("peak", "verdict"), [(9.6, "met"), (9.7, "missed")])
@pytest.mark.parametrize("size", ["medium-batch1", "large-batch1", "medium-batch16"])
def test_memory_in_the_steps(size, peak, verdict):
    found = [ours(loop_peak_gb=peak, weights_gb=6.0, cache_gb=2.0), peer(loop_peak_gb=20.0)]
    assert judge(f"generate-{size}-cuda", [], rounds=found)[1] == (9.6, verdict)
    assert judge(f"generate-{size}-cuda", [])[1] == "not measured"


@pytest.mark.parametrize(("version", "times"), [("medium", 4), ("large", 4.6)])
def test_a_batch_of_sixteen(version, times):
    one, many = (f"generate-{version}-batch{batch}-cuda" for batch in (1, 16))
    records = {
        one: {"device": GPU, "rows": [ours(real_time_factor=10.0)]},
        many: {"device": GPU, "rows": [ours(real_time_factor=42.0)]},
    }
    assert verdicts(many, records)[0] == (10 * times, "met" if version == "medium" else "missed")
    del records[one]
    assert verdicts(many, records)[0] == "not measured"


@pytest.mark.parametrize(
    ("name", "field", "limit", "missed"),
    [
        ("generate-small-batch1-cuda", "steps_per_s", 1000, 999.0),
        ("generate-large-batch1-cuda", "peak_gb", 12, 12.1),
        ("request-stereo-melody-cuda", "request_to_file_s", 4, 4.01),
    ],
)
def test_numbers_of_a_gpu(name, field, limit, missed):
    assert judge(name, [ours(**{field: float(limit)})])[-1] == (limit, "met")
    assert judge(name, [ours(**{field: missed})])[-1] == (limit, "missed")


def test_nothing_is_measured_without_records():
    assert {one.judge({}) for one in TARGETS} == {("", "", "not measured")}
    assert {one.judge({one.record: {"device": GPU, "rows": []}}) for one in TARGETS} == {
        ("", "", "not measured")
    }
