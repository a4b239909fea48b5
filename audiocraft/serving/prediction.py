"""From a request to an audio file: what `predict.py` asks for."""

import logging
import math
import os
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from audiocraft.data.audio import audio_info, audio_read, audio_write
from audiocraft.errors import AudioFileError, InputError, WeightsError
from audiocraft.models.musicgen import MusicGen
from audiocraft.models.versions import VERSIONS
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)

MAX_DURATION = 600
_SILENCE = 1e-4  # peak below -80 dBFS
_SHORTEST_CONTINUATION_S = 0.1
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
        if self.replicate_weights:
            raise InputError("replicate_weights is not supported yet; leave it empty.")
        if self.multi_band_diffusion:
            raise InputError("multi_band_diffusion is not supported yet; leave it off.")
        if self.prompt is None and self.input_audio is None:
            raise InputError(
                "There is nothing to make music from: give a prompt, an input_audio or both."
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
        if not math.isfinite(self.temperature + self.classifier_free_guidance + self.top_p):
            raise InputError("temperature, classifier_free_guidance and top_p must be numbers.")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p:g}, it must be from 0 to 1.")
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature:g}, it must be 0 or more.")
        if self.classifier_free_guidance < 0:
            raise InputError(
                f"classifier_free_guidance is {self.classifier_free_guidance:g}, it must be 0 or "
                "more."
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, it must fit in 64 bits.")
        if self.clip_end is not None and self.continuation_start >= self.clip_end:
            raise InputError(
                f"continuation_start is {self.continuation_start} s, it must be before "
                f"continuation_end, {self.clip_end} s."
            )
        if (
            self.input_audio is not None
            and not self.continuation
            and not VERSIONS[self.model_version].melody
        ):
            melody = ", ".join(name for name, version in VERSIONS.items() if version.melody)
            raise InputError(
                f"model_version {self.model_version} cannot follow the melody of input_audio: "
                f"take one of {melody}, or switch continuation on."
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
    """Answers one request at a time, with one model in memory.

    Args:
        weights: fine-tuned weights to serve.

    Raises:
        WeightsError: weights were given, which this version cannot load yet.
    """

    def __init__(self, weights: str | None = None) -> None:
        if weights:
            raise WeightsError(
                "COG_WEIGHTS is set, but fine-tuned weights are not supported yet; unset it."
            )
        _log_to_stderr()
        # The same request gives the same file: no algorithm that is chosen by a race.
        torch.backends.cudnn.deterministic = True
        self._model: MusicGen | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def predict(self, request: PredictionRequest) -> PredictionResult:
        """Make the music of a request.

        Raises:
            InputError: the request cannot be met; the message is meant for the user.
        """
        request.check()
        clip = None if request.input_audio is None else _read_clip(request)
        self._remove_last_result()
        model = self._load(request.model_version)
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
        wav = _generate(model, request, clip).cpu()  # a GPU is done when its result is here
        elapsed = time.perf_counter() - begin
        logger.info("Made %d s of music in %.1f s.", request.duration, elapsed)
        path = self._write(wav, model.sample_rate, request)
        return PredictionResult(
            path,
            {
                "seed": seed,
                "seconds_generated": wav.shape[-1] / model.sample_rate,
                "real_time_factor": wav.shape[-1] / model.sample_rate / elapsed,
                "steps_per_second": progress.done / elapsed,
                "model_version": request.model_version,
            },
        )

    def _load(self, version: str) -> MusicGen:
        if self._model is None or self._model.name != version:
            self._model = None  # frees its memory before the next one is loaded
            begin = time.perf_counter()
            self._model = MusicGen.get_pretrained(version)
            logger.info(
                "Loaded %s on %s in %.1f s.",
                version,
                self._model.device,
                time.perf_counter() - begin,
            )
        return self._model

    def _write(self, wav: Tensor, sample_rate: int, request: PredictionRequest) -> Path:
        self._folder = tempfile.TemporaryDirectory(prefix="musicgen-", ignore_cleanup_errors=True)
        return audio_write(
            Path(self._folder.name) / f"musicgen-{secrets.token_hex(6)}",
            wav,
            sample_rate,
            format=request.output_format,
            strategy=request.normalization_strategy,
            loudness_compressor=True,
        )

    def _remove_last_result(self) -> None:
        """Cog does not remove the file that it has sent."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _generate(
    model: MusicGen, request: PredictionRequest, clip: tuple[Tensor, int] | None
) -> Tensor:
    """Audio [C, T]."""
    descriptions = [request.prompt]
    if clip is None:
        audio = model.generate(descriptions)
    elif request.continuation:
        wav, sample_rate = clip
        seconds = wav.shape[-1] / sample_rate
        if seconds > model.max_duration:
            raise InputError(
                f"The part of input_audio to continue has {seconds:.2f} s, {model.name} hears at "
                f"most {model.max_duration:g} s: shorten it with continuation_start and "
                "continuation_end."
            )
        audio = model.generate_continuation(wav[None], sample_rate, descriptions)
    else:
        wav, sample_rate = clip
        audio = model.generate_with_chroma(descriptions, [wav], sample_rate)
    assert isinstance(audio, Tensor), "return_tokens was not asked for"
    return audio[0]


def _read_clip(request: PredictionRequest) -> tuple[Tensor, int]:
    """The part of `input_audio` that is used, [C, T], and its sample rate."""
    assert request.input_audio is not None
    path = _checked_path(request.input_audio)
    try:
        length = audio_info(path).duration
    except AudioFileError as error:
        raise AudioFileError(f"input_audio: {error}") from error
    start, end = request.continuation_start, request.clip_end
    for name, second in (("continuation_start", start), ("continuation_end", end)):
        if second is not None and second > length:
            raise InputError(
                f"{name} is {second} s, but input_audio has only {length:.2f} s: give an earlier "
                "second."
            )
    seconds = (length if end is None else end) - start
    if not request.continuation:
        seconds = min(seconds, request.duration + _MELODY_MARGIN_S)
    elif request.duration - seconds < _SHORTEST_CONTINUATION_S:
        raise InputError(
            f"The part of input_audio to continue has {seconds:.2f} s and duration is "
            f"{request.duration} s, which counts it too: raise duration, or shorten the part with "
            "continuation_start and continuation_end."
        )
    wav, sample_rate = audio_read(path, start, seconds)
    if wav.shape[-1] == 0:
        raise AudioFileError("input_audio holds no sound in the part that is used: take another.")
    if wav.abs().max() < _SILENCE:
        if request.continuation:
            raise AudioFileError(
                "input_audio is silent in the part that is used: there is nothing to continue."
            )
        logger.warning("input_audio is silent in the part that is used: it gives no melody.")
    return wav, sample_rate


def _checked_path(path: Path) -> Path:
    """Refuse files of the server that a client has no business with.

    Cog downloads URLs to the temporary folder, but hands plain path strings through.
    """
    resolved = path.resolve()
    own = (Path.cwd(), Path(tempfile.gettempdir()))
    if os.environ.get("ALLOW_LOCAL_FILES") == "1" or any(
        resolved.is_relative_to(folder.resolve()) for folder in own
    ):
        return resolved
    raise InputError(
        "input_audio is a path on the server, which is not allowed: give a URL, or start the "
        "server with ALLOW_LOCAL_FILES=1."
    )


def _log_to_stderr() -> None:
    """Show this package's messages, and not the progress bars of others."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    package = logging.getLogger("audiocraft")
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)
