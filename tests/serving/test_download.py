"""scripts/download against a hub on this machine."""

import hashlib
import logging
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from audiocraft.assets.remote import show_size
from audiocraft.assets.store import LABEL_MODELS, PARTS, RELEASES
from audiocraft.models.versions import VERSIONS
from audiocraft.serving.download import main
from audiocraft.serving.prediction import PredictionRequest, PredictionService
from tests.http_server import File, FileServer, use_hub
from tests.releases import stand_in
from tests.serving.client import wait_until
from tools.make_diffusion import write_diffusion

ROOT = Path(__file__).parents[2]
POINTER = "facebook/musicgen-stereo-melody"
T5 = {f"google-t5/t5-base/{name}" for name in PARTS["t5-base"][1]}
ENCODEC = {f"facebook/encodec_32khz/{name}" for name in PARTS["encodec_32khz"][1]}
DIFFUSION = f"{PARTS['mbd'][0]}/{PARTS['mbd'][1][0]}"
SEPARATOR = {"adefossez/HTDemucs/htdemucs.yaml", "adefossez/HTDemucs/abc123.safetensors"}
RELEASE = {f"{POINTER}/state_dict.bin", f"{POINTER}/compression_state_dict.bin"}
LABELS = {
    f"essentia/{Path(name).name}{suffix}" for name in LABEL_MODELS for suffix in (".pb", ".json")
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """What the hub has: a release with a pointer to a codec, and one with a codec of its own."""
    folder = tmp_path_factory.mktemp("hub")
    files = dict.fromkeys(T5 | ENCODEC | SEPARATOR | RELEASE, b"x" * 1000)
    files["adefossez/HTDemucs/htdemucs.yaml"] = b"models: [abc123]\n"
    files["facebook/musicgen-small/state_dict.safetensors"] = b"s" * 2000
    files["facebook/musicgen-small/state_dict.bin"] = b"b" * 2000
    files["facebook/musicgen-small/compression_state_dict.bin"] = bytes(1_100_000)
    for name in LABEL_MODELS:
        for suffix in (".pb", ".json"):
            files[f"labels/{name}{suffix}"] = b"label"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    torch.save(
        {"pretrained": "facebook/encodec_32khz", "exported": True},
        folder / POINTER / "compression_state_dict.bin",
    )
    (folder / DIFFUSION).parent.mkdir()
    write_diffusion(folder / DIFFUSION, 16, bands=1, hidden=4, depth=3, growth=2)
    return folder


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # A command's log goes to the stderr that one test has.
    monkeypatch.setattr(logging.getLogger("audiocraft"), "handlers", [])
    with FileServer(repositories) as server:
        use_hub(monkeypatch, server)
        yield server


@pytest.fixture
def fetched(hub, tmp_path):
    """Runs the command; returns its status, what it says, and the names of files in the store."""

    def run(capsys, *arguments):
        status = main(arguments, labels_url=hub.url("/labels"))
        names = {
            str(path.relative_to(tmp_path / "store"))
            for path in (tmp_path / "store").rglob("*")
            if path.is_file()
        }
        return status, capsys.readouterr().err, names

    return run


def test_a_version_with_a_pointer(hub, fetched, capsys, tmp_path):
    status, said, names = fetched(capsys, "stereo-melody")
    assert (status, names) == (0, RELEASE | T5 | ENCODEC | SEPARATOR)
    lines = said.splitlines()
    assert lines[0].startswith("Fetching compression_state_dict.bin of facebook/musicgen-stereo-m")
    assert f"  {POINTER}/state_dict.bin: 1.0 kB, to fetch" in lines
    pointer = (tmp_path / "store" / POINTER / "compression_state_dict.bin").stat().st_size
    # What was needed to know the rest is here already.
    total = (7000 + pointer + 17) / 1000
    assert f"stereo-melody needs {total:.1f} kB:" in lines
    assert f"To fetch: 7.0 kB, into {tmp_path / 'store'}" in lines
    assert lines[-1] == "Everything is there now."
    hub.requests.clear()
    status, said, again = fetched(capsys, "stereo-melody")
    assert (status, again, hub.requests) == (0, names, [])
    assert said.endswith("Everything is there.\n")
    assert f"  {POINTER}/state_dict.bin: 1.0 kB, here\n" in said


def test_a_version_with_a_codec_of_its_own(fetched, capsys):
    status, said, names = fetched(capsys, "small")
    # The hub has this one as safetensors, which the loaders prefer.
    release = {
        "facebook/musicgen-small/state_dict.safetensors",
        "facebook/musicgen-small/compression_state_dict.bin",
    }
    assert (status, names) == (0, release | T5)
    assert "small needs 1.1 MB:" in said


def test_what_training_needs(hub, fetched, capsys):
    status, _, names = fetched(capsys, "tiny", "--train")
    assert (status, names) == (0, SEPARATOR | LABELS)
    status, said, names = fetched(capsys, "small", "--train")
    assert status == 0
    assert names > SEPARATOR | LABELS | T5
    assert "essentia/discogs-effnet-bs64-1.pb: 5 bytes, here" in said
    paths = [request.path for request in hub.log()]
    assert len(paths) == len(set(paths))


def test_several_versions_and_parts_share_what_they_share(hub, fetched, capsys):
    status, said, names = fetched(capsys, "small", "stereo-melody", "t5-base", "htdemucs")
    assert status == 0
    assert names > RELEASE | T5 | ENCODEC | SEPARATOR
    assert "t5-base needs 3.0 kB:" in said
    paths = [request.path for request in hub.log()]
    assert len(paths) == len(set(paths))
    # Each file is asked about once, too.
    paths = [request.path for request in hub.log("HEAD")]
    assert len(paths) == len(set(paths))


def test_a_part_alone(fetched, capsys):
    assert fetched(capsys, "encodec_32khz")[2] == ENCODEC


def test_the_diffusion(repositories, fetched, capsys, tmp_path):
    status, said, names = fetched(capsys, "mbd")
    assert (status, names) == (0, {DIFFUSION})
    assert (tmp_path / "store" / DIFFUSION).read_bytes() == (repositories / DIFFUSION).read_bytes()
    assert said.endswith("Everything is there now.\n")


def test_a_prediction_fetches_the_diffusion_when_it_is_first_asked_for(hub, tmp_path):
    stand_in(tmp_path / "store", "small", 1)
    service = PredictionService()

    def predict(**inputs):
        service.predict(PredictionRequest("a song", model_version="small", duration=1, **inputs))
        return [(request.method, request.path) for request in hub.requests]

    assert predict() == []
    path = f"/{DIFFUSION.replace('/mbd', '/resolve/main/mbd')}"
    for _ in range(2):
        assert predict(multi_band_diffusion=True) == [("HEAD", path), ("GET", path)]
    assert (tmp_path / "store" / DIFFUSION).is_file()


def test_tiny_needs_nothing(hub, fetched, capsys):
    status, said, names = fetched(capsys, "tiny")
    assert (status, names, hub.requests) == (0, set(), [])
    assert said == "tiny comes with this package and needs nothing more.\nEverything is there.\n"


def test_files_of_the_hubs_cache_are_not_fetched(fetched, capsys, tmp_path):
    repo = tmp_path / "hub/models--google-t5--t5-base"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    for name in PARTS["t5-base"][1]:
        (snapshot / name).touch()
    status, said, names = fetched(capsys, "t5-base")
    assert (status, names) == (0, set())
    assert "google-t5/t5-base/config.json: 0 bytes, here" in said


def test_the_disk_is_checked_first(hub, fetched, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 64 * 2**20 + 1500})
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    status, said, names = fetched(capsys, "t5-base")
    assert (status, names) == (1, set())
    assert "What is missing needs 3.0 kB more on the disk of" in said
    assert hub.log() == []


