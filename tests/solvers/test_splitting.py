"""A batch is trained alike however it is split into micro-batches."""

from dataclasses import replace

import pytest

from audiocraft.solvers.conditions import Drops, batch_random, draw_drops
from tests.solvers.training import CODEBOOKS, SETTINGS, Case, clips, close, train


@pytest.mark.parametrize(
    "case",
    [
        Case(kind="mono"),
        Case("dadam", "mono"),
        Case("prodigy", "mono"),
        Case(kind="mono", lora_rank=4),
        Case(),
    ],
)
def test_micro_batches_of_2_train_like_a_batch_of_8(case, tmp_path):
    """Losses, gradients, weights and their average."""
    whole, split = (train(replace(case, micro=micro), tmp_path) for micro in (8, 2))
    close(split["losses"], whole["losses"], 1e-5)
    close(split["evaluated"], whole["evaluated"], 1e-3)  # of sums over 100 times as much
    assert split["counts"] == whole["counts"]
    close(split["exported"], whole["exported"], 1e-3)


def test_the_batches_that_are_split_are_dropped_in_every_way():
    drops = {
        draw_drops(SETTINGS.conditions, batch_random(SETTINGS.seed, update).random)
        for update in range(1, SETTINGS.updates + 1)
    }
    melody = frozenset({"self_wav"})
    assert drops == {
        Drops(everything, wav=wav) for everything in (False, True) for wav in (frozenset(), melody)
    }


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_parts_keep_the_padding_of_their_batch(kind):
    whole, single = (Case(kind=kind, micro=micro).trainer() for micro in (8, 1))
    data = clips(8, num_codebooks=CODEBOOKS[kind])
    together = whole.evaluate(data).sums
    close(single.evaluate(data).sums, together, 1e-3)
    alone = sum(whole.evaluate([clip]).sums for clip in data)
    assert (alone - together).abs().max() > 0.1


def test_a_clips_text_depends_on_itself_and_the_update_alone():
    trainer, data = Case(kind="mono").trainer(), clips()
    texts = [trainer._text(clip, 7) for clip in data]
    assert [trainer._text(clip, 7) for clip in data[::-1]] == texts[::-1]
    assert [trainer._text(clip, 8) for clip in data] != texts
