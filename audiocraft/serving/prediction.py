"""From a request to an audio file: what `predict.py` asks for."""

import logging
import math
import os
import secrets
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import urlsplit

import torch
from torch import Tensor

from audiocraft.assets.finetunes import FineTuneStore, StoredFile
from audiocraft.data.audio import LOUDEST, audio_info, audio_read, audio_write
from audiocraft.errors import (
    AssetError,
    AudiocraftError,
    AudioEndError,
    AudioFileError,
    InputError,
    TooLargeError,
    is_out_of_memory,
)
from audiocraft.models.finetunes import FineTune, read_finetune
from audiocraft.models.multibanddiffusion import MultiBandDiffusion
from audiocraft.models.musicgen import MusicGen
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.device import device_warning
from audiocraft.progress import ProgressLog
from audiocraft.serving.models import ModelCache, Selection
from audiocraft.serving.worker import checked_path, is_url, log_to_stderr, temporary_folder_needed

logger = logging.getLogger(__name__)

MAX_DURATION = 600
# The text encoder's memory grows with its square: some gigabytes here, if each were a token.
MAX_PROMPT = 5000
# Beyond, it would make infinities of the model's numbers, which end at 3e38.
MAX_GUIDANCE = 1e30
_SILENCE = 1e-4  # peak below -80 dBFS
_SHORTEST_CONTINUATION_S = 0.1
_SHORTEST_PART_S = 0.02  # one frame of codes
_SHOWN = 100  # characters of a path that may be anything
# Of a melody the result hears no more than its own length and one context; the rest is margin for
# the separator's segments. Separating all of a long song takes minutes without a GPU.
_MELODY_MARGIN_S = 60


