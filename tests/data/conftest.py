"""What tests of archives share."""

import pytest


@pytest.fixture
def place(tmp_path):
    """A folder with a victim; what is made of it must not change but for `work` and archives."""
    (tmp_path / "victim.wav").write_bytes(b"precious")
    (tmp_path / "work").mkdir()
    return tmp_path
