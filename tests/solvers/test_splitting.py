"""A batch is trained alike however it is split: the recipe's parts put together."""

import pytest
import torch

from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition, null_wav
from audiocraft.modules.lora import attach, lora_config
from audiocraft.solvers.conditions import (
    ConditionSettings,
    batch_random,
    clip_random,
    draw_drops,
    drop_conditions,
    drop_words,
    merge_metadata,
    take_rows,
)
from audiocraft.solvers.ema import Ema
from audiocraft.solvers.loss import clip_mask, codebook_loss, count_targets
from audiocraft.solvers.optimizers import OptimizerSettings, build_optimizer, parameter_groups
from audiocraft.solvers.schedules import lr_factor, set_lr
from tests.models.test_lm import lm

FRAMES, LENGTHS = 20, torch.tensor([20, 7, 20, 13, 20, 20, 5, 18])
DESCRIPTIONS = [
    "a slow piano song with strings and a choir of many voices",
    "drums",
    "90 bpm rock",
    None,
    "a calm song. It ends loud.",
    "guitar",
    "",
    "electronic dance music, 128 bpm",
]
METADATA = {"genre": "rock", "bpm": 120.0, "moods": ["calm", "dark"], "key": "c minor"}
SETTINGS = ConditionSettings(attributes=(("wav", "self_wav", 0.5),))


def items_of(update, rows, *, melody):
    """Conditions of some clips in an update, before anything is dropped for the whole batch."""
    items = []
    for row in rows:
        rng = clip_random(2036, update, f"clip {row}")
        text = merge_metadata(DESCRIPTIONS[row], METADATA, SETTINGS, rng)
        item = ConditioningAttributes(text={"description": drop_words(text, 0.3, rng.random)})
        if melody:
            generator = torch.Generator().manual_seed(row)
            wav = torch.randn(1, 1, 16384 + 3000 * row, generator=generator)
            length = torch.tensor([wav.shape[-1]])
            item.wav["self_wav"] = (
                null_wav(32000) if row % 3 == 0 else WavCondition(wav, length, [32000])
            )
        items.append(item)
    return items


def train(name, optimizer_name, lr, rank, size, updates=20):
    """Losses and final weights of a run in parts of `size` clips."""
    model = lm(name).train()
    if rank:
        attach(model, lora_config(rank), torch.Generator().manual_seed(0))
    groups = parameter_groups(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(OptimizerSettings(optimizer_name, lr), groups)
    ema = Ema(trained, every=5)
    codes = torch.randint(32, (8, 4, FRAMES), generator=torch.Generator().manual_seed(1))
    mask = clip_mask(LENGTHS, FRAMES)
    counts = count_targets(model.pattern_provider.delays, FRAMES, LENGTHS.tolist())
    provider, melody = model.condition_provider, name == "lm_tiny_melody"
    losses, dropped = [], 0
    for update in range(1, updates + 1):
        drops = draw_drops(SETTINGS, batch_random(2036, update).random)
        dropped += drops.everything
        # Every process makes the texts of all clips, which gives the padding.
        items = drop_conditions(items_of(update, range(8), melody=melody), drops)
        tokenized = provider.tokenize(items)
        set_lr(optimizer, lr * lr_factor("cosine", update, 8, 100))
        optimizer.zero_grad()
        parts = []
        for first in range(0, 8, size):
            rows = slice(first, first + size)
            output = model.compute_predictions(
                codes[rows], (), provider(take_rows(tokenized, rows))
            )
            loss = codebook_loss(output, codes[rows], mask[rows])
            loss.share(counts).backward()
            parts.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        ema.after(update)
        losses.append(sum(parts[1:], parts[0]).total.item())
    assert 0 < dropped < updates
    return losses, {name: p.detach() for name, p in trained.items()}, ema.average


@pytest.mark.parametrize(
    ("name", "optimizer", "lr", "rank"),
    [
        ("lm_tiny_text_mono", "adamw", 1e-3, 0),
        ("lm_tiny_text_mono", "dadam", 1.0, 0),
        ("lm_tiny_text_mono", "prodigy", 1.0, 0),
        ("lm_tiny_text_mono", "adamw", 1e-3, 4),
        ("lm_tiny_melody", "adamw", 1e-3, 0),
    ],
)
def test_micro_batches_of_2_train_like_a_batch_of_8(name, optimizer, lr, rank):
    whole, weights, average = train(name, optimizer, lr, rank, 8)
    split, others, other_average = train(name, optimizer, lr, rank, 2)
    assert split == pytest.approx(whole, abs=1e-6)
    assert whole[-1] < whole[0]
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=0, atol=1e-5)
        torch.testing.assert_close(other_average[key], average[key], rtol=0, atol=1e-5)


def test_a_clips_text_depends_on_itself_alone():
    alone = [items_of(7, [row], melody=False)[0] for row in range(8)]
    assert alone == items_of(7, range(8), melody=False)
    assert alone[::-1] == items_of(7, range(7, -1, -1), melody=False)
    assert alone != items_of(8, range(8), melody=False)
