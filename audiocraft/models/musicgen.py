"""MusicGen for Python programs: the interface of the official package.

Golden tests: `tiny_release`, `generate_greedy` (cases `api_*`).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import InputError
from audiocraft.generation.engine import ProgressCallback
from audiocraft.generation.sampling import RowNoise, SamplingParams
from audiocraft.generation.windows import (
    DecodingBehind,
    Window,
    generate_windows,
    loop_window,
    plan_windows,
)
from audiocraft.models.builders import (
    get_debug_compression_model,
    get_debug_lm_model,
    get_wrapped_compression_model,
)
from audiocraft.models.encodec import CompressionModel, exact
from audiocraft.models.finetunes import load_any
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition
from audiocraft.modules.device import default_device
from audiocraft.modules.precision import Precision, check_precision

_DEFAULT_CONTEXT = 30.0
Generated = Tensor | tuple[Tensor, Tensor]
"""Audio [B, C, T], and with `return_tokens` the codes [B, K, frames] beside it."""


class MusicGen:
    """Music from descriptions, melodies and recordings.

    Args:
        name: for messages.
        compression_model: the codec; a mono one is made stereo where the language model is.
        lm: the language model.
        max_duration: context in seconds; that of the training configuration if not given.

    Attributes:
        duration: seconds of the result.
        max_duration: most seconds that the model sees at once; may be assigned.
        generation_params: settings of the language model's sampling.
        device: where the models are.
    """

    def __init__(
        self,
        name: str,
        compression_model: CompressionModel,
        lm: LMModel,
        max_duration: float | None = None,
    ) -> None:
        if lm.cfg is not None:
            compression_model = get_wrapped_compression_model(compression_model, lm.cfg)
        self.name = name
        self.compression_model = compression_model
        self.lm = lm
        if max_duration is None:
            context = None if lm.cfg is None else lm.cfg.dataset.segment_duration
            max_duration = context or _DEFAULT_CONTEXT
        self.max_duration: float = max_duration
        self.device = lm.device
        self.duration = 0.0
        self._extend_stride: float | None = None
        self.seed: int | None = None
        self.generation_params: dict[str, Any] = {}
        self._progress_callback: ProgressCallback | None = None
        self.set_generation_params(duration=15)

    @staticmethod
    def get_pretrained(
        name: str | Path = "facebook/musicgen-melody",
        device: torch.device | str | None = None,
        precision: Precision | None = None,
    ) -> "MusicGen":
        """Load a model.

        Args:
            name: version (`small`, `stereo-melody`, ..., `tiny`), hub id, release folder, file of
                fine-tuned weights, or `debug` for a small random model.
            device: where it will run; the GPU if there is one.
            precision: of the language model's weights: `float32` (on a CPU, if not given),
                `bfloat16`, `float16` (on a GPU) or `int8` (CPUs alone; `small` is 2.9
                times as fast as in float32 there).

        Raises:
            InputError: the device does not offer the precision.
            WeightsError: the files are not those of a MusicGen.
            AssetError: they cannot be fetched.
        """
        if device is None:
            device = default_device()
        chosen = check_precision(precision, torch.device(device))
        if name == "debug":
            lm, codec = get_debug_lm_model(device), get_debug_compression_model(device)
            lm.set_precision(chosen)
        else:
            lm, codec = load_any(str(name), device, chosen)
        return MusicGen(str(name), codec, lm)

    @property
    def frame_rate(self) -> float:
        """Frames of codes per second."""
        return self.compression_model.frame_rate

    @property
    def sample_rate(self) -> int:
        """Hz of the audio."""
        return self.compression_model.sample_rate

    @property
    def audio_channels(self) -> int:
        """1 or 2."""
        return self.compression_model.channels

    def set_generation_params(
        self,
        use_sampling: bool = True,
        top_k: int = 250,
        top_p: float = 0.0,
        temperature: float = 1.0,
        duration: float = 30.0,
        cfg_coef: float = 3.0,
        cfg_coef_beta: float | None = None,
        two_step_cfg: bool = False,
        extend_stride: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Set how music is generated.

        Args:
            use_sampling: false takes the most likely token always.
            top_k: tokens to choose from; 0 is all.
            top_p: mass of the tokens to choose from; above 0 it replaces `top_k`.
            temperature: 0 is the most likely token; above 1 more surprising.
            duration: seconds of the result.
            cfg_coef: how closely the conditions are followed.
            cfg_coef_beta: weight of the text against the melody (double guidance).
            two_step_cfg: compute the branches of guidance one after the other.
            extend_stride: seconds by which the window moves on in music longer than the context;
                min(18, 0.6 x context) if not given.
            seed: random stream of the batch's first item, the next has `seed + 1` and so on;
                torch's global generator if not given.

        Raises:
            InputError: a value is out of its range.
        """
        SamplingParams(use_sampling, temperature, top_k, top_p)
        if not 1 <= duration * self.frame_rate < math.inf:
            raise InputError(
                f"duration is {duration:g} s, it must be a finite number from "
                f"{1 / self.frame_rate:g} s up."
            )
        if extend_stride is not None:
            self._check_stride(extend_stride)
        self._extend_stride = extend_stride
        self.duration = duration
        self.seed = seed
        self.generation_params = {
            "use_sampling": use_sampling,
            "temp": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "cfg_coef": cfg_coef,
            "two_step_cfg": two_step_cfg,
            "cfg_coef_beta": cfg_coef_beta,
        }

    @property
    def extend_stride(self) -> float:
        """Seconds by which the window moves on in music longer than the context."""
        given = self._extend_stride
        return min(18.0, 0.6 * self.max_duration) if given is None else given

    def _check_stride(self, extend_stride: float) -> None:
        if not 1 / self.frame_rate <= extend_stride < self.max_duration:
            raise InputError(
                f"extend_stride is {extend_stride:g} s, it must be from {1 / self.frame_rate:g} s "
                f"up and below the context of {self.max_duration:g} s."
            )

    def set_custom_progress_callback(
        self, progress_callback: ProgressCallback | None = None
    ) -> None:
        """Call this with (steps done, steps in all), over all windows.

        It is called after each step on a CPU, and every 8 steps on a GPU.
        """
        self._progress_callback = progress_callback

    def generate_unconditional(
        self, num_samples: int, progress: bool = False, return_tokens: bool = False
    ) -> Generated:
        """Music without any condition.

        Args:
            num_samples: B.
            progress: show a progress bar, where no callback is set.
            return_tokens: return the codes too.
        """
        return self._run([None] * num_samples, None, None, progress, return_tokens)

    def generate(
        self,
        descriptions: Sequence[str | None],
        progress: bool = False,
        return_tokens: bool = False,
    ) -> Generated:
        """Music from descriptions.

        Args:
            descriptions: one for each item, or None for none.
            progress: show a progress bar, where no callback is set.
            return_tokens: return the codes too.
        """
        return self._run(descriptions, None, None, progress, return_tokens)

    def generate_with_chroma(
        self,
        descriptions: Sequence[str | None],
        melody_wavs: Tensor | Sequence[Tensor | None],
        melody_sample_rate: int,
        progress: bool = False,
        return_tokens: bool = False,
    ) -> Generated:
        """Music from descriptions that follows melodies.

        Args:
            descriptions: one for each item.
            melody_wavs: [B, C, T], [C, T], or a list of [C, T] or None; T = 0 is none too.
            melody_sample_rate: Hz of the melodies.
            progress: show a progress bar, where no callback is set.
            return_tokens: return the codes too.

        Raises:
            InputError: the model follows no melody, or the numbers differ.
        """
        if not self.lm.condition_provider.has_wav_condition:
            raise InputError(
                f"The model {self.name} follows no melody; take a melody version such as "
                "stereo-melody, or leave the melody out."
            )
        if isinstance(melody_wavs, Tensor):
            melody_wavs = list(_batched(melody_wavs, "melody_wavs"))
        melodies = [
            None
            if wav is None
            else self._convert(_batched(wav, "each of melody_wavs", "[C, T]"), melody_sample_rate)
            for wav in melody_wavs
        ]
        return self._run(descriptions, None, melodies, progress, return_tokens)

    def generate_continuation(
        self,
        prompt: Tensor,
        prompt_sample_rate: int,
        descriptions: Sequence[str | None] | None = None,
        progress: bool = False,
        return_tokens: bool = False,
    ) -> Generated:
        """Music that goes on from recordings, which are its beginning.

        Args:
            prompt: [B, C, T] or [C, T].
            prompt_sample_rate: Hz of the recordings.
            descriptions: one for each item.
            progress: show a progress bar, where no callback is set.
            return_tokens: return the codes too.

        Raises:
            InputError: a recording leaves nothing to generate or is longer than the context.
        """
        prompt = self._convert(_batched(prompt, "prompt"), prompt_sample_rate)
        if descriptions is None:
            descriptions = [None] * len(prompt)
        return self._run(descriptions, prompt, None, progress, return_tokens)

    def generate_audio(self, gen_tokens: Tensor) -> Tensor:
        """Audio [B, C, T] of codes [B, K, frames]."""
        with torch.no_grad():
            return self.compression_model.decode(gen_tokens, None)

    @exact()
    def _convert(self, wav: Tensor, sample_rate: int) -> Tensor:
        wav = convert_audio(wav, sample_rate, self.sample_rate, self.audio_channels)
        return wav.to(self.device, torch.float32)

    def _run(
        self,
        descriptions: Sequence[str | None],
        prompt: Tensor | None,
        melodies: Sequence[Tensor | None] | None,
        progress: bool,
        return_tokens: bool,
    ) -> Generated:
        """Generate, decode, and return what was asked for."""
        if isinstance(descriptions, str):
            raise InputError("descriptions is one text; give a list of texts, one for each item.")
        rows = len(descriptions)
        if not rows:
            raise InputError("There is nothing to generate: give at least one description.")
        for name, items in (("melodies", melodies), ("prompts", prompt)):
            if items is not None and len(items) != rows:
                raise InputError(
                    f"There are {rows} descriptions and {len(items)} {name}; give one for each."
                )
        known = self._encode(prompt, rows)
        if self._decodes_behind():
            with DecodingBehind(self.compression_model.stream(), self.device) as decoding:
                tokens = self._generate_tokens(
                    descriptions, known, melodies, progress, decoding.push
                )
                audio = decoding.finish()
        else:
            tokens = self._generate_tokens(descriptions, known, melodies, progress)
            audio = self.generate_audio(tokens)
        return (audio, tokens) if return_tokens else audio

    def _decodes_behind(self) -> bool:
        """Whether windows are decoded while the next is generated: a CPU has no time to spare."""
        return self.device.type == "cuda" and self.duration > self.max_duration

    @torch.no_grad()
    def _encode(self, prompt: Tensor | None, rows: int) -> Tensor:
        """Codes [B, K, P] of the prompt; P is 0 without one."""
        if prompt is None:
            return torch.zeros(rows, self.lm.num_codebooks, 0, dtype=torch.long, device=self.device)
        codes, scale = self.compression_model.encode(prompt)
        if scale is not None:
            raise InputError(
                f"The codec of {self.name} has a scale, so no prompt can be continued; take a "
                "MusicGen version, whose codec has none."
            )
        return codes

    def _attributes(
        self,
        descriptions: Sequence[str | None],
        melodies: Sequence[Tensor | None] | None,
        window: Window,
    ) -> list[ConditioningAttributes]:
        """Conditions of one window; a long piece hears its melodies from where it is, looped."""
        attributes = [ConditioningAttributes(text={"description": text}) for text in descriptions]
        for item, melody in zip(attributes, melodies or [None] * len(attributes), strict=True):
            if melody is None or not melody.shape[-1]:
                continue
            wav = melody
            if self.duration > self.max_duration:
                start = int(window.offset / self.frame_rate * self.sample_rate)
                wav = loop_window(melody, start, int(self.max_duration * self.sample_rate))
            item.wav["self_wav"] = WavCondition(
                wav, torch.tensor([wav.shape[-1]]), [self.sample_rate], [None], [None]
            )
        return attributes

    @torch.no_grad()
    def _generate_tokens(
        self,
        descriptions: Sequence[str | None],
        prompt: Tensor,
        melodies: Sequence[Tensor | None] | None,
        progress: bool,
        finished: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Codes [B, K, frames] of the whole duration; `finished` hears of them window by window."""
        total = int(self.duration * self.frame_rate)
        context = int(self.max_duration * self.frame_rate)
        prompt_len = prompt.shape[-1]
        if prompt_len > context or prompt_len >= total:
            raise InputError(
                f"The prompt has {prompt_len / self.frame_rate:g} s: it must be shorter than the "
                f"result's {self.duration:g} s and at most the context of {self.max_duration:g} s."
            )
        if total > context:
            self._check_stride(self.extend_stride)
        stride = int(self.frame_rate * self.extend_stride)
        windows = plan_windows(total, context, stride, prompt_len)
        noise = RowNoise(self.seed, len(descriptions), self.device)
        max_delay = self.lm.pattern_provider.get_pattern(total).max_delay
        steps = sum(window.length - window.prompt_len + max_delay for window in windows)
        done = 0

        def generate(known: Tensor, window: Window) -> Tensor:
            nonlocal done
            codes = self.lm.generate(
                known,
                self._attributes(descriptions, melodies, window),
                max_gen_len=window.length,
                callback=lambda step, _: report(done + step, steps),
                noise=noise,
                **self.generation_params,
            )
            done += window.length - window.prompt_len + max_delay
            return codes

        with _progress_bar(steps, progress and self._progress_callback is None) as bar:

            def report(step: int, total_steps: int) -> None:
                if self._progress_callback is not None:
                    self._progress_callback(step, total_steps)
                bar.update(step - bar.n)

            return generate_windows(generate, windows, prompt, finished)


def _progress_bar(steps: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, disable=not shown, unit="step", mininterval=0.5)


def _batched(wav: Tensor, name: str, shape: str = "[B, C, T]") -> Tensor:
    """Audio [B, C, T] from [C, T], or from [B, C, T] where that is the shape asked for."""
    if wav.dim() == 2:  # noqa: PLR2004 - [C, T]
        wav = wav[None]
    elif wav.dim() != 3 or shape == "[C, T]":  # noqa: PLR2004 - [B, C, T]
        raise InputError(f"{name} has the shape {list(wav.shape)}, it must be {shape}.")
    return wav
