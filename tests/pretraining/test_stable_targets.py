"""Stable targets: posterior means over a whole training set."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from stepdistill.pretraining.clip import CaptionTokens, train_tokenizer
from stepdistill.pretraining.stable_targets import draw_timesteps, posterior_mean, stable_target_loss

KINDS = ("epsilon", "v_prediction", "sample")


def scheduler_of(prediction_type):
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)


def test_the_posterior_mean_is_bayes_rule():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 1, 2, 2, generator=generator)
    x_t = torch.randn(3, 1, 2, 2, generator=generator)
    shares = torch.rand(3, 5, generator=generator)
    shares[0, 2] = 0.0  # this image never has the condition
    alpha, sigma = torch.tensor([0.2, 0.6, 0.99]), torch.tensor([0.98, 0.8, 0.14])
    found = posterior_mean(x_t, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1), images, shares)
    for b in range(3):
        likelihood = torch.distributions.Normal(alpha[b].double() * images.double(), sigma[b].double())
        joint = shares[b].double() * likelihood.log_prob(x_t[b].double()).sum((1, 2, 3)).exp()
        expected = (joint / joint.sum()) @ images.double().flatten(1)
        torch.testing.assert_close(found[b].flatten().double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_is_its_own_stable_target(kind):
    """The denoising target of the very noise that was added, at every level."""
    scheduler = scheduler_of(kind)
    image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def knowing(x_t, timesteps):
        alpha_squared = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (x_t - alpha_squared.sqrt() * image) / (1 - alpha_squared).sqrt()
        x0 = image.expand_as(x_t)
        says = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, timesteps)}
        return SimpleNamespace(sample=says[kind])

    torch.manual_seed(0)
    index = torch.zeros(64, dtype=torch.long)
    assert stable_target_loss(knowing, scheduler, image, index, torch.ones(64, 1)) < 1e-8


def test_stable_targets_ask_for_the_same_with_less_noise():
    """At high noise: the means of single targets and of stable ones agree, and stable ones hardly vary."""
    scheduler, timesteps = scheduler_of("sample"), torch.full((4000,), 960)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 1, 2, 2, generator=generator)
    index = torch.randint(50, (4000,), generator=generator)
    x_t = scheduler.add_noise(images[index], torch.randn(4000, 1, 2, 2, generator=generator), timesteps)
    alpha_squared = scheduler.alphas_cumprod[960].expand(4000, 1, 1, 1)
    means = posterior_mean(x_t, alpha_squared.sqrt(), (1 - alpha_squared).sqrt(), images, torch.ones(4000, 50))
    for weight in (torch.ones(4000), x_t[:, 0, 0, 0], x_t[:, 0, 1, 1]):  # what a linear network would learn
        error = ((images[index] - means) * weight.view(-1, 1, 1, 1)).mean(0)
        assert error.abs().max() < 4 / 4000**0.5
    assert means.var(0).mean() < 0.1 * images.var(0).mean()


def test_half_of_the_timesteps_are_of_high_noise():
    torch.manual_seed(0)
    timesteps = draw_timesteps(20_000, 1000, torch.device("cpu"))
    assert timesteps.min() >= 0 and timesteps.max() == 999
    assert (timesteps >= 850).float().mean() == pytest.approx(0.5 + 0.5 * 0.15, abs=0.015)
    assert (timesteps < 425).float().mean() == pytest.approx(0.5 * 0.425, abs=0.015)


def test_shares_count_equal_captions_among_an_images_own():
    captions = [("red hair", "a hat"), ("red hair",), ("a hat", "a hat", "red hair", "a beard")]
    texts = [text for own in captions for text in own]
    tokens = CaptionTokens(train_tokenizer(texts, 600, 8), captions)
    drawn = [texts.index("red hair"), texts.index("a hat")]
    assert tokens.shares(torch.tensor(drawn)).tolist() == [[0.5, 1.0, 0.25], [0.5, 0.0, 0.5]]
    assert torch.equal(tokens.tokens(torch.tensor(drawn)), tokens.encode(["red hair", "a hat"]))

    rows = tokens.draw(torch.full((200,), 2), torch.Generator().manual_seed(0))
    assert set(rows.tolist()) == {3, 4, 5, 6}  # of the third image alone
