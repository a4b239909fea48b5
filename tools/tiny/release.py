"""Put the parts of the `tiny` release together.

    python -m tools.tiny.release --run FOLDER --evaluation FILE [--finetuning FILE] --out FOLDER

Copies the release of a run of `tools.tiny.lm` and adds the model card, with the figures that are
the last lines of the files, which `tools.tiny.evaluate` and `tools.tiny.finetune` have printed.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from audiocraft import __version__
from audiocraft.assets.tensors import read_safetensors
from audiocraft.errors import AudiocraftError, InputError
from audiocraft.models.loaders import CODEC_FILE, LM_FILE, read_config
from tools.tiny.card import model_card
from tools.tiny.dataset import SECONDS
from tools.tiny.text_encoder import save_text_encoder

RELEASE: Final = "release"
"""In the folder of a run."""

MOST_BYTES: Final = 24_000_000
"""Of a release that is bundled."""

MOST_BYTES_OF_A_FILE: Final = 15_000_000
"""Of any file in it."""

_CARD: Final = "README.md"
_SUFFIX: Final = ".safetensors"
_WORK: Final = "work.json"


@dataclass(frozen=True)
class Work:
    """What a release's weights have taken, with those that they began from.

    Attributes:
        hours: of work.
        heard_hours: of music.
    """

    hours: float = 0.0
    heard_hours: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.hours + other.hours, self.heard_hours + other.heard_hours)


def work_of(release: Path) -> Work:
    """What a release's weights have taken; nothing where it does not say."""
    path = release / _WORK
    return Work(**json.loads(path.read_text())) if path.is_file() else Work()


def write_release(
    folder: Path,
    cfg: DictConfig,
    state: Mapping[str, Tensor],
    codec: Path,
    text_encoder: tuple[Any, Any],
    work: Work,
) -> None:
    """Write a release; it appears under its name when it is whole, in the place of one before.

    Args:
        folder: of the release.
        cfg: the resolved `xp.cfg` of the language model.
        state: its tensors by official names, in 16 bit.
        codec: weights file of the codec, which is copied.
        text_encoder: tokenizer and encoder.
        work: that the tensors have taken.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    metadata = {"xp.cfg": OmegaConf.to_yaml(cfg), "version": __version__, "exported": "true"}
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, unfinished / f"{LM_FILE}{_SUFFIX}", metadata)
    shutil.copyfile(codec, unfinished / f"{CODEC_FILE}{_SUFFIX}")
    save_text_encoder(unfinished / "t5", *text_encoder)
    (unfinished / _WORK).write_text(json.dumps(asdict(work)) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def check_size(folder: Path) -> int:
    """Bytes of a release.

    Raises:
        InputError: it is too large to be bundled.
    """
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total, largest = sum(sizes.values()), max(sizes, key=lambda name: sizes[name])
    if total > MOST_BYTES or sizes[largest] > MOST_BYTES_OF_A_FILE:
        raise InputError(
            f"The release has {total / 1e6:.1f} MB and {largest} {sizes[largest] / 1e6:.1f} MB, "
            f"the limits are {MOST_BYTES / 1e6:g} and {MOST_BYTES_OF_A_FILE / 1e6:g}: train a "
            "smaller model."
        )
    return total


def finish(
    run: Path,
    evaluation: Mapping[str, Any],
    folder: Path,
    finetuning: Mapping[str, Any] | None = None,
) -> None:
    """Copy the release of a run, with its model card.

    Args:
        run: folder of `tools.tiny.lm`.
        evaluation: the figures.
        folder: of the release that is bundled; it must not exist.
        finetuning: figures of a fine-tune of it, if there are any.

    Raises:
        InputError: it exists, or the release is too large.
    """
    if folder.exists():
        raise InputError(f"{folder} exists: remove it, or give another one.")
    release = run / RELEASE
    check_size(release)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    best = min(log, key=lambda line: line["loss"])
    counts = {
        name: sum(t.numel() for t in read_safetensors(release / path)[0].values())
        for name, path in {
            "lm": f"{LM_FILE}{_SUFFIX}",
            "codec": f"{CODEC_FILE}{_SUFFIX}",
            "t5": "t5/model.safetensors",
        }.items()
    }
    cfg = read_config(LM_FILE, read_safetensors(release / f"{LM_FILE}{_SUFFIX}")[1]["xp.cfg"])
    assert cfg is not None, "write_release has written it"
    shape = {
        "dim": cfg.transformer_lm.dim,
        "layers": cfg.transformer_lm.num_layers,
        "context": cfg.dataset.segment_duration,
        "piece": SECONDS,
    }
    shutil.copytree(release, folder)
    (folder / _CARD).write_text(model_card(shape, counts, best, evaluation, finetuning))
    check_size(folder)


def _last_line(path: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
    return figures


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of tools.tiny.lm")
    parser.add_argument("--evaluation", type=Path, required=True, help="its last line has figures")
    parser.add_argument("--finetuning", type=Path, help="its last line has a fine-tune's figures")
    parser.add_argument("--out", type=Path, required=True, help="folder of the release")
    given = parser.parse_args()
    finetuning = None if given.finetuning is None else _last_line(given.finetuning)
    try:
        finish(given.run, _last_line(given.evaluation), given.out, finetuning)
    except AudiocraftError as error:
        parser.error(str(error))
    print(f"{given.out}: {check_size(given.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
