"""Stem separation with demucs, for the melody conditioner and for datasets.

A separator is a folder with `<name>.yaml` (the bag: `models: [signature]`) and one
`<signature>.safetensors` for each model, whose metadata holds the class and its arguments: the
form in which demucs 4.1 publishes its models. demucs' own loader would import and call any class
that the metadata names, or unpickle a download; here the class stands on an allow-list.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiocraft.assets.parts import file_sha256
from audiocraft.assets.store import PARTS, fetch
from audiocraft.assets.tensors import read_safetensors
from audiocraft.errors import WeightsError
from audiocraft.progress import ProgressLog

logger = logging.getLogger(__name__)

HTDEMUCS: Final = "htdemucs"
"""The separator that melody versions hear with."""

_QUIET_S: Final = 5.0
_OVERLAP: Final = 0.25  # of a segment, with the next; demucs' default


@dataclass(frozen=True)
class StemPart:
    """What comes next of the stems of a track.

    Attributes:
        track: its number.
        stems: (sources, channels, T).
        last: whether the track ends with it.
    """

    track: int
    stems: Tensor
    last: bool


@dataclass(frozen=True)
class _Segment:
    """What a model is given at once.

    Attributes:
        track: its number.
        start: sample of the track where it begins.
        length: samples.
        before: samples in `wav` before those.
        wav: (channels, T).
        last: whether it is the track's last.
    """

    track: int
    start: int
    length: int
    before: int
    wav: Tensor
    last: bool


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
        models = list(self._bag.models)
        # Samples of a segment, from one to the next, and of what the models take for one.
        self._length = int(self.sample_rate * min(model.segment for model in models))
        self._stride = int((1 - _OVERLAP) * self._length)
        self._filled = max(_valid_length(model, self._length) for model in models)
        half = self._length // 2
        rising, falling = torch.arange(1, half + 1), torch.arange(self._length - half, 0, -1)
        self._fade = (torch.cat([rising, falling]) / (self._length - half)).to(self.device)

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
        from demucs.audio import convert_audio

        mix = convert_audio(wav.float(), sample_rate, self.sample_rate, self.channels)
        progress = ProgressLog(logger, "s", "separating stems", self.sample_rate, quiet_s=_QUIET_S)
        rows: list[list[Tensor]] = [[] for _ in mix]
        for part in self.separate_tracks(([row] for row in mix), len(mix)):
            rows[part.track].append(part.stems.to(mix.device))
            done = sum(stems.shape[-1] for row in rows for stems in row)
            progress.update(done, mix.shape[0] * mix.shape[-1])
        return torch.stack([torch.cat(row, dim=-1) for row in rows])

    @torch.no_grad()
    def separate_tracks(
        self, tracks: Iterable[Iterable[Tensor]], batch: int = 1
    ) -> Iterator[StemPart]:
        """Split tracks of any length into stems, in memory for a few segments.

        What demucs' own `apply_model` gives (without random shifts): each segment overlaps its
        neighbours by a quarter, and they are faded into each other. The result does not depend on
        the blocks that a track comes in; where segments of several tracks make up a batch, that
        changes rounding only.

        Args:
            tracks: for each its blocks (channels, T) at the separator's own rate; they are asked
                for as they are needed, one track after the other.
            batch: segments that are computed at once.

        Yields:
            The parts of each track in order, on the separator's device.
        """
        segments = chain.from_iterable(
            self._cut(track, blocks) for track, blocks in enumerate(tracks)
        )
        tail = weights = torch.zeros(0, device=self.device)
        while some := list(islice(segments, batch)):
            for segment, stems in zip(some, self._run(some), strict=True):
                weight = self._fade[: segment.length].clone()
                faded = stems[..., segment.before : segment.before + segment.length] * weight
                if segment.start:
                    faded[..., : tail.shape[-1]] += tail
                    weight[: len(weights)] += weights
                ready = segment.length if segment.last else self._stride
                yield StemPart(
                    segment.track, faded[..., :ready] / weight[:ready], last=segment.last
                )
                tail, weights = faded[..., ready:], weight[ready:]

    def _run(self, segments: Sequence[_Segment]) -> Tensor:
        """The bag's estimate (B, sources, channels, T) of segments of one length."""
        mix = torch.stack([segment.wav for segment in segments]).to(self.device)
        estimate, total = torch.zeros((), device=self.device), torch.zeros(len(self.sources))
        for model, weights in zip(self._bag.models, self._bag.weights, strict=True):
            weight = torch.tensor(weights, dtype=torch.float32)
            estimate = estimate + model(mix) * weight[:, None, None].to(self.device)
            total += weight
        return estimate / total[:, None, None].to(self.device)

    def _cut(self, track: int, blocks: Iterable[Tensor]) -> Iterator[_Segment]:
        """Segments of a track, while it comes.

        A segment is filled up to what the models take with what is around it, and with silence
        beyond the track's ends.
        """
        filled = self._filled
        buffer, first, start = torch.zeros(self.channels, 0), 0, 0

        def segment(length: int, *, last: bool = False) -> _Segment:
            before = (filled - length) // 2
            begin, end = start - before - first, start - before - first + filled
            wav = buffer[:, max(0, begin) : end]
            wav = F.pad(wav, (max(0, -begin), max(0, end - buffer.shape[1])))
            return _Segment(track, start, length, before, wav, last)

        for block in blocks:
            buffer = torch.cat([buffer.to(block.device), block], dim=1)
            # Not the last ones, which may end earlier, and then reach back farther.
            while start + filled + self._length <= first + buffer.shape[1]:
                yield segment(self._length)
                start += self._stride
                forget = max(0, start - filled - first)
                buffer, first = buffer[:, forget:], first + forget
        total = first + buffer.shape[1]
        while start < total:
            length = min(self._length, total - start)
            yield segment(length, last=start + self._stride >= total)
            start += self._stride

    def mix(self, wav: Tensor, sample_rate: int, sources: Sequence[str]) -> Tensor:
        """Sum of the named stems, (B, channels, T') at the separator's own rate."""
        index = [self.sources.index(source) for source in sources]
        return self.separate(wav, sample_rate)[:, index].sum(dim=1)


