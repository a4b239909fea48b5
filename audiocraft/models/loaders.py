"""From files to modules: every form of released weights, safely.

A source is a file, a folder, or a hub id such as `facebook/musicgen-small`. Tensors are read by
memory map and copied once, into the model. Nothing is unpickled freely.
Golden tests: `tiny_release`, `encodec_tiny_hf`.
"""

import json
import pickle
import re
import struct
import typing
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import AnyNode
from torch import Tensor, nn
from yaml import YAMLError

from audiocraft.assets.store import PARTS, fetch_first, fetch_folder, find_first
from audiocraft.assets.tensors import read_safetensors
from audiocraft.errors import WeightsError
from audiocraft.models import hf_encodec
from audiocraft.models.builders import (
    get_compression_model,
    get_debug_compression_model,
    get_lm_model,
    get_wrapped_compression_model,
)
from audiocraft.models.encodec import CompressionModel
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import ChromaStemConditioner, T5Conditioner

LM_FILE = "state_dict"
CODEC_FILE = "compression_state_dict"
# What Python and torch raise at settings of the wrong type or size.
_BAD_VALUES = (TypeError, ValueError, ArithmeticError, RuntimeError, LookupError, AttributeError)
# What unpicklers, and readers of YAML, raise besides at bytes that mean nothing to them.
_BAD_BYTES = (*_BAD_VALUES, pickle.UnpicklingError, struct.error, EOFError, AssertionError)
# Another setting's value, such as ${dataset.sample_rate}.
_REFERENCE = r"\$\{[\w.\[\]-]+\}"
_SUFFIXES = (".safetensors", ".bin")
_RELEASED_CODEC = r"facebook/encodec_\w+"

# What a training checkpoint's configuration is pickled with; none of these runs code.
_CONFIG_CLASSES: list[Any] = [
    AnyNode,
    ContainerMetadata,
    DictConfig,
    ListConfig,
    Metadata,
    defaultdict,
    dict,
    float,
    int,
    list,
    str,
    typing.Any,
]


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        name: of the file, for messages.
        state: tensors by name; empty in a pointer.
        cfg: resolved `xp.cfg`, if the file has one.
        pretrained: what a pointer points to.
        metadata: of a safetensors file.
    """

    name: str
    state: Mapping[str, Tensor]
    cfg: DictConfig | None = None
    pretrained: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def _read_safetensors(path: Path, name: str) -> Checkpoint:
    state, metadata = read_safetensors(path, name)
    cfg = read_config(name, metadata.get("xp.cfg"))
    return Checkpoint(name, state, cfg, metadata.get("pretrained"), metadata)


def read_package(path: Path, name: str) -> dict[Any, Any]:
    """What `torch.save` has written, read without running any code that it may hold.

    Args:
        path: the file; its tensors are read by memory map.
        name: what messages call it.

    Raises:
        WeightsError: it is none, or it would have to run code to be read.
    """
    try:
        with torch.serialization.safe_globals(_CONFIG_CLASSES):
            package = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except _BAD_BYTES as error:
        code = re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", str(error))
        if code:
            raise WeightsError(
                f"{name} would run {code[1]} while it is read, which is never done; take an "
                "official export or a fine-tune."
            ) from error
        raise WeightsError(
            f"{name} is not a file of MusicGen weights; take an official export or a fine-tune."
        ) from error
    if not isinstance(package, dict):
        raise WeightsError(
            f"{name} is not a file of MusicGen weights; take an official export or a fine-tune."
        )
    return package


def _read_torch(path: Path, name: str) -> Checkpoint:
    package = read_package(path, name)
    if "pretrained" in package:
        return Checkpoint(name, {}, pretrained=str(package["pretrained"]))
    # Exports have best_state; training checkpoints best_state.model; older fine-tunes model.
    state = package["best_state"] if "best_state" in package else package.get("model")
    whole = package.get("fsdp_best_state")  # empty but in sharded training, which cuts best_state
    if isinstance(whole, dict) and whole:
        state = whole
    if isinstance(state, dict) and "model" in state:
        state = state["model"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise WeightsError(
            f"{name} holds no state of a model under best_state or model; take an official export "
            "or a fine-tune."
        )
    return Checkpoint(name, state, read_config(name, package.get("xp.cfg")))


def read_config(name: str, cfg: Any) -> DictConfig | None:
    """An `xp.cfg` as YAML text or as an OmegaConf object.

    Raises:
        WeightsError: it is none, or asks for values of this machine.
    """
    if cfg is None:
        return None
    try:
        written = OmegaConf.to_container(OmegaConf.create(cfg), resolve=False)
        # Made anew, for what was pickled may refer to settings that it does not show.
        config = OmegaConf.create(written) if isinstance(written, dict) else None
    except (YAMLError, OmegaConfBaseException, *_BAD_BYTES) as error:
        raise WeightsError(f"The xp.cfg of {name} cannot be read; fetch it again.") from error
    if config is None:
        raise WeightsError(f"The xp.cfg of {name} is no configuration; fetch it again.")
    # Such as ${oc.env:TOKEN}: a foreign file must not read this machine's environment. What is
    # called may have its name from elsewhere, as in ${${name}:TOKEN}.
    if "${" in re.sub(_REFERENCE, "", repr(written)):
        raise WeightsError(
            f"The xp.cfg of {name} asks for values of this machine, which it never gets; "
            "write the values themselves into it."
        )
    return config


def read_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Read a weights file of any supported form, recognised by its content.

    The tensors lie in the file still: they are read by memory map when they are used.

    Args:
        path: the file.
        name: what messages call it, if not by its own name.

    Raises:
        WeightsError: it is none, or it would have to run code to be read.
    """
    with path.open("rb") as file:
        head = file.read(9)
    read = _read_safetensors if head[8:] == b"{" else _read_torch
    return read(path, name or path.name)


