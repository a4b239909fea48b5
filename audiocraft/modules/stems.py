"""Stem separation with demucs, for the melody conditioner and for datasets.

A separator is a folder with `<name>.yaml` (the bag: `models: [signature]`) and one
`<signature>.safetensors` for each model, whose metadata holds the class and its arguments: the
form in which demucs 4.1 publishes its models. demucs' own loader would import and call any class
that the metadata names, or unpickle a download; here the class stands on an allow-list.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audiocraft.assets.tensors import read_safetensors
from audiocraft.errors import WeightsError
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)

_QUIET_S = 5.0


class StemSeparator:
    """A bag of demucs models on one device.

    Attributes:
        sample_rate: Hz that the models work at (44100 for every published one).
        channels: channels that they expect (2).
        sources: names of the stems, in output order.
    """

    def __init__(self, bag: Any, device: torch.device | str) -> None:
        self._bag = bag.to(device).eval()
        self.device = torch.device(device)
        self.sample_rate: int = self._bag.samplerate
        self.channels: int = self._bag.audio_channels
        self.sources: list[str] = list(self._bag.sources)

    def parameters(self) -> Iterator[Tensor]:
        """The weights."""
        yield from self._bag.parameters()

    @torch.no_grad()
    def separate(self, wav: Tensor, sample_rate: int) -> Tensor:
        """Split audio into stems.

        Args:
            wav: (B, C, T), any number of channels.
            sample_rate: Hz of `wav`.

        Returns:
            (B, sources, channels, T') at the separator's own rate, T' = T resampled.
        """
        from demucs.apply import apply_model
        from demucs.audio import convert_audio

        mix = convert_audio(wav.float(), sample_rate, self.sample_rate, self.channels)
        length, models = mix.shape[-1], len(self._bag.models)
        progress = ProgressLog(
            logger, "s", "separating stems", self.sample_rate * models, quiet_s=_QUIET_S
        )

        def report(segment: dict[str, Any]) -> None:
            # Called before and after each segment; one that begins has all before it done.
            if segment["state"] == "start":
                done = segment["model_idx_in_bag"] * length + segment["segment_offset"]
                progress.update(done, models * length)

        # shifts=0: a random shift would make equal requests differ.
        stems: Tensor = apply_model(
            self._bag, mix, shifts=0, device=self.device, callback=report, callback_arg={}
        )
        return stems

    def mix(self, wav: Tensor, sample_rate: int, sources: Sequence[str]) -> Tensor:
        """Sum of the named stems, (B, channels, T') at the separator's own rate."""
        index = [self.sources.index(source) for source in sources]
        return self.separate(wav, sample_rate)[:, index].sum(dim=1)


def load_separator(
    find: Callable[[str], Path], name: str, device: torch.device | str
) -> StemSeparator:
    """Load a bag of demucs models.

    Args:
        find: gives the path of a file of the bag by its name.
        name: of the bag, such as `htdemucs`.
        device: where it will run.

    Raises:
        WeightsError: a file is not a demucs model in this form.
    """
    import yaml
    from demucs.apply import BagOfModels

    path = find(f"{name}.yaml")
    bag = yaml.safe_load(path.read_text())
    if not isinstance(bag, dict) or not bag.get("models"):
        raise WeightsError(f"{path.name} lists no demucs models; fetch the separator again.")
    models = [_load_model(find(f"{signature}.safetensors")) for signature in bag["models"]]
    return StemSeparator(BagOfModels(models, bag.get("weights"), bag.get("segment")), device)


def _load_model(path: Path) -> Any:
    from demucs import demucs, hdemucs, htdemucs

    classes: dict[str, type[nn.Module]] = {
        "HTDemucs": htdemucs.HTDemucs,
        "HDemucs": hdemucs.HDemucs,
        "Demucs": demucs.Demucs,
    }
    state, metadata = read_safetensors(path)
    kind = metadata.get("klass", "").rsplit(".", 1)[-1]
    if kind not in classes:
        raise WeightsError(
            f"{path.name} names the class {metadata.get('klass')!r}, only {', '.join(classes)} "
            "are accepted; fetch the separator again."
        )
    try:
        args, kwargs = (_decode(json.loads(metadata[name])) for name in ("args", "kwargs"))
        model = classes[kind](*args, **kwargs)
        model.load_state_dict(state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(
            f"{path.name} does not hold the {kind} that it names ({type(error).__name__}); fetch "
            "the separator again."
        ) from error
    return model


def _decode(value: Any) -> Any:
    """JSON as demucs writes it: fractions are dictionaries with `_type: fraction`."""
    if isinstance(value, dict):
        if value.get("_type") == "fraction":
            return Fraction(value["numerator"], value["denominator"])
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