def load_htdemucs(device: torch.device | str) -> StemSeparator:
    """The separator in the store, fetched if it is not there; see `load_separator`.

    Raises:
        AssetError: it is nowhere on disk and cannot be downloaded.
    """
    return load_separator(_find_htdemucs, HTDEMUCS, device)


def htdemucs_key() -> str:
    """SHA-256 in hex over the files of the separator in the store, which are fetched if missing.

    Raises:
        AssetError: as for `load_htdemucs`.
    """
    digest = hashlib.sha256()
    for path in htdemucs_files():
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def htdemucs_files() -> list[Path]:
    """Files of the separator in the store, fetched if missing; see `separator_files`.

    Raises:
        AssetError: as for `load_htdemucs`.
    """
    return separator_files(_find_htdemucs, HTDEMUCS)


def _find_htdemucs(filename: str) -> Path:
    return fetch(PARTS[HTDEMUCS][0], filename)


def separator_files(find: Callable[[str], Path], name: str) -> list[Path]:
    """Files of a bag: the list of its models, then the models; see `load_separator`."""
    path = find(f"{name}.yaml")
    return [path, *(find(f"{signature}.safetensors") for signature in _read_bag(path)["models"])]


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
    from demucs.apply import BagOfModels

    path, *weights = separator_files(find, name)
    bag = _read_bag(path)
    models = [_load_model(path) for path in weights]
    return StemSeparator(BagOfModels(models, bag.get("weights"), bag.get("segment")), device)


def _read_bag(path: Path) -> dict[str, Any]:
    import yaml

    bag = yaml.safe_load(path.read_text())
    if not isinstance(bag, dict) or not bag.get("models"):
        raise WeightsError(f"{path.name} lists no demucs models; fetch the separator again.")
    return bag


def _valid_length(model: Any, length: int) -> int:
    """Samples that a model takes for a segment; some take any number."""
    return int(model.valid_length(length)) if hasattr(model, "valid_length") else length


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
