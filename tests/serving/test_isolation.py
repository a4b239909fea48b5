"""Many requests in one server: each gives what it gives alone, and nothing grows."""

import base64
import contextlib
import random
import re
import time
from pathlib import Path

import pytest
import torch

from audiocraft.serving.models import ModelCache
from audiocraft.serving.prediction import PredictionRequest, PredictionService
from tests.http_server import File, FileServer
from tests.releases import adapter, full_finetune, stand_in
from tests.serving.client import start

ROOT = Path(__file__).parents[2]
SONG = ROOT / "tests/audio/real_song.ogg"
VERSION = "stereo-melody"
KINDS = {
    "text": {"prompt": "a song"},
    "melody": {"prompt": "strings", "input_audio": SONG, "continuation_end": 4},
    "continuation": {
        "prompt": "guitars",
        "input_audio": SONG,
        "continuation": True,
        "continuation_end": 1,
        "duration": 2,
    },
    "flac": {"prompt": "a song", "output_format": "flac", "top_k": 5},
    "ogg": {"prompt": "a song", "output_format": "ogg", "temperature": 1.5},
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    stand_in(folder, VERSION, 1)
    stand_in(folder, "small", 2)
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(folder))
    monkeypatch.setenv("ALLOW_LOCAL_FILES", "1")
    return folder


@pytest.fixture
def site(store, tmp_path):
    """A folder of fine-tunes, all with the same name, and of what is none."""
    folder = tmp_path / "site"
    for name in ("full-1", "full-2", "full-3", "adapter-1", "adapter-2", "adapter-3"):
        (folder / name).mkdir(parents=True)
    for seed in (1, 2, 3):
        full_finetune(store, VERSION, seed + 10, folder / f"full-{seed}/trained_model.tar")
        adapter(store, VERSION, seed + 20, folder / f"adapter-{seed}/trained_model.tar")
    for name in ("text", "other-base", "half"):
        (folder / name).mkdir()
    (folder / "text/trained_model.tar").write_text("these are no weights")
    adapter(store, VERSION, 9, folder / "other-base/trained_model.tar", base_sha256="0" * 64)
    full_finetune(store, VERSION, 99, folder / "half/trained_model.tar")
    return folder


def alone(weights, kind):
    """What a service makes that has never made anything else."""
    service = PredictionService(models=ModelCache(torch.device("cpu")))
    inputs = {"duration": 1, "seed": 7, "model_version": VERSION, **KINDS[kind], **weights}
    return service.predict(PredictionRequest(**inputs)).path.read_bytes()


def status(pid):
    """Anonymous memory in MB, threads and open files of a process.

    Cog's own threads are left out: it has as many as its work needs at the time.
    """
    text = Path(f"/proc/{pid}/status").read_text()
    memory = int(text.split("RssAnon:")[1].split()[0]) / 1024
    names = []
    for path in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ends just now
            names.append(path.read_text())
    threads = sum(not name.startswith("tokio") for name in names)
    return memory, threads, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def least(pid, known):
    """The least of `status` within 5 s: what a request has ends a moment after its answer.

    Threads and files that are no more than is known already do at once.
    """
    end, found = time.monotonic() + 5, status(pid)
    while time.monotonic() < end and (
        known is None or any(now > then for now, then in zip(found[1:], known[1:], strict=True))
    ):
        time.sleep(0.1)
        found = tuple(map(min, found, status(pid)))
    return found


def ask(served, inputs):
    inputs = {key: str(v) if isinstance(v, Path) else v for key, v in inputs.items()}
    code, answer = served.predict({"duration": 1, "seed": 7, **inputs})
    assert code == 200, answer
    return answer


def content(answer):
    assert answer["status"] == "succeeded", answer
    return base64.b64decode(answer["output"].partition(",")[2])