@pytest.mark.parametrize("arguments", [[], ["--train"], ["smal"], ["small", "x"]])
def test_the_names_are_listed(fetched, capsys, arguments):
    status, said, _ = fetched(capsys, *arguments)
    assert status == 1
    assert said.count("\n") == 1
    for name in {*RELEASES, *VERSIONS, *PARTS}:
        assert f" {name}," in said or f" {name}." in said


def test_an_unknown_flag_is_one_sentence(fetched, capsys):
    status, said, _ = fetched(capsys, "--trian", "small")
    assert (status, said.count("\n")) == (1, 1)
    assert "--trian" in said


def test_the_home_of_nobody_is_one_sentence(fetched, capsys, monkeypatch):
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", "~nobody-here/x")
    assert fetched(capsys, "small")[:2] == (
        1,
        "AUDIOCRAFT_CACHE_DIR is '~nobody-here/x', and there is no such home: give a whole path.\n",
    )


def test_no_network_is_one_sentence(fetched, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, said, _ = fetched(capsys, "small")
    assert (status, said.count("\n")) == (1, 1)
    assert "HF_HUB_OFFLINE" in said


@pytest.mark.usefixtures("hub")
def test_label_models_that_cannot_be_had_are_told(capsys):
    assert main(["tiny", "--train"], labels_url="http://nowhere.invalid") == 1
    said = capsys.readouterr().err
    assert "discogs-effnet-bs64-1.pb is not in" in said
    assert "run scripts/download tiny --train, or put it there." in said


@pytest.fixture
def script(hub, tmp_path):
    """Starts scripts/download on the hub."""

    def start(*arguments):
        environment = os.environ | {
            "HF_ENDPOINT": hub.url(),
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        return subprocess.Popen(
            # Whoever runs the tests may ignore it, as a shell does for what runs in the background.
            ["env", "--default-signal=INT", ROOT / "scripts/download", *arguments],
            env=environment,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_the_script_runs(script, tmp_path):
    with script("htdemucs") as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert (tmp_path / "store/adefossez/HTDemucs/abc123.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_script_goes_on_where_it_was_stopped(script, hub, tmp_path, number):
    repo, name, content = "google-t5/t5-base", "model.safetensors", os.urandom(1_000_000)
    link = f"/{repo}/resolve/main/{name}"
    hub.files[link] = hub.find(link)
    hub.files[link].headers = {
        "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
        "X-Linked-Size": str(len(content)),
    }
    hub.files[f"/{repo}/{name}"] = file = File(content, etag='"1"', stall_after=600_000)
    part = tmp_path / f"store/{repo}/{name}.part"
    with script("t5-base") as process:
        wait_until(lambda: part.exists() and part.stat().st_size > 400_000, 60)
        process.send_signal(number)
        began = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert time.monotonic() - began < 10  # the server says nothing for 60 s
    assert process.returncode == 130, said
    assert said.endswith("Stopped; the same command goes on from here.\n")
    kept = part.stat().st_size
    assert kept > 400_000
    file.stall_after = None
    with script("t5-base") as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert f"Going on with {name} of {repo} at {show_size(kept)}." in said
    last = [request for request in hub.log() if request.path.startswith(f"/{repo}/{name}")][-1]
    assert last.headers["range"] == f"bytes={kept}-"
    assert last.sent == len(content) - kept
    assert part.with_name(name).read_bytes() == content
