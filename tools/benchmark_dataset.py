"""Seconds that each stage takes to prepare music for training.

    python -m tools.benchmark_dataset [--minutes 3] [--files 1] [--device cpu] [--batches]

One or more stereo files at 44.1 kHz, vocals removed, for a melody version. demucs and the codec
have their released shapes and random weights, which take the same time; the label models are small
stand-ins, so the real ones' own time is missing. Prints a table, with `--batches` the speed and
memory of separating segments one by one and together, and one line of JSON at the end.
"""

import argparse
import json
import logging
import os
import resource
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from audiocraft.data.audio import audio_read
from audiocraft.data.dataset import DatasetSettings, prepare
from audiocraft.data.files import find
from audiocraft.data.labels import MODELS_FOLDER, Vocabularies
from audiocraft.models.builders import get_compression_model
from audiocraft.modules.stems import load_htdemucs
from metadata import genre_labels, instrument_classes, mood_theme_classes
from tests.releases import stand_in

# Without types, as most tests are.
graphs: Any = import_module("tests.data.graphs")
separators: Any = import_module("tests.separators")

SONG: Final = Path(__file__).parents[1] / "tests" / "audio" / "real_song.ogg"
RATE: Final = 44100
VERSION: Final = "stereo-melody"
SEGMENT: Final = (39, 5)  # seconds, 7.8
HTDEMUCS: Final = {"bottom_channels": 512, "t_layers": 5, "t_heads": 8, "dconv_mode": 3}
CODEC: Final[dict[str, Any]] = {
    "dimension": 128,
    "n_filters": 64,
    "ratios": [8, 5, 4, 4],
    "lstm": 2,
}
BATCHES: Final = (1, 2, 4)


def make_store(store: Path) -> None:
    """Put all models that are needed into a store."""
    folder = stand_in(store, VERSION, 1, "vocals+other")
    package = torch.load(folder / "compression_state_dict.bin", weights_only=True)
    cfg = OmegaConf.create(package["xp.cfg"])
    cfg.seanet.update(CODEC)
    cfg.rvq.bins = 2048
    state = get_compression_model(cfg).state_dict()
    (folder / "compression_state_dict.bin").unlink()
    metadata = {"xp.cfg": OmegaConf.to_yaml(cfg)}
    save_file(state, folder / "compression_state_dict.safetensors", metadata)
    separators.put_htdemucs(store, kwargs=HTDEMUCS, segment=SEGMENT)
    zeros = {field: np.zeros(number) for field, number in graphs.CLASSES.items()}
    graphs.write_models(store / MODELS_FOLDER, zeros, zeros)


def make_music(folder: Path, files: int, seconds: float) -> None:
    """Files of different content."""
    folder.mkdir()
    song, rate = audio_read(SONG)
    assert rate == RATE
    length = round(seconds * RATE)
    long = song.repeat(1, -(-length // song.shape[1]))[:, :length]
    for number in range(files):
        wav = (1 - number / 100) * long
        soundfile.write(folder / f"{number}.wav", wav.T.numpy(), RATE, subtype="PCM_16")


def time_batches(device: str) -> list[dict[str, float]]:
    """Seconds of music a second, and memory, by number of segments that are computed at once."""
    separator = load_htdemucs(device)
    wav = audio_read(SONG)[0].repeat(1, 6)[:, : 45 * RATE]
    found = []
    for batch in BATCHES:
        begin = time.perf_counter()
        for part in separator.separate_tracks([[wav]], batch):
            part.stems.cpu()
        speed = 45 / (time.perf_counter() - begin)
        found.append({"batch": batch, "speed": round(speed, 2), "peak_mb": peak_memory(device)})
    return found


def peak_memory(device: str) -> int:
    """Megabytes, of the device since the last call, of the CPU since the start."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    peak = torch.cuda.max_memory_allocated() // 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", action="store_true", help="time batches of segments as well")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["AUDIOCRAFT_CACHE_DIR"] = str(folder / "store")
        make_store(folder / "store")
        make_music(folder / "music", given.files, 60 * given.minutes)
        vocabularies = Vocabularies(
            tuple(genre_labels), tuple(mood_theme_classes), tuple(instrument_classes)
        )
        settings = DatasetSettings(None, vocabularies, ("drums", "bass", "other"))
        begin, busy = time.perf_counter(), time.process_time()
        found = find(folder / "music", folder / "unpacked")
        work = folder / "work"
        prepared = prepare(found, "music", work, VERSION, settings, given.device)
        whole, busy = time.perf_counter() - begin, time.process_time() - busy
        peak = peak_memory(given.device)
        begin = time.perf_counter()
        prepare(found, "music", work, VERSION, settings, given.device)
        again = time.perf_counter() - begin
        rows = {**prepared.seconds, "all": whole, "all, CPU": busy, "a second run": again}
        for stage, seconds in rows.items():
            print(f"{stage:14s} {seconds:8.1f} s")
        batches = time_batches(given.device) if given.batches else []
        for row in batches:
            print(f"batch {row['batch']}: {row['speed']} x real time, peak {row['peak_mb']} MB")
    print(
        json.dumps(
            {
                "minutes": given.minutes,
                "files": given.files,
                "device": given.device,
                "threads": given.threads,
                "seconds": {stage: round(seconds, 2) for stage, seconds in rows.items()},
                "peak_mb": peak,
                "batches": batches,
            }
        )
    )


if __name__ == "__main__":
    main()
