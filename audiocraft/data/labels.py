"""What a clip of music is, for its description: genre, mood, instruments, key, tempo.

Genre, mood and instruments come from MTG's models: `discogs-effnet` makes 1280 numbers of every two
seconds, one second apart, and three heads make probabilities of those. Key and tempo come from
`key.py` and `tempo.py`. Where there is nothing to tell, as in silence, noise or a clip of a second,
there is no label rather than a wrong one.

essentia (AGPL-3.0) is imported here alone, and only to run those models, whose files are under
CC BY-NC-SA 4.0.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from audiocraft.assets import store
from audiocraft.assets.parts import file_sha256
from audiocraft.data import key, tempo
from audiocraft.data.key import Key, find_key
from audiocraft.data.tempo import Tempo, find_tempo
from audiocraft.errors import AssetError, InputError, WeightsError

MODELS_FOLDER: Final = "essentia"
"""Where the models lie in the store."""

THRESHOLDS: Final = {"genre": 0.15, "moods": 0.06, "instrument": 0.15}
"""Least probability of a label, as a mean over the clip."""

EMBEDDING: Final = 1280
"""Numbers that `discogs-effnet` makes of a patch."""

LONGEST: Final = max(key.LONGEST, tempo.LONGEST)
"""Seconds from the middle of a song that its key and tempo are told from."""

TAG_SEPARATORS: Final = ";,/|"
"""What stands between genres where a file's tag holds several; a null character does too."""

_RATE: Final = 16000  # Hz, of discogs-effnet
# 128 frames of 16 ms and the window of the last: below 2.1 s essentia returns no patch.
_SHORTEST: Final = 2.1  # seconds
_SILENT: Final = 1e-3  # the greatest sample, -60 dB of full scale

# Names of the tensors in MTG's files: what goes in, what comes out.
_EMBEDDER: Final = ("serving_default_melspectrogram", "PartitionedCall:1")
_HEADS: Final = {
    "genre": ("serving_default_model_Placeholder", "PartitionedCall:0"),
    "moods": ("model/Placeholder", "model/Sigmoid"),
    "instrument": ("model/Placeholder", "model/Sigmoid"),
}

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Vocabularies:
    """The labels that the heads know, in the order of their outputs.

    Attributes:
        genre: of `genre_discogs400`, `parent---style`.
        moods: of `mtg_jamendo_moodtheme`.
        instrument: of `mtg_jamendo_instrument`.
    """

    genre: tuple[str, ...]
    moods: tuple[str, ...]
    instrument: tuple[str, ...]


@dataclass(frozen=True)
class Labels:
    """What a clip is; what could not be told is empty or None.

    Attributes:
        genre: such as `("Electronic", "House")`.
        moods: such as `("dark", "dream")`; themes too.
        instrument: such as `("drums", "piano")`.
        key: such as `F# minor` or `Bb major`.
        bpm: beats a minute, to a tenth.
    """

    genre: tuple[str, ...] = ()
    moods: tuple[str, ...] = ()
    instrument: tuple[str, ...] = ()
    key: str | None = None
    bpm: float | None = None


@dataclass(frozen=True)
class LabelModels:
    """Models in memory, for as many clips as there are; not to be used after a fork.

    Attributes:
        vocabularies: what the heads' outputs mean.
        embedder: of audio to embeddings.
        heads: of embeddings to probabilities, by field of `Labels`.
    """

    vocabularies: Vocabularies
    embedder: Any
    heads: dict[str, Any]


def model_paths(folder: Path | None = None) -> dict[str, Path]:
    """Where each model should be: `embedder`, and the heads by field of `Labels`.

    Args:
        folder: of the models; `essentia` in the store by default.
    """
    folder = folder or store.store_dir() / MODELS_FOLDER
    files = [folder / f"{name.rpartition('/')[2]}.pb" for name in store.LABEL_MODELS]
    return dict(zip(("embedder", *_HEADS), files, strict=True))


