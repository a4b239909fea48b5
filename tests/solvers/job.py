"""A rank of a small job: joins the others, and does what it is told."""

import os
import signal
import sys
import time

import torch
from torch import distributed

from audiocraft.errors import InputError


def say(line: str) -> None:
    """Print a line at once: what is printed without a buffer writes its end apart, after others."""
    sys.stdout.write(f"{line}\n")


def main() -> None:
    """Arguments: what to do, and the rank that does it."""
    action, who = sys.argv[1], int(sys.argv[2])
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    total = torch.tensor([rank + 1])
    if processes > 1:
        distributed.init_process_group("gloo")
        distributed.all_reduce(total)
    say(f"rank {rank} of {processes}, pid {os.getpid()}, sum {total.item()}")
    say(f"agent {os.getppid()}")
    if processes > 1:
        distributed.barrier()
    if action == "agree":
        from audiocraft.solvers.rounds import _all_say

        say(f"all say so: {_all_say(rank != who, processes, torch.device('cpu'))}")
    if action == "wait":
        say("ready")
        while True:
            if processes > 1:
                distributed.all_reduce(total)
            time.sleep(0.01)
    if rank == who:
        time.sleep(0.2)
        if action == "raise":
            raise InputError("batch_size is wrong.")
        if action == "fail":
            raise RuntimeError("shapes differ:\n[1] and [2]")
        if action == "fill":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        if action == "exit":
            sys.exit(3)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    elif action == "exit":  # outlives it, and is ended by the launcher
        time.sleep(60)
    if processes > 1:
        if action != "end":
            distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
