"""FSDP2 on two processes against one process alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from audiocraft.solvers.optimizers import OPTIMIZERS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = subprocess.run(
        [sys.executable, *launcher, "tests.solvers.sharded_job"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_weights_train_as_whole_ones(name, result):
    """With rows that do not divide by two; resumed halfway; the states are gathered."""
    found = result[name]
    assert found["moved"] > 0.01
    assert found["weights"] < 2e-5
    assert found["averages"] < 2e-5
    assert found["states"] == {"adamw": 6, "dadam": 9, "prodigy": 12}[name]
    assert found["state"] < 1e-4


def test_weights_that_are_sharded_in_part_are_refused(result):
    assert "shard all that are trained" in result["mixed"]
