"""A zip of 1 GB by the command: who waits for the training stays small."""

import subprocess
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from tests.project import copy_project
from tests.serving.client import children
from tests.serving.test_train_command import environment, flags
from tests.serving.trainings import SONG

SECONDS, SONGS, RATE = 160, 4, 192_000  # of 32-bit stereo: 983 MB


@pytest.fixture
def user(tmp_path):
    """Where the user stands, with music of a studio's format: no two of the files are alike."""
    folder = tmp_path / "user"
    folder.mkdir()
    wav, rate = soundfile.read(SONG, dtype="float32")
    with zipfile.ZipFile(folder / "music.zip", "w", zipfile.ZIP_STORED) as archive:
        for number in range(SONGS):
            piece = soxr.resample(np.roll(wav, 1000 * number, axis=0), rate, RATE)
            song = np.tile(piece, (SECONDS // 8, 1))
            with archive.open(f"disc {number}/song.wav", "w", force_zip64=True) as file:
                path = folder / "song.wav"
                soundfile.write(path, song, RATE, subtype="FLOAT")
                file.write(path.read_bytes())
                path.unlink()
    return folder


def resident(pid):
    """Bytes of memory that a process holds and does not share with files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return 1024 * int(fields.get("RssAnon", "0 kB").split()[0])


@pytest.mark.slow
def test_a_zip_of_a_gigabyte(user, tmp_path):
    assert (user / "music.zip").stat().st_size > 900e6
    project = copy_project(tmp_path / "project")
    most = [0]
    with subprocess.Popen(
        [project / "scripts/train", *flags(dataset_path="@music.zip")],
        cwd=user,
        env=environment(user / "models"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:

        def watch():
            """The command, the server and its worker; not the processes of the job."""
            while process.poll() is None:
                servers = children(process.pid)
                waiting = [process.pid, *servers, *(w for s in servers for w in children(s))]
                most[0] = max(most[0], sum(map(resident, waiting)))
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        said, _ = process.communicate(timeout=900)
        watcher.join()
    assert process.returncode == 0, said
    assert said.splitlines()[-1] == str(project / "weights/trained_model.safetensors")
    assert 50e6 < most[0] < 1e9
