"""The encoder of MP3 and Ogg is a process of its own, which ends when nobody wants its file."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from audiocraft.data.audio_export import export
from tests.serving.client import assert_gone, members, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def endless(tmp_path, monkeypatch):
    """Lets ffmpeg write its number to this file and never end."""
    number = tmp_path / "bin" / "number"
    number.parent.mkdir()
    command = number.with_name("ffmpeg")
    command.write_text(f"#!/bin/sh\necho $$ > {number}\nexec sleep 600\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    return number


def works(endless):
    return endless.exists() and endless.read_text().endswith("\n")


def encoder(endless):
    """Both its processes: pydub and ffmpeg."""
    processes = members(os.getpgid(int(endless.read_text())))
    assert len(processes) == 2
    return processes


def test_an_interruption_ends_it(endless, tmp_path, monkeypatch):
    target = tmp_path / "out" / "x.ogg"
    target.parent.mkdir()
    wait, processes = time.sleep, []

    def interrupted(seconds):
        if not processes and works(endless):  # once: what ends it sleeps too
            processes.extend(encoder(endless))
            raise KeyboardInterrupt
        wait(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(memoryview(bytes(16000)), 1, 8000, "ogg", None, target)
    assert_gone(processes, 2)
    assert list(target.parent.iterdir()) == [target]  # which is its caller's


def test_one_that_is_killed_is_no_fault_of_ffmpeg(endless, tmp_path):
    target = tmp_path / "out" / "x.ogg"
    target.parent.mkdir()

    def kill():
        wait_until(lambda: works(endless))
        os.killpg(os.getpgid(int(endless.read_text())), signal.SIGKILL)

    with ThreadPoolExecutor() as pool:
        killing = pool.submit(kill)
        with pytest.raises(OSError, match="the encoder ended with status -9"):
            export(memoryview(bytes(16000)), 1, 8000, "ogg", None, target)
        killing.result()
    assert not list(target.parent.glob(".*"))


def test_it_does_not_outlive_its_caller(endless, tmp_path):
    code = (
        "from pathlib import Path; from audiocraft.data.audio_export import export; "
        "export(memoryview(bytes(16000)), 1, 8000, 'ogg', None, Path('x.ogg'))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as caller:
        wait_until(lambda: works(endless))
        processes = encoder(endless)
        caller.kill()
    assert_gone(processes, 2)
