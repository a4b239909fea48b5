"""The Cog interface for fine-tuning: its inputs, and one call into `audiocraft`.

Cog reads this file without importing it, see `predict.py`.
"""

import os

from cog import BaseModel, Input, Path

import metadata
from audiocraft.serving import training
from audiocraft.serving.training import TrainingRequest


class TrainingOutput(BaseModel):
    """What a training gives."""

    weights: Path


def train(
    dataset_path: Path = Input(
        description="Your music: an archive (.zip, .tar, .tar.gz, .tgz or .gz) of recordings in any common audio format, in folders or not, or a single recording. A text file beside a recording, song.txt for song.wav, describes it. Longer recordings are cut into pieces of 30 seconds (tiny: 12); those under 5 seconds are left out.",
    ),
    one_same_description: str | None = Input(
        default=None,
        description="One description for all of the music, such as: lo-fi hip hop with a warm Rhodes piano. It takes the place of the text files beside the recordings.",
    ),
    auto_labeling: bool = Input(
        default=True,
        description="Listen to the music and add what is heard to its descriptions: genre, mood, theme, instruments, key and tempo. Switched off, only your own descriptions and the tags in your files are used.",
    ),
    drop_vocals: bool = Input(
        default=True,
        description="Remove the vocals from the music first, for the model learns to play and not to sing. Counts only where source is all; any other source overrides it.",
    ),
    source: str = Input(
        default="all",
        choices=["all", "drop-vocals", "vocals", "bass", "drums", "other"],
        description="Which part of the music is learned. all: everything, but for the vocals where drop_vocals is on. drop-vocals: everything but the vocals. vocals, bass, drums, other: that part alone, all else is removed, whatever drop_vocals says.",
    ),
    model_version: str = Input(
        default="stereo-melody",
        choices=[
            "melody",
            "small",
            "medium",
            "stereo-melody",
            "stereo-small",
            "stereo-medium",
            "large",
            "melody-large",
            "stereo-large",
            "stereo-melody-large",
            "tiny",
        ],
        description="The MusicGen model that is taught your music. Larger ones sound richer and need more memory; stereo ones fill left and right; only the melody ones and tiny can follow a melody afterwards. tiny comes bundled, for a quick try.",
    ),
    lr: float = Input(
        default=1,
        description="Learning rate, above 0. With dadam and prodigy, which find the rate by themselves, it is a factor of theirs: leave it at 1. With adamw it is the rate itself; there 1 stands for 0.0001.",
    ),
    epochs: int = Input(
        default=10,
        description="How many rounds of training there are, 1 or more. More fit the model closer to your music, and in the end it repeats the music instead of learning its style.",
    ),
    updates_per_epoch: int = Input(
        default=100,
        description="How many steps of learning a round has. 0 is as many as go once through your music.",
    ),
    batch_size: int = Input(
        default=3,
        description="How many pieces of music the model learns from in each step, over all GPUs together. On several GPUs it is rounded to a multiple of their number, which the log says. A large one takes time, not memory.",
    ),
    optimizer: str = Input(
        default="dadam",
        choices=["dadam", "adamw", "prodigy"],
        description="The method of learning. dadam and prodigy find a suitable rate by themselves; adamw takes the rate that lr gives.",
    ),
    lr_scheduler: str = Input(
        default="cosine",
        choices=["exponential", "cosine", "polynomial_decay", "inverse_sqrt", "linear_warmup"],
        description="How the learning rate goes on after its warm-up. cosine, polynomial_decay and exponential come down towards the end, inverse_sqrt slowly so, linear_warmup stays at its height.",
    ),
    warmup: int = Input(
        default=8,
        description="How many steps the learning rate takes from nothing to its full height at the start, 0 or more.",
    ),
    cfg_p: float = Input(
        default=0.3,
        description="From 0 to 1: how often the model learns without being told description and melody. It needs some of that, so that classifier_free_guidance works when it makes music later.",
    ),
    lora_rank: int = Input(
        default=0,
        description="0 trains the whole model. Above 0, such as 16, a small addition to it (LoRA) of that rank is trained instead: it takes far less memory, and its file has some tens of megabytes instead of a gigabyte or more.",
    ),
    seed: int = Input(
        default=2036,
        description="A number that fixes the choices of chance in the training, such as the order of the pieces.",
    ),
) -> TrainingOutput:
    """Fine-tunes the model and returns its weights.

    Cog passes numbers and plain paths as `predict.py` says.
    """
    weights = training.train(
        TrainingRequest(
            dataset_path=Path(dataset_path),
            one_same_description=one_same_description,
            auto_labeling=auto_labeling,
            drop_vocals=drop_vocals,
            source=source,
            model_version=model_version,
            lr=float(lr),
            epochs=int(epochs),
            updates_per_epoch=int(updates_per_epoch),
            batch_size=int(batch_size),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            warmup=int(warmup),
            cfg_p=float(cfg_p),
            lora_rank=int(lora_rank),
            seed=int(seed),
        ),
        training.vocabularies_of(vars(metadata)),
    )
    # A Path comes back inside Cog's answer, base64 in JSON, which takes 14 times its size in
    # memory; a text comes back as it is.
    by_path = os.environ.get("WEIGHTS_BY_PATH") == "1"
    given = str(weights) if by_path else Path(weights)
    return TrainingOutput(weights=given)  # type: ignore[call-arg]  # Cog makes a dataclass of it
