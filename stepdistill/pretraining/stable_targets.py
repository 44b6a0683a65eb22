"""Denoise towards the mean of all images that a noisy one can come from (Xu, Tong, Jaakkola 2023, arXiv 2302.00670).

A denoising loss has a clean image as its target. What it teaches is the mean of all clean images that ``x_t`` can come
from, so at high noise, where these are many, one image is a noisy target. For a finite training set the mean is known:

    E[x_0 | x_t, c] = sum_i w_i x_i,    w_i ~ p(c | i) exp(-|x_t - alpha_t x_i|^2 / (2 sigma_t^2)),

with ``p(c | i)`` the share of image i's captions that are ``c``. The paper sums over a batch, this over all images. The
loss has the same minimum and gradients of less variance. High noise is where the errors of a small network are: its
means vary too little, and so do its images. So half of the timesteps are drawn there.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from stepdistill.diffusion.schedule import expand
from stepdistill.pretraining.fit import prediction_target

HIGH_NOISE = 0.85
"""Where high noise begins, as a share of the scheduler's timesteps."""


def stable_target_loss(
    network: nn.Module, scheduler: DDPMScheduler, x0: Tensor, index: Tensor, shares: Tensor, **cond: Tensor
) -> Tensor:
    """Return the mean squared error of the scheduler's prediction type, half of it at high noise.

    Args:
        network: predicts what ``scheduler.config.prediction_type`` names.
        scheduler: the noise process.
        x0: all clean images or latents (N, C, H, W).
        index: the images (B,) to which noise is added.
        shares: (B, N), how probable the condition of each is for every image.
        cond: the conditions, further arguments of the network.
    """
    timesteps = draw_timesteps(len(index), scheduler.config.num_train_timesteps, x0.device)
    x_t = scheduler.add_noise(x0[index], torch.randn_like(x0[index]), timesteps)
    alpha_squared = expand(scheduler.alphas_cumprod.to(x0.device)[timesteps], x0)
    alpha_t, sigma_t = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    mean = posterior_mean(x_t, alpha_t, sigma_t, x0, shares)
    target = prediction_target(scheduler, mean, (x_t - alpha_t * mean) / sigma_t, timesteps)
    return nn.functional.mse_loss(network(x_t, timesteps, **cond).sample.float(), target.float())


def draw_timesteps(count: int, timesteps: int, device: torch.device) -> Tensor:
    """Return ``count`` timesteps, half of them uniform over all and half over those of high noise."""
    everywhere = torch.randint(timesteps, (count,), device=device)
    high = torch.randint(int(HIGH_NOISE * timesteps), timesteps, (count,), device=device)
    return torch.where(torch.rand(count, device=device) < 0.5, high, everywhere)


def posterior_mean(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, x0: Tensor, shares: Tensor) -> Tensor:
    """Return ``E[x_0 | x_t, c]`` (B, C, H, W) for images drawn from ``x0`` with the probabilities ``shares``.

    Args:
        x_t: noisy images (B, C, H, W).
        alpha_t: factor of the clean image (B, 1, 1, 1).
        sigma_t: standard deviation of the noise (B, 1, 1, 1), above 0.
        x0: all clean images (N, C, H, W).
        shares: (B, N), the probability of the condition given an image; a factor in a row changes nothing.
    """
    alpha, sigma, images = alpha_t.flatten(1), sigma_t.flatten(1), x0.flatten(1)
    # |x_t - alpha x_i|^2, without the part that is the same for all i
    distance = alpha**2 * images.square().sum(1) - 2 * alpha * (x_t.flatten(1) @ images.T)
    weights = torch.softmax(shares.log() - distance / (2 * sigma**2), dim=1)
    return (weights @ images).view_as(x_t)
