"""A client of Cog's real server for tests: requests by HTTP, log lines, and its processes."""

import contextlib
import http.client
import json
import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from audiocraft.serving.schema import write_schema
from audiocraft.serving.server import CogServer, ServerError

Answer = tuple[int, Any]
_JSON = {"Content-Type": "application/json"}
_SLOT_SECONDS = 60.0
_REQUEST_SECONDS = 600.0


class Handle:
    """A prediction, or training, that was started and may still be running.

    Attributes:
        id: the name by which it can be cancelled.
    """

    def __init__(self, identifier: str, ask: Callable[[], Answer]) -> None:
        self.id = identifier
        self._result: Answer | BaseException | None = None
        self._ask = ask
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._ask()
        except BaseException as error:  # noqa: BLE001 - raised by `answer`
            self._result = error

    @property
    def done(self) -> bool:
        """Whether there is an answer."""
        return not self._thread.is_alive()

    def answer(self, timeout: float = 30.0) -> Answer:
        """The answer, as `Served.predict` gives it; waits for it so many seconds at most."""
        self._thread.join(timeout)
        assert self._result is not None, f"no answer within {timeout} s"
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


class Served:
    """A running server.

    Attributes:
        server: the server itself.
        lines: what its model has printed so far; `lines.clear()` forgets it.
        route: what it is asked for.
    """

    def __init__(self, server: CogServer, lines: list[str], route: str = "/predictions") -> None:
        self.server = server
        self.lines = lines
        self.route = route
        self._running = 0
        self._lock = threading.Lock()

    def request(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Status and body, parsed where it is JSON."""
        connection = self._connect()
        text = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, text, _JSON | dict(headers or {}))
            response = connection.getresponse()
            content = response.read().decode()
        finally:
            connection.close()
        kind = response.headers.get_content_type()
        return response.status, json.loads(content) if kind == "application/json" else content

    def predict(self, inputs: Mapping[str, Any]) -> Answer:
        """Makes a prediction: status and JSON, whatever they are."""
        return self._make("POST", self.route, inputs)

    train = predict

    def start_prediction(self, identifier: str, inputs: Mapping[str, Any]) -> Handle:
        """Starts a prediction under an id by which it can be cancelled."""
        return Handle(identifier, lambda: self._make("PUT", f"{self.route}/{identifier}", inputs))

    start_training = start_prediction

    def cancel(self, identifier: str) -> Answer:
        """Cancels a prediction or training."""
        return self.request("POST", f"{self.route}/{identifier}/cancel")

    def drop(self, inputs: Mapping[str, Any], *, after: str, seconds: float = 120.0) -> None:
        """Asks for a prediction and goes away when a line is seen that the pattern is found in."""
        deadline = time.monotonic() + seconds
        while True:
            connection = self._connect()
            try:
                body = json.dumps({"input": inputs})
                connection.request("POST", self.route, body, _JSON)
                while not self._find(after):
                    if select.select([connection.sock], [], [], 0.02)[0]:
                        assert connection.getresponse().status == http.HTTPStatus.CONFLICT
                        break  # see `_make`
                    assert time.monotonic() < deadline, f"no {after!r} in {self.lines}"
                else:
                    return
            finally:
                connection.close()

    def wait_for(self, pattern: str, seconds: float = 120.0) -> re.Match[str]:
        """Waits for a line that the pattern is found in, among those that came already, too."""
        deadline = time.monotonic() + seconds
        while True:
            match = self._find(pattern)
            if match is not None:
                return match
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.lines}"
            time.sleep(0.02)

    @property
    def server_pid(self) -> int:
        """The server: the child of this process that got its port."""
        variable = f"PORT={self.server.port}".encode()
        (pid,) = [
            pid
            for pid in children(os.getpid())
            if variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ]
        return pid

    @property
    def worker_pid(self) -> int:
        """The process that the model is in."""
        (pid,) = children(self.server_pid)
        return pid

    def _find(self, pattern: str) -> re.Match[str] | None:
        matches = (re.search(pattern, line) for line in list(self.lines))
        return next(filter(None, matches), None)

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=_REQUEST_SECONDS)

    def _make(self, method: str, path: str, inputs: Mapping[str, Any]) -> Answer:
        with self._lock:
            self._running += 1
        try:
            deadline = time.monotonic() + _SLOT_SECONDS
            while True:
                answer = self.request(method, path, {"input": inputs})
                # The server frees its slot a moment after its last answer. Busy it is only with
                # what this client has asked for and not been answered.
                free = self._running == 1 and time.monotonic() < deadline
                if answer[0] != http.HTTPStatus.CONFLICT or not free:
                    return answer
                time.sleep(0.02)
        finally:
            with self._lock:
                self._running -= 1


@contextlib.contextmanager
def start(
    project: Path,
    environment: Mapping[str, str] | None = None,
    *,
    training: bool = False,
    setup_timeout: float = 60.0,
) -> Iterator[Served]:
    """Serves a project with these variables until the block ends."""
    write_schema(project)
    lines: list[str] = []

    def make() -> CogServer:
        return CogServer(
            project,
            training=training,
            log=lines.append,
            setup_timeout=setup_timeout,
            environment=environment,
        )

    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(make())
        except ServerError as error:
            # Another process may take the port after it was found free.
            if "Address already in use" not in "\n".join([str(error), *lines]):
                raise
            lines.clear()
            server = stack.enter_context(make())
        yield Served(server, lines, "/trainings" if training else "/predictions")


def family_of(pid: int) -> tuple[int, int] | None:
    """Parent and group of a process; None where there is none that runs, as a zombie does not."""
    try:
        state, parent, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return None if state == "Z" else (int(parent), int(group))


def all_families() -> dict[int, tuple[int, int]]:
    """`family_of` every process of the machine that runs."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    families = {pid: family_of(pid) for pid in pids}
    return {pid: family for pid, family in families.items() if family is not None}


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [child for child, (parent, _) in all_families().items() if parent == pid]


def members(group: int) -> list[int]:
    """The processes of a group."""
    return [pid for pid, (_, its_group) in all_families().items() if its_group == group]


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    return family_of(pid) is not None


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for what must become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_gone(pids: list[int], seconds: float = 10.0) -> None:
    """Waits until none of the processes runs."""
    wait_until(lambda: not any(map(is_alive, pids)), seconds)