def check_label_models(folder: Path | None = None) -> None:
    """Find out whether all models are there, before anything costs time.

    Args:
        folder: see `model_paths`.

    Raises:
        AssetError: files are missing.
    """
    missing = [path for path in model_paths(folder).values() if not path.is_file()]
    if missing:
        names = ", ".join(path.name for path in missing)
        raise AssetError(
            f"auto_labeling needs {names} in {missing[0].parent}: run "
            f"{store.command('tiny --train')} or put the file{'s' * (len(missing) > 1)} there, or "
            "set auto_labeling=false."
        )


def load_label_models(vocabularies: Vocabularies, folder: Path | None = None) -> LabelModels:
    """Load the models, once for a job.

    Args:
        vocabularies: what the heads' outputs mean.
        folder: see `model_paths`.

    Raises:
        AssetError: files are missing, or essentia is not installed.
        WeightsError: a file is damaged, another model, or of another vocabulary.
    """
    check_label_models(folder)
    standard = _essentia()
    paths = model_paths(folder)
    models = LabelModels(
        vocabularies,
        _open(standard.TensorflowPredictEffnetDiscogs, paths["embedder"], *_EMBEDDER),
        {
            field: _open(standard.TensorflowPredict2D, paths[field], *names)
            for field, names in _HEADS.items()
        },
    )
    silence = np.zeros(3 * _RATE, np.float32)
    _check_width(paths["embedder"], models.embedder, silence, EMBEDDING, "an embedding has")
    for field, head in models.heads.items():
        width = len(getattr(vocabularies, field))
        embedding = np.zeros((1, EMBEDDING), np.float32)
        _check_width(paths[field], head, embedding, width, f"the vocabulary of {field} has")
    return models


def label_clip(
    models: LabelModels, wav: Tensor, sample_rate: int, genre_tag: str | None = None
) -> Labels:
    """All labels of a clip.

    Args:
        models: see `load_label_models`.
        wav: (C, T), floating point.
        sample_rate: Hz.
        genre_tag: what the file says of its genre, perhaps several; it comes first.

    Raises:
        InputError: `wav` is no such audio.
    """
    tags = re.split(f"[{TAG_SEPARATORS}\0]", genre_tag or "")
    clip = _Clip.of(wav, sample_rate)
    # The heads would find a name for noise too, which has neither steady tones nor a pulse.
    embeddings = _embed(models, clip.at(_RATE)) if clip.tones or clip.pulse else None
    if embeddings is None:
        return Labels(unique(tags), key=clip.key, bpm=clip.bpm)
    genre, moods, instrument = (_pick(models, field, embeddings) for field in _HEADS)
    styles = [part for label in genre for part in label.split("---")]
    return Labels(unique([*tags, *styles]), unique(moods), unique(instrument), clip.key, clip.bpm)


def key_and_tempo(wav: Tensor, sample_rate: int) -> tuple[str | None, float | None]:
    """The labels that need no model.

    Args:
        wav: (C, T), floating point.
        sample_rate: Hz.

    Returns:
        `key` and `bpm` of `Labels`: the first takes 10 s of music, the second 8.

    Raises:
        InputError: `wav` is no such audio.
    """
    clip = _Clip.of(wav, sample_rate)
    return clip.key, clip.bpm


def models_key(vocabularies: Vocabularies) -> str:
    """SHA-256 in hex over all that labels depend on besides the music.

    Args:
        vocabularies: what the heads' outputs mean.
    """
    digest = hashlib.sha256(repr((asdict(vocabularies), THRESHOLDS)).encode())
    for path in model_paths().values():
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def mono_at(wav: Tensor, sample_rate: int, wanted: int) -> Floats:
    """The mean of all channels at another rate.

    Args:
        wav: (C, T), floating point.
        sample_rate: Hz.
        wanted: Hz of the result.

    Returns:
        (T * wanted / sample_rate,), contiguous.
    """
    import soxr

    mono = wav.detach().cpu().float().mean(0).numpy()
    return np.ascontiguousarray(soxr.resample(mono, sample_rate, wanted, quality="HQ"))


