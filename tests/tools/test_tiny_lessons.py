"""What the language model is asked besides the codes, and the head that it begins with."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from audiocraft.models.builders import get_lm_model
from audiocraft.modules.conditioners import T5Conditioner
from tests.golden_data import GOLDEN
from tools.synthetic_music.composing import compose
from tools.synthetic_music.pieces import KEYS, TEMPI, plan
from tools.tiny import text_encoder
from tools.tiny.alignment import align
from tools.tiny.config import MELODY, Shape, lm_config
from tools.tiny.lessons import OF_PIECE, QUESTIONS, UNKNOWN, Lessons, answers, answers_of

PIECES = list(plan(5, 24, 16.0))
ROWS = {name: row for row, name in enumerate(QUESTIONS)}


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.name)
def test_answers_are_those_of_the_notes(piece):
    found = {name: answers(piece)[row] for name, row in ROWS.items() if name != "chroma"}
    assert all(len(row) == 800 for row in found.values())
    assert all(row.max() < QUESTIONS[name] for name, row in found.items())
    assert {KEYS[key] for key in found["key"]} == {piece.key}
    assert {TEMPI[bpm] for bpm in found["bpm"]} == {piece.bpm}
    beat = round(piece.beat * 50)
    begins = np.flatnonzero(found["frame_of_beat"] == 0)
    assert set(np.diff(begins)) == {beat}
    assert set(np.diff(found["frame_of_beat"].astype(int))) == {1, 1 - beat}
    begins = begins[begins > 0]
    assert set(np.diff(found["beat_of_bar"].astype(int))[begins - 1]) <= {1, *range(-7, 0)}
    melody = compose(piece).melody
    for note in melody[1:-1]:
        frame = round(note.onset * 50 + 1e-6)
        near = slice(frame - 1, frame + 2)  # swung notes are rounded to whole frames
        assert found["begins_lead"][near].any()
        assert note.pitch % 12 in found["tune"][near]
    assert found["begins_lead"].sum() == len({round(note.onset, 3) for note in melody})
    assert found["begins_kick"].any() == piece.has_drums


def test_a_note_that_comes_next_is_the_answer_before_it_sounds():
    piece = PIECES[0]
    first = compose(piece).melody[0]
    before = answers(piece)[ROWS["tune"], : int(first.onset * 50)]
    assert set(before) == {first.pitch % 12}


def test_lessons_change_gradients_and_nothing_else():
    torch.manual_seed(1)
    layer, lessons = nn.Linear(16, 16), Lessons(16, weight=2.0)
    layer.register_forward_hook(lessons.hook)
    inputs = torch.randn(2, 9, 16)
    plain = layer(inputs)
    targets = [torch.zeros(len(QUESTIONS), 5, dtype=torch.long) for _ in range(2)]
    lessons.ask(targets)
    assert torch.equal(layer(inputs), plain)
    loss = layer(inputs)  # it is asked once
    assert torch.equal(loss, plain)

    lessons.ask(targets)
    layer(inputs).sum().mul(0).backward()
    got = layer.weight.grad.clone()
    hidden = F.linear(inputs, layer.weight, layer.bias)[:, -6:-1]  # the last five but one
    logits = lessons.heads(F.layer_norm(hidden, (16,)))
    parts = logits.split([*QUESTIONS.values()], -1)
    mean = sum(-part.log_softmax(-1)[..., 0].mean() for part in parts) / len(parts)
    (expected,) = torch.autograd.grad(2.0 * mean, layer.weight, retain_graph=True)
    torch.testing.assert_close(got, expected)

    layer.weight.grad = None
    for target in targets:
        target[1:] = UNKNOWN
    targets[0][0, :2] = UNKNOWN
    lessons.ask(targets)
    layer(inputs).sum().mul(0).backward()
    nats = -parts[0].log_softmax(-1)[..., 0]
    asked = (nats[0, 2:].sum() + nats[1].sum()) / 8
    (expected,) = torch.autograd.grad(2.0 * asked / len(parts), layer.weight)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_lessons_are_learnt():
    torch.manual_seed(1)
    layer, lessons = nn.Linear(len(PIECES), 32), Lessons(32, weight=1.0)
    layer.register_forward_hook(lessons.hook)
    inputs = torch.eye(len(PIECES))[:, None].expand(-1, 101, -1)
    truths = [torch.from_numpy(answers(piece)[:, :100]).long() for piece in PIECES]
    truths = [torch.cat([truth, truth[:1] % 12]) for truth in truths]
    optimizer = torch.optim.Adam([*layer.parameters(), *lessons.parameters()], 0.05)
    for _ in range(60):
        lessons.ask(truths)
        optimizer.zero_grad()
        (0 * layer(inputs).sum()).backward()
        optimizer.step()
    found = lessons.results()
    assert all(found[name] == 1 for name in OF_PIECE)
    assert found["frame_of_beat"] < 0.5  # it can't be told from what there is


@pytest.mark.parametrize("words", [4, 16])
def test_the_first_head_looks_at_the_melody_of_now(words):
    torch.manual_seed(2)
    shape = Shape()
    lm = get_lm_model(OmegaConf.create(lm_config(shape, 12, 64)), GOLDEN / "t5_tiny").eval()
    melody, steps, ratio = 94, 600, 6.4
    align(lm, MELODY, melody, ratio, steps)
    classes = torch.randint(0, 12, (1, 24)).repeat_interleave(4, 1)[:, :melody]  # notes of 0.5 s
    chroma = F.one_hot(classes, 12).float()
    with torch.no_grad():
        prefix = lm.condition_provider.conditioners[MELODY].output_proj(chroma)
        codes = torch.randint(0, 64, (1, 8, steps))
        hidden = torch.cat([prefix, 0.3 * torch.randn(1, words, shape.dim), lm._embed(codes)], 1)
        attention, values = lm.transformer.layers[0].self_attn, []
        attention.out_proj.register_forward_pre_hook(lambda _, given: values.append(given[0]))
        out = lm.transformer(hidden)
    seen = values[0][0, -steps:, :12]
    now = classes[0][(torch.arange(steps) / ratio).long()]
    before = classes[0][((torch.arange(steps) / ratio).long() - 1).clamp(min=0)]
    after = classes[0][((torch.arange(steps) / ratio).long() + 1).clamp(max=melody - 1)]
    told = seen.argmax(1)
    assert ((told == now) | (told == before) | (told == after)).float().mean() > 0.9
    assert (attention.out_proj.weight[:, :64] == 0).all()
    assert out.isfinite().all()


def test_each_token_of_a_text_says_all_of_it_once_taught(tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoder, "_STEPS", 300)
    folder = tmp_path / "t5"
    text_encoder.make_text_encoder(folder)

    def difference():
        """Between one token of texts that differ in another one's key."""
        reads = T5Conditioner(partial(Path, folder), 128, 32)
        tokenizer, encoder = reads.load()
        texts = [f"120 bpm piano rock in {key} major" for key in ("C", "F#")]
        tokens = tokenizer(texts, return_tensors="pt")
        with torch.no_grad():
            (one, other) = encoder(**tokens).last_hidden_state[:, 2]
        return float((one - other).norm() / one.norm())

    before = difference()
    loss = text_encoder.teach_text_encoder(folder, PIECES)
    chance = sum(np.log(count) for count in OF_PIECE.values()) / len(OF_PIECE)
    assert loss < 0.6 * chance
    assert difference() > 2 * before
    tokenizer, encoder = T5Conditioner(partial(Path, folder), 128, 32).load()
    numbers = encoder.shared.weight[tokenizer("90 91 92 100").input_ids[:4]]
    assert [torch.equal(numbers[1], number) for number in numbers] == [True, True, True, False]
    assert len(answers_of(PIECES[0])) == len(OF_PIECE)
