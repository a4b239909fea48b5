"""A small training for tests, in this process or as a rank of a job."""

import copy
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import distributed

from audiocraft.errors import TrainingError
from audiocraft.models.loaders import build_lm_model, read_checkpoint
from audiocraft.modules.lora import attach, lora_config
from audiocraft.solvers.checkpoints import find_checkpoint, load_state, save_checkpoint
from audiocraft.solvers.conditions import ConditionSettings, parse_metadata
from audiocraft.solvers.launch import launch
from audiocraft.solvers.musicgen import Clip, Trainer, TrainSettings
from audiocraft.solvers.optimizers import OptimizerSettings
from audiocraft.solvers.sharding import local
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
OPTIMIZERS = {"adamw": 3e-3, "dadam": 1.0, "prodigy": 1.0}
CODEBOOKS = {"mono": 4, "stereo-melody": 8}


def model(kind="stereo-melody", lora_rank=0, *, frozen16=False):
    """A small model of a kind, in float32; with adapters its base may be 16 bit."""
    checkpoint = read_checkpoint(GOLDEN / "tiny_release" / kind / "state_dict.bin")
    dtype = torch.bfloat16 if frozen16 else torch.float32
    lm = build_lm_model(checkpoint, GOLDEN / "t5_tiny", "cpu", dtype)
    if lora_rank:
        attach(lm, lora_config(lora_rank), torch.Generator().manual_seed(0))
    return lm


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


def close(ours, theirs, limit):
    """Whatever they are made of: numbers and tensors differ by no more than `limit`."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list | tuple):
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other, limit)
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=0, abs=limit)
    else:
        assert ours == theirs


@dataclass(frozen=True)
class Case:
    """A training and what it trains; `resumed` after so many updates, if not 0."""

    optimizer: str = "adamw"
    kind: str = "stereo-melody"
    micro: int = 8
    lora_rank: int = 0
    sharded: bool = False
    checkpointing: bool = False
    ema_on_host: bool = False
    sixteen: bool = False
    resumed: int = 0

    def settings(self):
        return replace(
            SETTINGS,
            micro_batch=self.micro,
            optimizer=OptimizerSettings(self.optimizer, OPTIMIZERS[self.optimizer]),
            checkpointing=self.checkpointing,
            sharded=self.sharded,
            ema_on_host=self.ema_on_host,
            bfloat16=self.sixteen,
        )

    def trainer(self):
        frozen16 = self.sixteen and self.lora_rank > 0
        return Trainer(model(self.kind, self.lora_rank, frozen16=frozen16), self.settings())


def train(case, folder):
    """What a training says: losses, evaluations, the exported state and the last weights."""
    trainer, data = case.trainer(), clips(num_codebooks=CODEBOOKS[case.kind])
    losses, beside, came = [], [], set()

    def watch():
        """Take note of where gradients come in under DDP."""
        for weight in trainer._weights.values() if trainer._replicated else ():
            weight.register_post_accumulate_grad_hook(lambda it: came.add(it.grad.data_ptr()))

    def note(update):
        losses.append((float(update.loss.total), update.grad_norm))
        if came:  # where they are now is in buckets
            weights = trainer._weights.values()
            beside.append(len(came - {weight.grad.data_ptr() for weight in weights}))
            came.clear()

    watch()
    if case.resumed:
        trainer.train(data, note, case.resumed)
        save_checkpoint(
            folder,
            case.resumed,
            trainer.state_dict(),
            {},
            rank=trainer.rank,
            parts=trainer.ranks,
            barrier=distributed.barrier if trainer.ranks > 1 else lambda: None,
        )
        trainer = case.trainer()
        trainer.load_state_dict(load_state(find_checkpoint(folder), trainer.rank))
        watch()
    trainer.train(data, note)
    # An odd number of clips: one process has one less.
    evaluated = trainer.evaluate(data[:7], averaged=False)
    averaged = trainer.evaluate(data[:7])
    again = trainer.evaluate(data[:1], averaged=False)  # of which one process has none
    return {
        "losses": losses,
        "beside": beside,
        "evaluated": evaluated.sums.tolist() + averaged.sums.tolist() + again.sums.tolist(),
        "counts": evaluated.counts.tolist(),
        "exported": trainer.exported_state(),
        "state": copy.deepcopy(trainer.state_dict()),
        "refused": refused(trainer),
    }


def refused(trainer):
    """What is said where one process alone has a weight that is no number."""
    trainer.check_weights()
    if trainer.rank == trainer.ranks - 1:
        with torch.no_grad():
            parts = [local(weight) for weight in trainer.lm.parameters() if weight.requires_grad]
            next(part for part in parts if part.numel()).fill_(float("nan"))
    try:
        trainer.check_weights()
    except TrainingError as error:
        return str(error)
    return None


def train_in(processes, cases, folder):
    """What each process of a job says of each case: `[rank][case]`."""
    path = folder / "cases.json"
    path.write_text(json.dumps([asdict(case) for case in cases]))
    launch("tests.solvers.training", [str(path)], processes, lambda _: None)
    return [
        torch.load(folder / f"results-{rank}.pt", weights_only=True) for rank in range(processes)
    ]


def main() -> None:
    """A rank: takes a file of cases, and writes what came of each beside it."""
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    results = []
    for number, given in enumerate(json.loads(path.read_text())):
        results.append(train(Case(**given), path.parent / f"run {number}"))
    torch.save(results, path.parent / f"results-{distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
