"""Cog's own HTTP server as a child process: started, watched, asked once, and always stopped."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from audiocraft import errors
from audiocraft.assets.store import store_path
from audiocraft.errors import AudiocraftError
from audiocraft.serving.interface import Json
from audiocraft.serving.worker import is_url

_HOST: Final = "127.0.0.1"
_POLL_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 2.0
_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What the model prints reaches the server's stderr only at level info, and only under these names.
_LOG_FILTER: Final = "warn,coglet::setup=info,coglet::prediction=info,coglet::user=info"
# Waits for the end of its input, which comes with the end of this process, and cleans up for it.
_WATCHDOG: Final = 'read -r _; kill -s KILL -- "-$1"; rm -rf -- "$2"'
_OWN_ERRORS: Final = "|".join(
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, AudiocraftError)
)
# Cog puts up to four prefixes and the class before a message; ours are sentences by themselves.
_WRAPPING: Final = re.compile(
    r"^((worker setup|setup|prediction|training) failed( \(slot [^)]*\))?: )*"
    rf"(({_OWN_ERRORS}): )?",
    re.IGNORECASE,
)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Lets Ctrl-C and its like wait for the end of a block that must not be left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # their handlers run in the main thread only
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _INTERRUPTS}
    # What is ignored stays so; a handler that is not Python's could not be put back.
    deferred = [number for number in _INTERRUPTS if handlers[number] not in (signal.SIG_IGN, None)]
    try:
        for number in deferred:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number in deferred:
            signal.signal(number, handlers[number])
        if came:
            signal.raise_signal(came[0])


class ServerError(AudiocraftError):
    """Cog's server could not be started, or did not answer as it should."""


def plain_message(text: str) -> str:
    """The message of an exception without what Cog wraps around it.

    The class of an exception that is not of `audiocraft.errors` stays: it may be all there is.
    """
    return _WRAPPING.sub("", text.strip(), count=1)


