"""What each clip of an update is conditioned on: metadata merged in, and parts dropped at random.

The official recipe, but for where chance comes from. Officially each process draws from streams of
its own that run on from batch to batch. Here a draw depends on the seed, the number of the update
and the clip alone, so that neither the number of processes, nor micro-batches, nor a restart change
what a clip is trained with.
Golden test: `condition_dropout_and_merge`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from audiocraft.errors import InputError

Draw = Callable[[], float]
"""Gives the next number of a uniform random stream over [0, 1)."""

Metadata = Mapping[str, str | float | Sequence[str] | None]
"""What is known of a clip, by field; see `parse_metadata`."""

# All fields of the official record of a clip, in its order: one number is drawn for each.
_RECORD = (
    *("meta", "seek_time", "n_frames", "total_frames", "sample_rate", "channels", "audio_tokens"),
    *("title", "artist", "key", "bpm", "genre", "moods", "keywords", "description", "name"),
    *("instrument", "self_wav", "joint_embed"),
)
MERGED_FIELDS = ("key", "bpm", "genre", "moods", "instrument", "keywords")
"""The fields that are merged into descriptions."""
_LISTS = ("moods", "keywords")
_AS_WRITTEN = ("title", "artist", "description", "name")


def batch_random(seed: int, update: int) -> random.Random:
    """The random stream of an update's whole batch, over all processes."""
    return random.Random(f"batch {seed} {update}")  # noqa: S311 - not for secrets


def clip_random(seed: int, update: int, clip: str) -> random.Random:
    """The random stream of a clip in an update.

    Args:
        seed: of the run.
        update: its number.
        clip: a name that is the clip's own, such as the hash of its content: not its place in a
            list, which changes with the data.
    """
    return random.Random(f"clip {seed} {update} {clip}")  # noqa: S311 - not for secrets


@dataclass(frozen=True)
class ConditionSettings:
    """Probabilities of the recipe, each 0 to 1; see `condition_settings`.

    Attributes:
        cfg_p: of dropping all conditions of a batch, for classifier-free guidance.
        attributes: (kind, name, probability) of dropping one condition in a whole batch, in the
            configuration's order; the kind is `text` or `wav`. Anything else in the configuration
            counts as a kind that no clip has: it drops nothing, but a number is drawn for it.
        word_p: of dropping a word of a description.
        merge_text_p: of merging metadata into a description.
        drop_desc_p: of dropping the description itself where metadata are merged.
        drop_other_p: of *keeping* a field where metadata are merged. The name is the official one.
        null_as_generated: no probability: what is dropped becomes what generation has in its
            place, a text as many masked tokens as the others have, a melody one of class 0
            throughout. Officially it is a single token and five masked frames, which differ.
    """

    cfg_p: float = 0.3
    attributes: tuple[tuple[str, str, float], ...] = ()
    word_p: float = 0.3
    merge_text_p: float = 0.25
    drop_desc_p: float = 0.5
    drop_other_p: float = 0.5
    null_as_generated: bool = False

    def __post_init__(self) -> None:
        for name, value in {
            "cfg_p": self.cfg_p,
            "word_dropout": self.word_p,
            "merge_text_p": self.merge_text_p,
            "drop_desc_p": self.drop_desc_p,
            "drop_other_p": self.drop_other_p,
            **{f"attribute_dropout.{kind}.{name}": p for kind, name, p in self.attributes},
        }.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}, a probability must be from 0 to 1.")


def condition_settings(cfg: DictConfig, cfg_p: float | None = None) -> ConditionSettings:
    """The recipe that a resolved `xp.cfg` holds.

    Args:
        cfg: of the version that is trained; what it lacks is as in the base release.
        cfg_p: replaces the configuration's own.
    """
    found = {
        "cfg_p": OmegaConf.select(cfg, "classifier_free_guidance.training_dropout"),
        "word_p": OmegaConf.select(cfg, "conditioners.description.t5.word_dropout"),
        "merge_text_p": OmegaConf.select(cfg, "dataset.train.merge_text_p"),
        "drop_desc_p": OmegaConf.select(cfg, "dataset.train.drop_desc_p"),
        "drop_other_p": OmegaConf.select(cfg, "dataset.train.drop_other_p"),
    }
    attributes: Any = OmegaConf.select(cfg, "attribute_dropout")
    settings = ConditionSettings(
        attributes=tuple(
            (str(kind), str(name), float(p))
            for kind, names in (attributes or {}).items()
            for name, p in names.items()
        ),
        null_as_generated=bool(
            OmegaConf.select(cfg, "classifier_free_guidance.null_as_generated", default=False)
        ),
        **{name: float(value) for name, value in found.items() if value is not None},
    )
    return settings if cfg_p is None else replace(settings, cfg_p=cfg_p)


