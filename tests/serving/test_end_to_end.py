"""This project's own predictor, by the command line, on the real Cog server."""

import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

ROOT = Path(__file__).parent.parent.parent


def predict(cwd, *arguments):
    command = [sys.executable, "-P", "-m", "audiocraft.serving.cli", "predict", *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=False,
        timeout=600,
    )


def test_the_commands_of_the_readme(tmp_path):
    """Text to music, and that music as the melody of the next."""
    inputs = ["-i", "model_version=tiny", "-i", "prompt=90 bpm piano in C minor", "-i", "seed=5"]
    done = predict(tmp_path, *inputs, "-i", "duration=2")
    assert done.returncode == 0, done.stderr
    assert "Seed: 5" in done.stderr
    info = soundfile.info(tmp_path / "output.wav")
    assert (info.frames, info.samplerate, info.channels) == (64000, 32000, 2)
    done = predict(
        tmp_path,
        *inputs,
        "-i",
        "input_audio=@output.wav",
        "-i",
        "duration=1",
        "-o",
        "out.flac",
        "-i",
        "output_format=flac",
    )
    assert done.returncode == 0, done.stderr
    assert soundfile.info(tmp_path / "out.flac").frames == 32000


def test_weights_of_eight_bits(tmp_path):
    """Another file than float32's, by the server's environment variable."""
    inputs = ["-i", "model_version=tiny", "-i", "prompt=piano", "-i", "seed=5", "-i", "duration=2"]
    for precision in ("int8", "float32"):
        arguments = [*inputs, "-e", f"PRECISION={precision}", "-o", f"{precision}.wav"]
        done = predict(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert f", {precision} on cpu, in " in done.stderr
    exact, eight = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("float32", "int8"))
    assert exact.shape == eight.shape
    assert (exact != eight).any()


def test_a_precision_that_the_device_has_not(tmp_path):
    done = predict(
        tmp_path, "-i", "model_version=tiny", "-i", "prompt=piano", "-e", "PRECISION=fp8"
    )
    assert done.returncode == 1
    assert "precision is fp8, cpu offers float32" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the device here")
def test_a_device_that_torch_cannot_use_is_told_once(tmp_path):
    command = tmp_path / "bin/nvidia-smi"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    command.chmod(0o755)
    # The server's own Python comes by PATH too.
    path = f"PATH={command.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"
    inputs = ["-i", "model_version=tiny", "-i", "prompt=piano", "-i", "duration=1"]
    done = predict(tmp_path, *inputs, "-e", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning: GPU 0: NVIDIA H200 is there, but torch") == 1


def test_a_bad_request_is_one_sentence(tmp_path):
    done = predict(tmp_path, "-i", "model_version=tiny")
    assert done.returncode == 1
    expected = "There is nothing to make music from: give a prompt, an input_audio or both."
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
