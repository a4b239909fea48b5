"""This package's side."""

import tempfile
import time
import wave
from collections import Counter
from pathlib import Path
from typing import Any, Final, cast

from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from audiocraft.data.audio_utils import i16_pcm, normalize_audio
from audiocraft.models import MultiBandDiffusion, MusicGen
from audiocraft.models.encodec import InterleaveStereoCompressionModel
from audiocraft.models.loaders import load_compression_model
from audiocraft.modules.conditioners import ConditioningAttributes
from audiocraft.modules.precision import Precision
from tools.benchmark.shapes import DESCRIPTION, DIFFUSION_STEPS, GUIDANCE, TOP_K
from tools.benchmark.side import Generate, Job, OnStep, StepClock, random_codes, synchronize

_PROFILED: Final = (16, 80)  # frames; what they differ in is 64 steps, without text and prefill
_LARGEST: Final = 12


def load_model(job: Job) -> MusicGen:
    """The model."""
    precision = cast("Precision", job.precision)
    return MusicGen.get_pretrained(job.release, job.device, precision=precision)


def load(job: Job) -> Generate:
    """A function that makes music."""
    return generator(load_model(job), job.batch)


def generator(model: MusicGen, batch: int = 1) -> Generate:
    """A function that makes music with a model."""

    def generate(seconds: float, on_step: OnStep) -> Tensor:
        model.set_generation_params(duration=seconds, cfg_coef=GUIDANCE, top_k=TOP_K)
        model.set_custom_progress_callback(on_step)
        audio = model.generate([DESCRIPTION] * batch)
        assert isinstance(audio, Tensor)
        return audio

    return generate


def load_diffusion(job: Job) -> Generate:
    """A function that decodes codes, and tells of evaluations of a network for one channel."""
    codec = load_compression_model(job.release, job.device)
    if job.channels > 1:
        codec = InterleaveStereoCompressionModel(codec)
    decoder = MultiBandDiffusion.get_mbd_musicgen(codec_model=codec, source=job.diffusion)
    evaluations = job.batch * job.channels * len(decoder.DPs) * DIFFUSION_STEPS

    def decode(seconds: float, on_step: OnStep) -> Tensor:
        def progress(done: int, total: int) -> None:
            on_step(done * evaluations // total, evaluations)  # channels may be side by side

        return decoder.tokens_to_wav(random_codes(job, seconds), progress=progress)

    return decode


def make_file(job: Job) -> None:
    """Load a release and write a file of music."""
    from audiocraft.data.audio import audio_write

    model = load_model(job)
    audio = generator(model)(job.seconds, lambda *_: None)
    stem = Path(job.output).with_suffix("")
    audio_write(stem, audio[0], model.sample_rate, strategy="loudness")


def request(job: Job) -> dict[str, Any]:
    """Seconds from a request to a WAV file: of the first one, and of the one after it."""
    model = load_model(job)
    generate = generator(model)

    def answer(path: Path) -> float:
        begin = time.perf_counter()
        audio = generate(job.seconds, lambda *_: None)[0].cpu()
        level = normalize_audio(audio, strategy="loudness", sample_rate=model.sample_rate)
        # By Python's own module: a GPU machine may lack soundfile.
        with wave.open(str(path), "wb") as file:
            file.setparams((len(audio), 2, model.sample_rate, 0, "NONE", ""))
            file.writeframes(i16_pcm(level).T.contiguous().numpy().tobytes())
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "music.wav"
        return {"first_s": answer(path), "request_to_file_s": answer(path)}


def profile(job: Job) -> dict[str, Any]:
    """What the device does in one step, on average, the codec left out.

    Returns:
        `step_ms` without the profiler, `device_ms` and `kernels` of a step (operations on a CPU),
        and the `largest` kernels as (name, ms, count).
    """
    lm = load_model(job).lm

    def generate(frames: int, on_step: OnStep | None = None) -> None:
        # By the language model itself: `MusicGen` would decode the codes, more of them for 80
        # frames than for 16.
        items = [ConditioningAttributes(text={"description": DESCRIPTION})] * job.batch
        lm.generate(
            conditions=items, max_gen_len=frames, top_k=TOP_K, cfg_coef=GUIDANCE, callback=on_step
        )

    times: list[Counter[str]] = []
    counts: list[Counter[str]] = []
    for frames in _PROFILED:
        generate(frames)
        clock = StepClock(job.device)
        generate(frames, clock)
        with torch_profile(activities=list(_activities(job.device))) as found:
            generate(frames)
            synchronize(job.device)
        times.append(Counter())
        counts.append(Counter())
        for event in found.key_averages():
            on_device = event.device_type.name == "CUDA"
            if on_device == (job.device == "cuda"):
                spent = event.self_device_time_total if on_device else event.self_cpu_time_total
                times[-1][event.key] += spent / 1000
                counts[-1][event.key] += event.count
    steps = _PROFILED[1] - _PROFILED[0]
    spent_ms = {name: (ms - times[0][name]) / steps for name, ms in times[1].items()}
    number = {name: (count - counts[0][name]) / steps for name, count in counts[1].items()}
    largest = sorted(spent_ms, key=lambda name: -spent_ms[name])[:_LARGEST]
    return {
        "step_ms": 1000 / clock.steps_per_s,
        "device_ms": sum(spent_ms.values()),
        "kernels": sum(number.values()),
        "largest": [(name[:80], spent_ms[name], number[name]) for name in largest],
    }


def _activities(device: str) -> tuple[ProfilerActivity, ...]:
    return (ProfilerActivity.CUDA,) if device == "cuda" else (ProfilerActivity.CPU,)
