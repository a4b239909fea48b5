"""Write a MultiBand Diffusion of random weights, in the layout of the released files.

    python -m tools.make_diffusion FILE [--codec-dim 128] [--bands 4] [--hidden 48]
        [--depth 4] [--growth 4] [--bottleneck none|lstm|transformer]

For tests and benchmarks: it makes noise, in the time that a trained one of its shape takes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from audiocraft.modules.band_filters import low_pass_filters
from audiocraft.modules.unet_diffusion import DiffusionUnet, UnetConfig

BOTTLENECKS = ("none", "lstm", "transformer")
_SAMPLE_RATE = 32000
_PROCESSOR_BANDS = 8
_HELD = 10000.0  # samples that the processor's statistics are said to be of
_TRANSFORMER = (6, 2048)  # layers and width of the feed-forward layer, in the official package


def write_diffusion(
    path: Path,
    codec_dim: int = 128,
    bands: int = 4,
    hidden: int = 48,
    depth: int = 4,
    growth: float = 4.0,
    bottleneck: str = "none",
    seed: int = 0,
) -> None:
    """Write the file.

    Args:
        path: of the file, `mbd_musicgen_32khz.th` where a store is to find it.
        codec_dim: channels of the codec's latent; 128 in the released codec, 64 in that of `tiny`.
        bands: networks; the latter half has a processor, as in the released file.
        hidden: channels of the first level.
        depth: levels.
        growth: channels of a level over those of the one before.
        bottleneck: one of `BOTTLENECKS`.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    package: dict[str | int, Any] = {"n_bands": bands, "sample_rate": _SAMPLE_RATE}
    layers, width = _TRANSFORMER if bottleneck == "transformer" else (0, 0)
    shape: dict[str, Any] = {
        "hidden": hidden,
        "depth": depth,
        "growth": growth,
        "max_channels": 10000,
        "res_blocks": 1,
        "norm_groups": 4,
        "kernel": 8,
        "stride": 4,
        "codec_dim": codec_dim,
        "emb_all_layers": True,
        "bilstm": bottleneck == "lstm",
    }
    config = UnetConfig(
        **shape, transformer_layers=layers, transformer_hidden=width, num_steps=1000
    )
    for band in range(bands):
        model = DiffusionUnet(config)
        for name, weight in model.named_parameters():
            if name.endswith("in_proj_weight"):
                torch.nn.init.xavier_uniform_(weight)
        processed = band >= bands / 2
        package[band] = {
            "cfg": OmegaConf.create(_settings(shape, bool(layers), processed)),
            "model_state": model.state_dict(),
            "processor_state": _processor_state() if processed else {},
        }
    torch.save(package, path)


def _settings(shape: dict[str, Any], transformer: bool, processed: bool) -> dict[str, Any]:
    """A band's configuration."""
    return {
        "channels": 1,
        "schedule": {
            "repartition": "power",
            "variable_step_batch": True,
            "beta_t0": 1e-5,
            "beta_t1": 2.9e-2,
            "beta_exp": 7.5,
            "num_steps": 1000,
            "variance": "beta",
            "clip": 5.0,
            "rescale": 1.0,
            "n_bands": None,
            "noise_scale": 1.0,
        },
        "diffusion_unet": {
            **shape,
            "dropout": 0.0,
            "cross_attention": False,
            "transformer": transformer,
        },
        "processor": {
            "name": "multi_band_processor",
            "use": processed,
            "n_bands": _PROCESSOR_BANDS,
            "num_samples": int(_HELD),
            "power_std": 0.4,
        },
    }


def _processor_state() -> dict[str, torch.Tensor]:
    """Statistics of bands that are as loud as they should be."""
    filters = low_pass_filters(_SAMPLE_RATE, _PROCESSOR_BANDS, torch.device("cpu"))
    held = torch.full((_PROCESSOR_BANDS,), _HELD)
    return {
        "counts": held[:1].clone(),
        "sum_x": 0 * held,
        "sum_x2": held.clone(),
        "sum_target_x2": held.clone(),
        "split_bands.lowpass.filters": filters,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--codec-dim", type=int, default=128)
    parser.add_argument("--bands", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=48)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--growth", type=float, default=4.0)
    parser.add_argument("--bottleneck", choices=BOTTLENECKS, default="none")
    given = parser.parse_args()
    write_diffusion(
        given.file,
        given.codec_dim,
        given.bands,
        given.hidden,
        given.depth,
        given.growth,
        given.bottleneck,
    )


if __name__ == "__main__":
    main()
