"""A small training for tests, in this process or as a rank of a job."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from audiocraft.models.loaders import build_lm_model, read_checkpoint
from audiocraft.solvers.conditions import ConditionSettings, parse_metadata
from audiocraft.solvers.musicgen import Clip, Trainer, TrainSettings
from audiocraft.solvers.optimizers import OptimizerSettings
from tests.golden_data import GOLDEN

FRAMES = 60
DROPOUTS = ConditionSettings(
    cfg_p=0.3,
    attributes=(("wav", "self_wav", 0.5),),
    word_p=0.2,
    merge_text_p=0.5,
)
SETTINGS = TrainSettings(
    updates=20,
    batch_size=8,
    micro_batch=8,
    seed=7,
    optimizer=OptimizerSettings("adamw", 3e-3),
    warmup=2,
    conditions=DROPOUTS,
)


def model(kind="stereo-melody"):
    """A small model of a kind, in float32."""
    checkpoint = read_checkpoint(GOLDEN / "tiny_release" / kind / "state_dict.bin")
    return build_lm_model(checkpoint, GOLDEN / "t5_tiny", "cpu")


def clips(number=12, num_codebooks=8, card=32):
    """Clips of different lengths, with descriptions of different lengths, some without."""
    made = []
    for index in range(number):
        generator = torch.Generator().manual_seed(index)
        phrase = torch.randint(card, (num_codebooks, 6), generator=generator)
        words = " ".join(["piano", "and", "slow", "drums"][: index % 5])
        made.append(
            Clip(
                key=f"clip {index}",
                codes=phrase.repeat(1, FRAMES // 6),
                frames=FRAMES if index % 3 else 40,
                description=words or None,
                metadata=parse_metadata({"genre": "rock", "bpm": 100 + index, "key": "C major"}),
                chroma=torch.eye(12)[torch.arange(10) % 12],
                samples=4096 * (10 if index % 3 else 6),
            )
        )
    return made


def main() -> None:
    """Rank of a job: micro-batch, optimizer, lr and the file for what rank 0 saw."""
    torch.set_num_threads(1)
    micro, name, lr, path = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), Path(sys.argv[4])
    distributed.init_process_group("gloo")
    settings = replace(SETTINGS, micro_batch=micro, optimizer=OptimizerSettings(name, lr))
    trainer = Trainer(model(), settings)
    losses = []
    trainer.train(clips(), lambda update: losses.append(float(update.loss.total)))
    if distributed.get_rank() == 0:
        path.write_text(json.dumps(losses))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
