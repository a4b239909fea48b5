"""The front door: the Cog interface, its server, and the commands that speak to it."""

import os

# Torch's threads spin while they wait for each other. By libgomp's default they do it for so long
# that beside busy programs they take the core from the one that they wait for: on two cores, with
# two of those, `scripts/predict` took 22 s for 4 s of `tiny` instead of 15, on a free machine 11 to
# 13 either way. It is read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
