"""Crops of pieces that the language model is trained on, and what is to be learnt of each.

A model that makes music hears its own, which slips out of key and tempo. Of pieces as they were
composed it only learns to go on with what it hears. So most crops have disturbances, after which
the piece goes on as its description has it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audiocraft.solvers.conditions import Metadata, parse_metadata
from audiocraft.solvers.musicgen import Clip
from tools.synthetic_music.midi import TICKS
from tools.synthetic_music.pieces import FRAME, TEMPI, Piece
from tools.synthetic_music.rendering import RATE
from tools.synthetic_music.score import Score
from tools.tiny.dataset import Music, extractor, grid
from tools.tiny.lessons import OF_PIECE, UNKNOWN, answers

SEED: Final = 2036
"""Of a run."""

_ANY_LENGTH: Final = 1000  # words
_UNDESCRIBED: Final = 0.04  # share of updates without texts, as an empty prompt is
_BEGINNINGS: Final = 0.2  # share of crops that are the beginning of a piece
_CONTINUED: Final = 0.3  # of those that begin anywhere, as windows in longer music do
_HEARD: Final = 100  # frames of these that tell where the beats are, and are not learnt
_MOST: Final = 4  # disturbances of a crop
_LENGTHS: Final = (15, 150)  # frames of one


class Crops:
    """Crops of pieces with their descriptions; those of an update depend on its number alone.

    Most begin with a bar: where beats are is told by the tempo then, before anything is heard.
    Others begin anywhere, as a window in longer music does, and are learnt from where the beats
    were heard. None has the last chord of a piece: longer music would end with a window.

    In a disturbance some other music of the same style is heard, and nothing is learnt. It has the
    same tempo or one of those next to it, and is in time with the crop's own at its end: what is
    heard tells when the next beat comes, and the description how the beats go on. So one may also
    hide where a crop that begins anywhere has its beats.

    Args:
        music: encoded.
        context: seconds of a crop.
        frame_rate: of the codes.
    """

    def __init__(self, music: Music, context: float, frame_rate: float) -> None:
        self._music = music
        self._samples = round(context * RATE)
        self._frames = round(context * frame_rate)
        frame = round(RATE / frame_rate)
        self._step = grid(extractor(), frame) // frame
        self._hop = extractor().winhop / frame  # frames of the codes in one of the chroma
        last = self._step * (music.chroma.shape[1] - 1)
        scores = [*map(Score, music.pieces)]
        self._beats = [round(piece.beat / FRAME) for piece in music.pieces]
        self._bars = [[_frame(tick, score) for tick in score.bars] for score in scores]
        self._ends = [_frame(score.end, score) for score in scores]
        self._last = [min(last, end - self._frames) for end in self._ends]
        self._lengths = [np.array([len(t.split()) for t in texts]) for texts in music.texts]
        self._metadata = [_metadata(piece) for piece in music.pieces]
        self._one_hot = torch.eye(12)
        self._rows = {piece.name: row for row, piece in enumerate(music.pieces)}
        self._alike: dict[tuple[str, int], list[int]] = defaultdict(list)
        for row, piece in enumerate(music.pieces):
            for bpm in _near(piece.bpm):
                self._alike[piece.style, bpm].append(row)
        # Each pass is in an order of its own, and a batch is of one or two of them.
        self._order = lru_cache(2)(self._shuffled)

    def batch(self, update: int, size: int) -> list[Clip]:
        """The crops of an update, numbered from 1.

        A description has at most as many words as that of the first: texts are padded to the
        longest of their batch, and a prompt for generation mostly is alone in its own.
        """
        random = np.random.default_rng([SEED, update])
        clips: list[Clip] = []
        longest = _ANY_LENGTH
        described = bool(random.random() >= _UNDESCRIBED)
        for place in range((update - 1) * size, update * size):
            number, index = divmod(place, len(self._music.pieces))
            row = int(self._order(number)[index])
            start, kind = int(random.choice(self._starts(row))), random.random()
            if kind < _BEGINNINGS:
                start = self._bars[row][0]
            elif kind < _BEGINNINGS + _CONTINUED:
                start = int(random.integers(self._last[row] + 1))
            lengths = self._lengths[row]
            fitting = np.flatnonzero(lengths <= max(longest, lengths.min()))
            wording = int(random.choice(fitting))
            longest = lengths[wording] if not clips else longest
            clip = self._clip(row, start, wording)
            if described:
                clips.append(self._disturbed(clip, row, start, random))
            else:
                clips.append(replace(clip, description=None, metadata={}))
        return clips

    def measured(self, count: int) -> list[Clip]:
        """The same crops always, of the first pieces, each with the first of its descriptions."""
        starts = [self._starts(row) for row in range(count)]
        return [self._clip(row, some[row % len(some)], 0) for row, some in enumerate(starts)]

    def answers(self, clip: Clip) -> Tensor:
        """What is right in a clip, see `Lessons.ask`; what is of the piece is asked throughout."""
        name, begin, *disturbances = clip.key.split()
        row, start, frames = self._rows[name], int(begin), clip.codes.shape[-1]
        known = answers(self._music.pieces[row])[:, start : start + frames].astype(np.int64)
        assert clip.chroma is not None, "each clip has a melody"
        now = (torch.arange(frames) / self._hop).round().long().clamp(max=len(clip.chroma) - 1)
        truth = torch.cat([torch.from_numpy(known), clip.chroma.argmax(-1)[now][None]])
        if start not in self._bars[row]:
            truth[len(OF_PIECE) : -1, :_HEARD] = UNKNOWN
        for span in disturbances:
            truth[len(OF_PIECE) :, slice(*map(int, span.split("-")))] = UNKNOWN
        return truth

    def _starts(self, row: int) -> list[int]:
        return [bar for bar in self._bars[row] if bar <= self._last[row]]

    def _shuffled(self, number: int) -> NDArray[np.int64]:
        return np.random.default_rng([SEED, 0, number]).permutation(len(self._music.pieces))

    def _clip(self, row: int, start: int, wording: int) -> Clip:
        crop, after = divmod(start, self._step)
        moved = round(after / self._hop)  # to the nearest frame of the chroma
        # The crop that begins a step later has what follows in its last frames.
        shared = round(self._step / self._hop) - moved
        before, following = self._music.chroma[row, [crop, crop + bool(after)]]
        end = len(following) - shared
        classes = np.concatenate([before[moved:], following[end - moved : end]])
        codes = self._music.codes[row, :, start : start + self._frames].astype(np.int64)
        return Clip(
            f"{self._music.pieces[row].name} {start}",
            torch.from_numpy(codes),
            self._frames,
            self._music.texts[row][wording],
            self._metadata[row],
            self._one_hot[torch.from_numpy(classes.astype(np.int64))],
            self._samples,
        )

    def _disturbed(self, clip: Clip, row: int, start: int, random: np.random.Generator) -> Clip:
        """A clip with disturbances; its key tells where they are."""
        codes, spans = clip.codes.clone(), []
        for _ in range(random.integers(_MOST + 1)):
            length = int(random.integers(*_LENGTHS))
            end = int(random.integers(length, self._frames + 1))
            source, place = self._elsewhere(row, start + end, length, random)
            heard = self._music.codes[source, :, place : place + length].astype(np.int64)
            codes[:, end - length : end] = torch.from_numpy(heard)
            spans.append(f"{end - length}-{end}")
        return replace(clip, key=" ".join([clip.key, *spans]), codes=codes)

    def _elsewhere(
        self, row: int, end: int, length: int, random: np.random.Generator
    ) -> tuple[int, int]:
        """Row and first frame of what is heard up to a frame of a piece instead of it.

        Its beat that is next to the end has the place in its bar that the piece's own has there.
        """
        piece, beat = self._music.pieces[row], self._beats[row]
        other = int(random.choice(self._alike[piece.style, piece.bpm]))
        beats, rest = divmod(end - self._bars[row][0] + beat // 2, beat)
        first, second = self._bars[other][:2]
        begin = beats * self._beats[other] + rest - beat // 2 - length
        last = self._ends[other] - length
        in_time = range(first + begin % (second - first), last + 1, second - first)
        return other, int(random.choice(in_time))


def _near(bpm: int) -> tuple[int, ...]:
    """A tempo and those next to it."""
    index = TEMPI.index(bpm)
    return TEMPI[max(0, index - 1) : index + 2]


def _frame(tick: int, score: Score) -> int:
    """Where a tick of a piece is in its codes."""
    return round(tick / TICKS * score.piece.beat / FRAME)


def _metadata(piece: Piece) -> Metadata:
    return parse_metadata({
        "key": piece.key,
        "bpm": piece.bpm,
        "genre": piece.style,
        "instrument": ", ".join([piece.lead, *piece.band]),
    })  # fmt: skip


def unlearnt(truths: Sequence[Tensor]) -> Tensor:
    """Frames of clips of which nothing is learnt but what their piece is: (B, T).

    Args:
        truths: see `Crops.answers`.
    """
    return torch.stack([truth[len(OF_PIECE)] == UNKNOWN for truth in truths])
