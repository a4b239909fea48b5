"""The first process of a training: `python -m audiocraft.solvers.prepare WORK_FOLDER`.

It turns the dataset of the job in the folder into what the ranks train on, and writes down what
that is. All models that are needed for it live and die with this process.
"""

import logging
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

from audiocraft.data.dataset import DatasetSettings, Prepared, prepare, save_prepared
from audiocraft.data.descriptions import ClipMetadata, one_line
from audiocraft.data.files import find
from audiocraft.errors import InputError
from audiocraft.models.builders import get_conditioner_provider
from audiocraft.models.loaders import (
    LM_FILE,
    check_config,
    config_in_use,
    find_file,
    read_checkpoint,
    text_encoder_of,
)
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.conditioners import T5Conditioner
from audiocraft.solvers.clips import full_text
from audiocraft.solvers.conditions import ConditionSettings
from audiocraft.solvers.job import read_job
from audiocraft.solvers.memory import TEXT_TOKENS, TEXT_WORDS
from audiocraft.solvers.output import log_to_stdout

logger = logging.getLogger(__name__)

DATASET_FILE: Final = "dataset.json"
"""In the work folder of a training; see `dataset.load_prepared`."""

_LISTS: Final = ("genre", "moods", "keywords", "instrument")


def main() -> None:
    """Reads the job, prepares its dataset and writes `DATASET_FILE`."""
    log_to_stdout()
    work = Path(sys.argv[1])
    job, place = read_job(work)
    encoder = load_text_encoder(job.version)
    check_description(job.one_same_description, encoder)
    prepared = prepare(
        find(Path(place.dataset), Path(place.unpacked)),
        Path(place.dataset).name,
        Path(place.data),
        job.version,
        DatasetSettings(job.one_same_description, job.vocabularies, job.stems),
        place.device,
    )
    save_prepared(work / DATASET_FILE, shorten(prepared, encoder))


def load_text_encoder(version: str) -> T5Conditioner:
    """The text conditioner of a version, with a projection that means nothing; T5 comes on demand.

    Args:
        version: its short name.

    Raises:
        AssetError: its files are nowhere on disk and cannot be downloaded.
        WeightsError: they are not those of a MusicGen.
    """
    path = find_file(VERSIONS[version].source, LM_FILE)
    checkpoint = read_checkpoint(path)
    cfg = check_config(checkpoint.name, checkpoint.cfg)
    with config_in_use(checkpoint.name):
        provider = get_conditioner_provider(cfg.transformer_lm.dim, cfg, text_encoder_of(path))
    (name,) = provider.text_conditions
    return cast("T5Conditioner", provider.conditioners[name])


def check_description(description: str | None, encoder: T5Conditioner) -> None:
    """Refuse a description of all the music that is longer than a training takes.

    Args:
        description: as it was given.
        encoder: from `load_text_encoder`.

    Raises:
        InputError: it is.
    """
    line = one_line(description)
    # With the period that `merge_metadata` sets.
    tokens = _count(f"{line.rstrip('.')}.", encoder.load_tokenizer) if line else 0
    if tokens > TEXT_TOKENS:
        raise InputError(
            f"one_same_description has {tokens} tokens, a training takes {TEXT_TOKENS} at most: "
            f"shorten it to some {TEXT_WORDS} words."
        )


def shorten(prepared: Prepared, encoder: T5Conditioner) -> Prepared:
    """Cut the texts that are longer than a training takes, and say of how many files.

    A text counts with all that is merged into it.

    Args:
        prepared: the dataset.
        encoder: from `load_text_encoder`.

    Returns:
        The dataset; clips whose texts fit are as they were.
    """
    tokenizer = cache(encoder.load_tokenizer)
    shorter = {
        known: _shortened(known, tokenizer())
        for known, example in {example.metadata: example for example in prepared.examples}.items()
        if _count(full_text(example, ConditionSettings(), 0) or "", tokenizer) > TEXT_TOKENS
    }
    files = {example.name for example in prepared.examples if example.metadata in shorter}
    if files:
        logger.warning(
            "The texts of %d files are cut to %d tokens, some %d words with their labels: a "
            "training takes no longer ones.",
            *(len(files), TEXT_TOKENS, TEXT_WORDS),
        )
    examples = (
        replace(example, metadata=shorter.get(example.metadata, example.metadata))
        for example in prepared.examples
    )
    return replace(prepared, examples=tuple(examples))


def _count(text: str, tokenizer: Callable[[], Any]) -> int:
    """Tokens of a text, the end's among them; of a short one an upper bound.

    Args:
        text: any.
        tokenizer: gives it, and is asked for it only where a text is not short.
    """
    # What tokenizers change before they divide a text. No token is less than a byte of that; a
    # first space and the end come on top.
    most = len(unicodedata.normalize("NFKC", text).lower().encode()) + 2
    return most if most <= TEXT_TOKENS else len(tokenizer()(text)["input_ids"])


def _shortened(known: ClipMetadata, tokenizer: Any) -> ClipMetadata:
    """What is known of a clip, as much of it as a training takes.

    Lists lose their last entries, the one with most tokens first, and the description its last
    words. Neither gets less than half of the room for the sake of the other.
    """
    # Tokens do not reach over spaces, so the parts add up to the whole text. Each entry has one.
    entries: dict[str, tuple[str, ...]] = {it: getattr(known, it)[:TEXT_TOKENS] for it in _LISTS}
    entries["key"] = (known.key,) if known.key else ()
    costs = {
        name: [_cost(f"{entry.lower()},", tokenizer) for entry in given]
        for name, given in entries.items()
    }
    fixed = [f"{name}:" for name, given in entries.items() if given]
    fixed += [f"bpm: {known.bpm}."] if known.bpm is not None else []
    # Besides there are one more period and the end.
    room = TEXT_TOKENS - _cost(" ".join(fixed), tokenizer) - 2
    described = _cost(known.description or "", tokenizer)
    sums = {name: sum(tokens) for name, tokens in costs.items()}
    while sum(sums.values()) > max(room // 2, room - described):
        longest = max(sums, key=lambda name: sums[name])
        sums[longest] -= costs[longest].pop()
    left = {name: given[: len(costs[name])] for name, given in entries.items()}
    changes: dict[str, Any] = {name: left[name] for name in _LISTS}
    changes["key"] = next(iter(left["key"]), None)
    changes["description"] = _cut(known.description, room - sum(sums.values()), tokenizer)
    return replace(known, **changes)


def _cost(text: str, tokenizer: Any) -> int:
    """Tokens of a part of a text."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(text: str | None, tokens: int, tokenizer: Any) -> str | None:
    """The first words of a text that have at most so many tokens; of a single word a part."""
    if text is None:
        return None
    said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = said["offset_mapping"]
    if len(spans) <= tokens:
        return text
    start = text[: spans[tokens - 1][1]]
    start = start.rpartition(" ")[0] or start
    # Letters that are no tokens of their own become bytes, each with the place of all in a row.
    while _cost(start, tokenizer) > tokens:
        start = start[: len(start) // 2]
    return start


if __name__ == "__main__":
    main()