def find_file(source: str | Path, stem: str, cache_dir: str | Path | None = None) -> Path:
    """Path of one file of a release.

    Args:
        source: the file itself, a folder that holds it, or a hub id.
        stem: its name without suffix; `.safetensors` is preferred to `.bin`.
        cache_dir: a store other than the usual one.

    Raises:
        WeightsError: the folder lacks it.
        AssetError: the hub id cannot be fetched.
    """
    path = Path(source)
    if path.is_file():
        return path
    names = [stem + suffix for suffix in _SUFFIXES]
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"{path} holds neither {' nor '.join(names)}; give a release folder.")
    return fetch_first(str(source), names, cache_dir)


def is_on_disk(source: str | Path, stem: str) -> bool:
    """Whether `find_file` needs no network."""
    names = [stem + suffix for suffix in _SUFFIXES]
    return Path(source).exists() or find_first(str(source), names) is not None


def assign_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    name: str = "The file",
) -> None:
    """Give a model that was built on the meta device its tensors.

    Args:
        model: built under `torch.device("meta")`.
        state: tensors by name, exactly those of the model; each is copied once.
        device: where they go.
        dtype: of the parameters; floating buffers, such as a window, are float32 always.
        name: what messages call the weights.

    Raises:
        WeightsError: names or shapes differ.
    """
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state), sorted(state.keys() - expected)
    if missing or unexpected:
        raise WeightsError(
            f"{name} does not fit its configuration: {len(missing)} tensors are missing "
            f"{missing[:3]} and {len(unexpected)} unexpected {unexpected[:3]}; fetch or export it "
            "again."
        )
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise WeightsError(
                f"{name} does not fit its configuration: {key} has the shape "
                f"{list(state[key].shape)}, {list(tensor.shape)} is expected; fetch or export it "
                "again."
            )
    parameters = {key for key, _ in model.named_parameters()}
    converted = {
        key: tensor.to(device, dtype if key in parameters else torch.float32, copy=True)
        for key, tensor in state.items()
    }
    model.load_state_dict(converted, assign=True)
    model.to(device)  # what the state does not hold: constants


