"""A cancelled prediction stops at once, leaves nothing, and the next one is as if it had not been.

The server runs this project's own predictor; what is added to it prints what it does, and takes its
time doing it, so that a cancelation finds it there.
"""

import base64
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from audiocraft.assets.store import PARTS
from tests.http_server import File, FileServer
from tests.releases import full_finetune, stand_in
from tests.separators import put_htdemucs
from tests.serving.client import assert_gone, members, start, wait_until
from tools.make_diffusion import write_diffusion

ROOT = Path(__file__).parents[2]
SONG = ROOT / "tests/audio/real_song.ogg"
# What a phase takes, in a request that may be made as well.
NEEDS = {"segment": {"model_version": "melody"}, "evaluation": {"multi_band_diffusion": True}}
SLOWED = """
import itertools, time
from demucs.htdemucs import HTDemucs
from audiocraft.models.lm import LMModel
from audiocraft.modules.seanet import DecoderStream, EncoderStream, SEANetDecoder, SEANetEncoder
from audiocraft.modules.unet_diffusion import DiffusionUnet


def _slow(owner, name, tell, seconds):
    real, counter = getattr(owner, name), itertools.count(1)

    def slowed(self, *args, **kwargs):
        print("doing", tell(*args), next(counter), flush=True)
        time.sleep(seconds(*args) if callable(seconds) else seconds)
        return real(self, *args, **kwargs)

    setattr(owner, name, slowed)


def _advance(state, sequence):
    return "step" if sequence.shape[-1] == 1 else "prefill"


def _apart(sample, step, *_):
    # The first four of twenty are so far apart that no lag is taken for another evaluation.
    return 1.0 if step > 800 else 0.0


_slow(LMModel, "advance", _advance, 0.03)
_slow(HTDemucs, "forward", lambda *_: "segment", 0.3)
_slow(DiffusionUnet, "forward", lambda *_: "evaluation", _apart)
for owner, name in ((SEANetDecoder, "forward"), (DecoderStream, "push")):
    _slow(owner, name, lambda *_: "decode", 1.0)
for owner, name in ((SEANetEncoder, "forward"), (EncoderStream, "push")):
    _slow(owner, name, lambda *_: "encode", 0.2)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """`melody` hears stems, separated by a small real demucs; `stereo-melody` hears the mix."""
    folder = tmp_path_factory.mktemp("models")
    stand_in(folder, "stereo-melody", 1)
    stand_in(folder, "melody", 2, stems="vocals+other")
    put_htdemucs(folder)
    repo_id, (filename,) = PARTS["mbd"]
    (folder / repo_id).mkdir()
    write_diffusion(folder / repo_id / filename, 16, bands=1, hidden=4, depth=3, growth=2)
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The server's temporary folder."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def hold(tmp_path_factory):
    """A file; while it is there, the server's ffmpeg writes its number to it and never ends."""
    folder = tmp_path_factory.mktemp("bin")
    hold = folder / "hold"
    command = folder / "ffmpeg"
    command.write_text(
        f"#!/bin/sh\nif [ -e {hold} ]; then echo $$ > {hold}; exec sleep 600; fi\n"
        f'exec {shutil.which("ffmpeg")} "$@"\n'
    )
    command.chmod(0o755)
    return hold


