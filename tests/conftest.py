"""What holds for all tests."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.golden_data import GOLDEN

# Tensors of this size only wait for each other on several threads; and where the threads are more
# than the cores they spin for each other, which made a training of seconds one of minutes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` no other file is imported: a GPU's machine may lack what those need.

    Nor is a folder's conftest.py, where none of its files has such tests.
    """
    if config.option.markexpr != "gpu":
        return None
    if collection_path.is_dir():
        files = list(collection_path.rglob("test_*.py"))
    elif collection_path.name.startswith("test_"):
        files = [collection_path]
    else:
        return None
    return not any("mark.gpu" in path.read_text() for path in files) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that have slow tests: one left for the end would run alone.

    Skips the tests marked gpu where torch has no CUDA device.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def release(tmp_path):
    """Makes a release folder of a kind (mono, stereo, melody, stereo-melody) with its T5."""

    def make(kind):
        folder = tmp_path / kind
        shutil.copytree(GOLDEN / "tiny_release" / kind, folder)
        shutil.copytree(GOLDEN / "t5_tiny", folder / "t5")
        return folder

    return make
