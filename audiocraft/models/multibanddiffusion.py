"""MultiBand Diffusion: audio from codes by diffusion, instead of the codec's own decoder.

Each band of frequencies has a network that finds audio in noise, guided by the codes' latent; the
result is their sum, equalised to what the codec's decoder says. Golden test: `mbd_tiny`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from audiocraft.assets.store import PARTS, command, fetch
from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import InputError, TooLargeError, WeightsError, is_out_of_memory
from audiocraft.models.encodec import (
    CompressionModel,
    InterleaveStereoCompressionModel,
    exact,
)
from audiocraft.models.loaders import (
    assign_state,
    load_compression_model,
    read_config,
    read_package,
)
from audiocraft.modules.band_filters import CHUNK, band_stds, low_pass_filters, weighted_bands
from audiocraft.modules.device import default_device
from audiocraft.modules.diffusion_schedule import MultiBandProcessor, NoiseSchedule
from audiocraft.modules.unet_diffusion import DiffusionUnet, UnetConfig

ProgressCallback = Callable[[int, int], None]
"""Told (network evaluations done, evaluations in all) after each; what it raises ends the work."""

_FEWEST_BANDS = 2  # of an equaliser
_SILENCE = 1e-12  # a band without anything in it has a gain too
# Settings of the files' configuration, with what is implemented.
_SETTINGS = {
    "channels": 1,
    "schedule.repartition": "power",
    "schedule.variance": "beta",
    "schedule.rescale": 1.0,
    "schedule.n_bands": None,
    "diffusion_unet.cross_attention": False,
}


@dataclass(frozen=True)
class DiffusionProcess:
    """One band of frequencies.

    Attributes:
        model: its network, float32 on a CPU and float16 on a GPU.
        noise_schedule: how noise is taken away.
        sample_processor: what undoes the levelling of its training, if there was any.
        sample_rate: Hz of its audio.
    """

    model: DiffusionUnet
    noise_schedule: NoiseSchedule
    sample_processor: MultiBandProcessor | None
    sample_rate: int

    @torch.no_grad()
    def generate(
        self,
        condition: Tensor,
        noise: Callable[[], Tensor],
        step_list: Sequence[int] | None = None,
        evaluated: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The band's audio (R, 1, T).

        Args:
            condition: latent (R, D, F).
            noise: draws (R, 1, T); the first draw is where it starts.
            step_list: steps to take, falling, down to 0; the schedule's own if not given.
            evaluated: called after each evaluation of the network.
        """
        projected = self.model.condition(condition)

        def estimate(sample: Tensor, step: int) -> Tensor:
            heard: Tensor = self.model(sample, step, projected)
            if heard.is_cuda:  # else some evaluations are queued, and a cancel waits for them
                torch.cuda.synchronize(heard.device)
            evaluated()
            return heard

        steps = step_list or self.noise_schedule.default_steps
        with self.model.prepared():
            sample = self.noise_schedule.generate(estimate, noise, steps)
        return sample if self.sample_processor is None else self.sample_processor(sample)


