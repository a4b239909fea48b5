"""Render music, encode it, and keep what a language model is trained on.

    python -m tools.tiny.dataset --codec FILE --out FOLDER --hours H [--jobs 2]

A file holds two hours: the codes of whole pieces, the chroma of every crop that may be taken of
them, and the truth. Audio is not kept. Whatever ends the command, the same one goes on from the
files that are there. The pieces that are held out are of another seed, in a file of their own.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from audiocraft.errors import AudiocraftError, InputError
from audiocraft.models.encodec import CompressionModel, InterleaveStereoCompressionModel
from audiocraft.models.loaders import load_compression_model
from audiocraft.modules.chroma import ChromaExtractor
from tools.synthetic_music.composing import compose
from tools.synthetic_music.pieces import Piece, plan
from tools.synthetic_music.rendering import RATE, render
from tools.synthetic_music.styles import STYLES
from tools.synthetic_music.words import descriptions

SEED, HELD_OUT_SEED = 207, 202
"""Of the sets of pieces that are trained on, if no other is given, and that are not."""

TRAINED, HELD_OUT = "trained", "held-out"
"""What the names of their files begin with."""

SECONDS: Final = 20.0
"""Of a piece."""

CHROMA_EXPONENT: Final = 14
"""Of the chroma's window, as released versions have it."""

