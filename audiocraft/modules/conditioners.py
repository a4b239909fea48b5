"""What the language model is conditioned on: a description and a melody.

Golden tests: `lm_tiny_text_mono`, `lm_tiny_text_stereo`, `lm_tiny_melody`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiocraft.data.audio_utils import convert_audio
from audiocraft.errors import InputError, WeightsError
from audiocraft.modules.chroma import ChromaExtractor
from audiocraft.modules.stems import StemSeparator

ConditionType = tuple[Tensor, Tensor]
"""An encoded condition (B, T, dim) and its mask (B, T), 1 where it holds something."""

ConditionTensors = dict[str, ConditionType]


class WavCondition(NamedTuple):
    """Audio to follow.

    Attributes:
        wav: (B, C, T).
        length: (B,) samples that are filled; 0 means no audio.
        sample_rate: Hz of each item.
        path: source of each item, if known.
        seek_time: seconds into the source, if known.
    """

    wav: Tensor
    length: Tensor
    sample_rate: list[int]
    path: list[str | None] = []  # noqa: RUF012 - a default as in the official package, never changed
    seek_time: list[float | None] = []  # noqa: RUF012


@dataclass
class ConditioningAttributes:
    """What one item of a batch is conditioned on, by name of the conditioner."""

    text: dict[str, str | None] = field(default_factory=dict)
    wav: dict[str, WavCondition] = field(default_factory=dict)

    @property
    def is_null(self) -> bool:
        """Whether there is nothing to follow: no text, or an empty one, and no audio."""
        heard = any(bool(wav.length.any()) for wav in self.wav.values())
        return not heard and not any(self.text.values())

    @property
    def text_attributes(self) -> list[str]:
        """Names of the text conditions."""
        return list(self.text)

    @property
    def wav_attributes(self) -> list[str]:
        """Names of the audio conditions."""
        return list(self.wav)


def null_wav(sample_rate: int = 0) -> WavCondition:
    """No audio: a single zero sample of length 0."""
    return WavCondition(torch.zeros(1, 1, 1), torch.tensor([0]), [sample_rate], [None], [None])


def nullify(
    attributes: Sequence[ConditioningAttributes], keep_wav: bool = False
) -> list[ConditioningAttributes]:
    """The same batch without its conditions, for classifier-free guidance."""
    return [
        ConditioningAttributes(
            text=dict.fromkeys(item.text),
            wav=dict(item.wav) if keep_wav else {name: null_wav() for name in item.wav},
        )
        for item in attributes
    ]


class T5Conditioner(nn.Module):
    """A T5 encoder and a projection of its output.

    T5 stands outside the state dict, as in the checkpoints, and always runs in float32. It is
    frozen.

    Args:
        source: folder with the encoder and its tokenizer in transformers' format, or a function
            that finds it when it is first needed.
        dim: width of T5's output.
        output_dim: width of the language model.
    """

    def __init__(self, source: Callable[[], Path], dim: int, output_dim: int) -> None:
        super().__init__()
        self.output_proj = nn.Linear(dim, output_dim)
        self._source = source
        # A tuple, so that nn.Module does not take T5 for one of its own children.
        self.loaded: tuple[Any, Any] | None = None
        """Tokenizer and encoder, once they are."""

    def load(self) -> tuple[Any, Any]:
        """The tokenizer and the encoder on the projection's device, from disk the first time."""
        if self.loaded is None:
            from transformers import T5EncoderModel

            folder = self._source()
            tokenizer = _read_tokenizer(folder)
            # Eager attention gives wholly masked rows finite numbers on every device.
            model: Any = T5EncoderModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="eager",
            )
            if len(tokenizer) > model.config.vocab_size:
                raise WeightsError(
                    f"The text encoder's tokenizer has {len(tokenizer)} tokens, the encoder only "
                    f"{model.config.vocab_size}; take both from the same release."
                )
            self.loaded = (tokenizer, model.eval().requires_grad_(requires_grad=False))
        tokenizer, model = self.loaded
        return tokenizer, model.to(self.output_proj.weight.device)

    def load_tokenizer(self) -> Any:
        """The tokenizer from disk, without the encoder, which takes hundreds of MB."""
        return _read_tokenizer(self._source())

    def tokenize(self, texts: Sequence[str | None]) -> dict[str, Tensor]:
        """Token ids and mask (B, M), padded to the longest; no text masks its row wholly."""
        tokenizer, _ = self.load()
        tokens = tokenizer([text or "" for text in texts], return_tensors="pt", padding=True)
        device = self.output_proj.weight.device
        given = torch.tensor([bool(text) for text in texts])[:, None]
        mask: Tensor = tokens["attention_mask"] * given
        return {"input_ids": tokens["input_ids"].to(device), "attention_mask": mask.to(device)}

    def forward(self, tokens: Mapping[str, Tensor]) -> ConditionType:
        """Encode tokens (B, M) to (B, M, output_dim); rows and pads without text are zero."""
        _, model = self.load()
        mask = tokens["attention_mask"]
        # As it is added to the attention scores. To make this itself, transformers would have the
        # host wait for the device.
        added = torch.zeros(mask.shape, device=mask.device)
        added = added.masked_fill(mask == 0, torch.finfo(torch.float32).min)[:, None, None]
        with torch.autocast(mask.device.type, enabled=False):
            hidden = model(input_ids=tokens["input_ids"], attention_mask=added).last_hidden_state
        embeds = self.output_proj(hidden.to(self.output_proj.weight.dtype))
        return embeds * mask[..., None], mask


