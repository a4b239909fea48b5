"""The process between a caller and its ranks: `python -m audiocraft.solvers.agent`.

Arguments: descriptor of the caller's pipe, folder for what went wrong, number of processes, module,
and the module's arguments.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

AGENT = "MUSICGEN_AGENT"
"""Variable that tells a rank its agent's process."""
FOLDER = "MUSICGEN_JOB_FOLDER"
"""Variable that tells a rank where to leave what went wrong."""


def main() -> int:
    """Runs the ranks and returns the exit status."""
    watched, folder, processes, module, *arguments = sys.argv[1:]
    threading.Thread(target=_end_with_caller, args=(int(watched), folder), daemon=True).start()
    os.environ |= {AGENT: str(os.getpid()), FOLDER: folder}
    rank = ["-m", "audiocraft.solvers.rank", module, *arguments]
    failures = _run_one(rank) if processes == "1" else _run_several(rank, processes, folder)
    if failures:
        (Path(folder) / "agent.json").write_text(json.dumps(failures))
    return int(bool(failures))


def _run_one(command: list[str]) -> dict[int, int]:
    """Status of the one rank, if it failed; importing torch's launcher would take seconds."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    status = subprocess.run(  # noqa: S603 - our own interpreter and modules
        [sys.executable, *command], env=os.environ | own, check=False
    ).returncode
    return {0: status} if status else {}


def _run_several(command: list[str], processes: str, folder: str) -> dict[int, int]:
    """Status of each rank that failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    flags = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", processes]
    flags += ["--log-dir", folder]  # else a folder of its own is left behind each time
    try:
        run(parse_args([*flags, *command]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


def _end_with_caller(watched: int, folder: str) -> None:
    """The pipe closes when the caller lets go of it, or dies and cannot clean up."""
    os.read(watched, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)  # which ends the ranks, see `rank.py`


if __name__ == "__main__":
    sys.exit(main())
