"""What holds for all tests."""

import shutil

import pytest
import torch

from tests.golden_data import GOLDEN

# Tensors of this size only wait for each other on several threads.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked gpu where torch has no CUDA device."""
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
