"""Synthetic music: what is planned, what is composed, what is said of it."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from audiocraft.errors import InputError
from tools import score_labels
from tools.synthetic_music.composing import Composition, compose
from tools.synthetic_music.instruments import BASSES, CHORDS, LEADS
from tools.synthetic_music.midi import DRUM_CHANNEL
from tools.synthetic_music.pieces import KEYS, TEMPI, plan
from tools.synthetic_music.score import BASS, COMP, LEAD, Score
from tools.synthetic_music.styles import STYLES
from tools.synthetic_music.words import descriptions

MAJOR, MINOR = {0, 2, 4, 5, 7, 9, 11}, {0, 2, 3, 5, 7, 8, 10, 11}  # the minor with both sevenths


@pytest.fixture(scope="module")
def pieces():
    return list(plan(seed=5, count=240, seconds=20))


@pytest.fixture(scope="module")
def compositions(pieces):
    return [compose(piece) for piece in pieces]


def test_keys_leads_and_tempi_are_even(pieces):
    assert set(Counter(piece.key for piece in pieces[:24]).values()) == {1}
    assert {piece.key for piece in pieces[:24]} == set(KEYS)
    assert Counter(piece.lead for piece in pieces) == dict.fromkeys(LEADS, 20)
    for start in range(0, 240, 24):
        block = pieces[start : start + 24]
        assert Counter(piece.bpm for piece in block) == dict.fromkeys(TEMPI, 2)
    assert all(60 <= bpm <= 180 for bpm in TEMPI)


def test_every_style_is_played_at_its_tempi_by_its_band(pieces):
    assert {piece.style for piece in pieces} == set(STYLES)
    for piece in pieces:
        style = STYLES[piece.style]
        assert style.slowest <= piece.bpm <= style.fastest
        assert piece.band[0] in style.bass
        assert piece.band[1] in style.chords
        assert piece.has_drums == bool(style.pattern.drums)


def test_accompaniments_never_sound_like_leads():
    band = {**BASSES, **CHORDS}
    assert len(band) + len(LEADS) >= 12
    assert not {sound.program for sound in band.values()} & {s.program for s in LEADS.values()}
    volumes = [sound.volume(0.0) for sound in LEADS.values()]
    assert max(volumes) < 127  # else one would be softer than the others


def test_a_shorter_plan_begins_a_longer_one(pieces):
    assert list(plan(5, 30, 20)) == pieces[:30]
    assert list(plan(6, 30, 20)) != pieces[:30]


def test_a_style_is_left_out_and_all_else_stays(pieces):
    without = list(plan(5, 240, 20, exclude_style="waltz"))
    assert any(piece.style == "waltz" for piece in pieces)
    for one, other in zip(pieces, without, strict=True):
        if one.style != "waltz":
            assert other == one
        else:
            assert other.style != "waltz"
            assert replace(other, style=one.style, band=one.band) == one


@pytest.mark.parametrize("seconds", [9.9, 60.1])
def test_lengths_out_of_range_are_refused(seconds):
    with pytest.raises(InputError, match="give 10 to 60"):
        list(plan(1, 1, seconds))


def test_a_style_that_does_not_exist_is_not_excluded():
    with pytest.raises(InputError, match="no style 'zydeco' to exclude; give one of ballad"):
        list(plan(1, 1, exclude_style="zydeco"))


def test_equal_pieces_get_equal_notes(pieces, compositions):
    again = compose(pieces[3])
    assert again.notes == compositions[3].notes
    assert again.midi() == compositions[3].midi()
    assert compose(replace(pieces[3], number=4)).notes != again.notes


def test_the_midi_file_has_the_tempo(compositions):
    for composition in compositions[:24]:
        tempo, share = score_labels.main_tempo(composition.midi())
        assert tempo == pytest.approx(60 / composition.piece.beat, rel=1e-4)
        assert tempo == pytest.approx(composition.piece.bpm, rel=0.01)
        assert share == pytest.approx(1)


def test_notes_begin_and_end_on_a_grid_if_asked(compositions):
    for composition in compositions[:24]:
        midi = composition.midi(grid=20)
        assert score_labels.main_tempo(midi)[0] == pytest.approx(125)  # a tick is a millisecond
        events = note_events(midi)
        assert all(time % 20 == 0 for time, *_ in events)
        sounding = Counter()
        for _, channel, pitch, velocity in events:
            sounding[channel, pitch] += 1 if velocity else -1
        assert not any(sounding.values())  # what begins ends
        moved = sorted((channel, pitch, time) for time, channel, pitch, v in events if v)
        tick = 1000 * composition.piece.beat / 480
        exact = sorted(
            (channel, pitch, start * tick) for start, channel, pitch, *_ in composition.notes
        )
        assert len(moved) == len(exact)
        for one, other in zip(moved, exact, strict=True):
            assert one == (*other[:2], pytest.approx(other[2], abs=10.01))


def test_what_is_played_in_a_beat_is_played_in_others_at_the_same_frames(compositions):
    for composition in compositions[:24]:
        beat = round(1000 * composition.piece.beat)
        assert beat % 20 == 0
        events = note_events(composition.midi(grid=20))
        places = {tick % 480 for tick, *_ in composition.notes}
        frames = {time % beat for time, _, _, velocity in events if velocity}
        assert len(frames) <= len(places)


def note_events(midi):
    """Tick, channel, pitch and velocity (0 at its end) of each note, as they are in the file."""
    track, now, place, events = midi[22:], 0, 0, []
    while place < len(track):
        delta = 0
        while track[place] & 0x80:
            delta = delta << 7 | track[place] & 0x7F
            place += 1
        now += delta << 7 | track[place]
        place += 1
        status = track[place]
        if status == 0xFF:
            place += 3 + track[place + 2]
        elif status >> 4 in {8, 9}:
            velocity = track[place + 2] if status >> 4 == 9 else 0
            events.append((now, status & 15, track[place + 1], velocity))
            place += 3
        else:
            place += 2 if status >> 4 == 0xC else 3
    return events


def test_all_tones_are_of_the_key(compositions):
    for composition in compositions:
        piece = composition.piece
        scale = MAJOR if piece.mode == "major" else MINOR
        walking = piece.style == "swing"  # its bass steps between the tones
        for _, channel, pitch, _, _ in composition.notes:
            if channel != DRUM_CHANNEL and not (walking and channel == BASS):
                assert (pitch - piece.tonic) % 12 in scale, piece


def test_a_piece_begins_without_its_lead_and_ends_on_the_tonic(compositions):
    rests = []
    for composition in compositions:
        piece = composition.piece
        beat = piece.beat
        end = max(note[0] for note in composition.notes)
        last = [note for note in composition.notes if note[0] == end]
        pitches = {
            channel: {n[2] for n in last if n[1] == channel} for channel in (LEAD, BASS, COMP)
        }
        third = 4 if piece.mode == "major" else 3
        assert {pitch % 12 for pitch in pitches[LEAD] | pitches[BASS]} == {piece.tonic}
        assert {(pitch - piece.tonic) % 12 for pitch in pitches[COMP]} == {0, third, 7}
        over = (end + last[0][4]) / 480 * beat
        assert over == pytest.approx(piece.seconds, abs=beat / 240)
        assert 1 <= piece.seconds - end / 480 * beat <= 1 + beat
        rests.append(composition.melody[0].onset)
    assert sum(rest > 1.5 for rest in rests) > len(rests) / 2


def test_parts_stay_in_their_registers_and_the_lead_plays_one_note_at_a_time(compositions):
    for composition in compositions:
        lowest = LEADS[composition.piece.lead].lowest
        pitches = [note.pitch for note in composition.melody]
        assert lowest - 6 <= min(pitches)
        assert max(pitches) <= lowest + 26
        for before, after in itertools.pairwise(composition.melody):
            assert before.onset + before.duration <= after.onset + 1e-3
        channels = {note[1] for note in composition.notes}
        assert (DRUM_CHANNEL in channels) == composition.piece.has_drums


def test_motifs_return_and_so_do_phrases(pieces):
    for piece in pieces[:48]:
        long = replace(piece, seconds=60)
        score, slots = Score(long), Counter()
        played = {}
        for tick, channel, pitch, _, length in compose(long).notes:
            if channel == LEAD and tick < score.end:
                slot, offset = divmod(tick - score.start, score.slot)
                slots[slot] += 1 << offset // 40
                played.setdefault(slot, []).append((offset, pitch, length))
        # Nine of sixteen chords have the first motif, in its rhythm.
        assert Counter(slots.values()).most_common(1)[0][1] >= 0.4 * len(slots), piece
        # The second phrase is the fourth, note for note.
        if len(score.chords) > 16:
            assert [played[slot] for slot in range(4, 8)] == [played[s] for s in range(12, 16)]
            assert [played[slot] for slot in range(4, 8)] != [played[s] for s in range(8, 12)]


def test_the_melody_alone(compositions):
    composition = next(c for c in compositions if c.piece.has_drums)
    solo = Composition(composition.piece, tuple(n for n in composition.notes if n[1] == LEAD))
    assert composition.midi(melody_only=True) == solo.midi()
    assert len(solo.midi()) < len(composition.midi())


def test_descriptions_say_what_is_true(pieces):
    firsts = set()
    for piece in pieces:
        texts = descriptions(piece)
        assert texts == descriptions(piece)
        assert len(set(texts)) == len(texts) >= 12
        numbers = {word for text in texts for word in text.split() if word.isdigit()}
        assert numbers == {str(piece.bpm)}
        assert sum(piece.lead in text for text in texts) >= 12
        assert sum(piece.mode in text for text in texts) >= 12
        assert not any("{" in text or f" a {v}" in text for text in texts for v in "aeiou")
        firsts.add(texts[0].replace(str(piece.bpm), "").split(" ")[0])
    assert len(firsts) > 12


def test_a_key_is_called_by_either_of_its_names():
    names = {
        name
        for piece in plan(2, 240)
        if piece.key == "Eb minor"
        for name in ("Eb minor", "D# minor")
        if any(name in text for text in descriptions(piece))
    }
    assert names == {"Eb minor", "D# minor"}
