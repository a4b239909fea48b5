"""What the bundled release is trained on: codes and chroma of pieces whose audio is gone."""

import math
from functools import cache

import pytest
import torch

from audiocraft.assets.store import BUNDLED
from audiocraft.errors import InputError
from audiocraft.modules.conditioners import ChromaStemConditioner, WavCondition
from tools.synthetic_music.composing import compose
from tools.synthetic_music.midi import missing
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.rendering import RATE, render
from tools.synthetic_music.words import descriptions
from tools.tiny.dataset import (
    CHROMA_EXPONENT,
    HELD_OUT,
    SECONDS,
    TRAINED,
    Settings,
    crop_chroma,
    extractor,
    grid,
    load_music,
    load_settings,
    make_dataset,
    stereo_codec,
)

CODEC = BUNDLED / "tiny/compression_state_dict.safetensors"
CONTEXT, FRAME = 12, 640
SETTINGS = Settings("a codec", CONTEXT)
STEP = math.lcm(4096, FRAME)
FILES = [(f"{HELD_OUT}-0000", 8, 1), (f"{TRAINED}-0000", 7, 1), (f"{TRAINED}-0001", 7, 1)]

renders = pytest.mark.skipif(missing() is not None, reason=f"needs {missing()}")


@cache
def conditioner():
    return ChromaStemConditioner(32, RATE, 12, CHROMA_EXPONENT, CONTEXT)


def heard(wav):
    """The strongest pitch class of each frame, as the conditioner hears a melody (2, T)."""
    melody = WavCondition(wav[None], torch.tensor([wav.shape[1]]), [RATE])
    hears = conditioner()
    return hears._compute_chroma(hears.tokenize([melody]))[0].argmax(-1)


def tune(seconds):
    """A note of another pitch on each side every 0.31 s, and noise, (2, T)."""
    generator = torch.Generator().manual_seed(3)
    time = torch.arange(seconds * RATE) / RATE
    notes = torch.randint(48, 84, (2, seconds * 4), generator=generator)
    pitch = notes[:, (time / 0.31).long()]
    phase = (440 * 2 ** ((pitch - 69) / 12) / RATE).double().cumsum(1)
    return (2 * torch.pi * phase).sin().float() + 0.05 * torch.randn(
        phase.shape, generator=generator
    )


@pytest.mark.parametrize("length", [CONTEXT * RATE, 10 * RATE, 64 * 4096])
def test_chroma_of_crops_is_what_the_conditioner_hears_in_them(length):
    wav = tune(16)
    crops = crop_chroma(extractor(), wav, STEP, length)
    starts = range(0, wav.shape[1] - length + 1, STEP)
    assert len(crops) == len(starts)
    classes = extractor()(wav.mean(0)[None])[0].argmax(-1)
    differing = 0
    for crop, start in zip(crops, starts, strict=True):
        assert crop.tolist() == heard(wav[:, start : start + length]).tolist()
        differing += int((crop != classes[start // 4096 :][: len(crop)]).sum())
    assert differing > 0  # the ends of the crops are not those of the piece


def test_a_crop_has_as_many_frames_as_the_model_hears():
    crops = crop_chroma(extractor(), tune(CONTEXT), STEP, CONTEXT * RATE)
    assert crops.shape == (1, conditioner().chroma_len)


def test_crops_begin_where_frames_of_codes_and_chroma_do():
    assert grid(extractor(), FRAME) == STEP == 32 * FRAME == 5 * 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset")
    make_dataset(path, CODEC, SETTINGS, FILES, 1)
    return path


@renders
def test_a_dataset_holds_what_encoding_its_pieces_gives(folder):
    codec = stereo_codec(CODEC)
    for kind, seed, count in ((TRAINED, 7, 2), (HELD_OUT, 8, 1)):
        music = load_music(folder, kind)
        assert music.pieces == tuple(plan(seed, count, SECONDS))
        for index, piece in enumerate(music.pieces):
            wav = render(compose(piece))
            with torch.no_grad():
                codes, _ = codec.encode(wav[None])
            assert music.codes[index].tolist() == codes[0].tolist()
            assert music.texts[index] == descriptions(piece)
            last = (len(music.chroma[index]) - 1) * STEP
            assert last + CONTEXT * RATE <= wav.shape[1] < last + STEP + CONTEXT * RATE
            for crop in (0, 3, -1):
                start = crop * STEP if crop >= 0 else last
                own = heard(wav[:, start : start + CONTEXT * RATE])
                assert music.chroma[index, crop].tolist() == own.tolist()
    assert load_settings(folder) == SETTINGS


@renders
def test_it_goes_on_from_the_files_that_are_there(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    last = folder / f"{FILES[-1][0]}.safetensors"
    last.unlink()
    kept = list(folder.glob("*.safetensors"))
    times = {path.name: path.stat().st_mtime_ns for path in kept}
    unfinished = folder / f"{last.name}.1.unfinished"
    unfinished.write_bytes(b"of a process that was killed")
    make_dataset(folder, CODEC, SETTINGS, FILES, 2)
    unfinished.unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name: path.stat().st_mtime_ns for path in kept} == times


@renders
@pytest.mark.parametrize(
    "other",
    [Settings("another", CONTEXT), Settings("a codec", 10), Settings("a codec", CONTEXT, seed=208)],
)
def test_music_of_another_kind_is_not_mixed_in(other, folder):
    with pytest.raises(InputError, match="another codec, context, choice of styles or seed"):
        make_dataset(folder, CODEC, other, FILES, 1)
    assert load_settings(folder) == SETTINGS


def test_a_folder_without_music_is_named(tmp_path):
    with pytest.raises(InputError, match="no dataset"):
        load_settings(tmp_path)
    with pytest.raises(InputError, match="no trained music"):
        load_music(tmp_path, TRAINED)
