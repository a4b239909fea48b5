"""Several processes as one job: started, listened to, and ended together, whatever ends first.

The caller starts an agent (`agent.py`), which runs torch's own launcher; that starts one rank per
device (`rank.py`). A rank that is alone the agent starts itself. Three ties see to it that none
outlives another: the agent ends when the pipe from its caller closes, a rank when its agent dies,
and the launcher ends all ranks when one fails.
"""

import codecs
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from audiocraft.errors import TrainingError
from audiocraft.solvers.devices import threads_of

_POLL_S: Final = 0.1
_FREE_MEMORY: Final = "end what else uses memory, and start the training again"
_GO_ON: Final = "start the training again, which goes on from its last checkpoint if there is one"
_END_S: Final = 10.0


def launch(
    module: str,
    arguments: Sequence[str],
    processes: int,
    log: Callable[[str], None],
    *,
    remedy: str = _GO_ON,
    memory_remedy: str = _FREE_MEMORY,
) -> None:
    """Run a module in several processes of `torch.distributed` and wait for the end of all.

    Whatever is raised here meanwhile, such as a cancelation, ends every process first.

    Args:
        module: run as `python -m` runs it, in each process; several find each other by
            `torch.distributed.init_process_group`.
        arguments: its arguments.
        processes: how many.
        log: takes each line that any of them prints, as it comes.
        remedy: a clause for the message, where a process does not say itself what helps.
        memory_remedy: the same, where it lacked memory.

    Raises:
        TrainingError: a process failed, with its own message, or was killed.
    """
    with tempfile.TemporaryDirectory(prefix="musicgen-job-") as folder:
        watched, lifeline = os.pipe()
        command = [sys.executable, "-m", "audiocraft.solvers.agent"]
        command += [str(watched), folder, str(processes), module, *arguments]
        process = None
        try:
            try:
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                    command,
                    env=_environment(processes),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[watched],
                    start_new_session=True,
                )
            finally:
                os.close(watched)
            for line in _lines(process):
                log(line)
            process.wait()
        finally:
            os.close(lifeline)  # without which the agent ends by itself
            if process is not None:
                _end(process)
        if process.returncode:
            raise TrainingError(_reason(Path(folder), process.returncode, remedy, memory_remedy))


def _environment(processes: int) -> dict[str, str]:
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return {
        "OMP_NUM_THREADS": str(threads_of(processes)),
        **os.environ,
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
    }


def _lines(process: "subprocess.Popen[bytes]") -> Iterator[str]:
    """Lines of a process's pipe until all who write to it have ended.

    It is polled: what is raised in a thread that waits is heard only when the wait is over.
    """
    assert process.stdout is not None
    output = process.stdout.fileno()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, deadline = "", None
    while True:
        if select.select([output], [], [], _POLL_S)[0]:
            data = os.read(output, 65536)
            text += decoder.decode(data, final=not data)
            *lines, text = re.split(r"[\r\n]", text)
            yield from filter(None, lines)
            if not data:
                break
        elif process.poll() is not None:  # and yet somebody holds its output
            deadline = deadline or time.monotonic() + _END_S
            if time.monotonic() > deadline:
                break
    if text:
        yield text


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left, and see that it is gone: the pipe closes with its last writer."""
    assert process.stdout is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output, deadline = process.stdout.fileno(), time.monotonic() + _END_S
    while time.monotonic() < deadline:
        if select.select([output], [], [], _POLL_S)[0] and not os.read(output, 65536):
            break
    process.stdout.close()


def _reason(folder: Path, status: int, remedy: str, memory_remedy: str) -> str:
    """What went wrong first, from what agent and ranks have left."""
    said = [left for path in sorted(folder.glob("rank-*.json")) if (left := _read(path))]
    ended: dict[str, int] = _read(folder / "agent.json")
    # The launcher ends by SIGTERM those that outlive the first to fail.
    failures = {rank: code for rank, code in ended.items() if code != -signal.SIGTERM} or ended
    killed = {
        rank: -code for rank, code in failures.items() if code < 0 and code != -signal.SIGTERM
    }
    if killed:
        rank, number = min(killed.items())
        how = f"was killed by {_name(number)}"
        if number == signal.SIGKILL:
            how, remedy = f"{how}, most likely for lack of memory", memory_remedy
        return f"Training process {rank} {how}: {remedy}."
    if said:
        first = min(said, key=lambda item: item["time"])
        if first["is_ours"]:
            return str(first["message"])
        if first["short_of_memory"]:
            return f"Training process {first['rank']} ran out of memory: {memory_remedy}."
        return f"Training process {first['rank']} failed ({first['message']}): {remedy}."
    if failures:
        rank, code = min(failures.items())
        return f"Training process {rank} ended with status {code}: {remedy}."
    how = f"was killed by {_name(-status)}" if status < 0 else f"ended with status {status}"
    return f"The launcher of the training processes {how}: {remedy}."


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(path: Path) -> dict[str, Any]:
    """What was left; nothing where the writer was killed before or while it wrote."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value
