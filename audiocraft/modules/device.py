"""Which device computes, where nobody has said it."""

import os
import re
import shutil
import subprocess

import torch


def has_kernels(index: int = 0) -> bool:
    """Whether torch can compute on a GPU that it sees.

    A build has code for some architectures (`sm_80` runs on 8.0 and later ones of its major
    version) and may have a form that newer drivers compile for later ones (`compute_90`). It sees
    others as well, and fails on them at the first operation.
    """
    capability = torch.cuda.get_device_capability(index)
    for arch in torch.cuda.get_arch_list():
        kind, _, number = arch.partition("_")
        least = divmod(int(re.sub(r"\D", "", number)), 10)  # 90a is of 9.0
        if least <= capability and (kind == "compute" or least[0] == capability[0]):
            return True
    return False


def default_device() -> torch.device:
    """The first GPU if torch can compute on it, else the CPU."""
    usable = torch.cuda.is_available() and has_kernels()
    return torch.device("cuda" if usable else "cpu")


def device_warning() -> str | None:
    """One sentence where there is an NVIDIA device that torch cannot use, else None.

    None as well where `CUDA_VISIBLE_DEVICES` hides every device.
    """
    slow = "so this runs on the CPU, many times slower"
    build = f"torch {torch.__version__}, built for CUDA {torch.version.cuda},"
    if torch.cuda.is_available():
        if has_kernels():
            return None
        major, minor = torch.cuda.get_device_capability()
        return (
            f"Warning: {torch.cuda.get_device_name()} has compute capability {major}.{minor}, for "
            f"which {build} has no code, {slow}; install a torch that has it, or take another GPU."
        )
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
    return (
        f"Warning: {devices[0]} is there, but {build} cannot use it, {slow}; update the driver, or "
        "use the container."
    )
