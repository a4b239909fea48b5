import shutil

import pytest

from tests.golden_data import GOLDEN


@pytest.fixture
def release(tmp_path):
    """Makes a release folder of a kind (mono, stereo, melody, stereo-melody) with its T5."""

    def make(kind):
        folder = tmp_path / kind
        shutil.copytree(GOLDEN / "tiny_release" / kind, folder)
        shutil.copytree(GOLDEN / "t5_tiny", folder / "t5")
        return folder

    return make
