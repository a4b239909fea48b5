"""A real HTTP server on this machine, with the faults of the ones out there.

    with FileServer() as server:
        server.files["/a"] = File(b"content", etag='"1"', cuts=[3])
        server.url("/a")

    with FileServer(folder) as hub:  # folder/<repository>/<file>
        use_hub(monkeypatch, hub)

A folder is served as the hub serves repositories: `/<repository>/resolve/main/<file>`, large files
by a redirect to another host name; and as it is, `/<path>`.
"""

import email.utils
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

LARGE = {".bin", ".safetensors", ".pb"}
_PIECE = 16 * 1024


@dataclass
class File:
    """What a path answers.

    Attributes:
        content: of the file.
        etag: as it is sent, with its quotes.
        last_modified: seconds since 1970.
        date: seconds since 1970 that the server takes for now.
        ranges: whether it goes on where it is asked to.
        careless: whether it does so whatever the condition.
        length: whether it says how long the content is.
        cuts: bytes after which the next answers break off, one after the other.
        stall_after: bytes after which every answer stands still.
        errors: statuses of the next answers, with headers.
        location: where it redirects to.
        headers: sent with every answer.
        delay: seconds per 16 KiB.
        hook: called before every GET is answered; it may change the file.
    """

    content: bytes = b""
    etag: str | None = None
    last_modified: float | None = None
    date: float | None = None
    ranges: bool = True
    careless: bool = False
    length: bool = True
    cuts: list[int] = field(default_factory=list)
    stall_after: int | None = None
    errors: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    location: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hook: Callable[[], None] | None = None


@dataclass
class Request:
    """What was asked, and how much was sent in answer."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


class FileServer:
    """Serves files on a port of its own; `requests` lists what was asked.

    Args:
        folder: of repositories, served as the hub does; None for `files` alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.files: dict[str, File] = {}
        self.requests: list[Request] = []
        self.closing = threading.Event()
        server = self

        class Handler(_Handler):
            owner = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port: int = self._http.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def url(self, path: str = "") -> str:
        """Address of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def log(self, method: str = "GET") -> list[Request]:
        """Requests of a method."""
        return [request for request in self.requests if request.method == method]

    def sent(self, path: str) -> int:
        """Bytes of content sent for a path, whatever its query, in all answers."""
        return sum(
            request.sent for request in self.requests if request.path.partition("?")[0] == path
        )

    def find(self, path: str) -> File | None:
        """What a path answers."""
        bare = path.partition("?")[0]
        if path in self.files or bare in self.files:
            return self.files.get(path) or self.files[bare]
        if self.folder is None:
            return None
        on_hub = "/resolve/main/" in bare
        file = self.folder / bare.replace("/resolve/main/", "/").lstrip("/")
        if not file.is_file():
            return None
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if on_hub and file.suffix in LARGE:
            place = file.relative_to(self.folder)
            return File(
                location=f"http://localhost:{self.port}/{place}?signature=secret",
                headers={"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))},
            )
        return File(content, etag=f'"{git_hash(content) if on_hub else sha256[:32]}"')


def git_hash(content: bytes) -> str:
    """SHA-1 as git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


def use_hub(monkeypatch: Any, server: FileServer) -> None:
    """Make the hub's library in this process take a server for the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url())
    template = server.url("/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FileServer

    def log_message(self, *args: object) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        now = getattr(self, "now", None)
        return super().date_time_string(now if timestamp is None else timestamp)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path
        if path.startswith("http://"):  # as a proxy is asked
            path = "/" + path.split("/", 3)[3]
        asked = Request(self.command, path, {k.lower(): v for k, v in self.headers.items()})
        self.owner.requests.append(asked)
        file = self.owner.find(path)
        if file is None:
            self._head(asked, 404, {"Content-Length": "0"})
            return
        self.now = file.date or time.time()
        if file.hook is not None and body:
            file.hook()
        if file.errors:
            status, headers = file.errors.pop(0)
            self._head(asked, status, {"Content-Length": "0", **headers})
            return
        headers = dict(file.headers)
        if file.etag:
            headers["ETag"] = file.etag
        modified = None
        if file.last_modified is not None:
            modified = email.utils.formatdate(file.last_modified, usegmt=True)
            headers["Last-Modified"] = modified
        if file.location is not None:
            self._head(asked, 302, {**headers, "Location": file.location, "Content-Length": "0"})
            return
        if self._unchanged(file):
            self._head(asked, 304, headers)
            return
        content, status = file.content, 200
        wanted = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        same = file.careless or condition in {None, file.etag, modified}
        if wanted and file.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self._head(asked, 416, {"Content-Length": "0"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        if file.length:
            headers["Content-Length"] = str(len(content))
        else:
            headers["Connection"] = "close"
        self._head(asked, status, headers)
        if body:
            self._send(asked, file, content)

    def _unchanged(self, file: File) -> bool:
        tag, since = self.headers.get("If-None-Match"), self.headers.get("If-Modified-Since")
        if tag is not None:
            return tag == file.etag
        if since is None or file.last_modified is None:
            return False
        return int(file.last_modified) <= email.utils.parsedate_to_datetime(since).timestamp()

    def _head(self, asked: Request, status: int, headers: dict[str, str]) -> None:
        asked.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, asked: Request, file: File, content: bytes) -> None:
        end = file.cuts.pop(0) if file.cuts else len(content)
        stall = file.stall_after
        end = end if stall is None else min(end, stall)
        for start in range(0, end, _PIECE):
            piece = content[start : min(end, start + _PIECE)]
            asked.sent += len(piece)  # before: whoever has read it may look at once
            try:
                self.wfile.write(piece)
            except OSError:  # the client has left
                asked.sent -= len(piece)
                self.close_connection = True
                return
            if file.delay:
                self.owner.closing.wait(file.delay)
        if stall is not None and end == stall:
            self.owner.closing.wait(60)
        if end < len(content) or not file.length:
            self.close_connection = True
