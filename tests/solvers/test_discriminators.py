import pytest
import torch

from audiocraft.solvers.discriminators import (
    Discriminators,
    DiscriminatorSettings,
    Judgement,
    _compressed,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)

RATE = 16000


def judged(score, *features):
    return Judgement(torch.tensor(score), tuple(map(torch.tensor, features)))


def test_losses_by_hand():
    real = [judged([0.5, 2.0], [2.0, -2.0]), judged([1.0], [1.0])]
    made = [judged([-0.5, 1.0], [3.0, -1.0]), judged([-2.0], [1.0])]
    # Of real audio 0.5 and 0 are missing, and none; of the other, 0.5 and 2 are too much, and none.
    assert float(discriminator_loss(real, made)) == pytest.approx((0.25 + 1.25 + 0 + 0) / 2)
    assert float(adversarial_loss(made)) == pytest.approx((0.75 + 3) / 2)
    assert float(feature_loss(real, made)) == pytest.approx((1 / 2 + 0) / 2)
    assert float(feature_loss(real, real)) == 0


def test_features_of_real_audio_get_no_gradient():
    judges = Discriminators(RATE, DiscriminatorSettings((256,), 4))
    wavs = torch.randn(2, 2, 4000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(feature_loss(judges(wavs[0]), judges(wavs[1])), [wavs])
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().max() > 0


def test_each_scale_has_the_frames_of_its_window_and_halves_the_bins():
    judges = Discriminators(RATE, DiscriminatorSettings((512, 128), 4))
    large, small = judges(torch.randn(3, RATE // 2))
    frames, bins = 8000 // 128 + 1, 512 // 2 + 1
    assert [tuple(layer.shape) for layer in large.features] == [
        (3, 4, frames, bins),
        (3, 4, frames, 129),
        (3, 4, frames, 65),
        (3, 4, frames, 33),
        (3, 4, frames, 33),
    ]
    assert tuple(large.scores.shape) == (3, 1, frames, 33)
    assert tuple(small.scores.shape) == (3, 1, 8000 // 32 + 1, 9)


def test_what_is_below_the_lowest_frequency_is_not_heard():
    judges = Discriminators(RATE, DiscriminatorSettings((512,), 4, lowest=1000.0))
    time = torch.arange(RATE // 2) / RATE
    noise = 0.1 * torch.randn(1, RATE // 2, generator=torch.Generator().manual_seed(0))
    scores = judges(noise)[0].scores
    for pitch, heard in {300: False, 2000: True}.items():
        with_tone = judges(noise + 0.1 * torch.sin(2 * torch.pi * pitch * time))[0].scores
        # The ends, where the tone is mirrored, are left out: they click.
        change = (with_tone - scores)[:, :, 12:-12].abs().max() / scores.std()
        assert bool(change > 0.05) == heard, (pitch, float(change))


def test_what_is_faint_is_heard_with_its_phase():
    spectrum = torch.polar(
        torch.tensor([1.0, 1e-2, 1e-3, 0.0]), torch.tensor([0.5, 2.0, -3.0, 0.0])
    )
    heard = _compressed(spectrum)
    torch.testing.assert_close(
        heard.abs(), torch.tensor([1.0, 10**-0.6, 10**-0.9, 0]), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(heard.angle(), spectrum.angle())


def test_discriminators_learn_to_tell_noise_from_a_tone():
    torch.manual_seed(0)
    judges = Discriminators(RATE, DiscriminatorSettings((256, 64), 4))
    optimizer = torch.optim.AdamW(judges.parameters(), 2e-3, (0.5, 0.9))
    time = torch.arange(4000) / RATE
    for _ in range(60):
        tones = 0.3 * torch.sin(2 * torch.pi * (500 + 3000 * torch.rand(4, 1)) * time)
        loss = discriminator_loss(judges(tones), judges(0.2 * torch.randn(4, 4000)))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert float(loss.detach()) < 1
