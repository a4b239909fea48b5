"""Whether torch can use the NVIDIA device of this machine, if it has one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


def device_warning() -> str | None:
    """One sentence where there is an NVIDIA device that torch cannot use, else None.

    None as well where `CUDA_VISIBLE_DEVICES` hides every device.
    """
    command = shutil.which("nvidia-smi")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in {"", "-1"}
    if command is None or hidden:
        return None
    try:
        listing = subprocess.run(  # noqa: S603 - the driver's own tool
            [command, "--list-gpus"], capture_output=True, text=True, check=False, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    devices = [line.partition(" (")[0] for line in listing.splitlines() if line.startswith("GPU ")]
    if not devices:
        return None
    import torch

    if torch.cuda.is_available():
        return None
    return (
        f"Warning: {devices[0]} is there, but torch {torch.__version__}, built for CUDA "
        f"{torch.version.cuda}, cannot use it, so this runs on the CPU, many times slower; update "
        "the driver, or use the container."
    )


class DeviceCheck:
    """`device_warning` in a process of its own, for torch takes seconds to import.

    It starts with the `with` block; the warning is asked for when there is time to wait for it.

    Args:
        environment: variables beside those of this process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def __enter__(self) -> Self:
        self._process = None
        if shutil.which("nvidia-smi") is not None:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", __name__],
                cwd=Path(__file__).parents[2],
                env={**os.environ, **self._environment},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C in a terminal is not meant for it
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def warning(self) -> str | None:
        """The sentence, or None; waits for it."""
        if self._process is None:
            return None
        text, _ = self._process.communicate()
        return text.strip() or None


if __name__ == "__main__":
    sys.stdout.write(device_warning() or "")
