"""Whether torch can use the NVIDIA device of this machine, if it has one."""

import os
import shutil
import subprocess

import torch


def device_warning() -> str | None:
    """One sentence where there is an NVIDIA device that torch cannot use, else None.

    None as well where `CUDA_VISIBLE_DEVICES` hides every device.
    """
    command = shutil.which("nvidia-smi")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in {"", "-1"}
    if command is None or hidden or torch.cuda.is_available():
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
    return (
        f"Warning: {devices[0]} is there, but torch {torch.__version__}, built for CUDA "
        f"{torch.version.cuda}, cannot use it, so this runs on the CPU, many times slower; update "
        "the driver, or use the container."
    )
