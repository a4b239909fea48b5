"""What the training loop costs beyond the model itself.

    python -m tools.benchmark_training [--version small] [--device cuda] [--optimizers adamw,dadam]

For each optimizer, full and LoRA, it makes updates of the loop and, in turn with them, bare steps:
forward and backward pass and optimizer step of the same model on the same tensors, which lie ready
on the device. It prints the median over the pairs of the time of an update over that of the bare
step after it, the share of an update in which text and codes are prepared and sent, and the share
of the text encoder. The last line is all of it as one JSON object.

Weights and codes are random, for time does not depend on them. The default shape fits two CPU
cores; `--version` takes a released version's shape, from the configuration that the tests hold.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast, get_args

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from audiocraft.assets.store import BUNDLED
from audiocraft.models.builders import get_lm_model
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import ChromaStemConditioner, T5Conditioner
from audiocraft.modules.lora import attach, lora_config
from audiocraft.solvers.conditions import ConditionSettings
from audiocraft.solvers.loss import codebook_loss, count_targets
from audiocraft.solvers.musicgen import Clip, Trainer, TrainSettings, batch_clips
from audiocraft.solvers.optimizers import OptimizerName, OptimizerSettings

CONFIGS: Final = Path(__file__).parents[1] / "tests/golden/checkpoints"
TEXT_ENCODER: Final = BUNDLED / "tiny/t5"
LORA_RANK: Final = 16
DESCRIPTION: Final = (
    "slow piano with warm strings and soft drums, calm and a little sad, in the manner of film "
    "music. genre: classical. bpm: 82.0. key: c minor. instrument: piano, strings, drums"
)
SMALL: Final[dict[str, Any]] = {"dim": 256, "num_heads": 4, "num_layers": 4, "card": 512}


class Stopwatch:
    """Sums up the time of some functions, until the device has done what they ask for.

    Args:
        device: that they run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now(self._device)
            result = function(*args, **kwargs)
            self.seconds += now(self._device) - start
            return result

        return timed


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def build(version: str | None, device: torch.device) -> LMModel:
    """A model with random weights, float32, and a text encoder of its version's size.

    Args:
        version: a released one; None is a small text model.
        device: where it will be.
    """
    cfg = OmegaConf.load(CONFIGS / f"{version or 'small'}.xp_cfg.yaml")
    assert isinstance(cfg, DictConfig)
    if version is None:
        cfg.transformer_lm.update(SMALL)
    torch.manual_seed(0)
    lm = get_lm_model(cfg, None if version else TEXT_ENCODER).to(device)
    for conditioner in lm.condition_provider.conditioners.values():
        if version and isinstance(conditioner, T5Conditioner):
            conditioner.loaded = random_t5_base()
    return lm