@dataclass(frozen=True)
class PredictionRequest:
    """The inputs of `predict.py`, see their descriptions there."""

    prompt: str | None = None
    input_audio: Path | None = None
    duration: int = 8
    continuation: bool = False
    continuation_start: int = 0
    continuation_end: int | None = None
    multi_band_diffusion: bool = False
    normalization_strategy: str = "loudness"
    top_k: int = 250
    top_p: float = 0.0
    temperature: float = 1.0
    classifier_free_guidance: float = 3.0
    output_format: str = "wav"
    seed: int | None = None
    replicate_weights: str | None = None
    model_version: str = "stereo-melody"

    def check(self) -> None:
        """Refuse what can be refused without reading a file.

        Raises:
            InputError: naming the input, the limit and the remedy.
        """
        if self.prompt is None and self.input_audio is None:
            raise InputError(
                "There is nothing to make music from: give a prompt, an input_audio or both."
            )
        if self.input_audio == Path():
            raise InputError(
                "input_audio is empty or a folder: give a URL or a file, or leave it out."
            )
        # As the tokenizer sees it, in which one character may become eighteen.
        length = len(unicodedata.normalize("NFKC", self.prompt or ""))
        if length > MAX_PROMPT:
            raise InputError(
                f"prompt has {length} characters, it may have up to {MAX_PROMPT}: shorten it."
            )
        if self.continuation and self.input_audio is None:
            raise InputError(
                "continuation is on, but there is no input_audio to continue: give one, or switch "
                "continuation off."
            )
        if not 1 <= self.duration <= MAX_DURATION:
            raise InputError(
                f"duration is {self.duration}, it must be from 1 to {MAX_DURATION} seconds."
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}, it must be 0 or more; 0 lifts the limit.")
        for name in ("temperature", "classifier_free_guidance", "top_p"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise InputError(f"{name} is {value}, it must be a finite number.")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p:g}, it must be from 0 to 1.")
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature:g}, it must be 0 or more.")
        if self.classifier_free_guidance < 0:
            raise InputError(
                f"classifier_free_guidance is {self.classifier_free_guidance:g}, it must be 0 or "
                "more."
            )
        if self.classifier_free_guidance > MAX_GUIDANCE:
            raise InputError(
                f"classifier_free_guidance is {self.classifier_free_guidance:g}, it may be up to "
                f"{MAX_GUIDANCE:g}; 3 suits most music."
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, it must be from -2^63 to 2^63 - 1.")
        if self.clip_end is not None and self.continuation_start >= self.clip_end:
            raise InputError(
                f"continuation_start is {self.continuation_start} s, it must be before "
                f"continuation_end, {self.clip_end} s."
            )

    def check_for(self, selection: Selection) -> None:
        """Refuse what the weights that will answer cannot do, before they are loaded.

        Raises:
            InputError: naming the input, the limit and the remedy.
        """
        if self.input_audio is not None and not self.continuation and not selection.melody:
            melody = ", ".join(name for name, version in VERSIONS.items() if version.melody)
            remedy = (
                f"take one of {melody}, or switch continuation on"
                if selection.tuned is None
                else "leave input_audio out, or switch continuation on"
            )
            raise InputError(
                f"{selection.label} cannot follow the melody of input_audio: {remedy}."
            )

    @property
    def clip_end(self) -> int | None:
        """Second at which the clip ends; None is the end of the recording."""
        return None if self.continuation_end == -1 else self.continuation_end


@dataclass(frozen=True)
class PredictionResult:
    """What a request gave.

    Attributes:
        path: audio file in a folder of its own, kept until the next request.
        metrics: numbers and names to record with the prediction.
    """

    path: Path
    metrics: dict[str, int | float | str]


class PredictionService:
    """Answers one request at a time.

    Args:
        weights: path or URL of fine-tuned weights for requests that bring none.
        models: the models in memory.

    Raises:
        WeightsError: the weights are not those of a MusicGen, or not for what is here.
        AssetError: they cannot be fetched.
    """

    def __init__(self, weights: str | None = None, models: ModelCache | None = None) -> None:
        log_to_stderr()
        _hide_progress_bars()
        # The same request gives the same file: no algorithm that is chosen by a race.
        torch.backends.cudnn.deterministic = True
        self._models = models or ModelCache(precision=os.environ.get("PRECISION"))
        self._files = FineTuneStore()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._served: tuple[FineTune, str] | None = None
        self._device_warning = device_warning()
        if weights:
            # The base never answers under a fine-tune's name: what cannot be served ends here.
            stored = self._find_weights(weights, "COG_WEIGHTS")
            self._files.pin(stored)
            self._served = self._read_weights(stored, weights, "COG_WEIGHTS")
            if self._served[0].base is not None:
                self._models.get(self._select(PredictionRequest()))

    def predict(self, request: PredictionRequest) -> PredictionResult:
        """Make the music of a request.

        Raises:
            InputError: the request cannot be met; the message is meant for the user.
            WeightsError: the fine-tuned weights cannot be used; likewise.
            AssetError: something cannot be fetched; likewise.
        """
        self._remove_last_result()
        if self._device_warning is not None:
            logger.warning("%s", self._device_warning)
        request.check()
        if not request.replicate_weights:
            request.check_for(self._select(request))
        try:
            with temporary_folder_needed():
                self._folder = tempfile.TemporaryDirectory(
                    prefix="musicgen-", ignore_cleanup_errors=True
                )
            return self._make(request, Path(self._folder.name))
        except BaseException:  # refused, cancelled, or the disk is full
            self._remove_last_result()
            raise

    def _make(self, request: PredictionRequest, folder: Path) -> PredictionResult:
        """The music of a request, in a folder."""
        clip = None if request.input_audio is None else _read_clip(request)
        with self._selected(request) as selection:
            request.check_for(selection)
            if clip is not None and request.continuation:
                _check_prompt(clip, selection)
            model = self._models.get(selection)
        diffusion = self._models.diffusion(model) if request.multi_band_diffusion else None
        self._models.make_room(
            model, request.duration, clip is not None and not request.continuation, diffusion
        )
        seed = request.seed
        if seed is None or seed == -1:
            seed = secrets.randbelow(2**31)
        logger.info("Seed: %d", seed)
        model.set_generation_params(
            top_k=request.top_k,
            top_p=request.top_p,
            temperature=request.temperature,
            duration=request.duration,
            cfg_coef=request.classifier_free_guidance,
            seed=seed,
        )
        progress = ProgressLog(logger, "steps")
        model.set_custom_progress_callback(progress.update)
        begin = time.perf_counter()
        wav = self._generate(_Job(model, request, clip, diffusion, seed), selection.smaller)
        elapsed = time.perf_counter() - begin
        logger.info("Made %d s of music in %.1f s.", request.duration, elapsed)
        path = _write(folder, wav, model.sample_rate, request)
        return PredictionResult(
            path,
            {
                "seed": seed,
                "seconds_generated": wav.shape[-1] / model.sample_rate,
                "real_time_factor": wav.shape[-1] / model.sample_rate / elapsed,
                "steps_per_second": progress.done / elapsed,
                "model_version": selection.version,
            },
        )

    def _generate(self, job: "_Job", smaller: str) -> Tensor:
        """Audio [C, T] on the CPU; where memory runs out, again with no other model loaded.

        Args:
            job: what to make.
            smaller: a clause that says what takes less memory.
        """
        try:
            return job.run().cpu()  # a GPU is done when its result is here
        except (RuntimeError, MemoryError, TooLargeError) as error:
            if not (isinstance(error, TooLargeError) or is_out_of_memory(error)):
                raise
            logger.warning("Out of memory: trying again with no other model loaded.")
        self._models.evict_others(job.model, keep_bands=job.diffusion is not None)
        try:
            return job.run().cpu()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            model, seconds = job.model, job.request.duration
            raise InputError(
                f"{seconds} s of {model.name} do not fit the memory of {model.device}: "
                f"{smaller} or a shorter duration, or free some of it."
            ) from error

    def _select(
        self, request: PredictionRequest, own: tuple[FineTune, str] | None = None
    ) -> Selection:
        """The weights that answer: the request's own, else the server's, else a version's."""
        tuned, sha256 = own or self._served or (None, None)
        version = tuned.base if tuned is not None and tuned.base else request.model_version
        return Selection(version, tuned, sha256)

    @contextmanager
    def _selected(self, request: PredictionRequest) -> Iterator[Selection]:
        """`_select`, with the request's own weights on disk until the block ends."""
        source = request.replicate_weights
        if not source:
            yield self._select(request)
            return
        name = "replicate_weights"
        stored = self._find_weights(source, name)
        try:
            yield self._select(request, self._read_weights(stored, source, name))
        finally:
            self._files.release(stored)

    def _find_weights(self, source: str, name: str) -> StoredFile:
        """The file of fine-tuned weights, fetched if it is a URL.

        Args:
            source: path or URL.
            name: of the input that gave it.
        """
        if not is_url(source) and name != "COG_WEIGHTS":
            path = checked_path(Path(source), name)
            try:
                found = path.is_file()
            except OSError:  # too long, or in a folder that is closed to us
                found = False
            if not found:
                shown = source if len(source) <= _SHOWN else f"{source[:_SHOWN]}..."
                raise InputError(
                    f"{name}: there is no file {shown}: give a URL or the path of a file, on the "
                    f"command line as {name}=@{shown}."
                )
            source = str(path)
        try:
            return self._files.get(source)
        except AudiocraftError as error:
            kind = InputError if isinstance(error, InputError) else AssetError
            raise kind(f"{name}: {error}") from error

    def _read_weights(self, stored: StoredFile, source: str, name: str) -> tuple[FineTune, str]:
        """What the file says, and its hash."""
        shown = "" if source.startswith("data:") else f" ({PurePath(urlsplit(source).path).name})"
        return read_finetune(stored.path, name + shown), stored.sha256

    def _remove_last_result(self) -> None:
        """Cog does not remove the file that it has sent."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@dataclass
class _Job:
    """All that a result is made from.

    Attributes:
        model: with its settings made.
        request: checked.
        clip: the part of `input_audio` that is used, [C, T], and its sample rate.
        diffusion: what decodes, if not the codec alone.
        seed: of the result.
        tokens: [1, K, frames], once they are made and left to the diffusion.
    """

    model: MusicGen
    request: PredictionRequest
    clip: tuple[Tensor, int] | None
    diffusion: MultiBandDiffusion | None
    seed: int
    tokens: Tensor | None = None

    def run(self) -> Tensor:
        """Audio [C, T]; where decoding has failed, another run begins with that."""
        if self.tokens is None:
            audio, tokens = self._generate()
            if self.diffusion is None:
                return audio
            self.tokens = tokens
            del audio
        assert self.diffusion is not None
        progress = ProgressLog(logger, "network evaluations", "MultiBand Diffusion")
        return self.diffusion.tokens_to_wav(self.tokens, seed=self.seed, progress=progress.update)[
            0
        ]

    def _generate(self) -> tuple[Tensor, Tensor]:
        """Audio [C, T] of the codec, and tokens [1, K, frames]."""
        model, descriptions = self.model, [self.request.prompt]
        if self.clip is None:
            audio, tokens = model.generate(descriptions, return_tokens=True)
        elif self.request.continuation:
            wav, sample_rate = self.clip
            audio, tokens = model.generate_continuation(
                wav[None], sample_rate, descriptions, return_tokens=True
            )
        else:
            wav, sample_rate = self.clip
            audio, tokens = model.generate_with_chroma(
                descriptions, [wav], sample_rate, return_tokens=True
            )
        return audio[0], tokens


def _check_prompt(clip: tuple[Tensor, int], selection: Selection) -> None:
    wav, sample_rate = clip
    seconds = wav.shape[-1] / sample_rate
    if seconds > selection.context:
        shown = math.ceil(_hundredths(seconds)) / 100  # up, so that it shows as more
        raise InputError(
            f"The part of input_audio to continue has {shown:.2f} s, {selection.label} hears at "
            f"most {selection.context:g} s: shorten it with continuation_start and "
            "continuation_end."
        )


def _read_clip(request: PredictionRequest) -> tuple[Tensor, int]:
    """The part of `input_audio` that is used, [C, T], and its sample rate."""
    assert request.input_audio is not None
    path = checked_path(request.input_audio, "input_audio")
    start, end = request.continuation_start, request.clip_end
    # No more than is used is decoded, of which three hours take half a minute.
    most = request.duration + (0 if request.continuation else _MELODY_MARGIN_S)
    wanted = most if end is None else min(end - start, most)
    try:
        wav, sample_rate = audio_read(path, start, wanted)
        seconds = wav.shape[-1] / sample_rate
        left_out = end is not None and end - start > wanted
        too_much = request.continuation and request.duration - seconds < _SHORTEST_CONTINUATION_S
        length = audio_info(path).duration if left_out or too_much else start + seconds
    except AudioEndError as error:
        raise _past_the_end("continuation_start", start, error.duration) from error
    except AudioFileError as error:
        raise AudioFileError(f"input_audio: {error}") from error
    if end is not None and end > length:
        raise _past_the_end("continuation_end", end, length)
    if seconds < _SHORTEST_PART_S:
        remedy = "an earlier continuation_start" if start else "longer audio"
        raise InputError(
            f"The part of input_audio that is used is shorter than {_SHORTEST_PART_S:g} s, the "
            f"least that can be heard: give {remedy}."
        )
    if too_much:
        raise InputError(
            f"The part of input_audio to continue has {(end or length) - start:.2f} s and duration "
            f"is {request.duration} s, which counts it too: raise duration, or shorten the part "
            "with continuation_start and continuation_end."
        )
    peak = float(wav.abs().max())
    if peak > LOUDEST:
        raise AudioFileError(
            f"input_audio peaks at {peak:.4g}, where full scale is 1: export it again, for example "
            "as 24-bit WAV."
        )
    if peak < _SILENCE:
        if request.continuation:
            raise AudioFileError(
                "input_audio is silent in the part that is used, so there is nothing to continue: "
                "take another part with continuation_start and continuation_end, or other audio."
            )
        logger.warning("input_audio is silent in the part that is used: it gives no melody.")
    return wav, sample_rate


def _write(folder: Path, wav: Tensor, sample_rate: int, request: PredictionRequest) -> Path:
    """The file of a result."""
    if not bool(wav.isfinite().all()):
        raise InputError(
            "The music came out as samples that are not numbers (NaN or infinite): take another "
            "seed or other weights."
        )
    return audio_write(
        folder / f"musicgen-{secrets.token_hex(6)}",
        wav,
        sample_rate,
        format=request.output_format,
        strategy=request.normalization_strategy,
        loudness_compressor=True,
    )


def _past_the_end(name: str, second: int, length: float) -> InputError:
    shown = math.floor(_hundredths(length)) / 100  # down, so that it shows as less
    end = ", or -1 for its end" if name == "continuation_end" else ""
    return InputError(
        f"{name} is {second} s, but input_audio has only {shown:.2f} s: give an earlier second"
        f"{end}."
    )


def _hundredths(seconds: float) -> float:
    """Hundredths of a second, without what floating point adds; a sample is more."""
    return round(seconds * 100, 6)


def _hide_progress_bars() -> None:
    """Those of others; this package logs its own progress."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
