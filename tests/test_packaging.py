"""The library as pip installs it, and what its files say that they need."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from fnmatch import fnmatchcase
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath

import pytest
import soundfile
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {canonicalize_name(line.name): line for line in map(Requirement, PROJECT["dependencies"])}
# `pip install .[train]`: functions alone import these.
EXTRAS = {
    canonicalize_name(line.name): line
    for line in map(Requirement, PROJECT["optional-dependencies"]["train"])
}
DECLARED = RANGES | EXTRAS
PINS = {
    canonicalize_name(line.name): line
    for line in (
        Requirement(line.partition("  #")[0])
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
}
# By import name, where the package's is another.
PACKAGES = {"yaml": "pyyaml", "essentia": "essentia-tensorflow"}
# What `pip install .` does not bring, and functions alone import: a notebook is the user's own.
LAZY = {("generation", "triton"), ("utils", "IPython")}


def test_pins_are_exact():
    assert len(PINS) > 15
    for pin in PINS.values():
        assert [part.operator for part in pin.specifier] == ["=="], pin
        assert pin.url is None


@pytest.mark.parametrize("name", DECLARED)
def test_ranges_cover_the_pins(name):
    (pinned,) = PINS[name].specifier
    assert DECLARED[name].specifier.contains(pinned.version)
    assert str(DECLARED[name].marker).replace("'", '"') == str(PINS[name].marker)


# Imported where a GPU is used, by `generation/fused.py`; torch brings Triton where it has a wheel.
WITH_TRITON = {"kernels.py", "step.py"}


def imported_packages(tree, *, lazy=False):
    """Name of each import's package, and whether only a call imports it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imported_packages(node, lazy=lazy or inside)
            continue
        for name in names:
            yield name.partition(".")[0], lazy


def test_imports_are_declared():
    own = {"audiocraft", "predict", "train", "metadata"}
    found = set()
    for path in (ROOT / "audiocraft").rglob("*.py"):
        room = path.relative_to(ROOT / "audiocraft").parts[0]
        for name, lazy in imported_packages(ast.parse(path.read_text())):
            if name in own or name in sys.stdlib_module_names:
                continue
            found.add(name)
            package = canonicalize_name(PACKAGES.get(name, name))
            if package in EXTRAS:
                assert lazy, f"{path} imports {name}, which only the extra `train` brings"
            elif package not in RANGES and path.name not in WITH_TRITON:
                assert lazy, f"{path} imports {name}, which pyproject.toml does not name"
                assert (room, name) in LAZY
    assert {"torch", "yaml", "soundfile", "IPython"} <= found


def test_no_more_is_declared_than_is_imported():
    imported = {
        canonicalize_name(PACKAGES.get(name, name))
        for path in (ROOT / "audiocraft").rglob("*.py")
        for name, _ in imported_packages(ast.parse(path.read_text()))
    }
    assert set(DECLARED) - imported == {"audioop-lts"}  # pydub's


def test_official_snippets_read_and_write_audio(tmp_path):
    """They call torchaudio, which has torchcodec do it, of the version that goes with torch."""
    import torchaudio

    song = ROOT / "tests" / "audio" / "real_song.ogg"
    expected, expected_rate = soundfile.read(song, dtype="float32")
    wav, rate = torchaudio.load(song)
    assert rate == expected_rate
    torch.testing.assert_close(wav.T, torch.from_numpy(expected), rtol=0, atol=1e-4)
    torchaudio.save(tmp_path / "song.wav", wav, rate)
    written, rate = soundfile.read(tmp_path / "song.wav", dtype="float32")
    assert rate == expected_rate
    torch.testing.assert_close(torch.from_numpy(written).T, wav, rtol=0, atol=1e-4)


# The image


def test_the_image_has_a_gpu_and_what_the_packages_need():
    build = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]
    assert build["gpu"] is True
    assert build["cuda"] == "12.8"
    assert build["python_version"] == "3.11"  # a string: 3.10 would be 3.1
    assert build["python_requirements"] == "requirements.txt"
    assert {"ffmpeg", "gcc"} <= set(build["system_packages"])


def test_fetched_models_are_in_the_image_and_not_in_git():
    assert "/models/" in (ROOT / ".gitignore").read_text().splitlines()
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line.strip("/") for line in lines if line and not line.startswith("#")]
    patterns = {*rules, *(rule.removeprefix("**/") for rule in rules)}  # which may be no folder

    def is_left_out(name):
        path = PurePosixPath("models", name)
        places = [str(place) for place in (path, *path.parents)]
        return any(fnmatchcase(place, pattern) for place in places for pattern in patterns)

    assert not is_left_out("facebook/musicgen-small/state_dict.bin")
    assert not is_left_out("google-t5/t5-base/model.safetensors")
    assert not is_left_out("adefossez/HTDemucs/htdemucs.yaml")
    assert is_left_out("fine-tunes/0123.safetensors")
    assert is_left_out("facebook/musicgen-small/state_dict.bin.part")


# What pip does with it

# The newest pip: older ones download every package to learn what it needs.
PIP = "pip==26.3"
# pip takes the wheels of --python-version, but reads conditions with the Python that it runs on.
PIP_FOR_A_VERSION = """
import sys
from pip._internal.cli.main import main
from pip._vendor.packaging import markers

version = sys.argv.pop(1)
here = markers.default_environment
markers.default_environment = lambda: {
    **here(), "python_version": version, "python_full_version": f"{version}.0"
}
sys.exit(main())
"""


# What is said where the network or the registry fails; the last, too, where no index was read.
NETWORK = (
    "Retrying|Connection|HTTP error|Could not fetch|Timeout|[Tt]imed out|\\b50\\d\\b"
    "|No matching distribution"
)


