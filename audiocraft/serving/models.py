"""Models in memory: loaded when they are asked for, evicted when another needs their room."""

import ctypes
import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from audiocraft.assets.store import PARTS, fetch, find_folder
from audiocraft.errors import InputError, is_out_of_memory
from audiocraft.generation import fused
from audiocraft.models.finetunes import (
    FineTune,
    check_base,
    load_full,
    load_merged,
    merge_adapter,
    sharing_copy,
)
from audiocraft.models.loaders import (
    CODEC_FILE,
    LM_FILE,
    find_file,
    is_on_disk,
    load_models,
    read_checkpoint,
    text_encoder_of,
)
from audiocraft.models.multibanddiffusion import (
    DiffusionProcess,
    MultiBandDiffusion,
    load_diffusion_models,
)
from audiocraft.models.musicgen import MusicGen
from audiocraft.models.shapes import shape_of
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.conditioners import ChromaStemConditioner, T5Conditioner
from audiocraft.modules.device import default_device
from audiocraft.modules.precision import check_precision, int8_bytes, weight_dtype
from audiocraft.modules.stems import StemSeparator
from audiocraft.modules.transformer import cache_dtype
from audiocraft.solvers.devices import host_memory

logger = logging.getLogger(__name__)

# Measured on the released codec, of 0.24 GB: decoding takes 0.37 GB beyond its weights.
_CODEC_WORK = 2
_T5_BYTES = 440_000_000  # the encoder of t5-base, in float32
_CODEC_BYTES = 240_000_000
# Measured on htdemucs with 30 s of stereo.
_SEPARATOR_BYTES = 2_500_000_000
_PREFIX_POSITIONS = 512  # a melody takes 235, a description rarely 100


@dataclass(frozen=True)
class Selection:
    """Which weights answer a request.

    Attributes:
        version: gives codec and text encoder, and the weights where nothing is fine-tuned.
        tuned: fine-tuned weights.
        sha256: of their file.
    """

    version: str
    tuned: FineTune | None = None
    sha256: str | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """What tells loaded models apart."""
        return self.version, self.sha256

    @property
    def melody(self) -> bool:
        """Whether it follows a melody; known before anything is loaded."""
        cfg = self._own_config
        return VERSIONS[self.version].melody if cfg is None else "self_wav" in cfg.conditioners

    @property
    def context(self) -> float:
        """Most seconds that it hears at once; known before anything is loaded."""
        cfg = self._own_config
        own = None if cfg is None else cfg.dataset.get("segment_duration")
        return VERSIONS[self.version].context if own is None else float(own)

    @property
    def _own_config(self) -> DictConfig | None:
        """That of a full fine-tune; an adapter has its base's."""
        return None if self.tuned is None or self.tuned.lora is not None else self.tuned.cfg

    @property
    def label(self) -> str:
        """What messages call it."""
        if self.tuned is None:
            return f"model_version {self.version}"
        return f"{self.tuned.checkpoint.name}, fine-tuned from {self.tuned.base or 'MusicGen'},"

    @property
    def smaller(self) -> str:
        """What takes less memory: weights that name their base override `model_version`."""
        if self.tuned is None or self.tuned.base is None:
            return "choose a smaller model_version"
        return "take weights made from a smaller model_version"


