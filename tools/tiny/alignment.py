"""A head that looks at the moment of a melody that is now: where the training begins.

A melody stands before the codes, a frame for several of theirs, and which of its frames is now
follows from the positions alone. A small model hears too little to find that out.
"""

from typing import Final, cast

import torch
from torch import Tensor

from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import ChromaStemConditioner
from audiocraft.modules.transformer import TransformerLayer, sin_embedding

_TEXT: Final = 10  # tokens, about, between the melody and the first step
_HIGHEST: Final = 0.8  # radians a frame of the melody, of the waves that are compared
_GAIN: Final = 2.5  # of queries and of keys: most of the attention is then within two frames
_RIDGE: Final = 0.5  # keeps the weights about as small as those that are drawn
_ELSEWHERE: Final = 0.3  # how much it counts that keys behind the melody are zero


@torch.no_grad()
def align(lm: LMModel, melody: str, frames: int, ratio: float, steps: int) -> None:
    """Set the first layer's first head to look at the melody's pitch class of now.

    Queries and keys are waves of the time in the melody, as far as they can be had of the
    positions, whose products are highest where both are of one time. Values are the pitch classes.
    What is made of them is learnt, beginning with nothing.

    Args:
        lm: whose prefix begins with the melody.
        melody: name of the condition.
        frames: of the melody.
        ratio: steps in a frame of it.
        steps: after the prefix.
    """
    dim = lm.dim
    width = dim // lm.config.num_heads
    layer = cast("TransformerLayer", lm.transformer.layers[0])
    before = frames + _TEXT
    positions = torch.arange(before + steps)
    placed = sin_embedding(positions, dim)
    features = layer.norm1(placed)
    time = torch.where(positions < before, positions, (positions - before) / ratio)
    frequencies = (torch.arange(width // 2) + 0.5) * 2 * _HIGHEST / width
    strengths = torch.exp(-((frequencies / _HIGHEST) ** 2) / 1.44)
    angles = time[:, None] * frequencies
    waves = _GAIN * torch.cat([strengths * angles.cos(), strengths * angles.sin()], 1)
    queries = _solve(features[before:], waves[before:])
    counts = torch.ones(len(positions), 1)
    counts[frames:] = _ELSEWHERE
    waves[frames:] = 0
    keys = _solve(features * counts, waves * counts)
    conditioner = cast("ChromaStemConditioner", lm.condition_provider.conditioners[melody])
    projection = conditioner.output_proj
    classes = torch.eye(projection.in_features)
    heard = layer.norm1(projection(classes)[:, None] + placed[:frames]).flatten(0, 1)
    values = _solve(heard, classes.repeat_interleave(frames, 0))
    for part, rows in enumerate([queries, keys, values]):
        layer.self_attn.in_proj_weight[part * dim : part * dim + len(rows)] = rows
    layer.self_attn.out_proj.weight[:, :width] = 0  # nothing is made of them yet


def _solve(features: Tensor, values: Tensor) -> Tensor:
    """Weights (of a linear layer) by which features give values, of least squares."""
    square = features.T @ features
    square.diagonal().add_(_RIDGE)
    solved: Tensor = torch.linalg.solve(square.double(), (features.T @ values).double())
    return solved.T.float()
