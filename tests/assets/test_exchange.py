"""Requests: which URLs, what is kept secret, no network, cancelation."""

import ctypes
import logging
import os
import signal
import socket
import threading
import time

import pytest

from audiocraft.assets import exchange
from audiocraft.assets.download import download
from audiocraft.assets.parts import open_part
from audiocraft.assets.remote import Remote, show_url
from audiocraft.errors import AssetError, DownloadError, InputError, UnreachableError
from tests.assets.conftest import left
from tests.http_server import File

CONTENT = os.urandom(300_000)


class CancelationError(BaseException):
    """As Cog raises it."""


# URLs


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/x", "http://", "https://[::1", "http://h:99999/", "x"]
)
def test_only_http_is_fetched(target, url):
    with pytest.raises(InputError, match=r"https://"):
        download(Remote(url, "The file"), target)


# Redirects and secrets


def test_credentials_stay_with_their_host(remote, server, target):
    server.files["/f"] = File(location="/g")
    server.files["/g"] = File(location=f"http://localhost:{server.port}/h?signature=1")
    server.files["/h"] = File(CONTENT)
    download(remote(headers={"authorization": "Bearer secret"}), target)
    assert [request.headers.get("authorization") for request in server.log()] == [
        "Bearer secret",
        "Bearer secret",
        None,
    ]
    assert server.log()[2].path == "/h?signature=1"


def test_a_redirect_leads_to_http_only(remote, server, target):
    server.files["/f"] = File(location="file:///etc/passwd")
    with pytest.raises(AssetError, match="no http"):
        download(remote(), target)
    server.files["/f"] = File(location="/f")
    with pytest.raises(AssetError, match="redirects more than 10 times"):
        download(remote(), target)


def test_secrets_in_a_url_reach_the_server_and_nobody_else(server, target, caplog):
    server.files["/f"] = File(CONTENT, cuts=[1000])
    url = server.url("/f?signature=SECRET").replace("//", "//user:SECRET@")
    with caplog.at_level(logging.INFO):
        download(Remote(url, show_url(url)), target)
    assert server.log()[0].path == "/f?signature=SECRET"
    assert server.log()[0].headers["authorization"].startswith("Basic ")
    assert len(caplog.messages) > 2
    assert "SECRET" not in caplog.text
    with pytest.raises(DownloadError) as caught:
        download(Remote(url.replace("/f", "/none"), show_url(url)), target.with_name("other"))
    assert "SECRET" not in str(caught.value)
    assert "SECRET" not in repr(Remote(url, "x"))


@pytest.mark.parametrize("token", ["SECRET\n", "SECRET\0", "SECRETé"])
def test_a_broken_token_is_not_shown(remote, target, token):
    with pytest.raises(AssetError, match="set HF_TOKEN again") as caught:
        download(remote(headers={"authorization": token}), target)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_proxy_of_the_environment_is_used(server, target, monkeypatch):
    server.files["/f"] = File(CONTENT)
    monkeypatch.setenv("http_proxy", server.url())
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    download(Remote("http://nowhere.invalid/f?x=1", "The file"), target)
    assert server.log()[0].path == "/f?x=1"
    assert server.log()[0].headers["host"] == "nowhere.invalid"


# No network