def random_t5_base() -> tuple[Any, Any]:
    """A tokenizer, and an encoder of t5-base's shape."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(TEXT_ENCODER / "tokenizer.json"), pad_token="<pad>"
    )
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    config._attn_implementation = "eager"  # noqa: SLF001 - as T5Conditioner loads it
    encoder: Any = T5EncoderModel(config)
    return tokenizer, encoder.eval().requires_grad_(requires_grad=False)


def make_clips(lm: LMModel, number: int, frames: int) -> list[Clip]:
    """Clips of random codes, with a long description, and a melody if the model follows one."""
    chroma = None
    for conditioner in lm.condition_provider.conditioners.values():
        if isinstance(conditioner, ChromaStemConditioner):
            chroma = torch.eye(12)[torch.randint(12, (conditioner.chroma_len,))]
    return [
        Clip(
            key=f"clip {index}",
            codes=torch.randint(lm.card, (lm.num_codebooks, frames), dtype=torch.int16),
            frames=frames,
            description=DESCRIPTION,
            chroma=chroma,
            samples=960_000,
        )
        for index in range(number)
    ]


class BareStep:
    """Forward and backward pass and optimizer step, with all tensors ready on the device.

    Args:
        trainer: its model and its optimizer are used.
        clips: a batch.
    """

    def __init__(self, trainer: Trainer, clips: Sequence[Clip]) -> None:
        self._trainer = trainer
        lm, settings = trainer.lm, trainer.settings
        codes = torch.stack([clip.codes for clip in clips]).to(lm.device).long()
        self._counts = count_targets(
            lm.pattern_provider.delays, codes.shape[-1], [codes.shape[-1]] * len(clips)
        ).to(lm.device)
        self._parts: list[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]] = []
        conditioners = lm.condition_provider.conditioners
        for start in range(0, len(clips), settings.micro_batch):
            part = clips[start : start + settings.micro_batch]
            ready: dict[str, tuple[Tensor, Tensor]] = {}
            for name in lm.condition_provider.text_conditions:
                conditioner = cast("T5Conditioner", conditioners[name])
                tokens = conditioner.tokenize([clip.description for clip in part])
                _, encoder = conditioner.load()
                mask = tokens["attention_mask"]
                with torch.no_grad():
                    hidden = encoder(tokens["input_ids"], attention_mask=mask).last_hidden_state
                ready[name] = hidden, mask
            for name in lm.condition_provider.wav_conditions:
                chroma = torch.stack([cast("Tensor", clip.chroma) for clip in part]).to(lm.device)
                ready[name] = chroma, torch.ones(chroma.shape[:2], device=lm.device)
            self._parts.append((codes[start : start + settings.micro_batch], ready))

    def __call__(self) -> None:
        """Make a step."""
        trainer = self._trainer
        lm, settings = trainer.lm, trainer.settings
        trainer.optimizer.zero_grad(set_to_none=True)
        for codes, ready in self._parts:
            with torch.autocast(lm.device.type, torch.bfloat16, enabled=settings.bfloat16):
                conditions = {}
                for name, (values, mask) in ready.items():
                    conditioner: Any = lm.condition_provider.conditioners[name]
                    conditions[name] = conditioner.output_proj(values) * mask[..., None], mask
                output = lm.compute_predictions(codes, [], conditions)
            loss = codebook_loss(output, codes).share(self._counts)
            loss.backward()  # type: ignore[no-untyped-call]
        trainer.optimizer.step()


def measure(
    lm: LMModel, settings: TrainSettings, clips: Sequence[Clip], pairs: int
) -> dict[str, float]:
    """Seconds of an update, and what else the module's description says.

    Args:
        lm: is trained.
        settings: of the loop.
        clips: to train on.
        pairs: of an update and a bare step.
    """
    trainer, device = Trainer(lm, settings), lm.device
    data, encoder = Stopwatch(device), Stopwatch(device)

    def update() -> None:
        trainer.train(clips, lambda _: None, trainer.update + 1)

    bare = BareStep(trainer, batch_clips(clips, settings, 1))
    for step in (update, bare) * 2:  # buffers and kernels are made
        step()
    updates, ratios = [], []
    for _ in range(pairs):
        start = now(device)
        update()
        between = now(device)
        bare()
        updates.append(between - start)
        ratios.append(updates[-1] / (now(device) - between))
    # Taking the parts' times makes the host wait, so that is done apart.
    trainer._text = data.wrap(trainer._text)  # type: ignore[method-assign] # noqa: SLF001
    trainer._tokens = data.wrap(trainer._tokens)  # type: ignore[method-assign] # noqa: SLF001
    trainer._send = data.wrap(trainer._send)  # type: ignore[method-assign] # noqa: SLF001
    for conditioner in lm.condition_provider.conditioners.values():
        if isinstance(conditioner, T5Conditioner):
            model: nn.Module = conditioner.load()[1]
            model.forward = encoder.wrap(model.forward)
    start = now(device)
    for _ in range(max(2, pairs // 4)):
        begun = now(device)
        batch_clips(clips, settings, trainer.update + 1)
        data.seconds += now(device) - begun  # update() does so once more
        update()
    whole = now(device) - start
    for conditioner in lm.condition_provider.conditioners.values():
        if isinstance(conditioner, T5Conditioner):
            del conditioner.load()[1].forward
    return {
        "seconds": statistics.median(updates),
        "ratio": statistics.median(ratios),
        "data": data.seconds / whole,
        "text_encoder": encoder.seconds / whole,
    }


def main() -> None:
    """Prints the table, and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", help="shape of a released version; a small one by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--optimizers", default=",".join(get_args(OptimizerName)))
    parser.add_argument("--modes", default="full,lora")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each clip; 50 frames each")
    parser.add_argument("--pairs", type=int, default=20)
    given = parser.parse_args()
    device = torch.device(given.device)
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    results: dict[str, Any] = {}
    print(f"{'':>14}  s/update   ratio    data  text encoder")
    for mode in given.modes.split(","):
        for name in given.optimizers.split(","):
            lm = build(given.version, device)
            if mode == "lora":
                attach(lm, lora_config(LORA_RANK), torch.Generator().manual_seed(0))
            settings = TrainSettings(
                updates=10_000,
                batch_size=given.batch,
                micro_batch=given.micro,
                seed=0,
                optimizer=OptimizerSettings(name, 1e-5 if name == "adamw" else 1.0),
                conditions=ConditionSettings(cfg_p=0.0, word_p=0.0),
                bfloat16=bfloat16,
            )
            clips = make_clips(lm, 4 * given.batch, int(given.seconds * 50))
            found = measure(lm, settings, clips, given.pairs)
            results[f"{mode} {name}"] = found
            print(
                f"{mode + ' ' + name:>14}  {found['seconds']:8.3f}  {found['ratio']:6.3f}  "
                f"{found['data']:6.2%}  {found['text_encoder']:12.2%}"
            )
    used = {**vars(given), "bfloat16": bfloat16, "torch": torch.__version__}
    print(json.dumps({"benchmark": "training", "settings": used, "results": results}))


if __name__ == "__main__":
    main()
