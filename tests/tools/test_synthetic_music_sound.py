"""Synthetic music: how it sounds, and what measures hear in it."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiocraft.data.audio_utils import measure_loudness
from audiocraft.errors import AssetError, InputError
from tools.synthetic_music import __main__ as command
from tools.synthetic_music import measures, midi
from tools.synthetic_music.check import check_pieces, summary
from tools.synthetic_music.classifier import (
    WEIGHTS,
    Classifier,
    _Examples,
    classify,
    load_classifier,
    log_mels,
    train,
)
from tools.synthetic_music.composing import MelodyNote, compose
from tools.synthetic_music.dataset import write_dataset
from tools.synthetic_music.instruments import LEADS
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.rendering import RATE, render, rendered
from tools.synthetic_music.styles import STYLES

needs_fluidsynth = pytest.mark.skipif(
    midi.missing() is not None, reason=f"{midi.missing()} is missing: scripts/setup --render"
)
SEED = 9004  # nothing was learnt from


def tone(pitch, seconds, rate=RATE):
    time = torch.arange(round(seconds * rate)) / rate
    return 0.3 * torch.sin(2 * math.pi * 440 * 2 ** ((pitch - 69) / 12) * time)


@pytest.fixture(scope="module")
def pieces():
    return list(plan(SEED, 4, 10))


@pytest.fixture(scope="module")
def played(pieces):
    return list(rendered(pieces, jobs=2))


@needs_fluidsynth
def test_pieces_are_stereo_even_and_unclipped(pieces, played):
    assert [composition.piece for composition, _ in played] == pieces
    for _, wav in played:
        assert wav.shape == (2, 10 * RATE)
        assert wav.dtype == torch.float32
        assert wav.abs().max() < 0.95
        assert -20 < measure_loudness(wav, RATE) < -13
        assert measures.stereo_width(wav) > 0.05
        assert wav[:, -1].abs().max() < 1e-3  # it has come to its end
        seconds = wav.abs().amax(0).view(10, RATE).amax(1)
        assert seconds.min() > 0.01  # silent nowhere


@needs_fluidsynth
def test_the_truth_is_heard():
    figures = summary(check_pieces(SEED, 8, 20))
    assert figures["bpm"] >= 7 / 8
    assert figures["key"] >= 7 / 8
    assert figures["lead"] >= 7 / 8
    assert figures["melody_chroma"] > 0.65


@needs_fluidsynth
def test_the_melody_is_heard_best_alone(played):
    similarity = []
    for composition, mix in played:
        notes = measures.melody_chroma(composition.melody, 10, RATE)
        sounds = (mix, render(composition, melody_only=True))
        chromas = [measures.chroma_of(wav, RATE) for wav in sounds]
        similarity.append([measures.chroma_similarity(chroma, notes) for chroma in chromas])
    among_all, alone = np.mean(similarity, axis=0)
    assert 0.6 < among_all < alone
    assert alone > 0.65


@needs_fluidsynth
def test_the_same_command_writes_the_same_files(tmp_path, monkeypatch):
    arguments = ["--pieces", "2", "--seconds", "10", "--seed", "4"]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, jobs in zip(folders, ("1", "2"), strict=True):
        argv = ["synthetic_music", "--out", str(folder), *arguments, "--jobs", jobs]
        monkeypatch.setattr(sys, "argv", argv)
        command.main()
    names = [f"004-00000{n}.{kind}" for n in range(2) for kind in ("flac", "json", "mid")]
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    truth = json.loads((folders[0] / "004-000001.json").read_text())
    piece = list(plan(4, 2, 10))[1]
    assert (truth["key"], truth["bpm"], truth["style"]) == (piece.key, piece.bpm, piece.style)
    assert truth["instrument"] == [piece.lead, *piece.band]
    assert truth["description"] in truth["descriptions"]
    assert all(0 <= onset < onset + length <= 10.001 for onset, length, _ in truth["melody"])
    wav, rate = soundfile.read(folders[0] / "004-000001.flac")
    assert (wav.shape, rate) == ((320000, 2), RATE)


@needs_fluidsynth
def test_wav_holds_what_flac_holds(tmp_path):
    for kind in ("wav", "flac"):
        write_dataset(tmp_path, 4, 1, 10, audio_format=kind)
    wav, flac = (soundfile.read(tmp_path / f"004-000000.{kind}")[0] for kind in ("wav", "flac"))
    assert np.array_equal(wav, flac)
    with pytest.raises(InputError, match="no format 'mp3'; give one of flac, wav"):
        write_dataset(tmp_path, 4, 1, 10, audio_format="mp3")


def test_what_is_missing_for_rendering_is_named(pieces, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(
            AssetError, match=r"fluidsynth is missing: run scripts/setup --render\."
        ):
            render(compose(pieces[0]))
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/fluidsynth")
    monkeypatch.setattr(midi, "SOUNDFONT", Path("/nowhere/FluidR3_GM.sf2"))
    with pytest.raises(AssetError, match=r"/nowhere/FluidR3_GM\.sf2 is missing"):
        render(compose(pieces[0]))


def test_a_wrong_length_is_said_by_the_command(tmp_path, monkeypatch, capsys):
    argv = ["synthetic_music", "--out", str(tmp_path / "x"), "--seconds", "5"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        command.main()
    assert "seconds is 5; give 10 to 60." in capsys.readouterr().err


# Measures


@pytest.mark.parametrize(
    ("found", "right"), [(100, True), (103.9, True), (104.5, False), (50.5, True), (196, True),
                         (150, False), (66.7, False)],
)  # fmt: skip
def test_a_tempo_counts_with_its_double_and_its_half(found, right):
    assert measures.same_tempo(found, 100) is right


def test_tempo_and_key_of_a_plain_tune():
    beat = 60 / 96
    chords = ((57, 60, 64), (62, 65, 69), (56, 64, 71), (57, 60, 64))  # A minor
    decay = torch.linspace(1, 0, round(beat * RATE)) ** 2
    beats = [sum(tone(p, beat) for p in chord) * decay for chord in chords for _ in range(4)]
    wav = torch.cat(beats * 2)[None]
    assert measures.same_tempo(measures.bpm_of(wav, RATE), 96)
    assert measures.key_of(wav, RATE) == "A minor"


def test_width_of_stereo():
    torch.manual_seed(0)
    one, other = torch.randn(2, 100_000)
    assert measures.stereo_width(torch.stack([one, one])) == 0
    assert measures.stereo_width(torch.stack([one, other])) == pytest.approx(1, abs=0.02)
    assert measures.stereo_width(torch.stack([one, 0 * one])) == pytest.approx(1)


def test_a_tune_has_the_chroma_of_its_notes_and_of_no_other():
    pitches = (60, 64, 67, 71, 69, 65)
    melody = [MelodyNote(float(i), 1.0, pitch) for i, pitch in enumerate(pitches)]
    wav = torch.cat([tone(pitch, 1.0) for pitch in pitches])[None]
    notes = measures.melody_chroma(melody, 6.0, RATE)
    chroma = measures.chroma_of(wav, RATE)
    assert chroma.shape == notes.shape == (47, 12)
    # Frames whose window holds two notes in equal parts may fall either way.
    assert measures.chroma_similarity(chroma, notes) > 0.9
    assert measures.chroma_similarity(chroma, notes.roll(1, dims=1)) < 0.1


def test_pauses_of_a_melody_are_not_compared():
    notes = measures.melody_chroma([MelodyNote(2.0, 1.0, 62)], 6.0, RATE)
    heard = notes.any(1)
    assert notes[heard].argmax(1).unique().tolist() == [2]
    # Its own second, and half a window of 0.5 s before and after.
    assert heard.nonzero().min() * 4096 / RATE == pytest.approx(2.0 - 0.25, abs=0.13)
    assert heard.nonzero().max() * 4096 / RATE == pytest.approx(3.0 + 0.25, abs=0.13)
    chroma = torch.zeros_like(notes)
    chroma[:, 2] = 1
    assert measures.chroma_similarity(chroma, notes) == 1


# The classifier


def test_spectrograms_do_not_know_the_level():
    torch.manual_seed(0)
    wav = torch.randn(2, RATE)
    mels = log_mels(wav, RATE)
    assert mels.shape == (64, 32)
    assert torch.allclose(mels, log_mels(wav / 100, RATE), atol=1e-4)
    assert mels.max() == pytest.approx(0, abs=1e-3)
    assert log_mels(0 * wav, RATE).max() == pytest.approx(math.log(1e-6), abs=1e-3)


def test_it_learns_what_differs():
    torch.manual_seed(0)
    leads = torch.arange(48) % 3
    mels = torch.full((48, 64, 192), -12.0) + torch.randn(48, 64, 192)
    for row, lead in enumerate(leads):
        mels[row, 16 * int(lead) : 16 * int(lead) + 12] += 8
    styles = torch.arange(48) % 2
    classifier = train(_Examples(mels, leads, styles), epochs=8)
    found, _ = classifier(mels)
    assert (found.argmax(1) == leads).float().mean() > 0.95


def test_the_weights_are_small_and_those_of_the_classifier():
    assert WEIGHTS.stat().st_size < 1 << 20
    heard = classify(load_classifier(), torch.randn(2, 2 * RATE), RATE)
    assert heard.lead in LEADS
    assert heard.style in STYLES
    assert (len(heard.leads), len(heard.styles)) == (len(LEADS), len(STYLES))
    assert sum(heard.leads) == pytest.approx(1, abs=1e-5)
    assert heard.leads[list(LEADS).index(heard.lead)] == max(heard.leads)
    assert Classifier().training
