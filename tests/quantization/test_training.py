import pytest
import torch

from audiocraft.quantization.training import (
    CodebookSettings,
    begin,
    forget,
    learn,
    quantize_and_learn,
)
from audiocraft.quantization.vq import EuclideanCodebook, ResidualVectorQuantizer

NEVER_DEAD = CodebookSettings(decay=0.9, dead_share=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def codebook(vectors, uses):
    """One with given vectors, each used so often."""
    embed, size = torch.tensor(vectors), torch.tensor(uses)
    book = EuclideanCodebook(*embed.shape)
    book.embed.copy_(embed)
    book.cluster_size.copy_(size)
    book.embed_avg.copy_(embed * size[:, None])
    return book


def quantizer(latent_dim=4, n_q=3, bins=8):
    torch.manual_seed(1)
    made = ResidualVectorQuantizer(latent_dim, n_q, bins)
    forget(made)
    return made


def latent(batch=4, dim=4, frames=25, seed=2):
    return torch.randn(batch, dim, frames, generator=seeded(seed))


def test_moving_averages_by_hand():
    book = codebook([[0.0, 0.0], [10.0, 0.0]], [4.0, 2.0])
    vectors = torch.tensor([[1.0, 1.0], [3.0, 1.0], [8.0, 2.0]])
    index = book.encode(vectors)
    assert index.tolist() == [0, 0, 1]
    learn(book, vectors, index, NEVER_DEAD, seeded())
    # 0.9 * 4 + 0.1 * 2 and 0.9 * 2 + 0.1 * 1
    assert book.cluster_size.tolist() == pytest.approx([3.8, 1.9])
    # Sums: (4, 2) at the first, (8, 2) at the second, which had (20, 0) before.
    assert book.embed_avg.flatten().tolist() == pytest.approx([0.4, 0.2, 18.8, 0.2])
    expected = [0.4 / 3.8, 0.2 / 3.8, 18.8 / 1.9, 0.2 / 1.9]
    assert book.embed.flatten().tolist() == pytest.approx(expected, rel=1e-4)


def test_an_unused_vector_keeps_its_place():
    book = codebook([[0.0, 0.0], [10.0, 5.0]], [4.0, 4.0])
    vectors = torch.tensor([[1.0, 1.0]])
    for _ in range(5):
        learn(book, vectors, book.encode(vectors), NEVER_DEAD, seeded())
    assert book.embed[1].tolist() == pytest.approx([10.0, 5.0], rel=1e-4)
    assert book.cluster_size[1].item() == pytest.approx(4 * 0.9**5)


def test_dead_vectors_become_vectors_of_the_batch():
    book = codebook([[0.0, 0.0], [1.0, 0.0], [99.0, 99.0], [98.0, 98.0]], [5.0, 5.0, 0.01, 0.02])
    vectors = torch.randn(20, 2, generator=seeded())
    settings = CodebookSettings(decay=0.99, dead_share=0.1)
    learn(book, vectors, book.encode(vectors), settings, seeded(5))
    matches = (book.embed[2:, None] - vectors).abs().amax(-1) < 1e-4
    assert matches.any(1).all()
    assert not matches.all(0).any(), "two dead vectors became different ones"
    # They have time to be used before they count as dead again.
    assert (book.cluster_size[2:] > 0.1 * book.cluster_size.mean()).all()
    assert book.encode(vectors).bincount(minlength=4)[2:].min() > 0


def test_k_means_finds_separate_clusters():
    centres = 10 * torch.eye(5)
    vectors = (centres[:, None] + 0.1 * torch.randn(5, 40, 5, generator=seeded())).flatten(0, 1)
    # One start among several: k-means may put two centres in one cluster.
    for seed in range(20):
        book = EuclideanCodebook(5, 5)
        book.inited.zero_()
        begin(book, vectors, CodebookSettings(), seeded(seed))
        assert book.inited.item() == 1
        if book.cluster_size.tolist() == [40.0] * 5:
            break
    else:
        pytest.fail("no start found the clusters")
    order = book.encode(centres)
    means = vectors.view(5, 40, 5).mean(1)
    assert torch.allclose(book.embed[order], means, atol=1e-5)
    assert torch.allclose(book.embed_avg, 40 * book.embed)


def test_the_first_batch_makes_the_codebooks_and_later_ones_do_not():
    made, x = quantizer(), latent()
    before = [book.embed.clone() for book in made.codebooks]
    settings = CodebookSettings(decay=1.0, dead_share=0.0)
    quantize_and_learn(made, x, settings, seeded())
    begun = [book.embed.clone() for book in made.codebooks]
    assert all((b - a).abs().max() > 0.1 for a, b in zip(before, begun, strict=True))
    quantize_and_learn(made, latent(seed=9), settings, seeded())
    for book, embed in zip(made.codebooks, begun, strict=True):
        assert torch.allclose(book.embed, embed, atol=1e-4)


def test_it_is_what_inference_makes_of_the_same_codebooks():
    made, x = quantizer(), latent()
    quantize_and_learn(made, x, CodebookSettings(), seeded())
    expected = made.decode(made.encode(x))
    result = quantize_and_learn(made, x, CodebookSettings(), seeded())
    assert torch.allclose(result.latent, expected, atol=1e-6)


def test_gradients_go_straight_through():
    made = quantizer()
    x = latent().requires_grad_()
    result = quantize_and_learn(made, x, CodebookSettings(), seeded())
    pull = torch.randn(x.shape, generator=seeded(3))
    (gradient,) = torch.autograd.grad((result.latent * pull).sum(), [x])
    assert torch.allclose(gradient, pull)


def test_commitment_pulls_towards_the_chosen_vectors():
    made = quantizer(n_q=1)
    quantize_and_learn(made, latent(), CodebookSettings(), seeded())
    chosen = made.decode(made.encode(latent()))
    x = latent().requires_grad_()
    result = quantize_and_learn(made, x, CodebookSettings(), seeded())
    (gradient,) = torch.autograd.grad(result.commitment, [x])
    assert torch.allclose(gradient, 2 * (x - chosen).detach() / x.numel(), atol=1e-7)
    assert result.commitment.item() == pytest.approx((x - chosen).square().mean().item())


def test_dropout_leaves_the_last_codebooks_out():
    made = quantizer()
    quantize_and_learn(made, latent(), CodebookSettings(), seeded())
    moved = []
    for seed in range(60):
        before = [book.embed.clone() for book in made.codebooks]
        settings = CodebookSettings(dropout=0.5)
        quantize_and_learn(made, latent(seed=seed), settings, seeded(seed))
        moved.append([
            not torch.equal(a, b.embed) for a, b in zip(before, made.codebooks, strict=True)
        ])  # fmt: skip
    kinds = [moved.count([True] * n + [False] * (3 - n)) for n in (1, 2, 3)]
    assert sum(kinds) == 60
    assert min(kinds) > 5
    assert 20 < kinds[2] < 40


def test_the_seed_alone_decides():
    books = []
    for seed in (0, 0, 1):
        made = quantizer()
        for update in range(3):
            quantize_and_learn(made, latent(seed=update), CodebookSettings(), seeded(seed))
        books.append(torch.stack([book.embed for book in made.codebooks]))
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])
