"""Fine-tuned weights: their files, and models made of them.

A fine-tune is one safetensors file. Its metadata says `format` (`musicgen-finetune/1`), `xp.cfg`,
`base` (a version), `base_sha256`, `license` and, for an adapter, `lora` (JSON: rank, alpha,
targets). A full one holds the tensors of a release in 16 bit, an adapter `<name>.lora_a` and
`<name>.lora_b` for each weight that it adapts. Official exports, training checkpoints and files of
the older fine-tuner are full ones too, which name no base.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from audiocraft.assets.parts import whole_file
from audiocraft.assets.store import store_dir
from audiocraft.errors import WeightsError
from audiocraft.models.builders import T5_DIMS, get_wrapped_compression_model
from audiocraft.models.encodec import CompressionModel
from audiocraft.models.lm import LMModel
from audiocraft.models.loaders import (
    CODEC_FILE,
    LM_FILE,
    Checkpoint,
    build_lm_model,
    check_config,
    config_in_use,
    find_file,
    load_compression_model,
    load_models,
    official_key,
    read_checkpoint,
    text_encoder_of,
)
from audiocraft.models.versions import VERSIONS, resolve_source
from audiocraft.modules.conditioners import ChromaStemConditioner, T5Conditioner
from audiocraft.modules.lora import LoraConfig, merge
from audiocraft.modules.precision import Precision, weight_dtype

logger = logging.getLogger(__name__)

FORMAT = "musicgen-finetune/1"
_A, _B = ".lora_a", ".lora_b"
# Of any configuration that a stranger wrote: what is beyond can only be meant to do harm.
_LIMITS = {
    "dataset.segment_duration": 300,
    "conditioners.self_wav.chroma_stem.radix2_exp": 16,
    "conditioners.self_wav.chroma_stem.n_chroma": 128,
    "conditioners.self_wav.chroma_stem.sample_rate": 192_000,
}


@dataclass(frozen=True)
class FineTune:
    """What a file of fine-tuned weights says.

    Attributes:
        checkpoint: tensors, by memory map, and configuration.
        base: version that it was made from; None where the file does not say.
        base_sha256: of the base's weights, see `base_sha256`.
        license: of the weights, such as `cc-by-nc-4.0`.
        lora: shape of the adapter; None for a full fine-tune.
    """

    checkpoint: Checkpoint
    base: str | None = None
    base_sha256: str | None = None
    license: str | None = None
    lora: LoraConfig | None = None

    @property
    def cfg(self) -> DictConfig | None:
        """The resolved `xp.cfg`, if the file has one."""
        return self.checkpoint.cfg


def read_finetune(path: Path, name: str | None = None) -> FineTune:
    """Read a file of fine-tuned weights in any supported form; the tensors stay in the file.

    Args:
        path: the file.
        name: what messages call it, if not by its own name.

    Raises:
        WeightsError: it holds no fine-tuned MusicGen, or would have to run code to be read.
    """
    checkpoint = read_checkpoint(path, name)
    name, metadata = checkpoint.name, checkpoint.metadata
    if checkpoint.pretrained is not None or any(
        key.startswith(("encoder.", "decoder.", "quantizer.")) for key in checkpoint.state
    ):
        raise WeightsError(f"{name} holds a codec; give the weights of the language model.")
    given = metadata.get("format")
    if given is not None and given != FORMAT and given.startswith("musicgen-finetune/"):
        raise WeightsError(
            f"{name} is of the format {given}, this package reads {FORMAT}: update the package."
        )
    is_ours = given == FORMAT
    tuned = FineTune(
        checkpoint,
        metadata.get("base") if is_ours else None,
        metadata.get("base_sha256") if is_ours else None,
        metadata.get("license") if is_ours else None,
        _read_lora(name, metadata["lora"]) if is_ours and "lora" in metadata else None,
    )
    if tuned.base is not None and tuned.base not in VERSIONS:
        raise WeightsError(
            f"{name} was made from {tuned.base!r}, which is none of {', '.join(VERSIONS)}; take a "
            "fine-tune of one of these."
        )
    if tuned.lora is not None:
        _check_adapter(tuned)
    elif "emb.0.weight" not in checkpoint.state:
        raise WeightsError(
            f"{name} holds no weights of MusicGen's language model; take an official export or a "
            "fine-tune."
        )
    if tuned.cfg is not None:
        with config_in_use(name):
            check_config(name, tuned.cfg)
            _check_limits(name, tuned.cfg)
    return tuned


def _read_lora(name: str, text: str) -> LoraConfig:
    try:
        lora: Any = json.loads(text)
        targets = tuple(str(target) for target in lora["targets"])
        return LoraConfig(int(lora["rank"]), float(lora["alpha"]), targets)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise WeightsError(
            f"{name} does not say what kind of adapter it is; train or export it again."
        ) from error


def _check_adapter(tuned: FineTune) -> None:
    """Whether an adapter is whole in itself; what it is for is seen when it is merged."""
    lora, state, name = tuned.lora, tuned.checkpoint.state, tuned.checkpoint.name
    assert lora is not None
    if tuned.base is None or tuned.base_sha256 is None:
        raise WeightsError(f"{name} is an adapter that does not name its base; train it again.")
    names = {key.removesuffix(_A) for key in state if key.endswith(_A)}
    whole = {key + end for key in names for end in (_A, _B)}
    fits = all(
        tensor.dim() == 2 and tensor.shape[0 if key.endswith(_A) else 1] == lora.rank  # noqa: PLR2004
        for key, tensor in state.items()
    )
    if lora.rank < 1 or not names or whole != state.keys() or not fits:
        raise WeightsError(
            f"{name} is not a whole adapter of rank {lora.rank}; train or export it again."
        )


def _check_text_encoders(name: str, cfg: DictConfig) -> None:
    """A stranger's file must not choose folders of this machine."""
    for conditioner in cfg.conditioners.values():
        if "t5" in conditioner and conditioner.t5.name not in T5_DIMS:
            raise WeightsError(
                f"{name} names the text encoder {conditioner.t5.name}, it must be one of "
                f"{', '.join(T5_DIMS)}; take an official export or a fine-tune."
            )