@dataclass(frozen=True)
class Drops:
    """What a whole batch goes without.

    Attributes:
        everything: all conditions.
        text: names of text conditions.
        wav: names of audio conditions.
    """

    everything: bool = False
    text: frozenset[str] = frozenset()
    wav: frozenset[str] = frozenset()


def draw_drops(
    settings: ConditionSettings, draw: Draw, attribute_draw: Draw | None = None
) -> Drops:
    """Decide what a batch goes without.

    The same numbers of numbers are drawn whatever they are: one for everything, then one for each
    entry of `attributes`.

    Args:
        settings: the recipe.
        draw: such as `batch_random(seed, update).random`.
        attribute_draw: for the attributes; officially they have a stream of their own.
    """
    everything = draw() < settings.cfg_p
    draw = attribute_draw or draw
    dropped = [(kind, name) for kind, name, p in settings.attributes if draw() < p]
    return Drops(
        everything,
        frozenset(name for kind, name in dropped if kind == "text"),
        frozenset(name for kind, name in dropped if kind == "wav"),
    )


def drop_words(text: str | None, p: float, draw: Draw) -> str | None:
    """A text without some of its words.

    Args:
        text: words are what stands between spaces; None and no words at all are no condition.
        p: probability of each word's going.
        draw: the clip's stream.
    """
    if not text or p == 0:
        return text
    return " ".join(word for word in text.split(" ") if draw() >= p) or None


def _parse_list(value: str | Sequence[str]) -> list[str] | None:
    if isinstance(value, str):
        value = value.split(",") if "," in value else value.split()
    return [part for item in value if (part := item.strip().lower())] or None


def _parse_field(name: str, value: str | float | Sequence[str]) -> str | float | list[str] | None:
    if name == "bpm":
        try:
            return float(value)  # type: ignore[arg-type] # a list is no number either
        except (TypeError, ValueError):
            return None
    if name in _LISTS and not isinstance(value, float | int):
        return _parse_list(value)
    if not isinstance(value, str | float | int):
        value = ", ".join(value)
    text = str(value).strip()
    if name == "key" and "," in text:
        return None
    return (text if name in _AS_WRITTEN else text.lower()) or None


def parse_metadata(raw: Metadata) -> dict[str, str | float | list[str] | None]:
    """Metadata as they were written, in the form that is merged into descriptions.

    Of moods and keywords a string becomes a list, at its commas or else at its spaces; bpm becomes
    a number; a key must be one key; all but title, artist, description and name become lower case.
    Empty is None, and so is what cannot be read.
    """
    return {
        name: None if value is None else _parse_field(name, value) for name, value in raw.items()
    }


def _field_text(name: str, value: str | float | Sequence[str]) -> str:
    if isinstance(value, float | int):
        return f"{name}: {float(value)}"
    return f"{name}: {value if isinstance(value, str) else ', '.join(value)}"


def merge_metadata(
    description: str | None,
    metadata: Metadata,
    settings: ConditionSettings,
    rng: random.Random,
) -> str | None:
    """The text that a clip is trained with in one update.

    With probability `merge_text_p` a random choice of the fields in random order follows the
    description or replaces it: `A song. genre: rock. bpm: 120.0`. The description's final period
    goes before the metadata, and is set where there are none. If neither it nor a field is left,
    the clip has no text in this update.

    Ours: a clip without a description always gets the merge, and if no field would be left, one of
    them. Officially the whole step is left out where `merge_text_p` is 0; here that holds for clips
    with a description.

    Args:
        description: the clip's own.
        metadata: from `parse_metadata`; fields that are None or not merged do not count.
        settings: the recipe.
        rng: the clip's stream. Draws stand in the official order: one for the merge, one for each
            field of the official record, the shuffle, one for the description.

    Returns:
        The text, or None.
    """
    described = bool(description and description.strip())
    if described and settings.merge_text_p == 0:
        return description
    known = [
        name for name in MERGED_FIELDS if (value := metadata.get(name)) is not None and value != []
    ]
    is_merged = rng.random() < settings.merge_text_p or not described
    fields: list[str] = []
    if is_merged:
        kept = [name for name in _RECORD if rng.random() < settings.drop_other_p]
        fields = [name for name in kept if name in known]
        if known and not described and not fields:
            fields = [rng.choice(known)]
        rng.shuffle(fields)
        if rng.random() < settings.drop_desc_p:
            described = False
    pairs = [_field_text(name, value) for name in fields if (value := metadata[name]) is not None]
    if not described or description is None:
        return ". ".join(pairs) or None
    start = description.rstrip(".")
    return ". ".join([start, *pairs]) if pairs else f"{start}."
