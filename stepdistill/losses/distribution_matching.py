r"""Distribution matching, the idea of DMD and DMD2.

Blur the student's images and the teacher's with noise. The gradient of the Kullback-Leibler divergence between the two
distributions is then a difference of two scores: that of the frozen teacher ("real"), and that of a second network
("fake"), which keeps learning to denoise the student's images. With ``x`` an image of the student, ``x_t`` the same
image with noise, and both networks read as clean images (Yin et al. 2023, arXiv 2311.18828, Eq. 7-8 and Algorithm 2),

.. math:: g = \frac{\hat x_{fake}(x_t) - \hat x_{real}(x_t)}{\mathrm{mean} |x - \hat x_{real}(x_t)|},
    \qquad \nabla_\theta = \frac{g}{\mathrm{numel}} \frac{\partial x}{\partial \theta}.

The divisor, one number per sample, gives all noise levels the same weight. Like the authors' code, and unlike Eq. 8,
this leaves out a factor ``alpha_t``. Images move away from the fake score's prediction, towards the real one's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.diffusion.prediction import Denoise, from_x0
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.losses.regression import mean_square
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

MATCHED = (0.02, 0.98)
"""The range of times at which scores are compared: beyond it the divisor or the difference is uninformative."""

SMALLEST_DIVISOR = 1e-6

NOISE_BANDS = ("low_noise", "middle_noise", "high_noise")


def distribution_matching(
    teacher: Denoise, fake: Denoiser, x0: Tensor, cond: Cond, draws: Draws
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the student's images and diagnostics for the log.

    Args:
        teacher: the real score, its conditioning and guidance fixed.
        fake: the fake score.
        x0: images (B, ...) of the student, with their gradient.
        cond: conditioning of the batch.
        draws: source of noise levels and noise.
    """
    t = sample_times(fake.schedule, draws, *MATCHED)
    real, seen = both_scores(teacher, fake, x0.detach(), draws.normal_like(x0), t, cond)
    return matching_loss(x0, real, seen).mean(), diagnostics(x0, real, seen, t)


def fake_score_loss(fake: Denoiser, x0: Tensor, cond: Cond, draws: Draws) -> Tensor:
    """Return the denoising loss of the fake score on images (B, ...) of the student."""
    t = sample_times(fake.schedule, draws)
    return denoising_loss(fake, x0, draws.normal_like(x0), t, cond).mean()


@torch.no_grad()
def both_scores(
    teacher: Denoise, fake: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """Return the clean images (B, ...) that the teacher and the fake score predict of ``x0``, noised to times (B,)."""
    x_t = fake.schedule.add_noise(x0, noise, t)
    seen = fake(x_t, t, cond).x0
    return teacher(x_t, t).x0, seen


def matching_gradient(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return ``(fake - real) / mean|x0 - real|``, the mean over each sample; all (B, ...), float32 at least."""
    x0, real, fake = _at_least_single(x0), _at_least_single(real), _at_least_single(fake)
    scale = (x0 - real).abs().flatten(1).mean(1).clamp(min=SMALLEST_DIVISOR)
    return (fake - real) / scale.reshape(-1, *[1] * (x0.ndim - 1))


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def matching_loss(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return a loss (B,) whose mean has the gradient ``g / numel`` at ``x0``, with g of :func:`matching_gradient`."""
    gradient = matching_gradient(x0.detach(), real, fake).detach()
    shifted = x0 - x0.detach() + gradient  # exact, where x0 - (x0 - gradient) would round
    return 0.5 * shifted.square().flatten(1).mean(1)


def denoising_loss(denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Return the squared error (B,) of the network's own output at noised images: its pretraining loss."""
    x_t = denoiser.schedule.add_noise(x0, noise, t)
    target = from_x0(x0, x_t, t, denoiser.schedule, denoiser.family.prediction_type)
    return mean_square(denoiser.raw(x_t, t, cond), target)


def sample_times(schedule: NoiseSchedule, draws: Draws, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return uniform times (B,) between the shares ``low`` and ``high`` of the times that networks are trained at."""
    lowest = schedule.lowest_time
    return lowest + (1 - lowest) * draws.uniform(low, high)


def diagnostics(x0: Tensor, real: Tensor, fake: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Return metrics of a student's images (B, ...) and of both denoisings of them at times (B,)."""
    return {**score_gap(real, fake, t), "fake_score_error_ratio": fake_score_error_ratio(x0, real, fake)}


def score_gap(real: Tensor, fake: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Return the mean absolute difference of the two denoisings by third of the times; 0 for a third without a time.

    It shrinks as the student's images approach the teacher's. If it grows at high noise, the fake score lags behind.
    """
    difference = (fake - real).detach().float().abs().flatten(1).mean(1)
    bands = (t * len(NOISE_BANDS)).long().clamp(max=len(NOISE_BANDS) - 1)
    gaps = {}
    for i, name in enumerate(NOISE_BANDS):
        inside = bands == i
        gaps[f"score_gap_{name}"] = (difference * inside).sum() / inside.sum().clamp(min=1)
    return gaps


def fake_score_error_ratio(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return the fake score's squared error in denoising a student's images, over that of the real score.

    Only the fake score is trained on these images: the ratio is 1 at the start, and at most 1 while it keeps up.
    """
    clean = x0.detach().float()
    error = (fake.detach().float() - clean).square().mean()
    return error / (real.detach().float() - clean).square().mean().clamp(min=SMALLEST_DIVISOR)
