"""The official package's side: its public API, in a process that finds it before this project's."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tools.benchmark.absent import AbsentPackages
from tools.benchmark.shapes import DESCRIPTION, DIFFUSION_STEPS, GUIDANCE, ROOT, TOP_K
from tools.benchmark.side import Generate, Job, OnStep, random_codes

ABSENT: Final = (
    "av",
    "demucs",
    "dora",
    "flashy",
    "librosa",
    "num2words",
    "soundfile",
    "spacy",
    "torchaudio",
    "torchmetrics",
    "xformers",
)
"""What version 1.3.0 imports in any case, and music from a description does not need."""


class _Separator(torch.nn.Module):
    """In the place of htdemucs, which a melody version loads even where there is no melody."""

    sources = ("drums", "bass", "other", "vocals")
    samplerate = 44100
    audio_channels = 2


def load(job: Job) -> Generate:
    """A function that makes music.

    Raises:
        ImportError: there is no official package.
    """
    with no_initial_weights():
        return generator(load_model(job), job.batch)


def load_model(job: Job) -> Any:
    """The official `MusicGen` of a release folder.

    Raises:
        ImportError: there is no official package.
    """
    import_official(job.hub)
    models = import_module("audiocraft.models")
    return models.MusicGen.get_pretrained(job.release, device=job.device)


def generator(model: Any, batch: int) -> Generate:
    """A function that makes music with a model."""

    def generate(seconds: float, on_step: OnStep) -> Tensor:
        model.set_generation_params(duration=seconds, cfg_coef=GUIDANCE, top_k=TOP_K)
        model.set_custom_progress_callback(on_step)
        # Without `progress` it does not call.
        audio: Tensor = model.generate([DESCRIPTION] * batch, progress=True)
        return audio

    return generate


def load_diffusion(job: Job) -> Generate:
    """A function that decodes codes, and tells of evaluations of a network for one channel.

    Raises:
        ImportError: there is no official package.
    """
    import_official(job.hub)
    # It was made before torch began to refuse what the file's configuration is pickled with.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    with no_initial_weights():
        models = import_module("audiocraft.models")
        decoder = models.MultiBandDiffusion.get_mbd_musicgen(device=job.device)
    evaluations = job.batch * job.channels * len(decoder.DPs) * DIFFUSION_STEPS

    def decode(seconds: float, on_step: OnStep) -> Tensor:
        codes = random_codes(job, seconds)
        done = 0

        def evaluated(*_: Any) -> None:
            nonlocal done
            done += job.batch
            on_step(done, evaluations)

        hooks = [band.model.register_forward_hook(evaluated) for band in decoder.DPs]
        try:
            with torch.no_grad():  # it keeps what a gradient of its equaliser would need
                # Stereo codes are beyond it, so that each channel is decoded by itself.
                channels = [codes[:, channel :: job.channels] for channel in range(job.channels)]
                return torch.cat([decoder.tokens_to_wav(part) for part in channels], dim=1)
        finally:
            for hook in hooks:
                hook.remove()

    return decode


def make_file(job: Job) -> None:
    """Load a release and write a file of music."""
    model = load_model(job)
    audio = generator(model, 1)(job.seconds, lambda *_: None)
    write = import_module("audiocraft.data.audio").audio_write
    stem = str(Path(job.output).with_suffix(""))
    write(stem, audio[0].cpu(), model.sample_rate, strategy="loudness")


def import_official(hub: str) -> None:
    """Import the official package, with torch's attention instead of that of xformers.

    Args:
        hub: cache in which it finds the text encoder.

    Raises:
        ImportError: it is not there.
    """
    found = find_spec("audiocraft")
    ours = str(ROOT / "audiocraft" / "__init__.py")
    if found is None or found.origin in {None, ours}:
        raise ImportError("the official audiocraft is not among the peers' packages")
    os.environ.update(HF_HUB_CACHE=hub, HF_HUB_OFFLINE="1")
    sys.meta_path.append(AbsentPackages(ABSENT))
    for module, name, value in (
        ("xformers.ops", "unbind", torch.unbind),  # all that it calls of xformers then
        ("demucs.pretrained", "get_model", lambda *_, **__: _Separator()),
    ):
        setattr(import_module(module), name, value)
    import_module("audiocraft.modules.transformer").set_efficient_attention_backend("torch")


@contextmanager
def no_initial_weights() -> Iterator[None]:
    """Leaves new matrices as they are: their numbers come from a file, minutes sooner."""
    names = ("kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_")
    kept = {name: getattr(torch.nn.init, name) for name in names}

    def untouched(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    for name in names:
        setattr(torch.nn.init, name, untouched)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(torch.nn.init, name, function)
