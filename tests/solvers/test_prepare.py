"""The process that prepares a dataset, as a job launches it."""

import shutil
from pathlib import Path

import pytest
import torch

from audiocraft.data.codes import load_encoded
from audiocraft.data.dataset import load_prepared
from audiocraft.errors import TrainingError
from audiocraft.solvers.job import Place, TrainingJob, write_job
from audiocraft.solvers.launch import launch
from audiocraft.solvers.plan import Plan
from audiocraft.solvers.prepare import DATASET_FILE
from tests.releases import stand_in
from tests.separators import put_htdemucs

SONG = Path(__file__).parent.parent / "audio" / "real_song.ogg"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The work folder of a job that removes vocals for a text version."""
    store = tmp_path / "store"
    stand_in(store, "small", 1)
    put_htdemucs(store)
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(store))
    (tmp_path / "music").mkdir()
    shutil.copy(SONG, tmp_path / "music" / "Lied ä.ogg")
    (tmp_path / "music" / "rest.mp3").write_text("x")
    place = Place(
        dataset=str(tmp_path / "music"),
        source="music",
        data=str(tmp_path / "data"),
        unpacked=str(tmp_path / "unpacked"),
        weights=str(tmp_path / "weights"),
        device="cpu",
        processes=1,
        plan=Plan(),
    )
    job = TrainingJob("small", one_same_description="a song", stems=("drums", "bass", "other"))
    (tmp_path / "work").mkdir()
    write_job(tmp_path / "work", job, place)
    return tmp_path / "work"


def run(work):
    lines = []
    launch("audiocraft.solvers.prepare", [str(work)], 1, lines.append)
    return lines


@pytest.mark.slow
def test_it_writes_down_what_is_trained_on_and_says_how_far_it_is(work):
    lines = run(work)
    prepared = load_prepared(work / DATASET_FILE)
    (example,) = prepared.examples
    assert (example.name, example.metadata.description) == ("Lied ä.ogg", "a song")
    assert load_encoded(example.encoded).codes.dtype == torch.int16
    assert [left.name for left in prepared.report.left_out] == ["rest.mp3"]
    for line in (
        "decoding the dataset: 100 %, 2 of 2 files, 0 s left",
        "separating stems: 100 %, 1 of 1 files, 0 s left",
        "encoding: 100 %, 1 of 1 files, 0 s left",
    ):
        assert line in lines
    assert any(line.startswith("rest.mp3 is left out: it cannot be read") for line in lines)
    # What could not be decoded is tried again, and nothing else.
    again = [line for line in run(work) if "100 %" in line]
    assert again == ["decoding the dataset: 100 %, 1 of 1 files, 0 s left"]


@pytest.mark.slow
def test_an_error_reaches_the_caller_as_its_sentence(work):
    (work.parent / "music" / "Lied ä.ogg").unlink()
    with pytest.raises(TrainingError) as caught:
        run(work)
    assert str(caught.value).startswith(
        "music holds no music that can be used (1 x cannot be read as audio): give"
    )
    assert not (work / DATASET_FILE).exists()
