"""What the commands of `scripts/` share: flags, messages, exit status."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn, TextIO

from audiocraft.errors import AudiocraftError, InputError

_INTERRUPTED: Final = 130  # what a shell reports after Ctrl-C


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of leaving with argparse's own exit status."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError: the flags are wrong."""
        raise InputError(f"{message}; {self.prog} --help shows what there is.")


def run(command: Callable[[], None], stopped: str = "Stopped.") -> int:
    """Runs a command.

    Args:
        command: raises what is wrong.
        stopped: what to say when it is interrupted, by Ctrl-C or another signal.

    Returns:
        The exit status: 0, 1 after an error, 130 when interrupted.
    """
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):  # every way out cleans up
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, signal.default_int_handler)
        command()
    except AudiocraftError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say(stopped)
        return _INTERRUPTED
    return 0


def say(text: str) -> None:
    """Prints a line for the user, on stderr."""
    # Nobody may be there to listen, as in `2>&1 | head`; the work is still to be done.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            write_line(sys.stderr, text)


def write_line(stream: TextIO, text: str) -> None:
    """Prints a line at once.

    Raises:
        OSError: nobody takes it.
    """
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except OSError:
        # What is left in its buffer would fail once more at the end of the process.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        raise
