"""Training of a codec: what one update does, how it is measured, and what comes of it.

An update depends on its batch, its learning rate and the seed alone, so a run that is resumed with
the same batches is the same run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from audiocraft import __version__
from audiocraft.assets.parts import whole_file
from audiocraft.errors import InputError, TrainingError
from audiocraft.models.encodec import EncodecModel
from audiocraft.modules.conv import StreamableConv1d, StreamableConvTranspose1d
from audiocraft.quantization.training import (
    CodebookSettings,
    forget,
    quantize_and_learn,
)
from audiocraft.solvers.ema import Ema
from audiocraft.solvers.optimizers import load_optimizer_state, optimizer_state
from audiocraft.solvers.schedules import set_lr
from audiocraft.solvers.spectral_losses import (
    LogMelDistance,
    MelSpectrogram,
    MultiScaleMelLoss,
    si_sdr,
)

_NORM_DECAY = 0.99  # of the averages that gradients are balanced by, per update
_MEASURED_WINDOW, _MEASURED_MELS = 2048, 80


@dataclass(frozen=True)
class CodecSettings:
    """How a codec is trained.

    Attributes:
        seed: of every random choice.
        betas: of AdamW.
        weight_decay: of AdamW, decoupled, times the learning rate.
        windows: samples of each scale of the loss on spectra.
        shares: of the gradient that the decoder's output gets, of each loss.
        commitment: weight of the commitment loss.
        codebooks: how they are learnt.
        max_norm: gradients longer than this are scaled down to it.
        bfloat16: compute encoder and decoder in 16 bit, under autocast.
        decoder_only: encoder and codebooks stay as they are, and codes with them.
    """

    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    shares: Mapping[str, float] = field(default_factory=lambda: {"time": 0.6, "spectrum": 0.4})
    commitment: float = 0.25
    codebooks: CodebookSettings = field(default_factory=CodebookSettings)
    max_norm: float = 100.0
    bfloat16: bool = False
    decoder_only: bool = False


@dataclass(frozen=True)
class CodecUpdate:
    """What an update was like.

    Attributes:
        number: from 1.
        losses: `time`, `spectrum` and, where the encoder learns, `commitment`, not weighted.
        grad_norm: before clipping.
    """

    number: int
    losses: Mapping[str, float]
    grad_norm: float


@dataclass(frozen=True)
class CodecMeasures:
    """How good a codec is; means over clips.

    Attributes:
        si_sdr: decibels.
        log_mel: distance, decibels.
        perplexities: of each codebook's codes; its size if all are used alike.
    """

    si_sdr: float
    log_mel: float
    perplexities: tuple[float, ...]


def initialize(model: EncodecModel, wav: Tensor) -> None:
    """Scale and shift the layers of a random codec by what they make of a batch.

    Each convolution's output gets a mean of 0 in every channel and a variance of 1 over all, and
    the last one's the level of the batch. Without it, each layer leaves a fraction of its input's
    variance, and hundreds of updates pass before anything of the audio comes through.
    Source: the initialisation of weight normalisation by data, Salimans and Kingma 2016
    (arXiv 1602.07868, section 3).

    Args:
        model: its convolutions change.
        wav: (B, channels, T).
    """

    def normalize(layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        assert isinstance(layer, StreamableConv1d | StreamableConvTranspose1d)
        level = float(wav.std()) if layer is last else 1.0
        output = output.detach()
        mean = output.mean((0, 2))
        scale = level / float((output - mean[:, None]).std().clamp(min=1e-8))
        with torch.no_grad():
            layer.weights.weight_g.mul_(scale)
            layer.weights.bias.sub_(mean).mul_(scale)
        return (output - mean[:, None]) * scale

    kinds = StreamableConv1d | StreamableConvTranspose1d
    layers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    last = layers[-1]
    hooks = [layer.register_forward_hook(normalize) for layer in layers]
    try:
        # Gradients are not needed, but without them the layers would hear the batch in pieces.
        with torch.enable_grad():
            model.decoder(model.encoder(wav))
    finally:
        for hook in hooks:
            hook.remove()


class Trainer:
    """One codec in training.

    The losses on decoded audio are L1 in time and `MultiScaleMelLoss`. Their gradients are balanced
    as EnCodec's are (Defossez et al. 2022, section 3.4): each is divided by a moving average of its
    length at the decoder's output and multiplied by its share, so that shares mean the same
    whatever the losses' units are.

    Args:
        model: on its device, float32.
        settings: of the run.
        trained: whether to go on from the model's weights and codebooks. Otherwise they are random:
            the first batch scales the weights, and the codebooks begin with it.
    """

    def __init__(
        self, model: EncodecModel, settings: CodecSettings, *, trained: bool = False
    ) -> None:
        self.model = model.train()
        self.settings = settings
        self.update = 0
        self._random = not trained
        if not trained:
            forget(model.quantizer)
        trained_part = model.decoder if settings.decoder_only else model
        prefix = "decoder" if settings.decoder_only else ""
        self._weights = dict(trained_part.named_parameters(prefix))
        self.optimizer = torch.optim.AdamW(
            self._weights.values(), betas=settings.betas, weight_decay=settings.weight_decay
        )
        # Latents and codebooks move together, so they are averaged together.
        vectors = {n: b for n, b in trained_part.named_buffers() if n.endswith(".embed")}
        self.ema = Ema({**self._weights, **vectors})
        self._norms = dict.fromkeys(settings.shares, 0.0)
        device = next(model.parameters()).device
        self._spectra = MultiScaleMelLoss(model.sample_rate, settings.windows).to(device)
        mel = MelSpectrogram(model.sample_rate, _MEASURED_WINDOW, _MEASURED_MELS).to(device)
        self._log_mel = LogMelDistance(mel)

    def train(self, wav: Tensor, lr: float) -> CodecUpdate:
        """Make one update.

        Args:
            wav: (B, channels, T).
            lr: learning rate.

        Raises:
            TrainingError: loss or gradient are not finite; the weights are those of the update
                before.
        """
        settings, number = self.settings, self.update + 1
        if self.update == 0 and self._random:
            initialize(self.model, wav)
        latent, commitment = self._latent(wav, number)
        with self._autocast(wav):
            decoded = self.model.decoder(latent)
        decoded = decoded.float()[..., : wav.shape[-1]]
        losses = self._losses(decoded, wav)
        self.optimizer.zero_grad(set_to_none=True)
        roots, gradients = [decoded], [self._balanced(decoded, losses), None]
        if commitment is not None:
            losses["commitment"] = commitment
            roots.append(settings.commitment * commitment)
        torch.autograd.backward(roots, gradients[: len(roots)])
        norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), settings.max_norm)
        values = {name: loss.item() for name, loss in losses.items()}
        update = CodecUpdate(number, values, float(norm))
        for what, value in {**values, "gradient norm": update.grad_norm}.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"The {what} of update {number} is {value}: give a lower learning rate, or "
                    "begin from the last checkpoint."
                )
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.update = number
        self.ema.after(number)
        return update

    def _latent(self, wav: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
        """What the decoder gets of a batch, and the commitment loss if the encoder learns."""
        if self.settings.decoder_only:
            with torch.no_grad():
                return self.model.decode_latent(self.model.encode(wav)[0]), None
        generator = torch.Generator().manual_seed((self.settings.seed << 32) + number)
        with self._autocast(wav):
            latent = self.model.encoder(wav)
        quantized = quantize_and_learn(
            self.model.quantizer, latent.float(), self.settings.codebooks, generator
        )
        return quantized.latent, quantized.commitment

    @torch.no_grad()
    def evaluate(self, clips: Sequence[Tensor]) -> CodecMeasures:
        """Measure the averaged weights.

        Args:
            clips: (channels, T) each; none is silent.
        """
        bins = self.model.cardinality
        used = torch.zeros(self.model.num_codebooks, bins, dtype=torch.float64)
        distortions, distances = [], []
        with self.ema.applied():
            self.model.eval()
            for clip in clips:
                result = self.model(clip[None])
                distortions.append(si_sdr(result.x[0], clip).mean())
                distances.append(self._log_mel(result.x[0], clip).mean())
                used += F.one_hot(result.codes[0], bins).sum(1).cpu()
            self.model.train()
        shares = used / used.sum(1, keepdim=True)
        perplexities = torch.special.entr(shares).sum(1).exp()
        return CodecMeasures(
            float(torch.stack(distortions).mean()),
            float(torch.stack(distances).mean()),
            tuple(perplexities.tolist()),
        )

    @torch.no_grad()
    def exported_state(self) -> dict[str, Tensor]:
        """The averaged weights and codebooks by their official names, float16, on the CPU."""
        with self.ema.applied():
            return {
                name: tensor.detach().half().cpu()
                for name, tensor in self.model.state_dict().items()
            }

    def export(self, path: Path, cfg: DictConfig) -> None:
        """Write a release's codec: `exported_state` and its configuration.

        Args:
            path: ends in `.safetensors`; it is whole or not there.
            cfg: from which the model was built.
        """
        from safetensors.torch import save_file

        metadata = {"xp.cfg": OmegaConf.to_yaml(cfg), "version": __version__, "exported": "true"}
        with whole_file(path) as unfinished:
            save_file(self.exported_state(), unfinished, metadata)

    def state_dict(self) -> dict[str, Any]:
        """All that the run goes on from; tensors are not copied."""
        return {
            "update": self.update,
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "ema": self.ema.state_dict(),
            "norms": dict(self._norms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a run with the same settings.

        Raises:
            InputError: it is of a codec of another shape.
        """
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise InputError(
                "The checkpoint is of a codec of another shape: resume with the configuration that "
                "the run began with."
            ) from error
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self._norms = dict(state["norms"])
        self.update = int(state["update"])

    def _autocast(self, wav: Tensor) -> torch.autocast:
        return torch.autocast(wav.device.type, torch.bfloat16, enabled=self.settings.bfloat16)

    def _losses(self, decoded: Tensor, wav: Tensor) -> dict[str, Tensor]:
        flat = decoded.flatten(0, 1), wav.flatten(0, 1)
        return {"time": F.l1_loss(*flat), "spectrum": self._spectra(*flat)}

    def _balanced(self, decoded: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """The gradient that the decoder's output gets: all losses', by their shares."""
        shares = self.settings.shares
        corrected = 1 - _NORM_DECAY ** (self.update + 1)
        balanced = torch.zeros_like(decoded)
        for name, share in shares.items():
            (gradient,) = torch.autograd.grad(losses[name], [decoded])
            length = float(gradient.flatten(1).norm(dim=1).mean())
            self._norms[name] += (1 - _NORM_DECAY) * (length - self._norms[name])
            balanced += gradient * (share * corrected / max(self._norms[name], 1e-12))
        return balanced / len(decoded)
