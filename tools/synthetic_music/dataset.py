"""Write pieces as files: a dataset that `scripts/train` takes, and its truth."""

import json
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import Any, Final

from audiocraft.data.audio_utils import i16_pcm
from audiocraft.errors import InputError
from tools.synthetic_music.composing import Composition
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.rendering import RATE, rendered
from tools.synthetic_music.words import descriptions

FORMATS: Final = ("flac", "wav")

_PLENTY: Final = 10**6


def truth_of(composition: Composition) -> dict[str, Any]:
    """All that is known of a piece.

    The fields of official audiocraft's metadata come first, which training reads: key, bpm, genre,
    instrument (the lead first) and description. Then mode, style, lead, seconds, all wordings, and
    the melody as `[onset, duration, pitch]` in seconds and MIDI notes.
    """
    piece, texts = composition.piece, descriptions(composition.piece)
    return {
        "name": piece.name,
        "key": piece.key,
        "bpm": piece.bpm,
        "genre": [piece.style],
        "instrument": [piece.lead, *piece.band],
        "description": texts[0],
        "mode": piece.mode,
        "style": piece.style,
        "lead": piece.lead,
        "seconds": piece.seconds,
        "descriptions": list(texts),
        "melody": [list(astuple(note)) for note in composition.melody],
    }


def write_dataset(
    folder: Path,
    seed: int,
    count: int,
    seconds: float,
    exclude_style: str | None = None,
    jobs: int = 1,
    audio_format: str = "flac",
    style: str | None = None,
) -> None:
    """Compose, render and write; equal arguments give equal files, whatever `jobs` is.

    Each piece gets its sound (16 bit), `.mid`, and `.json` with the truth, all by its name.

    Args:
        folder: of the files.
        seed: see `plan`.
        count: how many pieces.
        seconds: of each.
        exclude_style: see `plan`.
        jobs: how many pieces are rendered at a time.
        audio_format: one of `FORMATS`.
        style: that all pieces have, if given.

    Raises:
        InputError: a length or a style that `plan` refuses, or no such format.
        AssetError: fluidsynth or the sound font is not installed.
    """
    import soundfile

    if audio_format not in FORMATS:
        raise InputError(f"There is no format {audio_format!r}; give one of {', '.join(FORMATS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    planned = plan(seed, _PLENTY if style else count, seconds, exclude_style)
    pieces = islice((piece for piece in planned if style in {None, piece.style}), count)
    for composition, wav in rendered(pieces, jobs):
        path = folder / composition.piece.name
        samples = i16_pcm(wav).T.numpy()
        soundfile.write(path.with_suffix(f".{audio_format}"), samples, RATE, "PCM_16")
        path.with_suffix(".mid").write_bytes(composition.midi())
        path.with_suffix(".json").write_text(json.dumps(truth_of(composition)) + "\n")
