"""The crops that the bundled release's language model is trained on."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tests.tools.tiny_runs import CONTEXT, CROPS, PIECES, music
from tools.synthetic_music.pieces import TEMPI
from tools.synthetic_music.score import Score
from tools.synthetic_music.words import descriptions
from tools.tiny.crops import Crops, unlearnt
from tools.tiny.dataset import Music
from tools.tiny.lessons import OF_PIECE, UNKNOWN, answers

FRAMES, STEP = 600, 32


@pytest.fixture
def crops():
    return Crops(music(1), CONTEXT, 50)


def read(clip):
    """Row, first frame and disturbances of a clip."""
    name, start, *spans = clip.key.split()
    return int(name.split("-")[1]), int(start), [tuple(map(int, s.split("-"))) for s in spans]


def mask(spans):
    """Frames within them."""
    frames = np.arange(FRAMES)
    return np.any([np.zeros(FRAMES)] + [(frames >= a) & (frames < b) for a, b in spans], axis=0)


@cache
def bars_of(row):
    """Frames with which the bars of a piece begin."""
    piece = music(1).pieces[row]
    return [tick * round(piece.beat * 50) // 480 for tick in Score(piece).bars]


def test_no_crop_has_the_last_chord_of_a_piece():
    source, latest = music(1), {}
    # With crops up to the end.
    source = replace(source, chroma=np.tile(source.chroma, (1, 2, 1))[:, :13])
    ends = [Score(p).end * round(p.beat * 50) // 480 for p in source.pieces]
    crops = Crops(source, CONTEXT, 50)
    for update in range(1, 201):
        for clip in crops.batch(update, 4):
            row, begin, _ = read(clip)
            latest[row] = max(begin, latest.get(row, 0))
    assert len(latest) == PIECES
    assert all(
        ends[row] - FRAMES - 40 < begin <= ends[row] - FRAMES for row, begin in latest.items()
    )


def test_crops_have_the_codes_and_the_chroma_of_their_place(crops):
    source, starts, disturbed = music(1), set(), 0
    for update in range(1, 30):
        batch = crops.batch(update, 4)
        assert len(batch) == 4
        for clip in batch:
            row, begin, spans = read(clip)
            kept, codes = ~mask(spans), source.codes[row, :, begin : begin + FRAMES]
            assert np.array_equal(clip.codes.numpy()[:, kept], codes[:, kept])
            disturbed += bool(spans)
            # A frame of the chroma lasts 6.4 of the codes; crops have theirs every 32 frames.
            crop, moved = begin // STEP, round(begin % STEP / 6.4)
            heard = source.chroma[row, crop].tolist()[moved:]
            heard += source.chroma[row, min(crop + 1, CROPS - 1)].tolist()[89 : 89 + moved]
            assert clip.chroma.argmax(1).tolist() == heard
            assert clip.chroma.sum(1).eq(1).all()
            if clip.description is None:
                assert clip.metadata == {}
                assert not spans  # there is nothing to tell what else should be heard
            else:
                assert clip.description in source.texts[row]
                assert clip.metadata["bpm"] == source.pieces[row].bpm
            assert (clip.frames, clip.samples) == (FRAMES, int(CONTEXT * 32000))
            starts.add((row, begin in bars_of(row)))
    assert starts == {(row, bar) for row in range(PIECES) for bar in (True, False)}
    assert 0.6 < disturbed / (29 * 4) < 0.95  # four of five, but for those without texts


def test_what_is_right_is_asked_where_it_can_be_known(crops):
    source = music(1)
    for update in range(1, 30):
        for clip in crops.batch(update, 4):
            row, begin, spans = read(clip)
            whole = answers(source.pieces[row])[:, begin : begin + FRAMES].astype(int)
            at = np.minimum((np.arange(FRAMES) / 6.4).round().astype(int), 93)
            whole = np.concatenate([whole, clip.chroma.argmax(1).numpy()[at][None]])
            unheard = begin not in bars_of(row)  # where its beats are is not known at first
            if unheard:
                whole[len(OF_PIECE) : -1, :100] = UNKNOWN
            whole[len(OF_PIECE) :, mask(spans)] = UNKNOWN
            truth = crops.answers(clip)
            assert np.array_equal(truth.numpy(), whole)
            expected = mask([*spans, (0, 100)] if unheard else spans)
            assert np.array_equal(unlearnt([truth])[0].numpy(), expected)


def test_a_disturbance_is_music_of_its_style_and_near_its_tempo_in_time_at_its_end():
    """Of two pieces that are alike, one faster, one even faster, and one of another style."""
    first, stranger = music(1, 2).pieces
    assert first.style != stranger.style
    index = TEMPI.index(first.bpm)
    faster, fastest = TEMPI[index + 1 : index + 3]
    pieces = [replace(first, number=n, bpm=bpm) for n, bpm in ((2, first.bpm), (3, faster))]
    pieces = [first, stranger, *pieces, replace(first, number=4, bpm=fastest)]
    chroma = music(1, 2).chroma
    source = Music(
        tuple(pieces),
        tuple(descriptions(piece) for piece in pieces),
        np.random.default_rng(5).integers(0, 2**16, (5, 8, 1000), dtype=np.uint16),
        np.concatenate([chroma, chroma[[0, 0, 0]]]),
    )
    bars = [[tick * round(p.beat * 50) // 480 for tick in Score(p).bars] for p in pieces]
    beats = [round(piece.beat * 50) for piece in pieces]
    ends = [Score(p).end * b // 480 for p, b in zip(pieces, beats, strict=True)]
    crops, found = Crops(source, CONTEXT, 50), set()
    for update in range(1, 401):
        for clip in crops.batch(update, 2):
            row, start, spans = read(clip)
            for begin, end in spans if len(spans) == 1 else ():
                assert 15 <= end - begin < 150
                heard = clip.codes[:, begin:end].numpy()
                # Codes are random, so those of a frame are nowhere else.
                ((at, place),) = np.argwhere((source.codes == heard[None, :, :1]).all(1))
                assert np.array_equal(source.codes[at, :, place : place + end - begin], heard)
                found.add((row, int(at)))
                assert place + end - begin <= ends[at]  # its last chord would end the music
                own, other = start + end - bars[row][0], place + end - begin - bars[at][0]
                count = (own + beats[row] // 2) // beats[row]  # of the beat next to the end
                after = own - count * beats[row]
                assert (other - after) % (4 * beats[at]) == count % 4 * beats[at]
    alike = {(a, b) for a in (0, 2) for b in (0, 2, 3)}
    assert found == alike | {(3, b) for b in (0, 2, 3, 4)} | {(4, 3), (4, 4), (1, 1)}


def test_what_is_measured_is_not_disturbed(crops):
    clips = crops.measured(PIECES)
    assert [read(clip)[2] for clip in clips] == [[]] * PIECES
    assert [clip.key for clip in clips] == [clip.key for clip in crops.measured(PIECES)]


def test_crops_of_an_update_depend_on_its_number_alone(crops):
    first = [clip.key for clip in crops.batch(5, 4)]
    crops.batch(9, 4)
    assert [clip.key for clip in crops.batch(5, 4)] == first
    assert [clip.key for clip in crops.batch(6, 4)] != first


def test_texts_are_no_longer_than_the_first_of_their_batch_where_they_can_be(crops):
    texts = {text: len(text.split()) for wordings in music(1).texts for text in wordings}
    shortest = max(min(map(texts.get, wordings)) for wordings in music(1).texts)
    firsts = set()
    for update in described(crops):
        first, *rest = (texts[clip.description] for clip in crops.batch(update, 6))
        assert all(length <= max(first, shortest) for length in rest)
        firsts.add(first)
    assert min(firsts) < 8
    assert max(firsts) > 15


def described(crops):
    """The updates of 200 that have texts: nearly all, and whole batches."""
    batches = {update: crops.batch(update, 6) for update in range(1, 201)}
    texts = {update: {clip.description for clip in batch} for update, batch in batches.items()}
    without = [update for update, found in texts.items() if None in found]
    assert all(texts[update] == {None} for update in without)
    assert 1 <= len(without) <= 20
    return texts.keys() - without


def test_each_piece_comes_once_in_a_pass_and_beginnings_come_oftener(crops):
    found = [read(clip)[:2] for update in range(1, 401) for clip in crops.batch(update, 2)]
    for start in range(0, len(found), PIECES):
        assert {row for row, _ in found[start : start + PIECES]} == set(range(PIECES))
    beginnings = np.mean([start == bars_of(row)[0] for row, start in found])
    assert 0.25 < beginnings < 0.6  # 0.2, and of those of any bar, of some two or three
