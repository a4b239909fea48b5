"""Cog's own HTTP server as a child process: started, watched, asked once, and always stopped."""

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from audiocraft.errors import AudiocraftError
from audiocraft.serving.interface import Json

_HOST: Final = "127.0.0.1"
_POLL_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 5.0
# What the model prints reaches the server's stderr only at level info, and only under these names.
_LOG_FILTER: Final = "warn,coglet::setup=info,coglet::prediction=info,coglet::user=info"
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class ServerError(AudiocraftError):
    """Cog's server could not be started, or did not answer as it should."""


class CogServer:
    """A server of one project's `Predictor`, from `with` to the end of its block.

    The schema must have been written (`audiocraft.serving.schema.write_schema`) before.

    Args:
        project: folder of `predict.py`; the server's working folder.
        log: takes each line that the model prints, as it comes; called from another thread.
        setup_timeout: seconds that the model's `setup` may take.
    """

    def __init__(
        self, project: Path, *, log: Callable[[str], None], setup_timeout: float = 300.0
    ) -> None:
        self._project = project
        self._log = log
        self._setup_timeout = setup_timeout
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            self._port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read_log, daemon=True)

    def __enter__(self) -> Self:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def end_with_parent() -> None:
            # The only way to be stopped when this process is killed outright.
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                [sys.executable, "-m", "cog.server.http", "--host", _HOST],
                cwd=self._project,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # Its own group, so that its worker and theirs can be ended together, and so that
                # Ctrl-C in a terminal reaches only us.
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - no thread runs yet
            )
            self._reader.start()
            self._wait_until_ready(self._process)
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

    def predict(self, inputs: Json) -> Json:
        """Makes one prediction and waits for it, however long it takes.

        Args:
            inputs: values by name, as the schema has them; files as absolute paths.

        Returns:
            Cog's answer: `status`, `output`, `error`, `metrics`.

        Raises:
            ServerError: the server refused the request, or is gone.
        """
        body = json.dumps({"input": inputs, "context": {}})
        try:
            status, answer = self._request("POST", "/predictions", body)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(
                "The server ended before it had answered; its last lines say why."
            ) from error
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
        """Ends the server with every process that it started; does nothing the second time."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # The pipe closes with its last writer; what was printed last is worth a moment.
            self._reader.join(_STOP_SECONDS)

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        # The worker is started as plain `python`: whatever comes first in PATH.
        paths = [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
        modules = [str(self._project), environment.get("PYTHONPATH", "")]
        filters = [_LOG_FILTER, environment.get("RUST_LOG", "")]
        return environment | {
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": os.pathsep.join(filter(None, modules)),
            "PORT": str(self._port),
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
            "ALLOW_LOCAL_FILES": "1",
            "LOG_FORMAT": "json",
            "RUST_LOG": ",".join(filter(None, filters)),
        }

    def _wait_until_ready(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + self._setup_timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(
                    "The server ended before the model was set up; its last lines say why."
                )
            with contextlib.suppress(OSError, http.client.HTTPException):
                _, answer = self._request("GET", "/health-check", timeout=_STOP_SECONDS)
                health: Json = json.loads(answer)
                if health["status"] == "READY":
                    return
                if health["status"] not in ("UNKNOWN", "STARTING"):
                    raise ServerError(
                        f"Model setup failed: {(health.get('setup') or {}).get('logs', '').strip()}"
                    )
            time.sleep(_POLL_SECONDS)
        raise ServerError(
            f"Model setup took longer than {self._setup_timeout:g} seconds; "
            "--setup-timeout allows more."
        )

    def _request(
        self, method: str, path: str, body: str | None = None, timeout: float | None = None
    ) -> tuple[int, str]:
        # Not urllib: it would send even this through a proxy.
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _read_log(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        for line in process.stdout:
            text = _log_text(line.rstrip("\n"))
            if text is not None:
                self._log(text)


def _log_text(line: str) -> str | None:
    """What a user wants to see of one line of the server's log, None for nothing.

    The lines are JSON objects; what the model prints carries its `source`, what its children print
    has the target `coglet::user`, all else is the server's own.
    """
    try:
        entry = json.loads(line)
        fields = entry["fields"]
        message = str(fields["message"])
        if "source" in fields or entry["target"] == "coglet::user":
            return message
        return f"cog: {message}" if entry["level"] in ("WARN", "ERROR") else None
    except (ValueError, KeyError, TypeError):
        return line