@dataclass(frozen=True)
class _Clip:
    """A clip, and what is told of it without a model.

    Attributes:
        wav: (C, T).
        sample_rate: Hz.
        tones: what its key would be; None where no tones are steady.
        pulse: what its tempo would be; None where there is no pulse.
    """

    wav: Tensor
    sample_rate: int
    tones: Key | None = None
    pulse: Tempo | None = None

    @classmethod
    def of(cls, wav: Tensor, sample_rate: int) -> Self:
        if wav.dim() != 2 or not wav.is_floating_point():  # noqa: PLR2004
            raise InputError(
                f"Audio is {wav.dtype} of the shape {tuple(wav.shape)}; give it as floating point, "
                "(channels, samples)."
            )
        if not bool(wav.isfinite().all()):
            raise InputError(
                "Audio holds samples that are not numbers (NaN or infinite); give it without them."
            )
        clip = cls(wav, sample_rate)
        if clip.seconds < _SHORTEST or float(wav.mean(0).abs().max()) < _SILENT:
            return clip
        tones, pulse = find_key(clip.at(key.RATE)), find_tempo(clip.at(tempo.RATE))
        return replace(
            clip, tones=tones if tones.is_tonal else None, pulse=pulse if pulse.is_regular else None
        )

    @property
    def seconds(self) -> float:
        return self.wav.shape[-1] / self.sample_rate

    @property
    def key(self) -> str | None:
        known = self.tones is not None and self.tones.is_clear and self.seconds >= key.SHORTEST
        return self.tones.name if self.tones is not None and known else None

    @property
    def bpm(self) -> float | None:
        known = self.pulse is not None and self.seconds >= tempo.SHORTEST
        return round(self.pulse.bpm, 1) if self.pulse is not None and known else None

    def at(self, rate: int) -> Floats:
        return mono_at(self.wav, self.sample_rate, rate)


def _embed(models: LabelModels, mono: Floats) -> Floats | None:
    """Embeddings (patches, 1280); None where the clip has no whole patch."""
    found = np.asarray(models.embedder(mono), np.float32)  # an empty list where there is none
    return found if found.size else None


def _pick(models: LabelModels, field: str, embeddings: Floats) -> list[str]:
    means = np.asarray(models.heads[field](embeddings)).mean(0)
    vocabulary: tuple[str, ...] = getattr(models.vocabularies, field)
    return [
        label for label, mean in zip(vocabulary, means, strict=True) if mean >= THRESHOLDS[field]
    ]


def unique(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels, each once and as it is first written; nothing empty."""
    first: dict[str, str] = {}
    for label in map(str.strip, labels):
        first.setdefault(label.casefold(), label)
    first.pop("", None)
    return tuple(first.values())


def _essentia() -> ModuleType:
    """`essentia.standard`, quiet.

    Raises:
        AssetError: it is not installed.
    """
    # TensorFlow's C library reads this when it is loaded: errors alone.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import essentia

        essentia.log.infoActive = False  # before the next import, which has something to say
        essentia.log.warningActive = False
        import essentia.standard
    except ImportError as error:
        raise AssetError(
            f"auto_labeling needs essentia-tensorflow, which cannot be imported ({error}): install "
            "it with pip, or set auto_labeling=false."
        ) from error
    standard: ModuleType = essentia.standard
    return standard


def _open(algorithm: Any, path: Path, source: str, output: str) -> Any:
    try:
        return algorithm(graphFilename=str(path), input=source, output=output)
    except RuntimeError as error:
        raise _wrong_model(path, "it is damaged or another model") from error


def _check_width(path: Path, model: Any, given: Floats, width: int, what: str) -> None:
    """Try a model, so that a wrong one is found before hours of work.

    Args:
        path: of the model, for messages.
        model: to try.
        given: what it takes.
        width: of what it should give.
        what: has that width, for messages.
    """
    try:
        found = np.asarray(model(given))
    except RuntimeError as error:
        raise _wrong_model(path, "it does not run") from error
    if found.ndim != 2 or found.shape[1] != width:  # noqa: PLR2004
        has = found.shape[1] if found.ndim == 2 else 0  # noqa: PLR2004
        raise _wrong_model(path, f"it has {has} outputs, but {what} {width}")


def _wrong_model(path: Path, why: str) -> WeightsError:
    return WeightsError(
        f"{path} cannot be used, {why}: delete it and run {store.command('tiny --train')}, or set "
        "auto_labeling=false."
    )