_HOURS: Final = 2.0  # of a file: 6 MB of codes and 0.3 MB of chroma
_HELD_OUT_PIECES: Final = 60
_SETTINGS: Final = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What the files of a folder have in common.

    Attributes:
        codec: SHA-256 of its file.
        context: seconds of a crop.
        exclude_style: that no piece has.
        seed: of the pieces that are trained on.
    """

    codec: str
    context: float
    exclude_style: str | None = None
    seed: int = SEED


@dataclass(frozen=True)
class Music:
    """Encoded pieces.

    Attributes:
        pieces: N, what they are.
        texts: of each its descriptions.
        codes: (N, K, T), whole pieces.
        chroma: (N, S, T'), the strongest pitch class of each frame of each crop.
    """

    pieces: tuple[Piece, ...]
    texts: tuple[tuple[str, ...], ...]
    codes: NDArray[np.uint16]
    chroma: NDArray[np.uint8]


def extractor() -> ChromaExtractor:
    """What the conditioner computes chroma with."""
    return ChromaExtractor(RATE, radix2_exp=CHROMA_EXPONENT, argmax=True)


def grid(chroma: ChromaExtractor, frame: int) -> int:
    """Samples from crop to crop: a whole number of frames of the chroma and of the codes.

    Args:
        chroma: see `extractor`.
        frame: samples of a frame of codes.
    """
    return math.lcm(chroma.winhop, frame)


def crop_chroma(chroma: ChromaExtractor, wav: Tensor, step: int, length: int) -> Tensor:
    """Chroma of all crops of a piece, each as if it were computed of the crop alone.

    A crop differs from the whole piece in the frames whose windows reach beyond its ends, where
    the transform mirrors it.

    Args:
        chroma: see `extractor`.
        wav: (C, T) at its rate.
        step: samples from crop to crop, see `grid`.
        length: samples of a crop, at least two windows.

    Returns:
        (S, T'), uint8: the strongest pitch class of each frame.
    """
    mono, hop = wav.mean(0), chroma.winhop
    mirrored = chroma.winlen // hop // 2  # frames at each end
    frames = chroma.num_frames(length)
    starts = torch.arange(0, len(mono) - length + 1, step)
    # Enough for the mirrored frames, and none of those are mirrored at the other end.
    near = (3 * mirrored) * hop
    far = (frames - 3 * mirrored) * hop
    heads = torch.stack([mono[start : start + near] for start in starts])
    tails = torch.stack([mono[start + far : start + length] for start in starts])
    classes: Tensor = chroma(mono[None])[0].argmax(-1)
    crops: Tensor = classes[starts[:, None] // hop + torch.arange(frames)]
    crops[:, :mirrored] = chroma(heads).argmax(-1)[:, :mirrored]
    crops[:, -mirrored:] = chroma(tails).argmax(-1)[:, -mirrored:]
    return crops.to(torch.uint8)


def stereo_codec(path: Path) -> CompressionModel:
    """The codec as the language model uses it.

    Args:
        path: of its weights.
    """
    return InterleaveStereoCompressionModel(load_compression_model(path)).eval()


def encode(pieces: Sequence[Piece], codec: CompressionModel, context: float, jobs: int) -> Music:
    """Render and encode pieces of one length.

    Args:
        pieces: at least one.
        codec: see `stereo_codec`.
        context: seconds of a crop.
        jobs: pieces that are made at a time.
    """
    chroma = extractor()
    step = grid(chroma, round(RATE / codec.frame_rate))

    @torch.no_grad()
    def make(piece: Piece) -> tuple[Tensor, Tensor]:
        wav = render(compose(piece))
        melodies = crop_chroma(chroma, wav, step, round(context * RATE))
        return codec.encode(wav[None])[0][0].to(torch.uint16), melodies

    with ThreadPoolExecutor(jobs) as pool:
        codes, melodies = zip(*pool.map(make, pieces), strict=True)
    return Music(
        tuple(pieces),
        tuple(descriptions(piece) for piece in pieces),
        torch.stack(codes).numpy(),
        torch.stack(melodies).numpy(),
    )


def save_music(path: Path, music: Music) -> None:
    """Write a file; it appears under its name when it is whole."""
    truth = [
        asdict(piece) | {"descriptions": texts}
        for piece, texts in zip(music.pieces, music.texts, strict=True)
    ]
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    tensors: dict[str, NDArray[Any]] = {"codes": music.codes, "chroma": music.chroma}
    save_file(tensors, unfinished, {"pieces": json.dumps(truth)})
    unfinished.replace(path)


def load_music(folder: Path, kind: str) -> Music:
    """All pieces of a kind.

    Args:
        folder: of the dataset.
        kind: `TRAINED` or `HELD_OUT`.

    Raises:
        InputError: there are none.
    """
    paths = sorted(folder.glob(f"{kind}-*.safetensors"))
    if not paths:
        raise InputError(f"{folder} has no {kind} music: make it with tools.tiny.dataset.")
    pieces: list[Piece] = []
    texts: list[tuple[str, ...]] = []
    arrays: dict[str, list[NDArray[Any]]] = {"codes": [], "chroma": []}
    for path in paths:
        with safe_open(path, "numpy") as file:
            for truth in json.loads(file.metadata()["pieces"]):
                texts.append(tuple(truth.pop("descriptions")))
                pieces.append(Piece(**truth | {"band": tuple(truth["band"])}))
            for name, parts in arrays.items():
                parts.append(file.get_tensor(name))
    codes, chroma = (np.concatenate(parts) for parts in arrays.values())
    return Music(tuple(pieces), tuple(texts), codes, chroma)


def load_settings(folder: Path) -> Settings:
    """What the files of a folder have in common.

    Raises:
        InputError: it is no dataset.
    """
    path = folder / _SETTINGS
    if not path.is_file():
        raise InputError(f"{folder} is no dataset: make one with tools.tiny.dataset.")
    return Settings(**json.loads(path.read_text()))


def make_dataset(
    folder: Path, codec: Path, settings: Settings, files: Sequence[tuple[str, int, int]], jobs: int
) -> None:
    """Write the files that are missing.

    Args:
        folder: of the dataset; made if missing.
        codec: its weights.
        settings: of the dataset.
        files: name, seed and number of pieces of each; those of a kind and a seed follow each
            other in its plan.
        jobs: pieces that are made at a time.

    Raises:
        InputError: the folder has files with other settings.
        AssetError: fluidsynth or the sound font is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    if path.is_file() and load_settings(folder) != settings:
        raise InputError(
            f"{folder} has music of another codec, context, choice of styles or seed: give another "
            "one."
        )
    path.write_text(json.dumps(asdict(settings)) + "\n")
    model = stereo_codec(codec)
    first: dict[int, int] = {}
    for name, seed, count in files:
        start = first.setdefault(seed, 0)
        first[seed] += count
        path = folder / f"{name}.safetensors"
        if path.is_file():
            continue
        began = time.monotonic()
        planned = plan(seed, start + count, SECONDS, settings.exclude_style)
        music = encode(list(islice(planned, start, None)), model, settings.context, jobs)
        save_music(path, music)
        speed = count * SECONDS / (time.monotonic() - began)
        print(json.dumps({"file": path.name, "times_real_time": round(speed, 1)}), flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", type=Path, required=True, help="weights of the codec")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--hours", type=float, required=True, help="of music to train on")
    parser.add_argument("--context", type=float, default=12.0, help="seconds of a crop")
    parser.add_argument("--exclude-style", choices=list(STYLES), help="leave a style out")
    parser.add_argument("--seed", type=int, default=SEED, help="another one has other pieces")
    parser.add_argument("--jobs", type=int, default=2, help="pieces made at a time")
    given = parser.parse_args()
    if given.seed < SEED:
        parser.error(
            f"--seed {given.seed} may be that of pieces to measure by: give {SEED} or more."
        )
    count = round(3600 * _HOURS / SECONDS)
    files = [(f"{HELD_OUT}-0000", HELD_OUT_SEED, _HELD_OUT_PIECES)]
    files += [
        (f"{TRAINED}-{i:04}", given.seed, count) for i in range(math.ceil(given.hours / _HOURS))
    ]
    digest = hashlib.sha256(given.codec.read_bytes()).hexdigest()
    settings = Settings(digest, given.context, given.exclude_style, given.seed)
    torch.set_num_threads(1)  # a core for each job is 1.4 times as fast as two for each piece
    try:
        make_dataset(given.out, given.codec, settings, files, given.jobs)
    except AudiocraftError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
