"""The most memory that a process has taken."""

import re
from pathlib import Path


def peak_mb() -> float:
    """Of this process since it began its program.

    Not getrusage's peak: a process inherits that from the one that started it, whose own may hide
    all that it takes.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