class ModelCache:
    """Loaded models, the least recently used of which make room for others.

    Args:
        device: where they run; the GPU if there is one.
        budget: most bytes that they may take together; what the device has, if not given.
        precision: of the language models; the device's default, if not given or empty.

    Raises:
        InputError: the device does not offer the precision.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        budget: int | None = None,
        precision: str | None = None,
    ) -> None:
        self.device = default_device() if device is None else device
        self._budget = budget
        self._precision = check_precision(precision, self.device)
        self._dtype = weight_dtype(self._precision)
        self._models: dict[tuple[str, str | None], MusicGen] = {}  # the last used stands last
        self._bands: list[DiffusionProcess] | None = None

    def get(self, selection: Selection) -> MusicGen:
        """The model of a selection.

        Raises:
            InputError: it does not fit the device.
            WeightsError: its files are not those of a MusicGen, or do not fit each other.
            AssetError: a file of its version cannot be fetched.
        """
        model = self._models.pop(selection.key, None)
        if model is None:
            begin = time.perf_counter()
            with self._loading(selection.label, selection.smaller):
                model = self._load(selection)
            elapsed = time.perf_counter() - begin
            logger.info(
                "Loaded %s, %s on %s, in %.1f s.",
                selection.label.rstrip(","),
                self._precision,
                self.device,
                elapsed,
            )
        self._models[selection.key] = model
        return model

    def diffusion(self, model: MusicGen) -> MultiBandDiffusion:
        """The diffusion that decodes a model's codes, fetched and loaded when first asked for.

        Raises:
            InputError: it was made for another codec, or does not fit the device.
            WeightsError: its file is not a MultiBand Diffusion.
            AssetError: it cannot be fetched.
        """
        if self._bands is None:
            repo_id, (filename,) = PARTS["mbd"]
            on_disk = find_folder(repo_id, [filename]) is not None
            if not on_disk and VERSIONS[model.name].own_codec:
                raise InputError(
                    "multi_band_diffusion decodes the codes of the released versions, and "
                    f"{model.name} has a codec of its own: switch it off, or make music with one "
                    "of those."
                )
            path = fetch(repo_id, filename)  # of float32
            halved = self.device.type != "cpu"
            label, remedy = "multi_band_diffusion", "switch it off"
            self._require(label, _size(path) >> halved, remedy, keep=model)
            with self._loading(label, remedy):
                self._bands = load_diffusion_models(device=self.device)
        return MultiBandDiffusion(self._bands, model.compression_model)

    def make_room(
        self,
        model: MusicGen,
        duration: float,
        melody: bool,
        diffusion: MultiBandDiffusion | None = None,
    ) -> None:
        """Evict other models as far as a request needs what they take.

        Args:
            model: the one that will work.
            duration: seconds of the result.
            melody: whether stems will be separated.
            diffusion: what will decode, if not the codec alone.

        Raises:
            InputError: the diffusion does not fit.
        """
        config = model.lm.config
        steps = min(duration, model.max_duration) * model.frame_rate + _PREFIX_POSITIONS
        weights = torch.int8 if self._precision == "int8" else self._dtype
        item = cache_dtype(self.device, weights).itemsize
        cache = 2 * config.num_layers * 2 * steps * config.dim * item  # guidance has two rows
        audio = 4 * 4 * duration * model.sample_rate * model.audio_channels
        codec = _CODEC_WORK * sum(_bytes(model.compression_model.parameters()).values())
        need = max(0, cache - fused.kept_bytes(model.lm)) + audio + codec
        conditioners = model.lm.condition_provider.conditioners.values()
        if melody and any(getattr(conditioner, "separates", False) for conditioner in conditioners):
            need += _SEPARATOR_BYTES
        frames = int(duration * model.frame_rate)
        if diffusion is not None:
            need += diffusion.memory(frames)
        self._evict_until(int(need), keep=model, keep_bands=diffusion is not None)
        if diffusion is not None:
            # On a GPU the cache stays for the next request; what is there already is not free.
            more = max(0, int(cache) - fused.kept_bytes(model.lm))
            diffusion.check_memory(
                frames, self._free() - (more if self.device.type == "cuda" else 0)
            )

    def evict_others(self, model: MusicGen, *, keep_bands: bool = False) -> None:
        """Evict all but one model, and but the diffusion if that is kept."""
        if not keep_bands:
            self._bands = None
        self._models = {key: kept for key, kept in self._models.items() if kept is model}
        self._give_back()

    @property
    def used(self) -> int:
        """Bytes of all loaded models; what several share counts once."""
        storages: dict[int, int] = {}
        for model in self._models.values():
            storages |= _bytes(_tensors(model))
        for band in self._bands or ():
            storages |= _bytes(band.model.parameters())
        packed = sum(int8_bytes(model.lm) for model in self._models.values())
        return sum(storages.values()) + packed

    @contextmanager
    def _loading(self, label: str, remedy: str) -> Iterator[None]:
        """Says what does not fit where memory runs out though there seemed to be enough."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"{label} does not fit the memory of {self.device}: {remedy}, or free some."
            ) from error

    def _load(self, selection: Selection) -> MusicGen:
        version, tuned = selection.version, selection.tuned
        if tuned is not None and tuned.lora is not None and self._precision != "int8":
            return self._load_adapter(tuned)
        source, is_own = VERSIONS[version].source, tuned is not None and tuned.lora is None
        if not is_own and not is_on_disk(source, LM_FILE):  # known before it is fetched
            size = self._dtype.itemsize * shape_of(version).parameters + _T5_BYTES + _CODEC_BYTES
            self._require(selection.label, size, selection.smaller)
        codec_file = find_file(source, CODEC_FILE)
        if tuned is None or tuned.lora is not None:
            weights = read_checkpoint(find_file(source, LM_FILE))
        else:
            weights = tuned.checkpoint
        text_encoder = text_encoder_of(codec_file)
        size = self._dtype.itemsize * sum(tensor.numel() for tensor in weights.state.values())
        size += _T5_BYTES if text_encoder is None else _size(text_encoder / "model.safetensors")
        size += _CODEC_BYTES if read_checkpoint(codec_file).pretrained else _size(codec_file)
        self._require(selection.label, size, selection.smaller)
        if tuned is None:
            lm, codec = load_models(source, self.device, self._dtype)
        elif tuned.lora is None:
            lm, codec = load_full(tuned, version, self.device, self._dtype)
        else:
            lm, codec = load_merged(tuned, self.device, self._dtype)
        lm.set_precision(self._precision)
        return MusicGen(version, codec, lm)

    def _load_adapter(self, tuned: FineTune) -> MusicGen:
        """The adapter's base with other tensors where the adapter changes them.

        The base itself stays as it is, so there is nothing to take back afterwards.
        """
        assert tuned.base is not None
        assert tuned.lora is not None
        check_base(tuned)
        base = self.get(Selection(tuned.base))
        lm, codec = sharing_copy(base.lm), base.compression_model
        ends = tuned.lora.targets
        size = sum(weight.nbytes for key, weight in lm.named_parameters() if key.endswith(ends))
        self._evict_until(size, keep=base)
        if self._free() < size:
            # What the adapter changes replaces the base's own, tensor by tensor.
            del self._models[Selection(tuned.base).key]
        del base
        merge_adapter(lm, tuned)
        return MusicGen(tuned.base, codec, lm)

    def _require(self, label: str, size: int, remedy: str, keep: MusicGen | None = None) -> None:
        self._evict_until(size, keep)
        free = self._free()
        if free < size:
            raise InputError(
                f"{label} needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are "
                f"free on {self.device}: {remedy}, or free some."
            )

    def _evict_until(
        self, size: int, keep: MusicGen | None = None, keep_bands: bool = False
    ) -> None:
        """Free what waits for the next request, the diffusion and models until there is room.

        The least recently used model goes first.
        """
        if self._free() < size:
            fused.release()
        if self._free() < size and not keep_bands and self._bands is not None:
            self._bands = None
            self._give_back()
        for key in list(self._models):
            if self._free() >= size:
                break
            if self._models[key] is not keep:
                del self._models[key]
                self._give_back()
                logger.info("Made room in memory: %s is no longer loaded.", key[0])

    def _free(self) -> int:
        if self._budget is not None:
            return self._budget - self.used
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            allocated = torch.cuda.memory_allocated(self.device)
            return int(free + torch.cuda.memory_reserved(self.device) - allocated)
        return host_memory()

    def _give_back(self) -> None:
        fused.release()
        gc.collect()  # modules of transformers refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            # Blocks below glibc's threshold, which grows to 32 MB, would stay with the process.
            ctypes.CDLL(None).malloc_trim(0)


def _tensors(model: MusicGen) -> Iterator[Tensor]:
    modules: list[nn.Module | StemSeparator] = [model.lm, model.compression_model]
    for conditioner in model.lm.condition_provider.conditioners.values():
        assert isinstance(conditioner, T5Conditioner | ChromaStemConditioner)
        modules += [
            part for part in conditioner.loaded or () if isinstance(part, nn.Module | StemSeparator)
        ]
    for module in modules:
        yield from module.parameters()


def _bytes(tensors: Iterator[Tensor]) -> dict[int, int]:
    """Bytes by storage."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _size(path: Path) -> int:
    return path.stat().st_size
