"""Where files of the hub are looked for, and what is said where they cannot be had."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from audiocraft.assets import exchange
from audiocraft.assets import store as module
from audiocraft.assets.store import (
    RELEASES,
    fetch,
    fetch_first,
    fetch_folder,
    plain_file,
    short_name,
    store_dir,
)
from audiocraft.errors import AssetError, InputError
from audiocraft.models.versions import VERSIONS
from tests.http_server import File, FileServer, use_hub

REPO = "google-t5/t5-base"
MUSICGEN = "facebook/musicgen-small"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store and an empty hub cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "store"))
    return tmp_path / "store" / REPO


@pytest.fixture
def hub_cache(tmp_path):
    """Puts files into the hub's own cache, as another program would have."""
    revision = "a" * 40

    def put(*names, repo_id=REPO):
        repo = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / revision
        snapshot.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs/main").write_text(revision)
        for name in names:
            (snapshot / name).touch()
        return snapshot

    return put


@pytest.fixture
def hub(store, tmp_path, monkeypatch):
    """A hub with two files of a repository."""
    folder = tmp_path / "repositories"
    (folder / REPO).mkdir(parents=True)
    (folder / REPO / "config.json").write_bytes(b"{}" * 50)
    (folder / REPO / "model.safetensors").write_bytes(b"tensors" * 10_000)
    with FileServer(folder) as server:
        use_hub(monkeypatch, server)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert not store.exists()
        yield server


# Places


def test_the_store_comes_first(store, hub_cache):
    store.mkdir(parents=True)
    (store / "config.json").touch()
    hub_cache("config.json")
    assert fetch(REPO, "config.json") == store / "config.json"
    assert store_dir() == store.parents[1]


def test_the_store_lies_in_the_project_or_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", "")
    assert store_dir() == Path(__file__).parents[2] / "models"
    installed = tmp_path / "lib/audiocraft/assets/store.py"
    monkeypatch.setattr(module, "__file__", str(installed))
    assert store_dir() == Path.home() / ".cache/audiocraft"
    (tmp_path / "lib/cog.yaml").parent.mkdir()
    (tmp_path / "lib/cog.yaml").touch()
    (tmp_path / "lib/predict.py").touch()
    assert store_dir() == tmp_path / "lib/models"
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", "~/here")
    assert store_dir() == Path.home() / "here"
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", "~nobody-here/x")
    with pytest.raises(InputError, match=r"^AUDIOCRAFT_CACHE_DIR is '~nobody-here/x', and"):
        store_dir()


@pytest.mark.usefixtures("store")
def test_the_hubs_own_cache_is_used(hub_cache):
    snapshot = hub_cache("config.json", "tokenizer.json")
    assert fetch_folder(REPO, ["config.json", "tokenizer.json"]) == snapshot
    assert fetch_first(REPO, ["none.json", "config.json"]) == snapshot / "config.json"


@pytest.mark.usefixtures("store")
def test_a_text_encoder_that_an_official_program_fetched_is_used(hub_cache):
    """Under the name that it had on the hub before; it is never asked for by that."""
    older = hub_cache("config.json", "model.safetensors", repo_id="t5-base")
    assert fetch_folder(REPO, ["config.json", "model.safetensors"]) == older
    with pytest.raises(AssetError, match=rf"^config\.json of {REPO} is not in .*/{REPO} and"):
        fetch_folder(REPO, ["config.json", "tokenizer.json"])
    newer = hub_cache("config.json")
    assert fetch_folder(REPO, ["config.json"]) == newer


def test_files_that_belong_together_lie_in_one_folder(store, hub_cache):
    """A cache that holds some of them does not serve; what is missing is asked for."""
    hub_cache("config.json")
    store.mkdir(parents=True)
    (store / "model.safetensors").touch()
    with pytest.raises(AssetError, match=r"^config\.json of google-t5/t5-base is not in .*store"):
        fetch_folder(REPO, ["config.json", "model.safetensors"])


def test_names_agree_with_those_of_the_models():
    assert {name for name in VERSIONS if name != "tiny"} == set(RELEASES)
    assert [short_name(VERSIONS[name].source) for name in RELEASES] == list(RELEASES)
    assert short_name("facebook/musicgen-style") is None


# The network


def test_files_come_from_the_hub_once(hub, store):
    folder = fetch_folder(REPO, ["config.json", "model.safetensors"])
    assert folder == store
    assert (folder / "model.safetensors").read_bytes() == b"tensors" * 10_000
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    asked = len(hub.requests)
    assert fetch_folder(REPO, ["config.json", "model.safetensors"]) == folder
    assert len(hub.requests) == asked


