"""Residual vector quantisation: each codebook quantises what those before it left over.

Golden test: `encodec_tiny`.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EuclideanCodebook(nn.Module):
    """Vectors that latents are replaced by, the nearest one each.

    `inited`, `cluster_size` and `embed_avg` are the state of its training by moving averages.
    """

    inited: Tensor
    cluster_size: Tensor
    embed: Tensor
    embed_avg: Tensor

    def __init__(self, bins: int, dim: int) -> None:
        super().__init__()
        embed = torch.randn(bins, dim)
        self.register_buffer("inited", torch.ones(1))
        self.register_buffer("cluster_size", torch.ones(bins))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def encode(self, x: Tensor) -> Tensor:
        """Index of the nearest vector, (N, dim) to (N,)."""
        embed = self.embed.t()
        distance = x.square().sum(1, keepdim=True) - 2 * x @ embed + embed.square().sum(0)
        return distance.argmin(dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (..., dim) of codes (...)."""
        return F.embedding(codes, self.embed)


class _Layer(nn.Module):
    """One codebook, one level down for the sake of the checkpoints' names."""

    def __init__(self, bins: int, dim: int) -> None:
        super().__init__()
        self._codebook = EuclideanCodebook(bins, dim)

    @property
    def codebook(self) -> EuclideanCodebook:
        return self._codebook


class ResidualVectorQuantizer(nn.Module):
    """A stack of codebooks.

    Args:
        dimension: channels of the latent.
        n_q: number of codebooks.
        bins: vectors per codebook.
    """

    def __init__(self, dimension: int, n_q: int, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.n_q = n_q
        self.vq = nn.ModuleDict(
            {"layers": nn.ModuleList(_Layer(bins, dimension) for _ in range(n_q))}
        )

    @property
    def total_codebooks(self) -> int:
        """Codebooks that the file holds."""
        return len(self.codebooks)

    @property
    def num_codebooks(self) -> int:
        """Codebooks in use."""
        return self.n_q

    @property
    def codebooks(self) -> list[EuclideanCodebook]:
        """Every codebook, coarse to fine."""
        layers = cast("nn.ModuleList", self.vq["layers"])
        return [cast("_Layer", layer).codebook for layer in layers]

    def encode(self, x: Tensor) -> Tensor:
        """Codes [B, K, T] of a latent (B, dimension, T)."""
        residual = x.transpose(1, 2)  # (B, T, dimension)
        codes = []
        for codebook in self.codebooks[: self.n_q]:
            index = codebook.encode(residual.flatten(0, 1)).view(residual.shape[:2])
            residual = residual - codebook.decode(index)
            codes.append(index)
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latent (B, dimension, T) of codes [B, K, T], K at most `total_codebooks`."""
        books = zip(codes.unbind(1), self.codebooks, strict=False)
        return torch.stack([book.decode(index) for index, book in books]).sum(0).transpose(1, 2)