def run(*command, cwd=None):
    """Output of a command; of its messages, which name the registry, only the last words.

    What the network may fail is tried three times.
    """
    for attempt in range(3):
        time.sleep(20 * attempt)
        result = subprocess.run(
            [*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False
        )
        if result.returncode == 0 or not re.search(NETWORK, result.stderr):
            break
    said = re.sub(r"\w+://\S+", "(address)", result.stderr)[-2000:]
    assert result.returncode == 0, f"{Path(command[0]).name} {command[1:3]}: {said}"
    return result.stdout


@pytest.fixture(scope="module")
def scratch():
    """A folder outside the project that goes with the tests: pytest would keep its own."""
    with tempfile.TemporaryDirectory(prefix="packaging-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def python(scratch):
    """Interpreter of a new environment."""
    run(sys.executable, "-m", "venv", scratch / "environment")
    python = scratch / "environment" / "bin" / "python"
    run(python, "-I", "-m", "pip", "install", "-q", PIP)
    return python


@pytest.fixture(scope="module")
def source(scratch):
    """The project's files, without what git ignores."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (scratch / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, scratch / "source" / name)
    return scratch / "source"


@pytest.fixture(scope="module")
def wheel(python, source, scratch):
    """The library, built."""
    command = (python, "-I", "-m", "pip", "wheel", "-q", "--no-deps", "-w", scratch / "wheels")
    run(*command, source)
    (wheel,) = (scratch / "wheels").iterdir()
    return wheel


def needed(requirements):
    """Distributions that are required here, and that those require in turn."""
    found, rest = {}, [(line, "") for line in requirements]
    while rest:
        line, extra = rest.pop()
        if line.marker and not line.marker.evaluate({"extra": extra}):
            continue
        package = distribution(line.name)
        for wanted in {"", *line.extras} - found.setdefault(line.name, set()):
            found[line.name].add(wanted)
            rest += [(Requirement(text), wanted) for text in package.requires or []]
    return [distribution(name) for name in found]


@pytest.fixture(scope="module")
def installed(python, wheel):
    """Interpreter of the environment with the library and what it needs.

    The packages that it needs are linked to where these tests have them: they are 6 GB.
    """
    run(python, "-I", "-m", "pip", "install", "-q", "--no-deps", wheel)
    code = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    site = Path(run(python, "-I", "-c", code))
    for package in needed(RANGES.values()):
        for name in {file.parts[0] for file in package.files} - {".."}:
            if not (site / name).exists():  # a folder that several packages share
                (site / name).symlink_to(package.locate_file(name))
    run(python, "-I", "-m", "pip", "check")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
@pytest.mark.parametrize("what", ["library", "container"])
def test_newer_pythons_find_every_package(python, wheel, scratch, version, what):
    """Resolved and not installed; of each package a few KB are read."""
    report = scratch / "report.json"
    options = ["install", "-q", "--dry-run", "--ignore-installed", "--target", scratch / "none"]
    options += ["--no-cache-dir", "--python-version", version, "--only-binary=:all:"]
    options += ["--use-feature=fast-deps", "--report", report]
    options += [wheel] if what == "library" else ["-r", ROOT / "requirements.txt"]
    run(python, "-I", "-c", PIP_FOR_A_VERSION, version, *options)
    packages = {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    wanted = {
        name: line
        for name, line in (RANGES if what == "library" else PINS).items()
        if line.marker is None or line.marker.evaluate({"python_version": version})
    }
    assert set(wanted) <= set(packages)
    for name, line in wanted.items():
        assert line.specifier.contains(packages[name], prereleases=True), name
    assert ("audioop-lts" in packages) == (version == "3.13")
    assert ("cog" in packages) == (what == "container")
    assert ("essentia-tensorflow" in packages) == (what == "container")


def python_example():
    """The code under the README's heading Python."""
    _, section = (ROOT / "README.md").read_text().split("\n## Python\n")
    example, *_ = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    return example


@pytest.mark.slow
def test_the_readmes_example_runs_where_only_the_library_is(installed, tmp_path):
    shutil.copy(ROOT / "tests" / "audio" / "real_song.ogg", tmp_path / "song.ogg")
    (tmp_path / "example.py").write_text(python_example())
    run(installed, "-I", "example.py", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"song.ogg", "example.py", "piano.wav"}
    samples, rate = soundfile.read(tmp_path / "piano.wav")
    assert (rate, samples.shape) == (32000, (8 * 32000, 2))
    assert samples[:32000].std() > 0.01
    assert samples[-32000:].std() > 0.01


@pytest.mark.slow
def test_what_is_installed(installed, scratch):
    code = """
import importlib, importlib.util, json, pkgutil
import audiocraft
modules = [module.name for module in pkgutil.walk_packages(audiocraft.__path__, "audiocraft.")]
for name in modules:
    importlib.import_module(name)
print(json.dumps([audiocraft.__path__[0], importlib.util.find_spec("cog") is not None, modules]))
"""
    folder, has_cog, modules = json.loads(run(installed, "-I", "-c", code, cwd=scratch))
    assert not has_cog  # and yet each module was imported
    assert {"audiocraft.models.musicgen", "audiocraft.modules.chroma"} < set(modules)
    package = Path(folder)
    assert package.is_relative_to(scratch / "environment")
    ours = {
        path.relative_to(ROOT)
        for path in (ROOT / "audiocraft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    theirs = {
        path.relative_to(package.parent)
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert theirs == ours
    assert Path("audiocraft/py.typed") in theirs
    assert Path("audiocraft/assets/tiny/state_dict.safetensors") in theirs