@pytest.fixture
def silent_port():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def unroutable_port():
    """A port whose queue is full, so that connections stay half open, as without a route."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for client in waiting:
            client.close()


def fails_within(seconds, url, target):
    began = time.monotonic()
    with pytest.raises(
        UnreachableError, match=r"cannot be reached \(.*\); check the URL and"
    ) as caught:
        download(Remote(url, "The file"), target)
    assert time.monotonic() - began < seconds
    return str(caught.value)


def test_a_closed_port_fails_at_once(closed_port, target):
    fails_within(4, f"http://127.0.0.1:{closed_port}/f", target)
    assert left(target) == []


@pytest.mark.parametrize("port", ["silent_port", "unroutable_port"])
def test_silence_fails_in_time(request, target, monkeypatch, port):
    monkeypatch.setattr(exchange, "FIRST_ANSWER_S", 0.5)
    port = request.getfixturevalue(port)
    said = fails_within(4, f"http://127.0.0.1:{port}/f", target)
    assert "nothing came for 0.5 s" in said or "timed out" in said  # whichever looks first


def test_an_unknown_host_fails_in_time(target):
    fails_within(exchange.FIRST_ANSWER_S + 4, "http://nowhere.invalid/f", target)


def test_a_resolver_that_hangs_fails_in_time(target, monkeypatch):
    monkeypatch.setattr(exchange, "FIRST_ANSWER_S", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_more: time.sleep(5))
    fails_within(4, "http://nowhere.invalid/f", target)


def test_there_are_eight_seconds_for_the_first_answer():
    assert exchange.FIRST_ANSWER_S <= 8
    assert exchange.STALL_S == 30


# Cancelation


def cancel_by_exception(thread):
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(CancelationError)
    )


def run_and_cancel(work, when, settle=0.1):
    """Seconds between an exception raised in a thread from outside and its end."""
    raised = []
    ready = threading.Event()

    def run():
        try:
            ready.set()
            work()
        except BaseException as error:  # noqa: BLE001 - what is looked at
            raised.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    deadline = time.monotonic() + 5
    while not when() and time.monotonic() < deadline:
        time.sleep(settle / 10)
    time.sleep(settle)
    began = time.monotonic()
    cancel_by_exception(thread)
    thread.join(10)
    assert raised == [CancelationError]
    return time.monotonic() - began


@pytest.mark.parametrize("keep", [False, True])
def test_a_stalled_download_is_canceled_at_once(remote, server, target, monkeypatch, keep):
    server.files["/f"] = File(CONTENT, etag='"1"', stall_after=100_000)
    written = []
    monkeypatch.setattr("audiocraft.assets.download._progress", lambda *_: written.append)
    took = run_and_cancel(
        lambda: download(remote(), target, keep_partial=keep), lambda: 100_000 in written
    )
    assert took < 3
    assert left(target) == (["file.bin.part", "file.bin.part.json"] if keep else [])
    if keep:
        server.files["/f"] = File(CONTENT, etag='"1"')
        download(remote(), target)
        assert server.sent("/f") == len(CONTENT)


def test_waiting_for_an_answer_is_canceled_at_once(silent_port, target):
    url = f"http://127.0.0.1:{silent_port}/f"
    began = time.monotonic()
    took = run_and_cancel(
        lambda: download(Remote(url, "The file"), target), lambda: time.monotonic() > began + 0.3
    )
    assert took < 3
    assert left(target) == []


def test_waiting_for_another_process_is_canceled_at_once(remote, target):
    target.parent.mkdir()
    with open_part(target.parent / "file.bin.part", "x"):
        began = time.monotonic()
        took = run_and_cancel(
            lambda: download(remote(), target), lambda: time.monotonic() > began + 0.3
        )
        assert took < 3


def test_waiting_for_the_next_attempt_is_canceled_at_once(remote, server, target):
    server.files["/f"] = File(CONTENT, errors=[(503, {"Retry-After": "20"})])
    took = run_and_cancel(lambda: download(remote(), target), server.log)
    assert took < 3
    assert left(target) == []


def test_cancelation_leaves_nothing_whenever_it_comes(remote, server, target):
    """Among others while a thread is started, which Python 3.11 confuses with its parent."""
    server.files["/f"] = File(CONTENT, etag='"1"', stall_after=200_000)
    for number in range(100):
        began = time.monotonic()
        took = run_and_cancel(
            lambda: download(remote(), target),
            lambda until=began + number * 1e-4: time.monotonic() > until,
            settle=0,
        )
        assert took < 3
        assert not target.parent.exists() or left(target) == []


def test_a_signal_stops_a_stalled_download(remote, server, target):
    server.files["/f"] = File(CONTENT, etag='"1"', stall_after=100_000)

    def raise_cancelation(*_args):
        raise CancelationError

    def send():
        while server.sent("/f") < 100_000:
            time.sleep(0.01)
        time.sleep(0.1)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGUSR1)

    sent = []
    before = signal.signal(signal.SIGUSR1, raise_cancelation)
    try:
        threading.Thread(target=send).start()
        with pytest.raises(CancelationError):
            download(remote(), target)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - sent[0] < 3
    assert left(target) == []


def test_a_thread_that_the_machine_refuses_is_started_later(monkeypatch):
    start, refused = threading.Thread.start, [RuntimeError("can't start new thread")]

    def refuse_once(thread):
        if thread.name == "audiocraft-fetch" and refused:
            raise refused.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    done = threading.Event()
    exchange.start_thread(done.set)
    assert done.wait(30)
    assert not refused
