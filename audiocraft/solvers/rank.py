"""One process of a job: `python -m audiocraft.solvers.rank MODULE ARGUMENTS`."""

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Final

from audiocraft.solvers.agent import AGENT, FOLDER

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def main() -> None:
    """Runs the module, and leaves its error for the caller."""
    # Before anything slow is imported: the kernel kills this process when its agent dies.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl failed")
    if os.getppid() != int(os.environ[AGENT]):  # it died before
        os.kill(os.getpid(), signal.SIGKILL)
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except Exception as error:
        rank = os.environ["RANK"]
        message = str(error) or type(error).__name__
        left = {"rank": rank, "time": time.time(), "message": message}
        path = Path(os.environ[FOLDER]) / f"rank-{rank}.json"
        path.write_text(json.dumps(left))
        raise


if __name__ == "__main__":
    main()
