"""Measure what becomes of the stereo image when MultiBand Diffusion decodes both channels apart.

    python -m tools.stereo_noise [--minutes 10] [--pieces 16]

It trains a small diffusion for the codec of `tiny`, on music of `tools.synthetic_music`, and
decodes pieces that it has not heard: with both channels from the same noise, and each from noise of
its own. The last line is one JSON object: the width of the image, and by how many dB middle and
side are louder than in what the codec decodes. Needs `scripts/setup --render`.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from audiocraft.assets.store import BUNDLED
from audiocraft.models.encodec import InterleaveStereoCompressionModel
from audiocraft.models.loaders import CODEC_FILE, find_file
from audiocraft.models.multibanddiffusion import (
    DiffusionProcess,
    MultiBandDiffusion,
    load_diffusion_models,
)
from audiocraft.modules.unet_diffusion import DiffusionUnet
from tools.make_diffusion import write_diffusion
from tools.synthetic_music.measures import stereo_width
from tools.synthetic_music.pieces import plan
from tools.synthetic_music.rendering import rendered
from tools.tiny.dataset import stereo_codec
from tools.tiny.scores import mean

_SEED: Final = 11
_TRAINED: Final = 40  # pieces
_SECONDS: Final = 12.0  # of a piece
_HIDDEN, _GROWTH = 24, 2.0
_BATCH, _FRAMES = 8, 64  # clips of an update, and frames of the codec in each
_LR: Final = 2e-3


def predict_noise(model: DiffusionUnet, noisy: Tensor, steps: Tensor, latents: Tensor) -> Tensor:
    """What `DiffusionUnet` computes without a bottleneck, so that gradients pass through.

    Args:
        model: of the smallest kind.
        noisy: (R, 1, T).
        steps: of each clip, (R,).
        latents: (R, D, F) of the same audio.
    """
    x: Tensor = noisy
    lengths, skips = [], []
    tables = [model.embedding, *model.embeddings]
    level: Any
    for level, table in zip(model.encoders, tables, strict=True):
        lengths.append(x.shape[-1])
        padded = F.pad(x, (0, -x.shape[-1] % model.config.stride))
        x = _residual(level, F.relu(level.norm(level.conv(padded))))
        x = x + table(steps)[..., None]
        skips.append(x)
    x = skips.pop()
    x = x + F.interpolate(model.condition(latents), x.shape[-1])
    for level in model.decoders:
        x = x if level is model.decoders[0] else x + skips.pop()
        x = level.convtr(F.relu(level.norm(_residual(level, x))))[..., : lengths.pop()]
    return x


def _residual(level: Any, x: Tensor) -> Tensor:
    for block in level.res_blocks:
        inner = block.conv1(F.relu(block.norm1(x)))
        x = x + block.conv2(F.relu(block.norm2(inner)))
    return x


def train(
    process: DiffusionProcess, codec: InterleaveStereoCompressionModel, minutes: float
) -> None:
    """Train a band.

    Args:
        process: the band, of all frequencies.
        codec: whose codes it decodes.
        minutes: of training.
    """
    model, schedule = process.model.requires_grad_(), process.noise_schedule
    left = (1 - schedule.betas).cumprod(0)
    clips = _clips(codec)
    optimizer = torch.optim.AdamW(model.parameters(), _LR)
    began, spent, losses = time.monotonic(), 0.0, []
    while spent < 1:
        spent = (time.monotonic() - began) / (60 * minutes)
        optimizer.param_groups[0]["lr"] = _LR * (1 + math.cos(math.pi * min(1, spent))) / 2
        wav, latents = next(clips)
        steps, noise = torch.randint(schedule.num_steps, (_BATCH,)), torch.randn(wav.shape)
        kept = left[steps][:, None, None]
        noisy = kept.sqrt() * wav + (1 - kept).sqrt() * noise
        loss = F.mse_loss(predict_noise(model, noisy, steps, latents), noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) % 200 == 0:
            print(json.dumps({"updates": len(losses), "loss": mean(losses[-200:])}), flush=True)


@torch.no_grad()
def _clips(codec: InterleaveStereoCompressionModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Audio of a power of 1 (B, 1, T) and its latents (B, D, F), of one channel each."""
    wavs = [wav for _, wav in rendered(plan(_SEED, _TRAINED, _SECONDS))]
    sounds = torch.cat(wavs)[:, None]  # both channels of each
    latents = torch.cat([_latents(codec, codec.encode(wav[None])[0]) for wav in wavs])
    sounds /= sounds.std()
    hop = sounds.shape[-1] // latents.shape[-1]
    while True:
        rows = torch.randint(len(sounds), (_BATCH,)).tolist()
        starts = torch.randint(latents.shape[-1] - _FRAMES, (_BATCH,)).tolist()
        places = [*zip(rows, starts, strict=True)]
        yield (
            torch.stack([sounds[r, :, s * hop : (s + _FRAMES) * hop] for r, s in places]),
            torch.stack([latents[r, :, s : s + _FRAMES] for r, s in places]),
        )