class MultiBandDiffusion:
    """A decoder of codes.

    Args:
        DPs: the bands, from `load_diffusion_models`.
        codec_model: the codec whose codes are decoded; several can share the bands.

    Raises:
        InputError: the bands were made for another codec.
    """

    def __init__(
        self,
        DPs: Sequence[DiffusionProcess],  # noqa: N803 - the official name
        codec_model: CompressionModel,
    ) -> None:
        self.DPs = list(DPs)
        self.codec_model = codec_model
        self.device = DPs[0].model.conv_codec.weight.device
        mono = self._mono
        place = next(mono.parameters()).device
        if place != self.device:
            raise InputError(
                f"The diffusion is on {self.device} and the codec on {place}: give both the same "
                "device."
            )
        codes = torch.zeros(1, mono.num_codebooks, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            width = mono.decode_latent(codes).shape[1]
        rate, expected = DPs[0].sample_rate, DPs[0].model.config.codec_dim
        if (mono.sample_rate, width) != (rate, expected):
            raise InputError(
                f"This diffusion decodes latents of {expected} channels to audio at {rate} Hz, the "
                f"codec has {width} channels at {mono.sample_rate} Hz: take a version with another "
                "codec, or switch multi_band_diffusion off."
            )

    @staticmethod
    def get_mbd_musicgen(
        device: torch.device | str | None = None,
        codec_model: CompressionModel | None = None,
        source: str | Path | None = None,
    ) -> "MultiBandDiffusion":
        """The diffusion for MusicGen's codec at 32 kHz; fetched when it is first asked for.

        Args:
            device: where it will run; the codec's, else the GPU if there is one.
            codec_model: that of a loaded MusicGen, mono or stereo; the released mono codec if not
                given.
            source: file, or folder that holds it, instead of the released one.

        Raises:
            InputError: it was made for another codec.
            WeightsError: the file is not a MultiBand Diffusion.
            AssetError: it cannot be fetched.
        """
        if device is None and codec_model is not None:
            device = next(codec_model.parameters()).device
        if device is None:
            device = default_device()
        bands = load_diffusion_models(source, device)
        if codec_model is None:
            codec_model = load_compression_model(PARTS["encodec_32khz"][0], device)
        return MultiBandDiffusion(bands, codec_model)

    @property
    def sample_rate(self) -> int:
        """Hz of the audio."""
        return self.codec_model.sample_rate

    @torch.no_grad()
    def tokens_to_wav(
        self,
        tokens: Tensor,
        n_bands: int = 32,
        seed: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Audio [B, C, T] of codes [B, K, frames], equalised to the codec's.

        The channels of stereo codes are decoded apart, from the same noise: with noise of its own
        each gets phases of its own, and the image is as wide as that of two unrelated sounds,
        be the diffusion trained or not (`tools.stereo_noise`).

        Args:
            tokens: the codes, as MusicGen returns them.
            n_bands: bands of the equaliser.
            seed: of the first item's noise, the next has `seed + 1` and so on; drawn from torch's
                global generator if not given.
            progress: is told how far it has come.

        Raises:
            TooLargeError: the memory does not suffice.
            InputError: `n_bands` is below 2.
        """
        _check_bands(n_bands)
        with self._explained(tokens.shape[-1]):
            reference = self.codec_model.decode(tokens)
            wav = self._generate(self._latents(tokens), reference.shape[-1], seed, progress)
            return self.re_eq(wav, reference, n_bands)

    @torch.no_grad()
    def regenerate(
        self,
        wav: Tensor,
        sample_rate: int,
        seed: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Audio [B, C, T] through the codec's codes and the diffusion, not equalised.

        Args:
            wav: [B, C', T], of any number of channels.
            sample_rate: Hz of it, and of the result.
            seed: see `tokens_to_wav`.
            progress: is told how far it has come.

        Raises:
            TooLargeError: the memory does not suffice.
        """
        codec = self.codec_model
        with exact():
            wav = convert_audio(wav, sample_rate, codec.sample_rate, codec.channels)
        wav = wav.to(self.device)
        codes, _ = codec.encode(wav)
        with self._explained(codes.shape[-1]):
            heard = self._generate(self._latents(codes), wav.shape[-1], seed, progress)
            with exact():
                return convert_audio(heard, codec.sample_rate, sample_rate, codec.channels)

    @torch.no_grad()
    def generate(
        self,
        emb: Tensor,
        size: Sequence[int] | None = None,
        step_list: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """The sum of all bands' audio, [B, 1, T].

        Args:
            emb: latent [B, D, F] of mono codes.
            size: of the result; all of the latent if not given.
            step_list: steps of the diffusion, falling, down to 0.
            seeds: of each item's noise; drawn from torch's global generator if not given.
            progress: is told how far it has come.
        """
        hop = int(self.sample_rate / self._mono.frame_rate)
        samples = emb.shape[-1] * hop if size is None else size[-1]
        if seeds is None:
            seeds = torch.randint(2**62, (len(emb),)).tolist()
        rows = min(band.model.rows_at_once(samples, self.device) for band in self.DPs)
        starts = range(0, len(emb), rows)
        steps = [len(step_list or band.noise_schedule.default_steps) - 1 for band in self.DPs]
        done, total = 0, len(starts) * sum(steps)

        def evaluated() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        out = torch.zeros(len(emb), 1, samples, device=self.device)
        for start in starts:
            part = slice(start, start + rows)
            noise = _Noise(seeds[part], samples, self.device)
            for band in self.DPs:
                out[part] += band.generate(emb[part].to(self.device), noise, step_list, evaluated)
        return out

    @torch.no_grad()
    def re_eq(self, wav: Tensor, ref: Tensor, n_bands: int = 32, strictness: float = 1.0) -> Tensor:
        """Give each band of frequencies the level that it has in another recording.

        A level is the standard deviation over all items and channels: both channels of a stereo
        piece are equalised alike, which leaves its image as it is.

        Args:
            wav: [B, C, T].
            ref: [B, C, T].
            n_bands: bands, evenly spaced in mel; at least 2.
            strictness: 1 takes the other's level over, 0 leaves `wav` as it is.

        Raises:
            InputError: `n_bands` is below 2.
        """
        _check_bands(n_bands)
        filters = low_pass_filters(self.sample_rate, n_bands, wav.device)
        levels = band_stds(wav, filters).clamp_min(_SILENCE)
        return weighted_bands(wav, filters, (band_stds(ref, filters) / levels) ** strictness)

    def memory(self, frames: int) -> int:
        """About the bytes that decoding one item needs, beside the weights.

        Args:
            frames: of its codes.
        """
        samples = int(frames * self.sample_rate / self.codec_model.frame_rate)
        channels = self.codec_model.channels
        # The equaliser works when the networks have given their memory back. For each of 32 bands
        # and each sample of a chunk some 6 numbers were counted: two left of the chunk before, the
        # spectrum and audio of blocks that overlap by a quarter, and the audio put together. 200 to
        # 280 MB were measured, which are up to 8.3.
        need = 4 * 10 * 32 * min(CHUNK, samples)
        for band in self.DPs:
            rows = min(channels, band.model.rows_at_once(samples, self.device))
            need = max(need, band.model.memory(samples, rows, self.device))
        return need + 4 * 4 * samples * channels  # the sum, the reference and two on the way

    def check_memory(self, frames: int, free: int) -> None:
        """Refuse what would not fit.

        Args:
            frames: of the codes.
            free: bytes.

        Raises:
            TooLargeError: it needs more than is free.
        """
        if self.memory(frames) > free:
            raise self._too_large(frames, f", {free / 1e9:.1f} GB are free")

    def _too_large(self, frames: int, have: str = "") -> TooLargeError:
        return TooLargeError(
            f"multi_band_diffusion needs {self.memory(frames) / 1e9:.1f} GB of memory for "
            f"{frames / self.codec_model.frame_rate:g} s of music{have} on {self.device}: make "
            "duration shorter, or switch it off."
        )

    @contextmanager
    def _explained(self, frames: int) -> Iterator[None]:
        """Says how much memory would have been needed."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_large(frames) from error

    @property
    def _mono(self) -> CompressionModel:
        codec = self.codec_model
        return codec.model if isinstance(codec, InterleaveStereoCompressionModel) else codec

    def _latents(self, codes: Tensor) -> Tensor:
        """Latent (B, C, D, F) of each channel's codes."""
        codec = self.codec_model
        if not isinstance(codec, InterleaveStereoCompressionModel):
            return codec.decode_latent(codes)[:, None]
        parts = codec.get_left_right_codes(codes)
        return torch.stack([codec.model.decode_latent(part) for part in parts], dim=1)

    def _generate(
        self, latents: Tensor, samples: int, seed: int | None, progress: ProgressCallback | None
    ) -> Tensor:
        """Audio [B, C, T] of latents (B, C, D, F), both channels of an item from the same noise."""
        items, channels = latents.shape[:2]
        first = int(torch.randint(2**62, ())) if seed is None else seed
        seeds = [first + item for item in range(items) for _ in range(channels)]
        wav = self.generate(latents.flatten(0, 1), (samples,), seeds=seeds, progress=progress)
        return wav.view(items, channels, samples)


def _check_bands(count: int) -> None:
    if count < _FEWEST_BANDS:
        raise InputError(f"n_bands is {count}, it must be {_FEWEST_BANDS} or more.")


class _Noise:
    """Normal noise (R, 1, T), from one random stream for each row."""

    def __init__(self, seeds: Sequence[int], samples: int, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._samples = samples

    def __call__(self) -> Tensor:
        shape = len(self._generators), 1, self._samples
        noise = torch.empty(shape, device=self._generators[0].device)
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise


def load_diffusion_models(
    source: str | Path | None = None, device: torch.device | str = "cpu"
) -> list[DiffusionProcess]:
    """The bands of a file in the official layout, ready to generate.

    Args:
        source: file, or folder that holds it; the released one for MusicGen if not given.
        device: where they will run; float32 on the CPU, float16 elsewhere.

    Raises:
        WeightsError: the file is not a MultiBand Diffusion, or not one that is supported.
        AssetError: it cannot be fetched.
    """
    repo_id, (filename,) = PARTS["mbd"]
    if source is None:
        path = fetch(repo_id, filename)
        remedy = f"remove it and run {command('mbd')}"
    else:
        remedy = "give another"
        path = Path(source) / filename if Path(source).is_dir() else Path(source)
        if not path.is_file():
            raise WeightsError(f"There is no {path}; give a file of MultiBand Diffusion.")
    with _is_diffusion(path, remedy):
        package = read_package(path, path.name)
        rate, count = package["sample_rate"], package["n_bands"]
        if count < 1:
            raise ValueError(f"n_bands is {count}")
        return [_build(path.name, package[band], rate, device) for band in range(count)]


@contextmanager
def _is_diffusion(path: Path, remedy: str) -> Iterator[None]:
    """Turns what a file of another kind leads to into a sentence."""
    try:
        yield
    except (
        WeightsError,
        OmegaConfBaseException,
        AttributeError,
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, WeightsError):  # whose remedy is one for MusicGen's own files
            reason = reason.rpartition("; ")[0] or reason
        raise WeightsError(
            f"{path} is not a file of MultiBand Diffusion ({reason.rstrip('.')}): {remedy}."
        ) from error


def _build(
    name: str, band: dict[str, Any], sample_rate: int, device: torch.device | str
) -> DiffusionProcess:
    """One band of a file."""
    cfg = read_config(name, band["cfg"])
    if cfg is None:
        raise ValueError("a band has no cfg")
    for key, expected in _SETTINGS.items():
        value = OmegaConf.select(cfg, key, default=expected)
        if value != expected:
            raise ValueError(f"{key} is {value}, only {expected} is supported")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    state = band["model_state"]
    with torch.device("meta"):
        model = DiffusionUnet(_unet_config(cfg, state))
    assign_state(model, state, device, dtype, name)
    model.eval().requires_grad_(requires_grad=False)
    schedule = NoiseSchedule(
        cfg.schedule.beta_t0,
        cfg.schedule.beta_t1,
        cfg.schedule.beta_exp,
        cfg.schedule.num_steps,
        **{
            name: float(value)
            for name in ("clip", "noise_scale")
            if (value := OmegaConf.select(cfg.schedule, name)) is not None
        },
    )
    processor = None
    if cfg.processor.use:
        state = band["processor_state"]
        taps = state["split_bands.lowpass.filters"].shape[-1]
        processor = MultiBandProcessor(cfg.processor.n_bands, taps, cfg.processor.power_std)
        assign_state(processor, state, device, name=name)
    return DiffusionProcess(model, schedule, processor, sample_rate)


def _unet_config(cfg: DictConfig, state: dict[str, Tensor]) -> UnetConfig:
    """Shape of a band's network; what the configuration leaves open is read from its tensors."""
    unet = cfg.diffusion_unet
    if unet.kernel < unet.stride or (unet.kernel - unet.stride) % 2:
        raise ValueError(f"kernel {unet.kernel} and stride {unet.stride} do not fit together")
    layers = {key.split(".")[2] for key in state if key.startswith("transformer.layers.")}
    if bool(layers) != bool(unet.transformer):
        raise ValueError(f"transformer is {unet.transformer}, with {len(layers)} layers of one")
    if not 0 < unet.depth + unet.res_blocks <= len(state):  # building more takes forever
        raise ValueError(f"depth is {unet.depth}, res_blocks is {unet.res_blocks}")
    if layers and unet.bilstm:
        raise ValueError("it has both a bilstm and a transformer, only one is supported")
    hidden = state["transformer.layers.0.linear1.weight"].shape[0] if layers else 0
    return UnetConfig(
        hidden=unet.hidden,
        depth=unet.depth,
        growth=unet.growth,
        max_channels=unet.max_channels,
        res_blocks=unet.res_blocks,
        norm_groups=unet.norm_groups,
        kernel=unet.kernel,
        stride=unet.stride,
        codec_dim=unet.codec_dim,
        emb_all_layers=unet.emb_all_layers,
        bilstm=unet.bilstm,
        transformer_layers=len(layers),
        transformer_hidden=hidden,
        num_steps=cfg.schedule.num_steps,
    )
