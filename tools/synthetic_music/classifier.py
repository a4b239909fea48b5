"""Which instrument leads, and in which style it is played: a small network on log-mel spectrograms.

    python -m tools.synthetic_music.classifier --codec FILE [--pieces 1440] [--epochs 16] [--jobs 2]

Trains it anew on rendered pieces, and on some of them as they come out of a codec, scores it on
pieces of another seed, writes `classifier.safetensors` beside this file, and ends with one JSON
object: the shares that it has right, of pieces as they are and decoded. What a model makes is
decoded too: one that has heard rendered music alone takes the sound of the codec for that of an
instrument.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from audiocraft.data.audio_utils import convert_audio
from audiocraft.models.encodec import InterleaveStereoCompressionModel
from audiocraft.models.loaders import load_compression_model
from tools.synthetic_music.instruments import LEADS
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.rendering import RATE, rendered
from tools.synthetic_music.styles import STYLES

WEIGHTS: Final = Path(__file__).with_name("classifier.safetensors")
"""What `load_classifier` loads by default."""

TRAIN_SEED, TEST_SEED = 9001, 9002
"""Of the pieces that it learns from and is scored on."""

_SECONDS: Final = 10.0  # of those
_MELS: Final = 64
_WINDOW, _HOP = 2048, 1024  # samples: 31 frames a second
_FLOOR: Final = 1e-6  # of the power, relative to the loudest bin
_WIDTHS: Final = (16, 32, 48, 64)
_DROPOUT: Final = 0.3
_CROP: Final = 192  # frames that are learnt from at a time, 6 s
_BATCH: Final = 24
_TEST_PIECES: Final = 120
_LEARNING_RATE: Final = 3e-3


@dataclass(frozen=True)
class Heard:
    """What the classifier says of a clip.

    Attributes:
        lead: a key of `LEADS`.
        style: a key of `STYLES`.
        leads: the chance of each lead, 0 to 1, in their order.
        styles: the chance of each style.
    """

    lead: str
    style: str
    leads: tuple[float, ...]
    styles: tuple[float, ...]


class Classifier(nn.Module):
    """Convolutions, each with a pooling by two, and a linear layer on their mean over time."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *_WIDTHS), _WIDTHS, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.convolutions = nn.Sequential(*layers)
        features = _WIDTHS[-1] * (_MELS >> len(_WIDTHS))
        self.heads = nn.Linear(features, len(LEADS) + len(STYLES))

    def forward(self, mels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of leads (B, 12) and styles (B, 15) from `log_mels` (B, 64, frames >= 16)."""
        features = self.convolutions(mels[:, None]).mean(-1).flatten(1)
        logits = self.heads(F.dropout(features, _DROPOUT, self.training))
        return logits[:, : len(LEADS)], logits[:, len(LEADS) :]


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The trained one, on the CPU, ready to classify."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


@torch.no_grad()
def classify(classifier: Classifier, wav: Tensor, sample_rate: int) -> Heard:
    """Lead and style of a clip.

    Args:
        classifier: see `load_classifier`.
        wav: (C, T) on the CPU, a second or more; it learnt from 6 s.
        sample_rate: Hz.
    """
    leads, styles = classifier(log_mels(wav, sample_rate)[None])
    return Heard(
        list(LEADS)[int(leads.argmax())],
        list(STYLES)[int(styles.argmax())],
        tuple(leads[0].softmax(0).tolist()),
        tuple(styles[0].softmax(0).tolist()),
    )


def log_mels(wav: Tensor, sample_rate: int) -> Tensor:
    """Spectrogram of the sides' mean, whatever its level.

    Args:
        wav: (C, T) on the CPU.
        sample_rate: Hz.

    Returns:
        (64, frames): natural logarithms of power, 0 at most, -13.8 at least; 31 frames a second.
    """
    mono = convert_audio(wav, sample_rate, RATE, 1)[0]
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(mono, _WINDOW, _HOP, window=window, return_complex=True)
    power = _filters() @ spectrum.abs().square()
    return (power / power.max().clamp(min=1e-12) + _FLOOR).log()


@cache
def _filters() -> Tensor:
    from librosa.filters import mel

    return torch.from_numpy(mel(sr=RATE, n_fft=_WINDOW, n_mels=_MELS, fmin=30, fmax=RATE / 2))


@dataclass(frozen=True)
class _Examples:
    """Pieces as they are learnt from: spectrograms (N, 64, frames), and what they are (N,)."""

    mels: Tensor
    leads: Tensor
    styles: Tensor


def _examples(seed: int, count: int, jobs: int, codec: Path, decoded: int) -> _Examples:
    """Pieces, and the first of them once more as a codec decodes them."""
    model = InterleaveStereoCompressionModel(load_compression_model(codec)).eval()
    mels, leads, styles = [], [], []
    for composition, wav in rendered(plan(seed, count, _SECONDS), jobs):
        piece = composition.piece
        heard = [wav]
        if piece.number < decoded:
            with torch.no_grad():
                heard.append(model.decode(*model.encode(wav[None]))[0, :, : wav.shape[1]])
        mels += [log_mels(sound, RATE) for sound in heard]
        leads += [list(LEADS).index(piece.lead)] * len(heard)
        styles += [list(STYLES).index(piece.style)] * len(heard)
    return _Examples(torch.stack(mels), torch.tensor(leads), torch.tensor(styles))


def _batches(examples: _Examples, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """A pass over the examples: spectrograms, coloured and cropped, leads and styles."""
    frames = examples.mels.shape[-1]
    for rows in torch.split(torch.randperm(len(examples.mels), generator=generator), _BATCH):
        start = int(torch.randint(frames - _CROP + 1, (1,), generator=generator))
        mels = _disturbed(examples.mels[rows, :, start : start + _CROP], generator)
        yield mels, examples.leads[rows], examples.styles[rows]


def _disturbed(mels: Tensor, generator: torch.Generator) -> Tensor:
    """What happens to music in codecs: another colour, a floor of noise, grain."""
    count = len(mels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    colours = torch.randn(count, 1, 6, generator=generator)
    colour = F.interpolate(colours, mels.shape[1], mode="linear", align_corners=True)
    mels = mels + uniform(0, 0.8) * colour.transpose(1, 2)
    mels = torch.logaddexp(mels, uniform(-14, -6).expand_as(mels))
    return mels + uniform(0, 0.8) * torch.randn(mels.shape, generator=generator)


def train(examples: _Examples, epochs: int, seed: int = 1) -> Classifier:
    """Learn leads and styles.

    Args:
        examples: to learn from.
        epochs: passes over them.
        seed: of weights and order.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = Classifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), _LEARNING_RATE, weight_decay=0.02)
    steps = epochs * -(-len(examples.mels) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps)
    for epoch in range(epochs):
        total = 0.0
        for mels, leads, styles in _batches(examples, generator):
            lead_logits, style_logits = classifier(mels)
            loss = F.cross_entropy(lead_logits, leads) + F.cross_entropy(style_logits, styles)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(mels)
        print(f"epoch {epoch + 1} of {epochs}: loss {total / len(examples.mels):.3f}", flush=True)
    return classifier.eval()


