"""The front door: the Cog interface, its server, and the commands that speak to it."""

import os

# Threads of a step spin while they wait for each other. By libgomp's default they do it for so long
# that beside busy programs they take the core from the one that they wait for: on two cores 4 s of
# `tiny` took 18 s and more instead of 12, on a free machine as long as now. It is read when torch
# is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
