"""What is said of a piece, in several wordings."""

from typing import Final

import numpy as np

from tools.synthetic_music.pieces import Piece
from tools.synthetic_music.styles import STYLES

# {a_lead} is with an article. What a wording leaves out is for the model to choose.
_WORDINGS: Final = (
    "{bpm} bpm {lead} {style} in {key}",
    "{bpm} bpm {lead} in {key}",
    "{lead} {style}, {key}, {bpm} bpm",
    "{style} with {lead} in {key} at {bpm} bpm",
    "{style} led by {a_lead}, {bpm} beats per minute, key of {key}",
    "{pace} {style} in {key} with {a_lead} melody, {bpm} bpm",
    "{key}, {bpm} bpm, {lead}",
    "{lead}, {bpm} bpm, {key}, {style}",
    "{lead} with {band}, {bpm} bpm, {key}",
    "{a_lead} plays {style} over {band} in {key}, {bpm} bpm",
    "{pace} {lead} music in {key} at {bpm} beats per minute",
    "solo {lead} over {band}, {style}, {mode} key, {bpm} bpm",
    "{pace} {style} with {lead} and {band}",
    "{lead} {style} in {key}",
    "{bpm} bpm {style} in {key}",
    "{bpm} bpm {style} with {lead}",
)
_ENHARMONIC: Final = {
    "C#": "Db", "Eb": "D#", "F#": "Gb", "Ab": "G#", "Bb": "A#",
}  # fmt: skip
_OTHER_NAME: Final = 0.25  # share of keys that are called by that
_PACES: Final = ((85, "slow"), (135, "mid-tempo"), (181, "fast"))  # up to a bpm


def descriptions(piece: Piece) -> tuple[str, ...]:
    """All wordings of a piece, in an order of its own; equal pieces get equal ones."""
    random = np.random.default_rng([piece.seed, piece.number, 2])
    key = piece.key
    tonic, mode = key.split()
    if random.random() < _OTHER_NAME:
        key = f"{_ENHARMONIC.get(tonic, tonic)} {mode}"
    words = {
        "bpm": piece.bpm,
        "key": key,
        "mode": mode,
        "lead": piece.lead,
        "a_lead": f"{'an' if piece.lead[0] in 'aeiou' else 'a'} {piece.lead}",
        "style": str(random.choice(STYLES[piece.style].names)),
        "pace": next(word for limit, word in _PACES if piece.bpm < limit),
        "band": _joined(piece.band),
    }
    texts = [wording.format(**words) for wording in random.permutation(_WORDINGS)]
    return tuple(texts)


def _joined(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