def load_lm_model(
    file_or_url_or_id: str | Path,
    device: torch.device | str = "cpu",
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> LMModel:
    """Load a language model, in evaluation mode.

    Args:
        file_or_url_or_id: weights file, release folder or hub id.
        device: where it will run.
        cache_dir: a store other than the usual one.
        dtype: of the weights; float32 on the CPU and float16 elsewhere, if not given.

    Raises:
        WeightsError: the file is not a MusicGen language model.
        AssetError: it cannot be fetched.
    """
    path = find_file(file_or_url_or_id, LM_FILE, cache_dir)
    return build_lm_model(read_checkpoint(path), text_encoder_of(path), device, dtype)


def text_encoder_of(path: Path) -> Path | None:
    """Folder of the text encoder that a release folder carries, from the path of its weights."""
    folder = path.parent / "t5"
    return folder if folder.is_dir() else None


def build_lm_model(
    checkpoint: Checkpoint,
    text_encoder: Path | None,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> LMModel:
    """The language model of a checkpoint, in evaluation mode.

    Args:
        checkpoint: tensors and configuration.
        text_encoder: folder of the text encoder, instead of the name in the configuration.
        device: where it will run.
        dtype: of the weights; float32 on the CPU and float16 elsewhere, if not given.

    Raises:
        WeightsError: this is not a MusicGen language model.
        AssetError: the text encoder cannot be fetched.
    """
    name = checkpoint.name
    # Models built without memory-efficient attention have one more level in these names.
    state = {official_key(key): value for key, value in checkpoint.state.items()}
    with config_in_use(name):
        cfg = check_config(name, checkpoint.cfg)
        _check_depth(name, cfg, state)
        with torch.device("meta"):
            model = get_lm_model(cfg, text_encoder)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    assign_state(model, state, device, dtype, name)
    for conditioner in model.condition_provider.conditioners.values():
        if isinstance(conditioner, ChromaStemConditioner):
            # As the official package sets it for generation, see golden test `lm_tiny_melody`.
            conditioner.match_len_on_eval = True
            conditioner.use_masking = False
        elif isinstance(conditioner, T5Conditioner):
            conditioner.load()
    return model.eval()


def check_config(name: str, cfg: DictConfig | None) -> DictConfig:
    """The configuration of a language model, if it is one in its outlines.

    Raises:
        WeightsError: it is none, naming the file.
    """
    outlines = ("transformer_lm", "conditioners", "dataset")
    if cfg is None or not all(isinstance(cfg.get(key), DictConfig) for key in outlines):
        raise WeightsError(
            f"{name} has no xp.cfg of a language model; give an official export or a fine-tune."
        )
    return cfg


@contextmanager
def config_in_use(name: str) -> Iterator[None]:
    """Turns what a setting of the wrong kind or size leads to into a sentence.

    Raises:
        WeightsError: naming the file.
    """
    try:
        yield
    except (OmegaConfBaseException, *_BAD_VALUES) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).removesuffix(".")
        raise WeightsError(
            f"The xp.cfg of {name} is not one of a MusicGen ({reason}); give an official export "
            "or a fine-tune."
        ) from error


def official_key(key: str) -> str:
    """Name of a tensor as released; models without memory-efficient attention have a level more."""
    return re.sub(r"(attn|attention)\.mha\.", r"\1.", key)


def check_codec_config(name: str, cfg: DictConfig | None) -> DictConfig:
    """The configuration of a codec, if it is one in its outlines.

    Raises:
        WeightsError: it is none, naming the file.
    """
    if cfg is None or "seanet" not in cfg:
        raise WeightsError(
            f"{name} has no xp.cfg of a codec; give an official export of an EnCodec."
        )
    return cfg


def _check_depth(name: str, cfg: DictConfig, state: Mapping[str, Tensor]) -> None:
    """Refuse a configuration of more layers than the file has tensors: building them takes hours.

    What else does not fit is named when the tensors are assigned.
    """
    for setting in ("num_layers", "n_q"):
        wanted = cfg.transformer_lm.get(setting)
        if not isinstance(wanted, int) or not 0 < wanted <= len(state):
            raise WeightsError(
                f"{name} holds {len(state)} tensors, which do not fit {setting}={wanted} of its "
                "xp.cfg; fetch or export it again."
            )


def load_compression_model(
    file_or_url_or_id: str | Path,
    device: torch.device | str = "cpu",
    cache_dir: str | Path | None = None,
) -> CompressionModel:
    """Load a codec, in float32 and evaluation mode.

    Args:
        file_or_url_or_id: weights file (a full codec or a pointer to one), release folder,
            folder of a transformers EnCodec, or hub id.
        device: where it will run.
        cache_dir: a store other than the usual one.

    Raises:
        WeightsError: the file is not a codec.
        AssetError: it cannot be fetched.
    """
    return _load_codec(str(file_or_url_or_id), device, cache_dir)


def _load_codec(
    source: str,
    device: torch.device | str,
    cache_dir: str | Path | None,
    pointers: tuple[Path, ...] = (),
) -> CompressionModel:
    """As `load_compression_model`, by way of pointers that were followed already."""
    if source == "debug_compression_model":
        return get_debug_compression_model(device)
    if source.startswith("dac_"):
        raise WeightsError(
            f"The codec {source} is not supported; take an EnCodec, as in facebook/encodec_32khz."
        )
    if (Path(source) / "config.json").is_file() or re.fullmatch(_RELEASED_CODEC, source):
        return _load_hf_encodec(source, device, cache_dir)
    path = find_file(source, CODEC_FILE, cache_dir)
    checkpoint = read_checkpoint(path)
    if checkpoint.pretrained is not None:
        if path.resolve() in pointers:
            raise WeightsError(
                f"{path.name} points to itself instead of to a codec; give an official export of "
                "an EnCodec."
            )
        beside = path.parent / checkpoint.pretrained
        target = str(beside) if beside.exists() else checkpoint.pretrained
        return _load_codec(target, device, cache_dir, (*pointers, path.resolve()))
    cfg = check_codec_config(checkpoint.name, checkpoint.cfg)
    with config_in_use(checkpoint.name), torch.device("meta"):
        model = get_compression_model(cfg)
    assign_state(model, checkpoint.state, device, name=checkpoint.name)
    return model.eval()


def _load_hf_encodec(
    source: str, device: torch.device | str, cache_dir: str | Path | None
) -> CompressionModel:
    folder = Path(source)
    if not folder.is_dir():
        folder = fetch_folder(source, PARTS["encodec_32khz"][1], cache_dir)
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model = hf_encodec.build(config)
    name = f"model.safetensors of {source}"
    state, _ = read_safetensors(folder / "model.safetensors", name)
    assign_state(model, hf_encodec.native_state(model, state, name), device, name=name)
    return model.eval()


def load_models(
    source: str | Path, device: torch.device | str, dtype: torch.dtype | None = None
) -> tuple[LMModel, CompressionModel]:
    """Language model and codec of a release, fitted to each other.

    Args:
        source: release folder, hub id, or the language model's file: with the codec beside it, or
            else with the name of a released codec in its configuration.
        device: where they will run.
        dtype: of the language model's weights; see `load_lm_model`.
    """
    lm = load_lm_model(source, device, dtype=dtype)
    assert lm.cfg is not None, "load_lm_model always sets it"
    beside: str | Path = source
    if Path(source).is_file():
        beside = Path(source).parent
        named = str(lm.cfg.get("compression_model_checkpoint", "")).removeprefix("//pretrained/")
        alone = not any((beside / (CODEC_FILE + suffix)).is_file() for suffix in _SUFFIXES)
        if alone and re.fullmatch(_RELEASED_CODEC, named):
            beside = named
    codec = load_compression_model(beside, device)
    with config_in_use(str(source)):
        return lm, get_wrapped_compression_model(codec, lm.cfg)