@pytest.fixture(scope="module")
def served(store, scratch, hold, tmp_path_factory):
    project = tmp_path_factory.mktemp("project")
    (project / "predict.py").write_text((ROOT / "predict.py").read_text() + SLOWED)
    paths = [str(hold.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        "AUDIOCRAFT_CACHE_DIR": str(store),
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(scratch),
    }
    with start(project, environment) as server:
        yield server


def result(served, **inputs):
    status, answer = served.predict({"duration": 1, "seed": 1, "prompt": "x", **inputs})
    assert (status, answer["status"]) == (200, "succeeded"), answer
    return base64.b64decode(answer["output"].partition(",")[2])


def count(served, what):
    """The number of the last thing of its kind that was done."""
    numbers = re.findall(rf"doing {what} (\d+)", "\n".join(served.lines))
    return int(numbers[-1]) if numbers else 0


def cancelled(served, seen, inputs):
    """Cancels a prediction when a line is seen; seconds until its end."""
    del served.lines[:]
    handle = served.start_prediction(f"cancel-{time.monotonic_ns()}", inputs)
    served.wait_for(seen)
    begin = time.monotonic()
    served.cancel(handle.id)
    _, answer = handle.answer(20)
    elapsed = time.monotonic() - begin
    assert answer["status"] == "canceled", answer
    return elapsed


def files(*folders):
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("phase", "seen", "inputs"),
    [
        (
            "prefill",
            "doing prefill",
            {"continuation": True, "duration": 20, "input_audio": str(SONG)},
        ),
        (
            "encode",
            "doing encode",
            {"continuation": True, "duration": 20, "input_audio": str(SONG)},
        ),
        ("step", r"doing step \d*0\b", {"duration": 30}),
        ("decode", "doing decode", {"duration": 1}),
        ("segment", "doing segment", {"input_audio": str(SONG)}),
        ("evaluation", "doing evaluation", {"duration": 1}),
    ],
)
def test_cancel_in_each_phase(served, scratch, store, phase, seen, inputs):
    if "input_audio" in inputs:
        song = scratch.parent / "song.ogg"
        song.write_bytes(SONG.read_bytes())
        inputs = {**inputs, "input_audio": str(song)}
    needs = NEEDS.get(phase, {})
    expected = result(served, **needs)
    before = files(scratch, store)
    elapsed = cancelled(served, seen, {"prompt": "x", "seed": 2, **needs, **inputs})
    assert elapsed < 8
    time.sleep(1)  # lines may lag
    at_end = count(served, phase)
    time.sleep(1.2)  # longer than from one to the next
    assert count(served, phase) == at_end  # nothing goes on behind the scenes
    assert files(scratch, store) <= before
    assert result(served, **needs) == expected


def test_within_sixteen_steps_one_segment_and_one_evaluation(served, scratch):
    song = scratch.parent / "song.ogg"
    song.write_bytes(SONG.read_bytes())
    for phase, limit, inputs in (
        ("step", 16, {"prompt": "x", "duration": 30}),
        ("segment", 1, {"prompt": "x", "input_audio": str(song)}),
        ("evaluation", 1, {"prompt": "x", "duration": 1}),
    ):
        del served.lines[:]
        handle = served.start_prediction(f"count-{phase}", inputs | NEEDS.get(phase, {}))
        served.wait_for(f"doing {phase}", 30)
        served.cancel(handle.id)
        at_cancel = count(served, phase)
        assert handle.answer(20)[1]["status"] == "canceled"
        time.sleep(1)
        assert count(served, phase) - at_cancel <= limit


def test_cancel_while_the_result_is_encoded(served, store, scratch, hold):
    inputs = {"prompt": "x", "duration": 1, "output_format": "mp3"}
    expected = result(served, **inputs)
    before = files(scratch, store)
    hold.touch()
    try:
        handle = served.start_prediction("in-encoder", inputs)
        wait_until(lambda: hold.read_text().endswith("\n"), 30)
        encoder = members(os.getpgid(int(hold.read_text())))
        assert len(encoder) == 2  # pydub and its ffmpeg
        begin = time.monotonic()
        served.cancel(handle.id)
        assert handle.answer(20)[1]["status"] == "canceled"
        assert time.monotonic() - begin < 8
        assert_gone(encoder, 2)
        assert files(scratch, store) <= before
        assert not list(scratch.rglob("*.part"))
    finally:
        hold.unlink()
    assert result(served, **inputs) == expected


def test_cancel_in_a_download(served, store, scratch, tmp_path):
    path = full_finetune(store, "stereo-melody", 5, tmp_path / "w.safetensors")
    expected = result(served)
    tuned = result(served, replicate_weights=data_url(path))
    with FileServer() as server:
        file = server.files["/w"] = File(path.read_bytes(), etag='"1"', stall_after=10_000)
        url = server.url("/w")
        before = files(scratch, store)
        handle = served.start_prediction("in-download", {"prompt": "x", "replicate_weights": url})
        wait_until(lambda: server.sent("/w") == 10_000)
        begin = time.monotonic()
        served.cancel(handle.id)
        assert handle.answer(20)[1]["status"] == "canceled"
        assert time.monotonic() - begin < 8
        assert files(scratch, store) <= before
        assert result(served) == expected
        file.stall_after = None
        assert result(served, replicate_weights=url) == tuned


def data_url(path):
    return f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_a_client_that_goes_away(served):
    """Dropping the connection cancels too; the server is free again at once."""
    expected = result(served)
    del served.lines[:]
    served.drop({"prompt": "x", "duration": 600}, after="doing step")
    begin = time.monotonic()
    while True:
        body = {"input": {"prompt": "x", "duration": 1, "seed": 1}}
        status, answer = served.request("POST", "/predictions", body)  # which does not try again
        if status != 409:
            break
        assert time.monotonic() - begin < 8
        time.sleep(0.05)
    assert base64.b64decode(answer["output"].partition(",")[2]) == expected
