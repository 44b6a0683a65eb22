r"""Distribution matching: what DMD and DMD2 share.

The gradient of the Kullback-Leibler divergence from a student's images to the teacher's, both blurred by noise, is a
difference of two scores: the frozen teacher's ("real"), and that of a second network ("fake") which keeps learning to
denoise whatever the student makes. With ``x`` an image of the student's, ``x_t`` the same noised, and both networks
read as clean images (Yin et al. 2023, arXiv 2311.18828, Eq. 7-8 and Algorithm 2),

.. math:: g = \frac{\hat x_{fake}(x_t) - \hat x_{real}(x_t)}{\mathrm{mean} |x - \hat x_{real}(x_t)|},
    \qquad \nabla_\theta = \frac{g}{\mathrm{numel}} \frac{\partial x}{\partial \theta}.

The divisor, one number a sample, makes all noise levels count alike. Like the authors' code, and unlike Eq. 8, it
leaves out a factor ``alpha_t``. Images move away from where the fake score sees them and to where the real one does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.diffusion.prediction import Denoise, from_x0
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.losses.regression import mean_square
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

MATCHED = (0.02, 0.98)
"""The noise levels at which scores are compared: at either end the divisor, or the difference, says nothing."""


SMALLEST_DIVISOR = 1e-6


NOISE_BANDS = ("low_noise", "middle_noise", "high_noise")


@torch.no_grad()
def both_scores(
    teacher: Denoise, fake: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """The clean images (B, ...) that the teacher and the fake score see in ``x0``, noised to times (B,)."""
    x_t = fake.schedule.add_noise(x0, noise, t)
    with eval_mode(fake):
        seen = fake(x_t, t, cond).x0
    return teacher(x_t, t).x0, seen


def matching_gradient(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """``(fake - real) / mean|x0 - real|``, the mean over each sample; all (B, ...), float32 at least."""
    x0, real, fake = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (x0, real, fake))
    scale = (x0 - real).abs().flatten(1).mean(1).clamp(min=SMALLEST_DIVISOR)
    return (fake - real) / scale.reshape(-1, *[1] * (x0.ndim - 1))


def matching_loss(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A loss (B,) whose mean has the gradient ``g / numel`` at ``x0``, ``g`` being :func:`matching_gradient`."""
    gradient = matching_gradient(x0.detach(), real, fake).detach()
    shifted = x0 - x0.detach() + gradient  # exact, where x0 - (x0 - gradient) would round
    return 0.5 * shifted.square().flatten(1).mean(1)


def denoising_loss(denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The squared error (B,) of the network's own output at noised images: the loss it was once trained with."""
    x_t = denoiser.schedule.add_noise(x0, noise, t)
    target = from_x0(x0, x_t, t, denoiser.schedule, denoiser.family.prediction_type)
    return mean_square(denoiser.raw(x_t, t, cond), target)


def sample_times(schedule: NoiseSchedule, draws: Draws, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Times (B,), uniform between the shares ``low`` and ``high`` of those at which networks are trained."""
    lowest = schedule.lowest_time
    return lowest + (1 - lowest) * draws.uniform(low, high)


def score_gap(real: Tensor, fake: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Mean absolute difference of the two denoisings by third of the times; 0 where no time of the batch fell.

    It shrinks as the student's images become the teacher's. One that grows at high noise is a fake score that lags.
    """
    difference = (fake - real).detach().float().abs().flatten(1).mean(1)
    bands = (t * len(NOISE_BANDS)).long().clamp(max=len(NOISE_BANDS) - 1)
    means = [(difference * (bands == i)).sum() / (bands == i).sum().clamp(min=1) for i in range(len(NOISE_BANDS))]
    return {f"score_gap_{name}": mean for name, mean in zip(NOISE_BANDS, means, strict=True)}


def fake_score_error_ratio(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Squared error of the fake score's denoising of a student's images over that of the real one's.

    The fake score is trained to denoise these images, the real one was not: 1 at the start, at most 1 where it follows.
    """
    errors = [(seen.detach().float() - x0.detach().float()).square().mean() for seen in (fake, real)]
    return errors[0] / errors[1].clamp(min=SMALLEST_DIVISOR)


def diagnostics(x0: Tensor, real: Tensor, fake: Tensor, t: Tensor) -> dict[str, Tensor]:
    """What the log shows of a student's images (B, ...) and both denoisings of them at times (B,)."""
    return {**score_gap(real, fake, t), "fake_score_error_ratio": fake_score_error_ratio(x0, real, fake)}


@contextlib.contextmanager
def eval_mode(denoiser: Denoiser) -> Iterator[None]:
    """The network in evaluation mode, without dropout, while another one's turn asks it."""
    with denoiser.bank.using(denoiser.role) as network:
        training = network.training
        network.eval()
        try:
            yield
        finally:
            network.train(training)