def _check_limits(name: str, cfg: DictConfig) -> None:
    for key, limit in _LIMITS.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not (isinstance(value, int | float) and 0 < value <= limit):
            raise WeightsError(
                f"{name} says {key}={value}, it must be above 0 and up to {limit}; take an "
                "official export or a fine-tune."
            )


def _read_for_hash(state: Mapping[str, Tensor]) -> Iterator[bytes]:
    for key in sorted(state):
        tensor = state[key]
        yield f"{key} {list(tensor.shape)}\n".encode()
        yield tensor.to("cpu", torch.float16).contiguous().view(torch.uint8).numpy().tobytes()


def base_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over a language model's tensors in the order of their names.

    Of each: its name, a space, its shape as Python writes a list, a line feed, and its values in 16
    bit. So the same weights have the same hash in every kind of file.
    """
    digest = hashlib.sha256()
    named = {official_key(key): tensor for key, tensor in state.items()}
    for part in _read_for_hash(named):
        digest.update(part)
    return digest.hexdigest()


def file_base_sha256(path: Path, checkpoint: Checkpoint) -> str:
    """`base_sha256` of a file, computed once and kept in the store."""
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    kept = store_dir() / "base-hashes" / hashlib.sha256(identity.encode()).hexdigest()
    if kept.is_file():
        return kept.read_text()
    value = base_sha256(checkpoint.state)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as unfinished:
            unfinished.write_text(value)
    except OSError as error:
        logger.warning("The hash of %s cannot be kept in the store: %s.", path.name, error)
    return value


def load_full(
    tuned: FineTune,
    version: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> tuple[LMModel, CompressionModel]:
    """Models of a full fine-tune: its language model with the codec and text encoder of a version.

    Args:
        tuned: a full fine-tune.
        version: its base, or where it names none the one that it shall be heard through.
        device: where they will run.
        dtype: of the language model's weights; see `load_lm_model`.

    Raises:
        WeightsError: they do not fit each other.
        AssetError: a file of the version cannot be fetched.
    """
    name, source = tuned.checkpoint.name, VERSIONS[version].source
    text_encoder = text_encoder_of(find_file(source, CODEC_FILE))
    cfg = read_checkpoint(find_file(source, LM_FILE)).cfg if tuned.cfg is None else tuned.cfg
    if text_encoder is None and cfg is not None:
        with config_in_use(name):
            _check_text_encoders(name, cfg)
    lm = build_lm_model(replace(tuned.checkpoint, cfg=cfg), text_encoder, device, dtype)
    assert lm.cfg is not None, "build_lm_model always sets it"
    codec = load_compression_model(source, device)
    with config_in_use(name):
        codec = get_wrapped_compression_model(codec, lm.cfg)
    if (codec.num_codebooks, codec.cardinality) != (lm.num_codebooks, lm.card):
        raise WeightsError(
            f"{name} writes {lm.num_codebooks} codebooks of {lm.card} codes, the codec of "
            f"{version} reads {codec.num_codebooks} of {codec.cardinality}: choose the "
            "model_version that the weights were made from."
        )
    return lm, codec


def check_base(tuned: FineTune) -> None:
    """Whether an adapter is for the weights of its base that are here.

    Raises:
        WeightsError: it is for others.
        AssetError: those of the base cannot be fetched.
    """
    assert tuned.base is not None
    path = find_file(VERSIONS[tuned.base].source, LM_FILE)
    there = file_base_sha256(path, read_checkpoint(path))
    if there != tuned.base_sha256:
        raise WeightsError(
            f"{tuned.checkpoint.name} is an adapter for other weights of {tuned.base} "
            f"({str(tuned.base_sha256)[:12]}) than the ones here ({there[:12]}): train it again, "
            "or bring back the weights that it was made from."
        )


def load_any(
    name: str, device: torch.device | str, precision: Precision
) -> tuple[LMModel, CompressionModel]:
    """Language model and codec of whatever `MusicGen.get_pretrained` takes.

    Args:
        name: version, hub id, release folder, language model's file in a release folder, or file
            of fine-tuned weights.
        device: where they will run.
        precision: of the language model.
    """
    path, dtype = Path(name), weight_dtype(precision)
    tuned = read_finetune(path) if path.is_file() else None
    if tuned is None:
        lm, codec = load_models(resolve_source(name), device, dtype)
    elif tuned.base is None:
        lm, codec = load_models(path, device, dtype)
    elif tuned.lora is None:
        lm, codec = load_full(tuned, tuned.base, device, dtype)
    else:
        lm, codec = load_merged(tuned, device, dtype)
    lm.set_precision(precision)
    return lm, codec


def load_merged(
    tuned: FineTune, device: torch.device | str, dtype: torch.dtype
) -> tuple[LMModel, CompressionModel]:
    """An adapter's base from disk, with the adapter in it, and its codec.

    Args:
        tuned: an adapter.
        device: where they will run.
        dtype: of the language model's weights.

    Raises:
        WeightsError: the adapter is for other weights.
        AssetError: the base cannot be fetched.
    """
    assert tuned.base is not None
    check_base(tuned)
    lm, codec = load_models(VERSIONS[tuned.base].source, device, dtype)
    merge_adapter(lm, tuned)
    return lm, codec


def sharing_copy(lm: LMModel) -> LMModel:
    """A model of its own modules, but with the tensors, text encoder and separator of another."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(lm.parameters(), lm.buffers())}
    for conditioner in lm.condition_provider.conditioners.values():
        assert isinstance(conditioner, T5Conditioner | ChromaStemConditioner)
        memo[id(conditioner.loaded)] = conditioner.loaded
    return copy.deepcopy(lm, memo)


