"""The adversarial losses: their formulas, that shares add up, whom the gradient reaches, and that they learn."""

from __future__ import annotations

import pytest
import torch

from train.adversary import Adversary, AdversaryConfig
from train.errors import RecipeError

TINY = AdversaryConfig((2, 3), (4, 6, 8), (32, 16), 4)


def noise(samples, seed=0):
    return 0.3 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("game", ["least_squares", "hinge"])
def test_losses_are_those_of_the_papers(game):
    """One waveform: means over positions, summed over discriminators and layers, times the samples."""
    adversary = Adversary(AdversaryConfig(TINY.periods, TINY.period_widths, TINY.windows, 4, game))
    real_S, fake_S = 9 * noise(301), 9 * noise(301, 1)
    discriminator, count = adversary.discriminator_loss(real_S, fake_S, [301])
    adversarial, matching, _ = adversary.generator_loss(real_S, fake_S, [301])
    want = [0.0, 0.0, 0.0]
    for part in adversary.discriminators:
        (wanted, real), (features, fake) = part.judge([real_S[None], fake_S[None]])
        if game == "hinge":
            of_real, of_fake, won = (1 - real).clamp(min=0), (1 + fake).clamp(min=0), (1 - fake).clamp(min=0)
        else:
            of_real, of_fake, won = (real - 1) ** 2, fake**2, (fake - 1) ** 2
        want[0] += (of_real.mean() + of_fake.mean()).item()
        want[1] += won.mean().item()
        want[2] += sum((a - b).abs().mean().item() for a, b in zip(features, wanted, strict=True))
    assert count == 301
    got = [total.item() / count for total in (discriminator, adversarial, matching)]
    assert got == pytest.approx(want, rel=1e-5)


def test_shapes_and_sizes():
    """Periods fold samples that lie a period apart; any length will do; the papers' sizes have 41.6 M parameters."""
    adversary = Adversary(TINY)
    picture = adversary.discriminators[1].picture(torch.arange(1.0, 8.0)[None])
    assert picture[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    for samples in (1, 2, 31, 100):
        for part in adversary.discriminators:
            ((features, scores_BN),) = part.judge([noise(2 * samples).view(2, samples)])
            assert len(features) == len(part.convs) - 1 and len(scores_BN) == 2 and scores_BN.shape[1] > 0
    with torch.device("meta"):
        assert sum(p.numel() for p in Adversary(AdversaryConfig()).parameters()) == 41_578_260


def gradients(adversary, total):
    return torch.autograd.grad(total, list(adversary.parameters()))


def test_shares_of_any_split_add_up():
    adversary, lengths = Adversary(TINY), [90, 40, 90, 0, 7]
    real_S, fake_S = noise(227), noise(227, 1).requires_grad_()
    whole, count = adversary.discriminator_loss(real_S, fake_S, lengths)
    *generator, _ = adversary.generator_loss(real_S, fake_S, lengths)
    (of_wave,) = torch.autograd.grad(sum(generator), fake_S)
    parts, counts, of_parts = [], 0, []
    for a, b in ((0, 1), (1, 1), (1, 5)):
        here = slice(sum(lengths[:a]), sum(lengths[:b]))
        part, samples = adversary.discriminator_loss(real_S[here], fake_S[here], lengths[a:b])
        *made, _ = adversary.generator_loss(real_S[here], fake_S[here], lengths[a:b])
        parts, counts, of_parts = [*parts, part], counts + samples, [*of_parts, *made]
    torch.testing.assert_close(sum(parts), whole)
    assert counts == count == 227
    torch.testing.assert_close(sum(of_parts), sum(generator))
    torch.testing.assert_close(torch.autograd.grad(sum(of_parts), fake_S)[0], of_wave, rtol=1e-4, atol=1e-4)
    for got, want in zip(gradients(adversary, sum(parts)), gradients(adversary, whole), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_whom_the_gradient_reaches():
    """The discriminators' loss leaves the waveform alone; the decoder's reaches it; nothing gives zeros, not none."""
    adversary = Adversary(TINY)
    real_S, fake_S = noise(100), noise(100, 1).requires_grad_()
    total, _ = adversary.discriminator_loss(real_S, fake_S, [100])
    total.backward()
    assert fake_S.grad is None and all(p.grad is not None and p.grad.any() for p in adversary.parameters())
    for index in (0, 1):
        (gradient_S,) = torch.autograd.grad(adversary.generator_loss(real_S, fake_S, [100])[index], fake_S)
        assert gradient_S.isfinite().all() and gradient_S.any()
    adversary.zero_grad()
    sum(adversary.generator_loss(real_S, fake_S, [100])[:2]).backward()
    assert fake_S.grad is not None and all(p.grad is None and p.requires_grad for p in adversary.parameters())
    fake_S.grad = None
    total, count = adversary.discriminator_loss(real_S[:0], fake_S[:0], [])
    total.backward()
    assert total == 0 == count and all(p.grad is not None and not p.grad.any() for p in adversary.parameters())
    sums = adversary.generator_loss(real_S[:0], fake_S[:0], [])
    (sums[0] + sums[1]).backward()
    assert sums[0] == 0 == sums[1] and fake_S.grad is not None and not fake_S.grad.any()


def test_same_waves_match_and_weights_follow_the_seed():
    adversary, wave_S = Adversary(TINY), noise(100)
    assert adversary.generator_loss(wave_S, wave_S.clone(), [100])[1] == 0
    states = [Adversary(TINY, seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("game", ["least_squares", "hinge"])
def test_discriminators_tell_tones_from_noise(game):
    adversary = Adversary(AdversaryConfig((2, 3), (4, 8), (32,), 4, game))
    optimizer = torch.optim.AdamW(adversary.parameters(), lr=5e-3, betas=(0.8, 0.99))
    losses = []
    for seed in range(40):
        phase = torch.rand(4, 1, generator=torch.Generator().manual_seed(seed))
        real_S = (0.4 * torch.sin(torch.arange(200) * 0.3 + 6 * phase)).flatten()
        total, count = adversary.discriminator_loss(real_S, noise(800, seed), [200] * 4)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float(total.detach()) / count)
    assert losses[-1] < 0.3 * losses[0], losses


def test_says_which_setting_is_wrong():
    for settings, message in (
        ({"periods": (), "windows": ()}, "both empty"),
        ({"periods": (0,)}, "above 0"),
        ({"period_widths": ()}, "above 0"),
        ({"windows": (30,)}, r"multiples of 4 from 16 on, not \[30\]"),
        ({"game": "wasserstein"}, "least_squares, hinge, not 'wasserstein'"),
    ):
        with pytest.raises(RecipeError, match=message):
            AdversaryConfig(**settings)
