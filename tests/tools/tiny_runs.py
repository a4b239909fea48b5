"""A training of the bundled release that takes seconds: few pieces, random codes, a small model."""

import json
from dataclasses import asdict

import numpy as np
import torch

from audiocraft.assets.store import BUNDLED
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.words import descriptions
from tools.tiny.config import Shape
from tools.tiny.dataset import HELD_OUT, SECONDS, TRAINED, Music, Settings, save_music
from tools.tiny.lm import Run
from tools.tiny.text_encoder import make_text_encoder

CODEC = BUNDLED / "tiny/compression_state_dict.safetensors"
CONTEXT, PIECES, CROPS = 12.0, 8, 7
SHAPE = Shape(dim=32, layers=1, heads=2, batch_size=2, lr=1e-3)


def music(seed, count=PIECES):
    """Pieces as the dataset has them, with codes and chroma that are random."""
    random = np.random.default_rng(seed)
    pieces = tuple(plan(seed, count, SECONDS))
    return Music(
        pieces,
        tuple(descriptions(piece) for piece in pieces),
        random.integers(0, 256, (count, 8, round(SECONDS * 50)), dtype=np.uint16),
        random.integers(0, 12, (count, CROPS, 94), dtype=np.uint8),
    )


def make_data(folder):
    """A dataset."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(asdict(Settings("a codec", CONTEXT))))
    save_music(folder / f"{TRAINED}-0000.safetensors", music(1))
    save_music(folder / f"{HELD_OUT}-0000.safetensors", music(2, 3))
    return folder


def run_in(folder, data, updates=None, *, hours=1.0, shape=SHAPE, begin_from=None):
    """A run that makes so many updates, with a text encoder that has been taught nothing."""
    folder.mkdir(exist_ok=True)
    if begin_from is None and not (folder / "t5").is_dir():
        make_text_encoder(folder / "t5")
    run = Run(folder, data, CODEC, hours, shape, torch.device("cpu"), begin_from)
    if updates is not None:
        run.plan(updates)
    return run
