"""One process of a job: `python -m audiocraft.solvers.rank MODULE ARGUMENTS`."""

import ctypes
import json
import logging
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Final, NoReturn

from audiocraft.solvers.agent import AGENT, FOLDER

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def main() -> NoReturn:
    """Runs the module, leaves its error for the caller, and ends the process."""
    # Before anything slow is imported: the kernel kills this process when its agent dies.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl failed")
    if os.getppid() != int(os.environ[AGENT]):  # it died before
        os.kill(os.getpid(), signal.SIGKILL)
    del sys.argv[0]
    status = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:  # noqa: BLE001 - the caller raises it
        traceback.print_exc()
        _leave(str(error) or type(error).__name__)
    _end(status)


def _leave(message: str) -> None:
    """Tell the caller what went wrong."""
    rank = os.environ["RANK"]
    left = {"rank": rank, "time": time.time(), "message": message}
    (Path(os.environ[FOLDER]) / f"rank-{rank}.json").write_text(json.dumps(left))


def _end(status: int) -> NoReturn:
    """End without the interpreter's own clearing up.

    Threads of gloo may still hold tensors then, and abort the process as they let go of them after
    the interpreter has gone: a job whose work is done would fail, and one that failed would lose
    its reason.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
