"""What may import what."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "audiocraft"
# What each room may import of the others (README, architecture).
ROOMS = {
    "errors": set(),
    "progress": set(),
    "assets": {"errors", "progress", "__init__"},
    "data": {"errors", "progress", "models", "modules", "assets", "data"},
    "quantization": {"errors"},
    "modules": {"errors", "progress", "assets", "data", "modules"},
    "generation": {"errors", "modules", "generation"},
    "models": {
        "errors",
        "progress",
        "modules",
        "quantization",
        "generation",
        "assets",
        "data",
        "models",
        "__init__",
    },
    "solvers": {
        "errors",
        "progress",
        "assets",
        "models",
        "modules",
        "quantization",
        "data",
        "solvers",
        "__init__",
    },
    "utils": {"errors", "models", "__init__"},
    "serving": {
        "errors",
        "progress",
        "assets",
        "models",
        "modules",
        "generation",
        "data",
        "solvers",
        "utils",
        "serving",
        "__init__",
    },
    "__init__": set(),
}
HEAVY = [
    "cog",
    "demucs",
    "essentia",
    "librosa",
    "soundfile",
    "scipy",
    "julius",
    "pydub",
    "httpx2",
    "torchaudio",
    "torchcodec",
    "soxr",
    "decorator",
    "dadaptation",
    "prodigyopt",
]


def imported_rooms(path):
    """Rooms of this package that a file imports, and modules of the project's own top level."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            top, *rest = name.split(".")
            if top == "audiocraft":
                yield rest[0] if rest else "__init__"
            elif top in {"predict", "train", "metadata"}:
                yield top


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_arrows_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert set(imported_rooms(path)) <= ROOMS[room] | {room}


def test_models_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import audiocraft.models"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "name", ["models.MusicGen", "data.audio.audio_write", "modules.conditioners.T5Conditioner"]
)
def test_the_bare_package_is_light_and_leads_to_its_rooms(name):
    """As official programs use it: `import audiocraft` is all that they import."""
    code = (
        "import sys, audiocraft; assert not hasattr(audiocraft, 'nothing'); "
        "assert not hasattr(audiocraft, 'solvers'); assert 'torch' not in sys.modules; "
        f"audiocraft.{name}; audiocraft.data.audio.audio_read; "
        "assert not hasattr(audiocraft.data, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_models_import_with_the_basic_libraries_alone():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ("models", "modules", "quantization", "generation")
        for path in sorted((PACKAGE / room).glob("[!_]*.py"))
    ]
    assert len(modules) > 15
    code = f"import sys; {blocked}; import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_gpu_tests_import_with_the_basic_libraries_alone():
    """One file that cannot be imported ends them all, on a machine that may lack the rest."""
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    tests = (ROOT / "tests").rglob("test_*.py")
    marked = {str(p.relative_to(ROOT)) for p in tests if re.search(r"\bmark\.gpu\b", p.read_text())}
    assert len(marked) > 5
    options = ["-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]
    code = f"import sys; {blocked}; import pytest; sys.exit(pytest.main({options}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"^(tests/\S+\.py)::", done.stdout, re.MULTILINE)) == marked


def test_a_melody_model_is_built_without_what_only_a_melody_needs():
    code = (
        "import sys; sys.modules['librosa'] = None; from audiocraft.models import MusicGen; "
        "MusicGen.get_pretrained('tiny')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
