"""How codebooks are learnt: moving averages of what falls to each vector, begun by k-means.

Sources: the moving averages are those of van den Oord et al. 2017 (arXiv 1711.00937, appendix A.1);
k-means for the start, the replacement of dead vectors and the dropout of codebooks are those of
Zeghidour et al. 2021 (SoundStream, arXiv 2107.03312), which EnCodec takes over (Defossez et al.
2022, arXiv 2210.13438).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from audiocraft.quantization.vq import EuclideanCodebook, ResidualVectorQuantizer

_EPSILON = 1e-5  # vectors, added to each one's use, so that none is divided by nothing


@dataclass(frozen=True)
class CodebookSettings:
    """How codebooks are learnt.

    Attributes:
        decay: of the moving averages, per update.
        kmeans_iterations: of the start, on the first batch.
        dead_share: a vector is dead when it is used less than this share of the mean use.
        dropout: chance that an update uses only the first codebooks, 1 to all but one, evenly.
    """

    decay: float = 0.99
    kmeans_iterations: int = 10
    dead_share: float = 0.1
    dropout: float = 0.0


@dataclass(frozen=True)
class QuantizedLatent:
    """What a quantiser in training makes of a batch.

    Attributes:
        latent: (B, dimension, T), quantised; its gradient goes straight to the quantiser's input.
        commitment: a scalar, the mean squared distance of what each codebook was given to what it
            made of it, summed over the codebooks; its gradient goes to the input.
    """

    latent: Tensor
    commitment: Tensor


def forget(quantizer: ResidualVectorQuantizer) -> None:
    """Have every codebook begin by k-means in the next update."""
    for codebook in quantizer.codebooks:
        codebook.inited.zero_()


def quantize_and_learn(
    quantizer: ResidualVectorQuantizer,
    latent: Tensor,
    settings: CodebookSettings,
    generator: torch.Generator,
) -> QuantizedLatent:
    """Quantise a batch, and move the codebooks in use towards it.

    The batch is quantised by the codebooks as they were before it, but for the first batch, which
    they are made from.

    Args:
        quantizer: its codebooks change.
        latent: (B, dimension, T), float32.
        settings: how they change.
        generator: of all that is random, on the CPU.
    """
    used = quantizer.n_q
    if used > 1 and float(torch.rand((), generator=generator)) < settings.dropout:
        used = int(torch.randint(1, used, (), generator=generator))
    x = latent.transpose(1, 2)  # (B, T, dimension)
    quantized = torch.zeros_like(x)
    commitment = latent.new_zeros(())
    for codebook in quantizer.codebooks[:used]:
        residual = x - quantized
        vectors = residual.detach().flatten(0, 1)
        if not codebook.inited:
            begin(codebook, vectors, settings, generator)
        index = codebook.encode(vectors)
        chosen = codebook.decode(index).view_as(x)
        commitment = commitment + F.mse_loss(residual, chosen)
        quantized = quantized + chosen
        learn(codebook, vectors, index, settings, generator)
    return QuantizedLatent((x + (quantized - x).detach()).transpose(1, 2), commitment)


@torch.no_grad()
def begin(
    codebook: EuclideanCodebook,
    vectors: Tensor,
    settings: CodebookSettings,
    generator: torch.Generator,
) -> None:
    """Take the centres of a batch for the codebook, by Lloyd's k-means.

    A centre that nothing falls to stays where it is: where the batch has fewer vectors than the
    codebook, some are there twice, and what is dead is replaced later.

    Args:
        codebook: it changes.
        vectors: (N, dimension).
        settings: how many iterations.
        generator: of the vectors that it starts from.
    """
    bins = len(codebook.embed)
    codebook.embed.copy_(_draw(vectors, bins, generator))
    for _ in range(settings.kmeans_iterations):
        count, total = _usage(vectors, codebook.encode(vectors), bins)
        centres = total / count.clamp(min=1)[:, None]
        codebook.embed.copy_(torch.where(count[:, None] > 0, centres, codebook.embed))
    count, _ = _usage(vectors, codebook.encode(vectors), bins)
    codebook.cluster_size.copy_(count)
    codebook.embed_avg.copy_(codebook.embed * count[:, None])
    codebook.inited.fill_(1)


@torch.no_grad()
def learn(
    codebook: EuclideanCodebook,
    vectors: Tensor,
    index: Tensor,
    settings: CodebookSettings,
    generator: torch.Generator,
) -> None:
    """Move the vectors of a codebook towards what has fallen to them, and replace dead ones.

    With `n` vectors of the batch at one code, and their sum `s`: `N = d N + (1 - d) n`,
    `m = d m + (1 - d) s`, and the code's vector is `m / N`, where `N` is smoothed by Laplace's
    rule. A dead code's vector becomes one of the batch, with twice the use that it would be dead
    below.

    Args:
        codebook: it changes.
        vectors: (N, dimension), of the batch.
        index: (N,), the code of each.
        settings: decay, and which codes are dead.
        generator: of the vectors that replace dead ones.
    """
    size, average = codebook.cluster_size, codebook.embed_avg
    count, total = _usage(vectors, index, len(size))
    size.lerp_(count, 1 - settings.decay)
    average.lerp_(total, 1 - settings.decay)
    limit = settings.dead_share * size.mean()
    dead = (size < limit).nonzero()[:, 0]
    if len(dead):
        size[dead] = 2 * limit
        average[dead] = 2 * limit * _draw(vectors, len(dead), generator)
    whole = size.sum()
    smoothed = (size + _EPSILON) / (whole + len(size) * _EPSILON) * whole
    codebook.embed.copy_(average / smoothed[:, None])


def _usage(vectors: Tensor, index: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """How many vectors fall to each code, (bins,), and their sum, (bins, dimension)."""
    chosen = F.one_hot(index, bins).to(vectors.dtype)
    return chosen.sum(0), chosen.t() @ vectors


def _draw(vectors: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Some of the vectors, none of them twice before all are drawn."""
    rounds = [
        torch.randperm(len(vectors), generator=generator) for _ in range(-(-number // len(vectors)))
    ]
    return vectors[torch.cat(rounds)[:number].to(vectors.device)]
