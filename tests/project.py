"""A copy of this project for tests of `scripts/`, whose results lie in the project's folder."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FILES = ("predict.py", "train.py", "metadata.py", "requirements.txt", "tests/requirements.txt")


def copy_project(folder: Path) -> Path:
    """Copies what the scripts run; they share the environment of this project."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("audiocraft", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in _FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder
