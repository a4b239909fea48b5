"""A server, and a place for what it sends."""

import pytest

from audiocraft.assets import download
from audiocraft.assets.remote import Remote
from tests.http_server import FileServer


@pytest.fixture
def server(monkeypatch):
    """A server that is asked again without much of a wait."""
    monkeypatch.setattr(download, "BACKOFF_S", 0.01)
    with FileServer() as server:
        yield server


@pytest.fixture
def target(tmp_path):
    """Where a download goes."""
    return tmp_path / "store" / "file.bin"


@pytest.fixture
def remote(server):
    """Makes a file to fetch from a path of the server."""

    def make(path="/f", **arguments):
        return Remote(server.url(path), "The file", **arguments)

    return make


def left(target):
    """Names in the folder of a download."""
    return sorted(path.name for path in target.parent.iterdir())