@pytest.mark.usefixtures("store")
def test_the_token_goes_to_the_hub_alone(hub):
    fetch(REPO, "model.safetensors")
    tokens = {
        request.path.partition("?")[0]: request.headers.get("authorization")
        for request in hub.requests
    }
    assert tokens == {
        f"/{REPO}/resolve/main/model.safetensors": "Bearer hf_secret",
        f"/{REPO}/model.safetensors": None,  # on another host, where large files are
    }
    assert [request.method for request in hub.requests] == ["HEAD", "GET", "GET"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_wrong_bytes_are_refused(hub, store, name):
    hub.files[f"/{REPO}/config.json"] = hub.files[f"/{REPO}/model.safetensors"] = File(
        b"x" * 70_000
    )
    (hub.folder / REPO / "config.json").write_bytes(b"y" * 70_000)
    path = f"/{REPO}/resolve/main/config.json"
    hub.files[path] = hub.find(path)
    hub.files[path].hook = lambda: setattr(hub.files[path], "content", b"x" * 70_000)
    with pytest.raises(AssetError, match=rf"{name} of {REPO} could not be fetched: its hash is"):
        fetch(REPO, name)
    assert list(store.iterdir()) == []


def test_a_partial_download_stays_for_the_next_time(hub, store, monkeypatch):
    monkeypatch.setattr("audiocraft.assets.download.BACKOFF_S", 0.01)
    path = f"/{REPO}/model.safetensors"
    hub.files[path] = hub.find(path)
    hub.files[path].cuts = [30_000] + [0] * 5
    with pytest.raises(AssetError, match="breaks off"):
        fetch(REPO, "model.safetensors")
    assert (store / "model.safetensors.part").stat().st_size == 30_000
    fetch(REPO, "model.safetensors")
    assert sum(request.sent for request in hub.requests) == 70_000


def test_a_renamed_repository_is_followed(hub):
    old = "/t5-base/resolve/main/model.safetensors"
    hub.files[old] = File(location=f"/{REPO}/resolve/main/model.safetensors")
    assert fetch("t5-base", "model.safetensors").stat().st_size == 70_000


def test_the_first_of_several_names_is_taken(hub, store):
    names = ["model.bin", "model.safetensors"]
    assert fetch_first(REPO, names) == store / "model.safetensors"
    (store / "model.bin").touch()
    asked = len(hub.requests)
    assert fetch_first(REPO, names) == store / "model.bin"
    assert len(hub.requests) == asked
    with pytest.raises(AssetError, match=r"has no a or b of google-t5/t5-base; check the name"):
        fetch_first(REPO, ["a", "b"])


def test_what_the_hub_refuses_is_told(hub):
    path = f"/{REPO}/resolve/main/config.json"
    with pytest.raises(AssetError, match=rf"has no none\.json of {REPO}; check the name"):
        fetch(REPO, "none.json")
    hub.files[path] = File(errors=[(401, {}), (403, {}), (418, {})])
    for _ in range(2):
        with pytest.raises(AssetError, match=r"private, gated or misspelt; set HF_TOKEN"):
            fetch(REPO, "config.json")
    with pytest.raises(AssetError, match=r"answers 418 .*: run scripts/download t5-base later, or"):
        fetch(REPO, "config.json")


def test_a_token_is_for_the_hub_alone(hub, store, monkeypatch):
    """Label models lie on another host, which knows no token of the hub."""
    hub.files["/labels/a.pb"] = File(errors=[(403, {})])
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    with pytest.raises(AssetError) as caught:
        plain_file(hub.url("/labels/a.pb"), store, "tiny --train")
    assert str(caught.value) == (
        f"a.pb is not in {store} and 127.0.0.1:{hub.port} answers 403 (it forbids access): "
        "run scripts/download tiny --train later, or put it there."
    )


# No network


def test_what_is_nowhere_is_named(store):
    with pytest.raises(AssetError) as caught:
        fetch(REPO, "tokenizer.json")
    assert str(caught.value) == (
        f"tokenizer.json of {REPO} is not in {store} and HF_HUB_OFFLINE forbids fetching it: "
        "unset that and run scripts/download t5-base, or put it there."
    )
    with pytest.raises(AssetError, match="neither a file, a folder nor a hub id"):
        fetch("a/b/c", "x")
    with pytest.raises(AssetError, match="unset that and try again, or put it there"):
        fetch("some/one", "x")


def test_the_command_is_one_that_is_there(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "lib/audiocraft/assets/store.py"))
    with pytest.raises(AssetError, match=r"run python -m audiocraft\.serving\.download small, or"):
        fetch(MUSICGEN, "state_dict.bin")
    assert not store.exists()


@pytest.fixture
def elsewhere(store, monkeypatch):
    """Lets the hub be at another address; returns what is said about a file of it.

    Its first answer has 3 s instead of the 8 of `test_exchange`; two waits would be noticed.
    """
    monkeypatch.setattr(exchange, "FIRST_ANSWER_S", 3.0)

    def ask(url):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        began = time.monotonic()
        with pytest.raises(AssetError) as caught:
            fetch(MUSICGEN, "state_dict.bin")
        assert time.monotonic() - began < 6
        place = store.parents[1] / MUSICGEN
        message = str(caught.value)
        assert message.startswith(f"state_dict.bin of {MUSICGEN} is not in {place} and ")
        assert message.endswith(
            ": connect to the network and run scripts/download small, or put it there."
        )
        return message

    return ask


def test_a_closed_port_is_told(elsewhere):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert f"127.0.0.1:{port} cannot be reached" in elsewhere(f"http://127.0.0.1:{port}")


def test_an_unknown_host_is_told(elsewhere):
    assert "nowhere.invalid cannot be reached" in elsewhere("http://nowhere.invalid")


@pytest.mark.slow
def test_silence_is_told_in_time(elsewhere):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        message = elsewhere(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert f"nothing came for {exchange.FIRST_ANSWER_S:g} s" in message


def test_the_store_needs_no_heavy_library():
    code = "import sys, audiocraft.assets.finetunes as f; print([m for m in ('torch', "
    code += "'transformers', 'huggingface_hub') if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert output.strip() == "[]"