def merged_state(state: Mapping[str, Tensor], tuned: FineTune) -> dict[str, Tensor]:
    """A language model's tensors with an adapter added where it is for them.

    Args:
        state: of the adapter's base, by name; its tensors are not changed.
        tuned: an adapter.

    Returns:
        All tensors by their official names: new ones where the adapter is for them.

    Raises:
        WeightsError: the adapter is for other weights.
    """
    named = {official_key(key): tensor for key, tensor in state.items()}
    return named | dict(_merged(dict(named), tuned))


def merge_adapter(lm: LMModel, tuned: FineTune) -> None:
    """Replace the weights that an adapter is for by ones with the adapter added.

    A replaced weight is a new tensor: models that share the old one keep it as it was.

    Args:
        lm: from `sharing_copy` of the adapter's base.
        tuned: an adapter.

    Raises:
        WeightsError: the adapter is for other weights.
    """
    with torch.no_grad():
        # One after the other, so that where nobody else has the old ones both are there just once.
        for key, weight in _merged(dict(lm.named_parameters()), tuned):
            module, _, attribute = key.rpartition(".")
            setattr(lm.get_submodule(module), attribute, nn.Parameter(weight))


def _merged(weights: dict[str, Tensor], tuned: FineTune) -> Iterator[tuple[str, Tensor]]:
    """Name and merged weight, one by one, after all of the adapter was checked.

    Args:
        weights: by name; each is let go of when it is merged.
        tuned: an adapter.
    """
    lora, state = tuned.lora, tuned.checkpoint.state
    assert lora is not None
    names = [key for key in weights if key.endswith(lora.targets)]
    fitting = [
        key
        for key in names
        if weights[key].dim() == 2  # noqa: PLR2004 - (out, in)
        and key + _A in state
        and state[key + _A].shape[1] == weights[key].shape[1]
        and state[key + _B].shape[0] == weights[key].shape[0]
    ]
    if len(fitting) != len(names) or 2 * len(names) != len(state):
        raise WeightsError(
            f"{tuned.checkpoint.name} is an adapter for other weights than those of {tuned.base}, "
            f"{len(fitting)} of {len(state) // 2} fit; train it again."
        )
    for key in names:
        yield key, merge(weights.pop(key), state[key + _A], state[key + _B], lora.scale)


def save_finetune(
    path: Path,
    state: Mapping[str, Tensor],
    cfg: DictConfig,
    *,
    base: str,
    base_sha256: str,
    license: str,  # noqa: A002 - the format's name
    lora: LoraConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a fine-tune; it appears under its name when it is whole.

    Args:
        path: file to write, `.safetensors`.
        state: official names to tensors, or for an adapter their `.lora_a` and `.lora_b`; written
            in 16 bit.
        cfg: the resolved `xp.cfg`.
        base: version that it was made from.
        base_sha256: of that version's weights.
        license: of the weights.
        lora: shape of the adapter.
        metadata: what else the file should say.
    """
    said = {
        **(metadata or {}),
        "format": FORMAT,
        "xp.cfg": OmegaConf.to_yaml(cfg, resolve=True),
        "base": base,
        "base_sha256": base_sha256,
        "license": license,
    }
    if lora is not None:
        said["lora"] = json.dumps(
            {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
        )
    half = {
        key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()
    }
    with whole_file(path) as unfinished:
        save_file(half, unfinished, said)