@torch.no_grad()
def _accuracy(classifier: Classifier, examples: _Examples) -> dict[str, float]:
    leads, styles = classifier(examples.mels)
    return {
        "lead": round(float((leads.argmax(1) == examples.leads).float().mean()), 4),
        "style": round(float((styles.argmax(1) == examples.styles).float().mean()), 4),
    }


def _every_second(examples: _Examples, first: int) -> _Examples:
    return _Examples(*(part[first::2] for part in vars(examples).values()))


def main() -> None:
    """Render, train, score, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", type=Path, required=True, help="weights of the codec")
    parser.add_argument("--decoded", type=int, default=720, help="of the pieces, that are decoded")
    parser.add_argument("--pieces", type=int, default=1440, help="to learn from")
    parser.add_argument("--epochs", type=int, default=16, help="passes over them")
    parser.add_argument("--jobs", type=int, default=1, help="pieces rendered at a time")
    given = parser.parse_args()
    examples = _examples(TRAIN_SEED, given.pieces, given.jobs, given.codec, given.decoded)
    classifier = train(examples, given.epochs)
    save_file(classifier.state_dict(), WEIGHTS)
    test = _examples(TEST_SEED, _TEST_PIECES, given.jobs, given.codec, _TEST_PIECES)
    original, decoded = (_accuracy(classifier, _every_second(test, first)) for first in (0, 1))
    print(json.dumps({"pieces": _TEST_PIECES, "original": original, "decoded": decoded}))


if __name__ == "__main__":
    main()
