import pytest
from huggingface_hub import constants

from audiocraft.assets.store import fetch, fetch_folder, store_dir
from audiocraft.errors import AssetError

REPO = "google-t5/t5-base"


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
    repo = tmp_path / "hub" / "models--google-t5--t5-base"
    snapshot = repo / "snapshots" / revision

    def put(*names):
        snapshot.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs/main").write_text(revision)
        for name in names:
            (snapshot / name).touch()
        return snapshot

    return put


def test_the_store_comes_first(store, hub_cache):
    store.mkdir(parents=True)
    (store / "config.json").touch()
    hub_cache("config.json")
    assert fetch(REPO, "config.json") == store / "config.json"
    assert store_dir() == store.parents[1]


@pytest.mark.usefixtures("store")
def test_the_hubs_own_cache_is_used(hub_cache):
    snapshot = hub_cache("config.json", "tokenizer.json")
    assert fetch_folder(REPO, ["config.json", "tokenizer.json"]) == snapshot


def test_files_that_belong_together_lie_in_one_folder(store, hub_cache):
    """A cache that holds some of them does not serve; what is missing is asked for."""
    hub_cache("config.json")
    store.mkdir(parents=True)
    (store / "model.safetensors").touch()
    with pytest.raises(AssetError, match=r"^config\.json of google-t5/t5-base is not in .*store"):
        fetch_folder(REPO, ["config.json", "model.safetensors"])


@pytest.mark.usefixtures("store")
def test_what_is_nowhere_is_named():
    with pytest.raises(AssetError, match=r"tokenizer\.json .* connect to the network once"):
        fetch(REPO, "tokenizer.json")
    with pytest.raises(AssetError, match="neither a file, a folder nor a hub id"):
        fetch("a/b/c", "x")