def with_absolute_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for work in another folder: their relative paths are of the user's own.

    Raises:
        InputError: a path begins with the home of nobody.
    """
    absolute = dict(environment)
    if absolute.get("COG_WEIGHTS"):
        absolute["COG_WEIGHTS"] = absolute_weights(absolute["COG_WEIGHTS"])
    if absolute.get("AUDIOCRAFT_CACHE_DIR"):
        store = store_path(absolute["AUDIOCRAFT_CACHE_DIR"])
        absolute["AUDIOCRAFT_CACHE_DIR"] = str(store.absolute())
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        folder = absolute.get(name)
        if folder and folder[0] not in "~$":  # which huggingface_hub replaces
            absolute[name] = str(Path(folder).absolute())
    return absolute


def absolute_weights(source: str) -> str:
    """Path or URL of weights, as `with_absolute_paths` has variables."""
    return source if is_url(source) else str(Path(source).absolute())


class CogServer:
    """A server of one project's `Predictor`, or its `train`, from `with` to the end of its block.

    The schema must have been written (`audiocraft.serving.schema.write_schema`) before.

    Args:
        project: folder of `predict.py` and `train.py`; the server's working folder.
        training: whether it trains. One server does not do both.
        log: takes each line that the model prints, as it comes; called from another thread.
        setup_timeout: seconds that the model's `setup` may take.
        environment: variables of the server; they win over this process's and over those that
            are set here.

    Attributes:
        port: where the server listens, on 127.0.0.1.
    """

    def __init__(
        self,
        project: Path,
        *,
        training: bool = False,
        log: Callable[[str], None],
        setup_timeout: float = 300.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._project = project
        self._training = training
        self._log = log
        self._setup_timeout = setup_timeout
        self._given = dict(environment or {})
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[str] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._complaints: deque[str] = deque(maxlen=20)

    def __enter__(self) -> Self:
        try:
            with _interrupts_deferred():
                process = self._start()
            self._wait_until_ready(process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def ask(self, inputs: Json) -> Json:
        """Makes one prediction, or training, and waits for it, however long it takes.

        Args:
            inputs: values by name, as the schema has them; files as absolute paths.

        Returns:
            Cog's answer: `status`, `output`, `error`, `metrics`.

        Raises:
            ServerError: the server refused the request, or is gone.
        """
        body = json.dumps({"input": inputs, "context": {}})
        # Cog would answer the other route too, and call the wrong function.
        route = "/trainings" if self._training else "/predictions"
        deadline = time.monotonic() + _STOP_SECONDS
        while True:
            try:
                status, answer = self._request("POST", route, body)
            except (OSError, http.client.HTTPException) as error:
                raise self._ended("it had answered") from error
            # Nobody else asks this server: it frees its slot a moment after its last answer.
            if status != http.HTTPStatus.CONFLICT or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        if status == http.HTTPStatus.UNPROCESSABLE_ENTITY:
            details = json.loads(answer)["detail"]
            raise ServerError(
                "\n".join(f"{'.'.join(item['loc'][2:])}: {item['msg']}." for item in details)
            )
        if status != http.HTTPStatus.OK:
            raise ServerError(f"The server refused the request with status {status}: {answer}")
        parsed: Json = json.loads(answer)
        return parsed

    def stop(self) -> None:
        """Ends the server with every process that it started; does nothing the second time.

        Another Ctrl-C waits until this is done, which takes a few seconds at most.
        """
        with _interrupts_deferred():
            process, self._process = self._process, None
            if process is not None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if self._watchdog is not None:
                self._watchdog.kill()  # before its end of the pipe closes: the group is gone
                self._watchdog.communicate()
            # The pipe closes with its last writer; what was printed last is worth a moment.
            if self._reader.ident is not None:
                self._reader.join(_STOP_SECONDS)
            if self._scratch is not None:
                self._scratch.cleanup()

    def _start(self) -> subprocess.Popen[str]:
        mode = "train" if self._training else "predict"
        command = [sys.executable, "-m", "cog.server.http", "--host", _HOST, "--x-mode", mode]
        try:
            self._scratch = tempfile.TemporaryDirectory(
                prefix="musicgen-server-", ignore_cleanup_errors=True
            )
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                command,
                cwd=self._project,
                env=self._environment(self._scratch.name),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # Its own group, so that its worker and theirs can be ended together, and so that
                # Ctrl-C in a terminal reaches only us.
                start_new_session=True,
            )
            self._reader.start()
            # Sees to it that the group ends even when this process is killed outright.
            self._watchdog = subprocess.Popen(  # noqa: S603 - a constant script
                ["/bin/sh", "-c", _WATCHDOG, "sh", str(self._process.pid), self._scratch.name],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"The server cannot be started: {error}.") from error
        return self._process

    def _environment(self, scratch: str) -> dict[str, str]:
        inherited = dict(os.environ)
        # The worker is started as plain `python`: whatever comes first in PATH.
        paths = [str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]
        modules = [str(self._project), inherited.get("PYTHONPATH", "")]
        filters = [_LOG_FILTER, inherited.get("RUST_LOG", "")]
        own = {
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": os.pathsep.join(filter(None, modules)),
            "TMPDIR": scratch,  # the server keeps its last result until it is asked again
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
            "COG_TRAIN_TYPE_STUB": "train.py:train",
            "ALLOW_LOCAL_FILES": "1",
            "LOG_FORMAT": "json",
            "RUST_LOG": ",".join(filter(None, filters)),
        }
        return with_absolute_paths(inherited | own | self._given | {"PORT": str(self.port)})

    def _wait_until_ready(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + self._setup_timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise self._ended("the model was set up")
            with contextlib.suppress(OSError, http.client.HTTPException):
                _, answer = self._request("GET", "/health-check", timeout=_STOP_SECONDS)
                health: Json = json.loads(answer)
                if health["status"] == "READY":
                    return
                if health["status"] not in ("UNKNOWN", "STARTING"):
                    logs = (health.get("setup") or {}).get("logs", "")
                    raise ServerError(f"Model setup failed: {plain_message(logs)}")
            time.sleep(_POLL_SECONDS)
        raise ServerError(
            f"Model setup took longer than {self._setup_timeout:g} seconds; "
            "--setup-timeout allows more."
        )

    def _request(
        self, method: str, path: str, body: str | None = None, timeout: float | None = None
    ) -> tuple[int, str]:
        # Not urllib: it would send even this through a proxy.
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _ended(self, moment: str) -> ServerError:
        self._reader.join(_POLL_SECONDS)
        return ServerError("\n".join([f"The server ended before {moment}.", *self._complaints]))

    def _read_log(self) -> None:
        """Passes on what the model prints, and keeps the server's own warnings for an error.

        The lines are JSON objects. What the model prints carries its `source`, what its children
        print has the target `coglet::user`, all else is the server's own.
        """
        process = self._process
        assert process is not None
        assert process.stdout is not None
        for line in process.stdout:
            try:
                entry = json.loads(line)
                fields, message = entry["fields"], str(entry["fields"]["message"])
            except (ValueError, KeyError, TypeError):
                self._log(line.rstrip("\n"))
                continue
            if "source" in fields or entry.get("target") == "coglet::user":
                self._log(message)
            elif entry.get("level") in ("WARN", "ERROR"):
                self._complaints.append(message)
