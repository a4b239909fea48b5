"""Teach `tiny` a style that it has never heard, and measure what it has learnt and forgotten.

    python -m tools.tiny.finetune [--style polka] [-- SETTINGS OF scripts/train]

Renders ten pieces of the style with their descriptions, fine-tunes the bundled release on them by
the real `scripts/train`, and has both models play prompts of the style and of the others, which are
measured as by `tools.tiny.evaluate`. It prints a JSON object for each; the last line is all of them
in one. Without settings they are

    -i optimizer=adamw -i lr=0.0004 -i epochs=4 -i updates_per_epoch=50
    -i auto_labeling=false -i drop_vocals=false

The training leaves what any leaves, in `runs/` and `weights/`. As it keeps the music that it has
encoded, a second one is some seconds faster.
"""

import argparse
import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from audiocraft.errors import AudiocraftError, TrainingError
from audiocraft.models.musicgen import MusicGen
from audiocraft.models.versions import VERSIONS
from tools.synthetic_music.dataset import write_dataset
from tools.synthetic_music.styles import STYLES
from tools.tiny.evaluate import Evaluation, Sizes, rounded

TRAIN: Final = Path(__file__).parents[2] / "scripts/train"
"""The command that is measured."""

SEED: Final = 204
"""Of the pieces that are taught: not of those that prompts are taken of, nor trained on before."""

SETTINGS: Final = (
    *("-i", "optimizer=adamw", "-i", "lr=0.0004", "-i", "epochs=4", "-i", "updates_per_epoch=50"),
    *("-i", "auto_labeling=false", "-i", "drop_vocals=false"),
)
"""Of `scripts/train`. With its own, dadam for 1000 updates, `tiny` has ten songs by heart."""

STYLE_PROMPTS, REST_PROMPTS = 24, 48
"""How many clips of the style, and of the others, each model makes."""

_PIECES, _SECONDS = 10, 30.0  # that are taught, and of each
_JOBS: Final = 2  # pieces that are rendered at a time


def measure(model: MusicGen, style: str, when: str) -> dict[str, Any]:
    """What a model makes of prompts of a style, and of the others; each is printed when known.

    Args:
        model: as it is loaded, float32.
        style: a key of `STYLES`.
        when: what the printed figures are called.

    Returns:
        For prompts of the style (`style`) and of the others (`rest`) what `Evaluation.text` does,
        with `heard_as_style` in `right` and `clean`, the share of clips that are heard as the
        style. Prompts of the style all ask for it, so `shuffled` can't tell it from chance there:
        `heard_as_style` of `rest` can.
    """
    figures = {}
    for name, prompts, asked, excluded in (
        ("style", STYLE_PROMPTS, style, None),
        ("rest", REST_PROMPTS, None, style),
    ):
        evaluation = Evaluation(model, Sizes(prompts=prompts), asked, excluded)
        text = evaluation.text()
        for clips, share in evaluation.heard_as(style).items():
            text[clips]["heard_as_style"] = share
        figures[name] = rounded(text)
        print(json.dumps({f"{when}, {name}": figures[name]}), flush=True)
    return figures


def fine_tune(
    version: str, style: str, settings: Sequence[str], folder: Path
) -> tuple[Path, float]:
    """Render music and have `scripts/train` learn it, as a user would.

    Args:
        version: that is fine-tuned.
        style: of the music.
        settings: arguments of `scripts/train`.
        folder: for the music and the result.

    Returns:
        The file of weights, and minutes that the command took.

    Raises:
        AssetError: fluidsynth or the sound font is not installed.
        TrainingError: the command failed.
    """
    music, weights = folder / "music", folder / "tuned.safetensors"
    write_dataset(music, SEED, _PIECES, _SECONDS, jobs=_JOBS, style=style)
    inputs = ["-i", f"dataset_path=@{music}", "-i", f"model_version={version}"]
    command = [str(TRAIN), "--fresh", *inputs, *settings, "-o", str(weights)]
    began = time.monotonic()
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:  # noqa: S603
        raise TrainingError("scripts/train failed; the lines above say why.")
    return weights, (time.monotonic() - began) / 60


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--style", choices=list(STYLES), default="polka", help="that is taught")
    parser.add_argument("--model", choices=list(VERSIONS), default="tiny", help="that learns it")
    parser.add_argument("settings", nargs="*", default=SETTINGS, help="of scripts/train, after --")
    given = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            # The training comes first, for it is what can fail.
            weights, minutes = fine_tune(given.model, given.style, given.settings, Path(folder))
            before, after = (
                measure(MusicGen.get_pretrained(model, "cpu", "float32"), given.style, when)
                for when, model in (("before", given.model), ("after", weights))
            )
    except AudiocraftError as error:
        parser.error(str(error))
    print(
        json.dumps(
            {
                "style": given.style,
                "minutes": rounded(minutes),
                "settings": shlex.join(given.settings),
                "before": before,
                "after": after,
            }
        )
    )


if __name__ == "__main__":
    main()
