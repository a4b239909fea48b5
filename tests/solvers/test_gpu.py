"""Trainings on a GPU, in 16 bit, against the same ones on the CPU in 32."""

from dataclasses import replace

import pytest
import torch

from audiocraft.solvers.musicgen import Trainer
from tests.solvers.training import CODEBOOKS, Case, clips, close, model, train

pytestmark = pytest.mark.gpu
CASES = [
    Case(),
    Case("dadam", "mono", micro=2, checkpointing=True),
    Case("prodigy", ema_on_host=True),
    Case(lora_rank=4, kind="mono", micro=2),
    Case("dadam", lora_rank=4, checkpointing=True, ema_on_host=True),
]


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_on_the_cpu(case, tmp_path):
    expected = train(replace(case, checkpointing=False, ema_on_host=False), tmp_path)
    case = replace(case, sixteen=True)
    lm = model(case.kind, case.lora_rank, frozen16=case.lora_rank > 0).to("cuda")
    trainer, data = Trainer(lm, case.settings()), clips(num_codebooks=CODEBOOKS[case.kind])
    losses = []
    trainer.train(data, lambda update: losses.append(float(update.loss.total)))
    close(losses, [loss for loss, _ in expected["losses"]], 0.1)
    place = "cpu" if case.ema_on_host else "cuda"
    assert {value.device.type for value in trainer.ema.average.values()} == {place}
    own = {name: value.clone() for name, value in lm.state_dict().items()}
    averaged = trainer.evaluate(data[:7])
    assert all(torch.equal(value, own[name]) for name, value in lm.state_dict().items())
    sums = torch.tensor(expected["evaluated"])[lm.num_codebooks : 2 * lm.num_codebooks]
    close(averaged.per_codebook, sums.double() / averaged.counts, 0.1)
    exported = trainer.exported_state()
    assert {(value.device.type, value.dtype) for value in exported.values()} == {
        ("cpu", torch.float16)
    }
    close(exported, expected["exported"], 0.1)
