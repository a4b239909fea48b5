"""This project's `train` on the real Cog server, asked over HTTP as any client does."""

import base64
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from audiocraft.serving.server import plain_message
from tests.http_server import FileServer
from tests.serving.client import assert_gone, start, wait_until
from tests.serving.trainings import LONG, ROOT, SHORT, job_processes, make_music, make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A server as a container has it."""
    return {
        "AUDIOCRAFT_CACHE_DIR": str(tmp_path_factory.mktemp("models")),
        "HF_HUB_OFFLINE": "1",
        "ALLOW_LOCAL_FILES": "0",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path_factory.getbasetemp()),
        "OMP_NUM_THREADS": "1",
        "TRAIN_PROCESSES": "2",
    }


@pytest.fixture(scope="module")
def served(project, environment):
    with start(project, environment, training=True) as server:
        yield server


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Below the temporary folder, where a server may read."""
    return make_music(tmp_path_factory.mktemp("music"))


@pytest.fixture(scope="module")
def archive(music):
    return Path(shutil.make_archive(str(music.parent / "archive"), "zip", music))


def data_url(path):
    return f"data:application/zip;base64,{base64.b64encode(path.read_bytes()).decode()}"


def refused(served, **inputs):
    status, answer = served.train(inputs)
    assert (status, answer["status"]) == (200, "failed"), answer
    return plain_message(answer["error"])


# What is refused


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0, it must be from 1 to 1000000."),
        ({"batch_size": -3}, "batch_size is -3, it must be from 1 to 1000000."),
        ({"cfg_p": 1.5}, "cfg_p is 1.5, it must be from 0 to 1; 0.3 suits most music."),
        ({"lr": 0}, "lr is 0, it must be a finite number above 0: leave it at 1 if in doubt."),
        (
            {"warmup": -1.0},
            "warmup is -1, it must be from 0 to 1000000; 0 starts at the full rate.",
        ),
        (
            {"dataset_path": "/etc/passwd"},
            (
                "dataset_path is a path on the server, which is not allowed: give a URL, or start "
                "the server with ALLOW_LOCAL_FILES=1."
            ),
        ),
        (
            {"dataset_path": "/etc"},
            (
                "dataset_path is a path on the server, which is not allowed: give a URL, or start "
                "the server with ALLOW_LOCAL_FILES=1."
            ),
        ),
        *(
            (
                {"dataset_path": empty},
                (
                    "dataset_path is empty or the server's working folder: give a URL, or the path "
                    "of your music."
                ),
            )
            for empty in ("", ".")
        ),
        (
            {},  # the folder of music, though it lies where files may be read
            (
                "dataset_path is a folder of the server, which is not allowed: give a URL, or "
                "start the server with ALLOW_LOCAL_FILES=1."
            ),
        ),
        (
            {"dataset_path": "nothing.zip"},
            (
                "dataset_path: there is no file or folder nothing.zip: give a URL, or on the "
                "command line the path of one as in dataset_path=@music.zip."
            ),
        ),
        ({"dataset_path": "data:application/zip;base64,"}, r"dataset_path: .* is empty \(0 bytes"),
        ({"dataset_path": "http://127.0.0.1:9/music.zip"}, "Input validation error: "),
    ],
)
def test_a_training_that_cannot_be(served, project, music, inputs, sentence):
    works = set(project.glob("runs/*"))
    message = refused(served, **SHORT | {"dataset_path": str(music), **inputs})
    assert message == sentence or re.match(sentence, message), message
    assert "\n" not in message
    assert set(project.glob("runs/*")) == works  # nothing has started
    assert job_processes(project) == []


def test_a_link_out_of_the_folder(served, project):
    link = project / "music.zip"
    link.symlink_to("/etc/passwd")
    try:
        message = refused(served, **SHORT | {"dataset_path": "music.zip"})
        assert message.startswith("dataset_path is a path on the server, which is not allowed")
    finally:
        link.unlink()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"epochs": "3"}, '"3" is not of type "integer"'),
        ({"epochs": 1.5}, '1.5 is not of type "integer"'),
        ({"updates_per_epoch": None}, 'null is not of type "integer"'),
        ({"source": "guitar"}, '"guitar" is not one of'),
        ({"optimizer": "sgd"}, '"sgd" is not one of'),
        ({"lr_scheduler": ""}, '"" is not one of'),
        ({"model_version": "huge"}, '"huge" is not one of'),
        ({"drop_vocals": 1}, '1 is not of type "boolean"'),
    ],
)
def test_wrong_types_and_choices(served, inputs, message):
    status, answer = served.train({"dataset_path": "https://example.com/music.zip", **inputs})
    assert status == 422
    (problem,) = answer["detail"]
    assert problem["loc"] == ["body", "input", *inputs]
    assert problem["msg"].startswith(message)


def test_a_training_without_a_dataset(served):
    status, answer = served.train({})
    assert status == 422
    assert [problem["loc"][-1] for problem in answer["detail"]] == ["dataset_path"]


# What is made


@pytest.mark.slow
def test_the_answer_holds_the_file(served, project, archive):
    """Without WEIGHTS_BY_PATH: the bytes that lie in `weights/`. By URL it is the same training."""
    served.lines.clear()
    status, answer = served.train(SHORT | {"dataset_path": data_url(archive), "batch_size": 3})
    assert (status, answer["status"]) == (200, "succeeded"), answer
    weights = project / "weights/trained_model.safetensors"
    content = base64.b64decode(answer["output"]["weights"].partition(";base64,")[2])
    assert content == weights.read_bytes()
    said = answer["logs"]
    assert "Nothing is removed from the music: source=all, drop_vocals=false." in said
    assert "batch_size is 3 and becomes 4, a multiple of the 2 processes." in said
    assert str(weights) in said
    with FileServer(archive.parent) as server:
        url = server.url(f"/{archive.name}")
        status, answer = served.train(SHORT | {"dataset_path": url, "batch_size": 4})
    assert (status, answer["status"]) == (200, "succeeded"), answer
    assert base64.b64decode(answer["output"]["weights"].partition(";base64,")[2]) == content


@pytest.mark.slow
def test_cancel_leaves_no_process_and_the_work_goes_on(served, project, archive):
    inputs = LONG | {"dataset_path": data_url(archive), "seed": 1}
    served.lines.clear()
    handle = served.start_training("long", inputs)
    served.wait_for("loss", 300)
    wait_until(lambda: len(job_processes(project)) >= 3)  # the agent and two ranks, at least
    processes = job_processes(project)
    begin = time.monotonic()
    assert served.cancel("long")[0] == 200
    assert handle.answer(15)[1]["status"] == "canceled"
    assert_gone(processes, 10 - (time.monotonic() - begin))
    assert job_processes(project) == []
    # The folder is free again.
    served.lines.clear()
    handle = served.start_training("again", inputs)
    served.wait_for("loss", 300)
    served.cancel("again")
    assert handle.answer(15)[1]["status"] == "canceled"
    wait_until(lambda: job_processes(project) == [])


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_its_processes_along(project, environment, archive):
    inputs = LONG | {"dataset_path": data_url(archive), "seed": 2}
    with start(project, environment, training=True) as server:
        handle = server.start_training("long", inputs)
        server.wait_for("loss", 300)
        processes = job_processes(project)
        assert len(processes) >= 3
        os.kill(server.worker_pid, signal.SIGKILL)
        assert_gone(processes, 10)
        assert handle.answer(15)[1]["status"] == "failed"