def _read_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    # Not T5Tokenizer: it adds tokens of its own, which a small encoder does not have.
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<pad>",  # noqa: S106 - no password
    )


class ChromaStemConditioner(nn.Module):
    """Chroma of a melody's stems (vocals and other, without drums and bass), projected.

    Args:
        output_dim: width of the language model.
        sample_rate: Hz at which chroma is computed.
        n_chroma: number of pitch classes.
        radix2_exp: the transform has `2 ** radix2_exp` samples.
        duration: seconds of the context, which gives `chroma_len`.
        argmax: one-hot chroma.
        match_len_on_eval: repeat or cut chroma to `chroma_len` in evaluation mode.
        use_masking: zero the frames beyond a clip's length.
        separator: loads the stem separator when the first melody comes; None takes the whole mix.
    """

    stems = ("vocals", "other")

    def __init__(
        self,
        output_dim: int,
        sample_rate: int,
        n_chroma: int,
        radix2_exp: int,
        duration: float,
        argmax: bool = True,
        match_len_on_eval: bool = True,
        use_masking: bool = False,
        separator: Callable[[torch.device], StemSeparator] | None = None,
    ) -> None:
        super().__init__()
        self.output_proj = nn.Linear(n_chroma, output_dim)
        self.sample_rate = sample_rate
        self.match_len_on_eval = match_len_on_eval
        self.use_masking = use_masking
        self.chroma = ChromaExtractor(
            sample_rate, n_chroma=n_chroma, radix2_exp=radix2_exp, argmax=argmax
        )
        self.chroma_len = self.chroma.num_frames(int(duration * sample_rate))
        self._load_separator = separator
        # A tuple, so that nn.Module does not take the separator's weights for its own.
        self.loaded: tuple[StemSeparator] | None = None
        """The separator, once it is."""

    @property
    def separates(self) -> bool:
        """Whether stems are separated, or the whole mix is heard."""
        return self._load_separator is not None

    def tokenize(self, wavs: Sequence[WavCondition]) -> WavCondition:
        """One batch of mono clips, padded with zeros to the longest."""
        device = self.output_proj.weight.device
        clips = [item.wav.to(device, torch.float32).mean(dim=1)[0] for item in wavs]
        longest = max(clip.shape[-1] for clip in clips)
        return WavCondition(
            torch.stack([F.pad(clip, (0, longest - clip.shape[-1])) for clip in clips])[:, None],
            torch.cat([item.length.to(device) for item in wavs]),
            [rate for item in wavs for rate in item.sample_rate],
            [path for item in wavs for path in item.path],
            [time for item in wavs for time in item.seek_time],
        )

    def _get_stemmed_wav(self, wav: Tensor, sample_rate: int) -> Tensor:
        """Melodic part of (B, C, T), as mono (B, 1, T') at the chroma's rate.

        People override this one to condition on something else, such as the whole mix.
        """
        if self._load_separator is None:
            return convert_audio(wav, sample_rate, self.sample_rate, 1)
        if self.loaded is None or self.loaded[0].device != wav.device:
            self.loaded = (self._load_separator(wav.device),)
        separator = self.loaded[0]
        melody = separator.mix(wav, sample_rate, self.stems)
        return convert_audio(melody, separator.sample_rate, self.sample_rate, 1)

    def _match_length(self, chroma: Tensor) -> Tensor:
        """Repeat or cut (B, T, n_chroma) to `chroma_len` frames."""
        repeats = -(-self.chroma_len // chroma.shape[1])
        return chroma.repeat(1, repeats, 1)[:, : self.chroma_len]

    def _compute_chroma(self, condition: WavCondition) -> Tensor:
        """Chroma (B, T, n_chroma).

        Rows without a melody are not separated: silence has no strongest pitch class, and the
        official argmax then takes class 0 (golden test `lm_tiny_melody`, case `allnull`).
        """
        wav, length, rates, *_ = condition
        given = (length > 0).nonzero()[:, 0]
        frames = self.chroma.num_frames(wav.shape[-1])
        melody = None
        if len(given):
            row_rates = {rates[row] for row in given.tolist()}
            if len(row_rates) > 1:
                raise InputError(
                    f"The melodies of a batch have the sample rates {sorted(row_rates)}; "
                    "convert them to one."
                )
            melody = self.chroma(self._get_stemmed_wav(wav[given], row_rates.pop()))
            frames = melody.shape[1]
        chroma = wav.new_zeros(wav.shape[0], frames, self.chroma.n_chroma)
        if self.chroma.argmax:
            chroma[..., 0] = 1.0
        if melody is not None:
            chroma[given] = melody
        return chroma

    def forward(self, condition: WavCondition) -> ConditionType:
        """Encode a tokenized batch of melodies to (B, T, output_dim)."""
        with torch.no_grad():
            chroma = self._compute_chroma(condition)
        if self.match_len_on_eval and not self.training:
            chroma = self._match_length(chroma)
        mask = torch.ones(chroma.shape[:2], dtype=torch.long, device=chroma.device)
        if self.use_masking:
            mask = self.length_mask(condition.length, chroma.shape[1])
        return self.project(chroma, mask)

    def length_mask(self, length: Tensor, frames: int) -> Tensor:
        """(B, frames), 1 for the frames of chroma that begin before a clip's end.

        Args:
            length: (B,) samples of each clip.
            frames: of chroma in the batch.
        """
        frame = torch.arange(frames, device=length.device)
        return (frame < length[:, None] / self.chroma.winhop).long()

    def project(self, chroma: Tensor, mask: Tensor) -> ConditionType:
        """Encode chroma (B, T, n_chroma) that was computed before; `mask` (B, T) zeroes frames."""
        embeds = self.output_proj(chroma.to(self.output_proj.weight.dtype))
        return embeds * mask[..., None], mask


class ConditioningProvider(nn.Module):
    """The conditioners of a language model by name."""

    def __init__(self, conditioners: Mapping[str, T5Conditioner | ChromaStemConditioner]) -> None:
        super().__init__()
        self.conditioners = nn.ModuleDict(conditioners)

    @property
    def text_conditions(self) -> list[str]:
        """Names of the text conditioners."""
        return [k for k, v in self.conditioners.items() if isinstance(v, T5Conditioner)]

    @property
    def wav_conditions(self) -> list[str]:
        """Names of the audio conditioners."""
        return [k for k, v in self.conditioners.items() if isinstance(v, ChromaStemConditioner)]

    @property
    def has_wav_condition(self) -> bool:
        """Whether there is a melody to be given."""
        return bool(self.wav_conditions)

    def tokenize(self, inputs: Sequence[ConditioningAttributes]) -> dict[str, Any]:
        """Prepare a batch for `forward`; what an item does not name is absent for it."""
        for item in inputs:
            unknown = {*item.text, *item.wav} - set(self.conditioners)
            if unknown:
                raise InputError(
                    f"This model has no condition named {', '.join(sorted(unknown))}; "
                    f"it has {', '.join(self.conditioners)}."
                )
        tokenized: dict[str, Any] = {}
        for name in self.text_conditions:
            texts = [item.text.get(name) for item in inputs]
            tokenized[name] = cast("T5Conditioner", self.conditioners[name]).tokenize(texts)
        for name in self.wav_conditions:
            wavs = [item.wav.get(name, null_wav()) for item in inputs]
            tokenized[name] = cast("ChromaStemConditioner", self.conditioners[name]).tokenize(wavs)
        return tokenized

    def forward(self, tokenized: Mapping[str, Any]) -> ConditionTensors:
        """Encode what `tokenize` returned; text conditions come first."""
        return {name: self.conditioners[name](inputs) for name, inputs in tokenized.items()}


class ConditionFuser:
    """Where each condition enters the language model.

    Args:
        fuse2cond: names under `prepend` (in front of the sequence) and `cross`
            (cross-attention); other ways are refused.
    """

    def __init__(self, fuse2cond: Mapping[str, Sequence[str]]) -> None:
        other = [
            way for way, names in fuse2cond.items() if names and way not in {"prepend", "cross"}
        ]
        if other:
            raise InputError(
                f"Conditions fused by {', '.join(other)} are not supported; "
                "MusicGen releases use prepend and cross."
            )
        self.prepend = frozenset(fuse2cond.get("prepend", ()))
        self.cross = frozenset(fuse2cond.get("cross", ()))

    def __call__(self, conditions: ConditionTensors) -> tuple[Tensor | None, Tensor | None]:
        """Prefix (B, P, dim) of the sequence and source (B, M, dim) of cross-attention, if any."""
        # Each prefix goes in front of those before it: [melody][description][audio].
        prefix = [cond for name, (cond, _) in conditions.items() if name in self.prepend][::-1]
        source = [cond for name, (cond, _) in conditions.items() if name in self.cross]
        return (
            torch.cat(prefix, dim=1) if prefix else None,
            torch.cat(source, dim=1) if source else None,
        )