def _latents(codec: InterleaveStereoCompressionModel, codes: Tensor) -> Tensor:
    """Latents (2, D, F) of both channels of an item's codes (1, K, F)."""
    parts = codec.get_left_right_codes(codes)
    return torch.cat([codec.model.decode_latent(part) for part in parts])


@torch.no_grad()
def measure(
    diffusion: MultiBandDiffusion, codec: InterleaveStereoCompressionModel, pieces: int
) -> dict[str, dict[str, float]]:
    """Width of the image, and levels of middle and side over the codec's, by whose noise it is."""
    heard: dict[str, list[Sequence[float]]] = {}
    planned = plan(_SEED + 1, pieces, _SECONDS)
    for seed, (_, wav) in enumerate(rendered(planned)):
        codes = codec.encode(wav[None])[0]
        decoded = codec.decode(codes)
        noises = {"same noise": [seed, seed], "noise of its own": [seed, pieces + seed]}
        made = {"rendered": wav[None], "codec": decoded}
        for name, seeds in noises.items():
            channels = diffusion.generate(_latents(codec, codes), decoded.shape[-1:], seeds=seeds)
            made[name] = diffusion.re_eq(channels.view_as(decoded), decoded)
        for name, audio in made.items():
            both = zip(_levels(audio[0]), _levels(decoded[0]), strict=True)
            louder = [20 * math.log10(level / codecs) for level, codecs in both]
            heard.setdefault(name, []).append([stereo_width(audio[0]), *louder])
    names = "width", "middle_db", "side_db"
    return {
        name: {
            what: round(mean(values), 3)
            for what, values in zip(names, zip(*rows, strict=True), strict=True)
        }
        for name, rows in heard.items()
    }


def _levels(wav: Tensor) -> tuple[float, float]:
    """RMS of middle and side of (2, T)."""
    middle, side = (wav[0] + wav[1]) / 2, (wav[0] - wav[1]) / 2
    return float(middle.square().mean().sqrt()), float(side.square().mean().sqrt())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--pieces", type=int, default=16, help="that are decoded")
    given = parser.parse_args()
    torch.manual_seed(_SEED)
    codec = stereo_codec(find_file(BUNDLED / "tiny", CODEC_FILE))
    assert isinstance(codec, InterleaveStereoCompressionModel), "that is how tiny is stereo"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mbd_musicgen_32khz.th")
        write_diffusion(file, codec_dim=64, bands=1, hidden=_HIDDEN, growth=_GROWTH, seed=_SEED)
        bands = load_diffusion_models(file)
    train(bands[0], codec, given.minutes)
    print(json.dumps(measure(MultiBandDiffusion(bands, codec), codec, given.pieces)))


if __name__ == "__main__":
    main()
