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

from audiocraft.errors import AudiocraftError, is_out_of_memory
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
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as asked:
        end(asked.code if isinstance(asked.code, int) else int(asked.code is not None))
    except Exception as error:  # noqa: BLE001 - the caller raises it
        is_ours = isinstance(error, AudiocraftError)  # a sentence that says it all
        if not is_ours:
            traceback.print_exc()
        _leave(error, is_ours=is_ours)
        end(1)  # here, where the error still holds all that was in use, see `end`
    end(0)


def _leave(error: Exception, *, is_ours: bool) -> None:
    """Tell the caller what went wrong; of an error that is not ours, the log has all of it."""
    rank, kind, message = os.environ["RANK"], type(error).__name__, str(error)
    if not is_ours:
        message = next(iter(message.strip().splitlines()), kind).rstrip(".:")
    left = {
        "rank": rank,
        "time": time.time(),
        "message": message,
        "is_ours": is_ours,
        "short_of_memory": is_out_of_memory(error),
    }
    (Path(os.environ[FOLDER]) / f"rank-{rank}.json").write_text(json.dumps(left))


def end(status: int) -> NoReturn:
    """End without the interpreter's own clearing up.

    Threads of gloo may still hold tensors then, and abort the process as they let go of them after
    the interpreter has gone: a job whose work is done would fail, and one that failed would lose
    its reason. A module that has joined the others calls this itself, before it lets go of what
    communicates: a model under DDP is the last to hold gloo, whose end waits for its threads, and
    these may wait for the interpreter to let go of a tensor, for ever.

    Args:
        status: of the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
