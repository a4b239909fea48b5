"""From a prepared dataset to what a model is trained and measured with."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Final

from audiocraft.data.codes import load_encoded
from audiocraft.data.dataset import Example
from audiocraft.solvers.conditions import (
    ConditionSettings,
    clip_random,
    merge_metadata,
    parse_metadata,
)
from audiocraft.solvers.musicgen import Clip

LEAST_SONGS: Final = 5
"""Songs below which all are trained on: too few to give one away."""

_SHARE: Final = 10  # of so many songs one is held out
_MOST_HELD_OUT: Final = 10
_PROMPTS: Final = 3


def hold_out(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Set whole songs aside, to measure how well the model does on what it has not heard.

    Args:
        examples: all of them.
        seed: together with the songs themselves it chooses.

    Returns:
        Those to train on, and those to measure with: of a tenth of the songs, at least one and at
        most ten, and none where there are less than `LEAST_SONGS`.
    """
    songs = {example.song for example in examples}
    number = min(_MOST_HELD_OUT, max(1, round(len(songs) / _SHARE)))
    if len(songs) < LEAST_SONGS:
        number = 0
    ordered = sorted(songs, key=lambda song: hashlib.sha256(f"{seed} {song}".encode()).digest())
    chosen = set(ordered[:number])
    kept = [example for example in examples if example.song not in chosen]
    return kept, [example for example in examples if example.song in chosen]


def load_clips(examples: Iterable[Example]) -> list[Clip]:
    """The clips of examples, with their codes in memory.

    Raises:
        WeightsError: a file of codes is broken.
    """
    return [_load(example) for example in examples]


def load_measured_clips(
    examples: Iterable[Example], settings: ConditionSettings, seed: int
) -> list[Clip]:
    """Clips to measure with: each has all that is known of it as its description."""
    return [
        replace(_load(example), description=full_text(example, settings, seed))
        for example in examples
    ]


def _load(example: Example) -> Clip:
    encoded = load_encoded(example.encoded)
    chroma = encoded.chroma
    # Copied: each would keep a memory map, of which a process may have some 65,000.
    return Clip(
        example.key,
        encoded.codes.clone(),
        encoded.frames,
        example.metadata.description,
        parse_metadata(asdict(example.metadata)),
        None if chroma is None else chroma.clone(),
        encoded.samples,
    )


def full_text(example: Example, settings: ConditionSettings, seed: int) -> str | None:
    """A text as training makes them, with all that is known of the clip; None if nothing is.

    Args:
        example: the clip.
        settings: of the training.
        seed: gives the fields their order.
    """
    whole = replace(settings, merge_text_p=1.0, drop_desc_p=0.0, drop_other_p=1.0)
    metadata = parse_metadata(asdict(example.metadata))
    rng = clip_random(seed, 0, example.key)
    return merge_metadata(example.metadata.description, metadata, whole, rng)


def choose_prompts(
    examples: Iterable[Example], settings: ConditionSettings, seed: int
) -> list[str]:
    """Up to three different texts that a model was trained with, of different songs first."""
    by_song: dict[str, list[str]] = {}
    for example in examples:
        text = full_text(example, settings, seed)
        if text is not None:
            by_song.setdefault(example.song, []).append(text)
    firsts = [texts[0] for texts in by_song.values()]
    rest = [text for texts in by_song.values() for text in texts[1:]]
    return list(dict.fromkeys(firsts + rest))[:_PROMPTS]
