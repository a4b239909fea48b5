"""How a process that `launch` runs says what it does."""

import logging
import sys


def log_to_stdout(level: int = logging.INFO) -> None:
    """Show messages as plain lines on standard output, and no progress bars of others.

    Args:
        level: of the least important message.
    """
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