@pytest.mark.slow
def test_two_hundred_mixed_requests(store, site):
    """Over the base, three full fine-tunes and three adapters, and URLs whose content changes.

    One of them tells its content by an ETag, the other by the time that it was changed.
    """
    names = [f"{kind}-{seed}" for kind in ("full", "adapter") for seed in (1, 2, 3)]
    weights = {
        name: {"replicate_weights": str(site / name / "trained_model.tar")} for name in names
    }
    weights |= {"base": {}, "small": {"model_version": "small"}}
    kinds = {name: [k for k in KINDS if name != "small" or k != "melody"] for name in weights}
    expected = {
        (name, kind): alone(weights[name], kind) for name in weights for kind in kinds[name]
    }
    assert len(set(expected.values())) == len(expected)
    choose = random.Random(5)  # noqa: S311 - a repeatable order
    environment = {
        "AUDIOCRAFT_CACHE_DIR": str(store),
        "ALLOW_LOCAL_FILES": "1",
    }
    changing = {}
    failures = {
        "half": "replicate_weights: .*",
        "text": r"replicate_weights \(trained_model.tar\) is not a file of MusicGen weights",
        "other-base": r"replicate_weights \(trained_model.tar\) is an adapter for other weights",
    }
    with FileServer(site) as server, start(ROOT, environment) as served:
        half = (site / "half/trained_model.tar").read_bytes()
        server.files["/half/trained_model.tar"] = File(half, etag='"1"', cuts=[20_000] * 1000)
        modified = time.time() - 10_000
        for number in range(200):
            name = choose.choice([*weights, "etag", "last-modified"])
            if name in {"etag", "last-modified"}:
                now = choose.choice(names)
                file = File((site / now / "trained_model.tar").read_bytes())
                if name == "etag":
                    file.etag = f'"{now}"'
                else:
                    modified += now != changing.get(name)
                    file.last_modified = modified
                changing[name] = now
                server.files[f"/{name}/trained_model.tar"] = file
                kind = choose.choice(kinds[now])
                inputs = {"replicate_weights": server.url(f"/{name}/trained_model.tar")}
                wanted = expected[now, kind]
            else:
                kind = choose.choice(kinds[name])
                inputs, wanted = dict(weights[name]), expected[name, kind]
                if "replicate_weights" in inputs and choose.random() < 0.7:
                    inputs["replicate_weights"] = server.url(f"/{name}/trained_model.tar")
            assert content(ask(served, {**KINDS[kind], **inputs})) == wanted, (number, name, kind)
            if number % 10 == 9:
                # A download is given up after 16 s of patience.
                wrong = "half" if number in {59, 139} else choose.choice(["text", "other-base"])
                url = server.url(f"/{wrong}/trained_model.tar")
                answer = ask(served, {"prompt": "x", "replicate_weights": url})
                assert answer["status"] == "failed"
                assert re.search(failures[wrong], answer["error"]), answer["error"]
                assert "\n" not in answer["error"]


@pytest.mark.slow
def test_three_hundred_requests_leave_nothing(store, site, tmp_path):
    """No growth of memory, threads, open files or temporary files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {
        "AUDIOCRAFT_CACHE_DIR": str(store),
        "ALLOW_LOCAL_FILES": "1",
        "TMPDIR": str(scratch),
        # What is freed goes back to the system at once, so that memory is what is held: glibc's own
        # thresholds adapt, and left some 30 MB more or less from one count to the next.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    weights = [{}, {"model_version": "small", "continuation": True}] + [
        {"replicate_weights": str(site / name / "trained_model.tar")}
        for name in ("full-1", "adapter-1", "text")
    ]
    seen = []
    with start(ROOT, environment) as served:
        for number in range(300):
            kind = list(KINDS.values())[number % len(KINDS)]
            inputs = {**kind, **weights[number // len(KINDS) % len(weights)]}
            ask(served, {**inputs, "seed": number, "duration": 1 + number % 3})
            if number % 50 == 49:
                known = seen[1][:2] if seen[1:] else (None, None)
                state = map(least, (served.worker_pid, served.server_pid), known)
                seen.append((*state, len(list(scratch.rglob("*")))))
    first, last = seen[1], seen[-1]
    for before, after in zip(first[:2], last[:2], strict=True):
        assert after[0] - before[0] < 30, seen
        assert after[1] <= before[1], seen
        assert after[2] <= before[2], seen
    assert last[2] <= first[2], seen
