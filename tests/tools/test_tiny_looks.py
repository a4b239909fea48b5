"""Where two heads of the language model are told to look."""

import math

import pytest
import torch

from audiocraft.modules.transformer import SelfAttention, TransformerConfig, sin_embedding
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.styles import STYLES
from tools.tiny.lessons import answers
from tools.tiny.looks import SPANS, Looks

DIM, HEADS, PREFIX, FRAMES = 64, 4, 7, 260
PIECES = [piece for piece in plan(5, 48, 16.0) if STYLES[piece.style].pattern.beats == 4]
TRUTHS = [torch.from_numpy(answers(piece)[:, :FRAMES]).long() for piece in PIECES]


def attention(seed):
    torch.manual_seed(seed)
    layer = SelfAttention(TransformerConfig(DIM, HEADS, 1))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return layer


def attended(layer, x):
    """What each of the heads that are told looks at, of all that came before: (B, 2, S, S)."""
    width = DIM // HEADS
    q, k, _ = (x @ layer.in_proj_weight.T).chunk(3, -1)
    found = []
    for head in range(len(SPANS)):
        part = slice(head * width, (head + 1) * width)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        steps = range(logits.shape[1])
        heard = torch.tensor([[other <= step for other in steps] for step in steps])
        found.append(logits.where(heard, -torch.inf).softmax(-1))
    return torch.stack(found, 1)


def test_looks_change_gradients_and_nothing_else():
    layer, looks = attention(1), Looks(weight=0.5)
    inputs = torch.randn(2, PREFIX + FRAMES + 1, DIM)
    plain = layer(inputs, 0, None)
    layer.register_forward_pre_hook(looks.hook)
    assert torch.equal(layer(inputs, 0, None), plain)  # nothing is asked

    looks.ask(TRUTHS[:2])
    asked = layer(inputs.requires_grad_(), 0, None)
    assert torch.equal(asked, plain)
    assert torch.equal(layer(inputs, 0, None), plain)  # it is asked once
    (asked * 0).sum().backward()
    weights, nats, right = attended(layer, inputs), [], []
    for row, piece in enumerate(PIECES[:2]):
        beat = round(piece.beat * 50)
        for head, span in enumerate((beat, 4 * beat)):
            for frame in range(span, FRAMES):
                step = PREFIX + frame  # which predicts the frame
                there = step + 1 - span  # which hears the one that was a span before
                nats.append(-weights[row, head, step, there].log())
                right.append((head, float(weights[row, head, step].argmax() == there)))
    expected = torch.autograd.grad(
        0.5 * torch.stack(nats).mean(), (inputs, layer.in_proj_weight), retain_graph=True
    )
    torch.testing.assert_close(inputs.grad, expected[0])
    torch.testing.assert_close(layer.in_proj_weight.grad, expected[1])
    shares = [[value for of, value in right if of == head] for head in (0, 1)]
    found = [*looks.results().values()]
    assert found == [round(sum(share) / len(share), 3) for share in shares]


def test_a_head_learns_where_to_look():
    beat = PIECES[0].beat
    truths = [truth for piece, truth in zip(PIECES, TRUTHS, strict=True) if piece.beat == beat]
    layer, looks = attention(2), Looks(weight=1.0)
    layer.register_forward_pre_hook(looks.hook)
    steps = torch.arange(PREFIX + FRAMES + 1)
    inputs = sin_embedding(steps, DIM).expand(len(truths), -1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for update in range(150):
        looks.ask(truths)
        optimizer.zero_grad()
        (layer(inputs, 0, None) * 0).sum().backward()
        if not update:
            assert max(looks.results().values()) < 0.1
        optimizer.step()
    assert min(looks.results().values()) > 0.9


def test_a_bar_that_is_longer_than_the_clip_is_not_asked_for():
    layer, looks = attention(3), Looks(weight=1.0)
    layer.register_forward_pre_hook(looks.hook)
    inputs = torch.randn(1, PREFIX + 11, DIM).requires_grad_()
    looks.ask([TRUTHS[0][:, :10]])  # shorter than a beat too
    (layer(inputs, 0, None) * 0).sum().backward()
    assert [*looks.results().values()] == pytest.approx([0, 0])
    assert not inputs.grad.any()
