"""One HTTP request at a time, which can be left at any moment.

A resolver or a server may keep a call waiting for as long as it likes, and what is raised in the
waiting thread meanwhile (Cog's cancelation, a signal) would be heard only afterwards. So a thread
of its own makes the call, and whoever waits for the answer polls.
"""

import _thread
import logging
import os
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from socket import SHUT_RDWR, socket
from typing import Final
from urllib.parse import urlsplit

import httpx2

from audiocraft.assets.remote import show_url
from audiocraft.errors import AssetError, InputError

logger = logging.getLogger(__name__)

POLL_S: Final = 0.1
FIRST_ANSWER_S = 8.0
"""Seconds for a server's first answer, name look-up included: beyond it there is no network."""
STALL_S = 30.0
"""Seconds without a byte after which a connection counts as cut."""
_CHUNKS_AHEAD: Final = 32  # of at most 64 KiB
_REDIRECTS: Final = 10
_BAD_HEADER: Final = (
    "The request holds characters that HTTP forbids, most likely in a token: set HF_TOKEN again."
)


class CutError(Exception):
    """The server was not reached or broke off: another attempt may mend it.

    Attributes:
        reason: a clause for a message.
        answered: whether the server had begun to answer.
        wait: seconds until the next attempt, where the server or the cause says so.
    """

    def __init__(self, reason: str, *, answered: bool, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.answered = answered
        self.wait = wait


def check_url(url: str) -> None:
    """Refuse what is no http(s) URL.

    Raises:
        InputError: another scheme, or no URL at all.
    """
    try:
        parsed = httpx2.URL(url)
        port = urlsplit(url).port  # which httpx leaves unchecked
    except (httpx2.InvalidURL, ValueError) as error:
        raise InputError("This is not a valid URL; give one that begins with https://.") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host or port == 0:
        raise InputError(
            f"{show_url(url)} cannot be fetched; give a URL that begins with https://."
        )


def pause(seconds: float) -> None:
    """Sleep in short steps, between which a cancelation gets through."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(POLL_S, left))


@dataclass(frozen=True)
class _Head:
    status: int
    headers: httpx2.Headers


class Answer:
    """A response: status and headers at once, the body as it comes.

    Attributes:
        status: HTTP status.
        headers: without regard to case.
        url: that answered, after redirects.
    """

    def __init__(self, method: str, url: str, headers: Mapping[str, str], within: float) -> None:
        self.url = url
        self._items: SimpleQueue[_Head | bytes | Exception | None] = SimpleQueue()
        self._credits: SimpleQueue[None] = SimpleQueue()
        for _ in range(_CHUNKS_AHEAD):
            self._credits.put(None)
        self._left = threading.Event()
        self._socket: socket | None = None
        # The query travels apart from the URL, because httpx writes URLs into its log.
        parsed = httpx2.URL(url)
        request = httpx2.Request(
            method,
            parsed.copy_with(query=None, fragment=None),
            headers=headers,
            extensions={
                "target": parsed.raw_path,
                "timeout": httpx2.Timeout(STALL_S, connect=within).as_dict(),
            },
        )
        start_thread(partial(self._run, request))
        try:
            head = self._next(within, answered=False)
        except BaseException:
            self.close()
            raise
        assert isinstance(head, _Head), "the thread puts the head first"
        self.status, self.headers = head.status, head.headers

    def chunks(self) -> Iterator[bytes]:
        """The body as it was sent.

        Raises:
            CutError: it breaks off.
        """
        while (item := self._next(STALL_S, answered=True)) is not None:
            assert isinstance(item, bytes), "the thread puts the body last"
            self._credits.put(None)
            yield item

    def close(self) -> None:
        """Leave: the thread ends by itself, at once where the answer has begun."""
        self._left.set()
        if self._socket is not None:
            with suppress(OSError):  # it may be closed already
                self._socket.shutdown(SHUT_RDWR)

    def _next(self, within: float, *, answered: bool) -> _Head | bytes | None:
        end = time.monotonic() + within
        while True:
            with suppress(Empty):
                item = self._items.get(timeout=POLL_S)
                break
            if time.monotonic() >= end:
                raise CutError(f"nothing came for {within:g} s", answered=answered)
        if isinstance(item, httpx2.LocalProtocolError):
            # Its own text repeats the header, and with it a token.
            raise AssetError(_BAD_HEADER) from None
        if isinstance(item, httpx2.TransportError | OSError):
            raise CutError(str(item) or type(item).__name__, answered=answered) from item
        if isinstance(item, ImportError):  # the one thing that httpx may lack
            raise AssetError(
                "A SOCKS proxy is set, which needs one more package: run pip install socksio, or "
                "unset ALL_PROXY."
            ) from item
        if isinstance(item, Exception):
            raise item
        return item

    def _run(self, request: httpx2.Request) -> None:
        try:
            with httpx2.Client() as client:
                response = client.send(request, stream=True)
                try:
                    stream = response.extensions["network_stream"]
                    self._socket = stream.get_extra_info("socket")
                    self._items.put(_Head(response.status_code, response.headers))
                    for chunk in response.iter_raw():
                        if not self._may_go_on():
                            return
                        self._items.put(chunk)
                    self._items.put(None)
                finally:
                    response.close()
        except Exception as error:  # noqa: BLE001 - raised again in the waiting thread
            self._items.put(error)

    def _may_go_on(self) -> bool:
        """Waits until the reader is not too far behind; False when it has left."""
        while not self._left.is_set():
            with suppress(Empty):
                self._credits.get(timeout=POLL_S)
                return True
        return False


_Jobs = SimpleQueue[Callable[[], None]]
_helpers: dict[int, _Jobs] = {}


def start_thread(job: Callable[[], None]) -> None:
    """Run a job in a thread of its own, from a thread that may be canceled; see `_helper`."""
    _helper().put(job)


def _helper() -> _Jobs:
    """A thread that starts threads, one a process, made when it is first needed.

    Until a new thread runs, Python 3.11 takes it for the one that starts it: what is raised there
    from outside in that moment, such as Cog's cancelation, ends the new thread, and
    `Thread.start` then waits for ever. So a thread that may be canceled starts but this one,
    once, and does not wait for it blindly.
    """
    jobs = _helpers.get(os.getpid())  # a fork has none
    while jobs is None:
        new: _Jobs = SimpleQueue()
        started: SimpleQueue[None] = SimpleQueue()
        _thread.start_new_thread(_start_threads, (new, started))
        with suppress(Empty):
            started.get(timeout=1)
            jobs = _helpers.setdefault(os.getpid(), new)
    return jobs


def _start_threads(jobs: _Jobs, started: SimpleQueue[None]) -> None:
    started.put(None)
    while True:
        job, waiting = jobs.get(), True
        while waiting:
            try:
                threading.Thread(target=job, name="audiocraft-fetch", daemon=True).start()
                waiting = False
            except RuntimeError as error:  # the machine has as many as it may have
                logger.warning("A thread cannot be started (%s); trying again.", error)
                time.sleep(1)


@contextmanager
def ask(
    method: str,
    url: str,
    headers: Mapping[str, str],
    *,
    within: float,
    follow: Callable[[Answer, str], bool] = lambda _answer, _target: True,
) -> Iterator[Answer]:
    """The answer to a request, after redirects.

    Args:
        method: GET or HEAD.
        url: http or https; a name and password in it are sent as such.
        headers: an `Authorization` among them is not sent to another host.
        within: seconds until the first answer; later ones have `STALL_S`.
        follow: whether to follow a redirect, from its answer and its target.

    Raises:
        InputError: no http(s) URL.
        AssetError: a redirect leads nowhere.
        CutError: no answer.
    """
    check_url(url)
    first = url
    try:
        sent = httpx2.Headers(headers)
    except UnicodeEncodeError:
        raise AssetError(_BAD_HEADER) from None
    sent.setdefault("Accept", "*/*")
    sent.setdefault("User-Agent", "musicgen-cog")
    sent["Accept-Encoding"] = "identity"  # bytes are counted and hashed as they are stored
    for hop in range(_REDIRECTS + 1):
        bare, login = _split_login(url)
        if login is not None:
            sent["Authorization"] = login
        try:
            answer = Answer(method, bare, sent, within)
        except CutError as cut:
            if hop == 0:
                raise
            reason = f"{show_url(bare)} cannot be reached ({cut.reason})"
            raise CutError(reason, answered=True) from cut
        try:
            target = _redirect(answer)
            if target is None or not follow(answer, target):
                yield answer
                return
        finally:
            answer.close()
        if not _same_origin(url, target):
            sent.pop("Authorization", None)
        url, within = target, STALL_S
    raise AssetError(f"{show_url(first)} redirects more than {_REDIRECTS} times; check the URL.")


def _redirect(answer: Answer) -> str | None:
    location = answer.headers.get("Location")
    if answer.status not in {301, 302, 303, 307, 308} or location is None:
        return None
    try:
        target = str(httpx2.URL(answer.url).join(location))
        check_url(target)
    except (httpx2.InvalidURL, InputError) as error:
        raise AssetError(
            f"{show_url(answer.url)} redirects to something that is no http(s) URL; check the URL."
        ) from error
    return target


def _split_login(url: str) -> tuple[str, str | None]:
    """A URL without its name and password, and these as the header that they stand for."""
    parsed = httpx2.URL(url)
    if not parsed.userinfo:
        return url, None
    login = f"{parsed.username}:{parsed.password}".encode()
    return str(parsed.copy_with(userinfo=b"")), f"Basic {b64encode(login).decode()}"


def _same_origin(url: str, other: str) -> bool:
    """Whether credentials for one URL may go to the other."""
    a, b = httpx2.URL(url), httpx2.URL(other)
    return (a.scheme, a.host, a.port) == (b.scheme, b.host, b.port)
