"""The text encoder of the bundled release: its tokenizer, its start, and what is written of it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from audiocraft.assets.store import BUNDLED
from audiocraft.modules.conditioners import T5Conditioner
from tests.project import ROOT
from tools.synthetic_music.pieces import TEMPI, plan
from tools.synthetic_music.words import descriptions
from tools.tiny.text_encoder import build_tokenizer, make_text_encoder, save_text_encoder

TEXTS = (
    "90 bpm piano ballad in C minor",
    "F# major, 174 bpm, drum and bass",
    None,
    "Ünknöwn wörds",
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "t5"
    make_text_encoder(path)
    return path


def conditioner(folder, dim=128):
    torch.manual_seed(0)
    return T5Conditioner(partial(Path, folder), dim, 32)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("90 bpm Piano  ballad in C minor", "90 bpm piano ballad in c minor"),
        ("key: Bb major. bpm: 120.0", "key: bb major. bpm: 120.0"),
        ("Ünïcode 日本\nžluťoučký _x_ \U0001f3b9", "ünïcode 日本 žluťoučký x \U0001f3b9"),
        ("zyxwv(12,345)!", "zyxwv(12,345)!"),
    ],
)
def test_any_text_has_tokens_and_comes_back_from_them(text, normal, tokenizer):
    ids = tokenizer.encode(text).ids
    assert tokenizer.token_to_id("<unk>") not in ids
    assert tokenizer.decode(ids[:-1]) == normal
    assert tokenizer.id_to_token(ids[-1]) == "</s>"


def test_words_of_descriptions_are_a_token_each(tokenizer):
    for planned in plan(77, 48):
        for text in descriptions(planned):
            *tokens, _ = tokenizer.encode(text).tokens
            assert all(piece[0] in "\u2581," for piece in tokens), tokens
            assert len(tokens) == len(text.split()) + text.count(",")
            assert f"\u2581{planned.bpm}" in tokens or str(planned.bpm) not in text


def test_the_same_code_makes_the_same_files(folder, tmp_path):
    """In another process, whose sets have another order."""
    command = "from pathlib import Path; from tools.tiny.text_encoder import make_text_encoder; "
    command += f"make_text_encoder(Path({str(tmp_path / 't5')!r}))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", command], check=True, env=environment)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "t5").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "t5" / name).read_bytes(), name


def test_it_is_small(folder):
    _, encoder = conditioner(folder).load()
    assert sum(weight.numel() for weight in encoder.parameters()) < 1_000_000


def test_near_tempi_begin_alike_and_far_ones_do_not(folder, tokenizer):
    _, encoder = conditioner(folder).load()
    weight = encoder.shared.weight

    def likeness(one, other):
        rows = [weight[tokenizer.token_to_id(f"\u2581{number}")] for number in (one, other)]
        return float(torch.cosine_similarity(*rows, dim=0))

    assert likeness(120, 121) > 0.9
    assert likeness(120, 130) < 0.5
    assert all(abs(likeness(120, other)) < 0.5 for other in (60, 80, 100, 140, 180))
    assert 0.7 < float(weight.std()) < 1.3  # all begin at the same size


@pytest.mark.parametrize(
    ("number", "tempo"),
    [
        *[(tempo, tempo) for tempo in TEMPI],
        *[(90, 91), (88, 91), (128, 130), (140, 143), (174, 176), (180, 176), (58, 60)],
        *[(45, 91), (50, 100), (200, 100), (220, 111)],
    ],
)
def test_the_bundled_one_reads_a_number_as_the_tempo_next_to_it(number, tempo, tokenizer):
    """One that no piece has was followed by none of 24 clips."""
    _, encoder = conditioner(BUNDLED / "tiny/t5").load()
    read, known = (
        encoder.shared.weight[tokenizer.token_to_id(f"\u2581{n}")] for n in (number, tempo)
    )
    assert torch.equal(read, known)


def test_what_is_written_gives_the_same_embeddings(folder, tmp_path):
    trained = conditioner(folder)
    tokenizer, encoder = trained.load()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.mul_(
                1 + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    save_text_encoder(tmp_path / "t5", tokenizer, encoder)
    read = conditioner(tmp_path / "t5")
    read.load_state_dict(trained.state_dict())
    first = conditioner(folder)
    first.load_state_dict(trained.state_dict())
    with torch.no_grad():
        (ours, mask), (theirs, theirs_mask) = (c(c.tokenize(TEXTS)) for c in (read, trained))
        (before, _) = first(first.tokenize(TEXTS))
    assert torch.equal(ours, theirs)
    assert torch.equal(mask, theirs_mask)
    assert not torch.allclose(ours, before)
