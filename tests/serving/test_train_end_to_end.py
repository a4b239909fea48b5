"""From an archive as people make them to music by what was trained on it, by the two commands.

Separator and label models are small ones in the format of the real ones, for those are not to be
had here; `tiny` is the real one.
"""

import json
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import soundfile
from safetensors import safe_open

import metadata
from audiocraft.models.finetunes import read_finetune
from audiocraft.models.versions import VERSIONS
from tests.data.graphs import CLASSES, write_models
from tests.http_server import FileServer
from tests.project import copy_project
from tests.separators import put_htdemucs
from tests.serving.test_train_command import environment
from tests.serving.trainings import SONG

pytestmark = pytest.mark.slow

GENRE, MOOD, INSTRUMENT = 3, 5, 7  # what the label models hear in everything
USED = {  # chunks, channels, description
    "Album/one/song.wav": (-(-36 // round(VERSIONS["tiny"].context)), 2, "slow piano, first take"),
    "Album/two/song.wav": (1, 2, None),
    "Ünïcode/日本の歌.ogg": (1, 2, "静かな夜"),
    "Ünïcode/Ночь.mp3": (1, 2, None),
    "a/b/c/d/live.m4a": (1, 2, None),
    "mono.wav": (1, 1, None),
    "surround.wav": (1, 6, None),
}
LEFT_OUT = {"broken.wav", "three seconds.wav"}
OTHERS = {"Album/cover.jpg", "notes.txt"}
JUNK = {"__MACOSX/Album/one/._song.wav", "Album/.DS_Store", ".DS_Store"}


def ffmpeg(source, target, *arguments):
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(source), *arguments, str(target)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A zip with all that goes wrong in people's own."""
    folder = tmp_path_factory.mktemp("music")
    wav, rate = soundfile.read(SONG)
    for name in (*USED, *LEFT_OUT, *OTHERS, *JUNK):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "Album/one/song.wav", np.concatenate([wav] * 5)[: 36 * rate], rate)
    soundfile.write(folder / "Album/two/song.wav", wav[::-1], rate)
    soundfile.write(folder / "Ünïcode/日本の歌.ogg", wav[: 6 * rate], rate)
    ffmpeg(SONG, folder / "Ünïcode/Ночь.mp3", "-ss", "1", "-b:a", "128k")
    ffmpeg(SONG, folder / "a/b/c/d/live.m4a", "-af", "atempo=1.1", "-c:a", "aac")
    ffmpeg(SONG, folder / "mono.wav", "-ac", "1", "-ar", "22050", "-t", "7")
    ffmpeg(SONG, folder / "surround.wav", "-ac", "6", "-ar", "48000", "-t", "6.5")
    soundfile.write(folder / "three seconds.wav", wav[: 3 * rate], rate)
    (folder / "broken.wav").write_bytes(bytes(range(256)) * 100)
    (folder / "Album/cover.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    (folder / "notes.txt").write_text("what to record next")
    (folder / "Album/one/song.txt").write_text("slow piano, first take\nrecorded at home\n")
    (folder / "Ünïcode/日本の歌.txt").write_text("\ufeff静かな夜\n", encoding="utf-8")
    for name in JUNK:
        (folder / name).write_bytes(b"\0\5\x16\7")
    path = folder.parent / "our music.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The store: a small real separator, and label models that always hear the same."""
    store = tmp_path_factory.mktemp("models")
    put_htdemucs(store)
    heard = {"genre": GENRE, "moods": MOOD, "instrument": INSTRUMENT}
    gains = {field: np.zeros(count) for field, count in CLASSES.items()}
    biases = {field: np.full(count, -9.0) for field, count in CLASSES.items()}
    for field, label in heard.items():
        biases[field][label] = 9.0
    write_models(store / "essentia", gains, biases)
    return store


def run(script, folder, store, *arguments, **more):
    done = subprocess.run(
        [script, *arguments],
        cwd=folder,
        env=environment(store, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(archive, models, tmp_path_factory):
    """The project, the user's folder, and what the command said."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    user = tmp_path_factory.mktemp("user")
    shutil.copy(archive, user)
    inputs = {"model_version": "tiny", "epochs": 2, "updates_per_epoch": 3, "batch_size": 3}
    inputs |= {"optimizer": "adamw", "lr": 0.01, "warmup": 0}  # so that few updates are heard
    flags = [part for name, value in inputs.items() for part in ("-i", f"{name}={value}")]
    done = run(
        project / "scripts/train",
        user,
        models,
        *("-i", f"dataset_path=@{archive.name}", *flags, "-o", "tuned.safetensors"),
        TRAIN_PROCESSES="2",
    )
    return project, user, done.stderr


@pytest.fixture(scope="module")
def report(trained):
    (path,) = (trained[0] / "runs").glob("*/report.json")
    return json.loads(path.read_text())


def test_the_report_accounts_for_every_file(report):
    dataset = report["dataset"]
    used = {file["name"]: file for file in dataset["used"]}
    assert {
        name: (file["chunks"], file["channels"], file["description"]) for name, file in used.items()
    } == USED
    assert {file["name"] for file in dataset["left_out"]} == LEFT_OUT
    reasons = {file["name"]: file["reason"] for file in dataset["left_out"]}
    assert "3.0" in reasons["three seconds.wav"] or "5 s" in reasons["three seconds.wav"]
    assert OTHERS <= {file["name"] for file in dataset["others"]} <= OTHERS | JUNK
    assert report["summary"]["chunks"] == sum(chunks for chunks, *_ in USED.values())


def test_labels_are_those_that_were_heard(report):
    parent, _, style = metadata.genre_labels[GENRE].partition("---")
    for file in report["dataset"]["used"]:
        assert len(file["labels"]) == file["chunks"]
        for chunk in file["labels"]:
            assert {parent, style} <= set(chunk["genre"])
            assert chunk["moods"] == [metadata.mood_theme_classes[MOOD]]
            assert chunk["instrument"] == [metadata.instrument_classes[INSTRUMENT]]


def test_the_log_tells_what_happens(trained):
    project, user, said = trained
    assert "Vocals will be removed from the music: drop_vocals=true." in said
    assert "batch_size is 3 and becomes 4, a multiple of the 2 processes." in said
    assert str(project / "weights/trained_model.safetensors") in said
    assert f"Written output to: {user}/tuned.safetensors" in said


def test_the_result_says_what_it_is(trained):
    project, user, _ = trained
    tuned = read_finetune(user / "tuned.safetensors", "weights")
    assert (tuned.base, tuned.lora) == ("tiny", None)
    with safe_open(user / "tuned.safetensors", "pt") as file:
        said = file.metadata()
        types = {str(file.get_tensor(key).dtype) for key in file.keys()}  # noqa: SIM118
    assert types == {"torch.float16"}
    assert said["license"] == "apache-2.0"
    samples = list((project / "weights").rglob("*.wav"))
    assert len(samples) == 2
    assert all(soundfile.info(sample).duration == pytest.approx(8, abs=0.1) for sample in samples)


def test_predict_with_the_result(trained, models):
    """As a path and as a URL; it is not the base that answers."""
    project, user, _ = trained
    inputs = ["-i", "prompt=slow piano", "-i", "duration=1", "-i", "seed=1"]
    script = project / "scripts/predict"
    run(script, user, models, *inputs, "-i", "model_version=tiny", "-o", "base.wav")
    run(
        script,
        user,
        models,
        *(*inputs, "-i", "replicate_weights=@tuned.safetensors", "-o", "by-path.wav"),
    )
    with FileServer(user) as server:
        url = server.url("/tuned.safetensors")
        run(script, user, models, *inputs, "-i", f"replicate_weights={url}", "-o", "by-url.wav")
    base, by_path, by_url = (
        (user / f"{name}.wav").read_bytes() for name in ("base", "by-path", "by-url")
    )
    assert by_path == by_url
    assert by_path != base


def test_the_users_files_are_untouched(trained, archive):
    _, user, _ = trained
    assert (user / archive.name).read_bytes() == archive.read_bytes()
