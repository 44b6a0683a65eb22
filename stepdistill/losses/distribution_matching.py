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

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.diffusion.guidance import Rescale
from stepdistill.diffusion.prediction import Denoise, from_x0
from stepdistill.diffusion.schedule import expand
from stepdistill.losses.levels import MATCHED, sample_times
from stepdistill.losses.regression import mean_square
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

SMALLEST_DIVISOR = 1e-6

NOISE_BANDS = ("low_noise", "middle_noise", "high_noise")

Weigh = Callable[[Tensor, Tensor], Tensor]
"""A function of noised images (B, ...) and times (B,) that returns weights (B,) of their gradients."""

Divergence = Literal["reverse_kl", "kl", "js"]
"""Reverse KL is DMD's own; KL keeps modes that the student lacks, at more variance; Jensen-Shannon is between."""


def distribution_matching(
    teacher: Denoise, fake: Denoiser, x0: Tensor, cond: Cond, draws: Draws, *, t: Tensor | None = None,
    floor: float = SMALLEST_DIVISOR, weigh: Weigh | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return the loss of the student's images and diagnostics for the log.

    Args:
        teacher: the real score, its conditioning and guidance fixed.
        fake: the fake score.
        x0: images (B, ...) of the student, with their gradient.
        cond: conditioning of the batch.
        draws: source of noise levels and noise.
        t: times (B,) at which the scores are compared; by default uniform ones.
        floor: least value of the divisor.
        weigh: weights of the gradients, see :func:`divergence_weight`.
    """
    t = sample_times(fake.schedule, draws, *MATCHED) if t is None else t
    noise = draws.normal_like(x0)
    real_x0, fake_x0 = both_scores(teacher, fake, x0.detach(), noise, t, cond)
    gradient = matching_gradient(x0.detach(), real_x0, fake_x0, floor)
    if weigh is not None:
        gradient = expand(weigh(fake.schedule.add_noise(x0.detach(), noise, t), t), gradient) * gradient
    return descent_loss(x0, gradient).mean(), diagnostics(x0, real_x0, fake_x0, t)


class Matching:
    """Distribution matching against a guided teacher, whole or in its two parts (Decoupled DMD, arXiv 2511.22677).

    With the conditional and the unconditional denoising c and u of the teacher, its guided one r, that of the fake
    score f, and the guidance scale g, the gradient before its divisor is ``f - r = (f - c) - (g - 1) (c - u)``. The
    first part matches the teacher's own distribution. The second, "CFG augmentation", makes images agree with their
    condition; it needs no fake score, and may be evaluated at noise levels of its own.

    Args:
        teacher: the real score.
        fake: the fake score.
        guidance_scale: g; at 1 the teacher is not asked without a condition.
        rescale: whether guided velocities keep the conditional ones' norm.
        floor: least value of the divisor.
    """

    def __init__(
        self, teacher: Denoiser, fake: Denoiser, guidance_scale: float, *, rescale: Rescale = "none",
        floor: float = SMALLEST_DIVISOR,
    ) -> None:  # fmt: skip
        self.teacher = teacher
        self.fake = fake
        self.w = guidance_scale - 1
        self.rescale: Rescale = rescale
        self.floor = floor

    def guided(
        self, x0: Tensor, cond: Cond, draws: Draws, t: Tensor, weigh: Weigh | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss whose gradient is ``f - r`` over its divisor, and diagnostics.

        Args:
            x0: images (B, ...) of the student, with their gradient.
            cond: conditioning of the batch.
            draws: source of the noise.
            t: times (B,) at which the scores are compared.
            weigh: weights of the gradients.
        """
        real = self.teacher.guided(cond, self.w, self.rescale)
        return distribution_matching(real, self.fake, x0, cond, draws, t=t, floor=self.floor, weigh=weigh)

    def unguided(
        self, x0: Tensor, cond: Cond, draws: Draws, t: Tensor, weigh: Weigh | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss whose gradient is ``f - c`` over its divisor, and diagnostics; see :meth:`guided`."""
        real = self.teacher.conditioned(cond)
        return distribution_matching(real, self.fake, x0, cond, draws, t=t, floor=self.floor, weigh=weigh)

    def augmentation(self, x0: Tensor, cond: Cond, draws: Draws, t: Tensor) -> dict[str, Tensor]:
        """Return a term whose gradient is ``c - r`` over the unguided divisor; none without guidance.

        For rescaled guidance, which is not linear in g, that is all that :meth:`unguided` leaves.
        """
        if self.w == 0:
            return {}
        x_t = self.teacher.schedule.add_noise(x0.detach(), draws.normal_like(x0), t)
        with torch.no_grad():
            guided, conditional = self.teacher.guided_and_conditional(x_t, t, cond, self.w, self.rescale)
        gradient = (conditional.x0 - guided.x0) / divisor(x0.detach(), conditional.x0, self.floor)
        return {"augmentation": descent_loss(x0, gradient).mean()}


def fake_score_loss(fake: Denoiser, x0: Tensor, cond: Cond, draws: Draws, t: Tensor | None = None) -> Tensor:
    """Return the denoising loss of the fake score on images (B, ...) of the student, at uniform times or at ``t``."""
    t = sample_times(fake.schedule, draws) if t is None else t
    return denoising_loss(fake, x0, draws.normal_like(x0), t, cond).mean()


@torch.no_grad()
def both_scores(
    teacher: Denoise, fake: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """Return the clean images (B, ...) that the teacher and the fake score predict of ``x0``, noised to times (B,)."""
    x_t = fake.schedule.add_noise(x0, noise, t)
    fake_x0 = fake(x_t, t, cond).x0
    return teacher(x_t, t).x0, fake_x0


def matching_gradient(x0: Tensor, real: Tensor, fake: Tensor, floor: float = SMALLEST_DIVISOR) -> Tensor:
    """Return ``(fake - real) / mean|x0 - real|``, the mean over each sample; all (B, ...), float32 at least."""
    x0, real, fake = _at_least_single(x0), _at_least_single(real), _at_least_single(fake)
    return (fake - real) / divisor(x0, real, floor)


def divisor(x0: Tensor, real: Tensor, floor: float) -> Tensor:
    """Return ``mean|x0 - real|`` of each sample (B, 1, ..., 1), at least ``floor``."""
    scale = (_at_least_single(x0) - _at_least_single(real)).abs().flatten(1).mean(1).clamp(min=floor)
    return scale.reshape(-1, *[1] * (x0.ndim - 1))


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def descent_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """Return a loss (B,) whose mean has the gradient ``gradient / numel`` at ``x0``, both (B, ...)."""
    shifted = x0 - x0.detach() + gradient.detach()  # exact, where x0 - (x0 - gradient) would round
    return 0.5 * shifted.square().flatten(1).mean(1)


@torch.no_grad()
def divergence_weight(logits: Tensor, divergence: Divergence) -> Tensor:
    """Return weights (B,), of mean 1 over all processes, that make reverse KL's gradient another divergence's.

    Xu et al. 2025 (f-distill, arXiv 2502.15681). A critic's logits (B, n) at noised images are the log-ratio of the
    real density to the student's; the weight h of the ratio r is 1, r or r / (1 + r). Here r is relative to its mean
    over the batch, where FastGen keeps means by noise level.
    """
    ratio = logits.float().mean(1).clamp(-10, 10).exp().clamp(0.1, 20)
    ratio = ratio / _mean_over_processes(ratio)
    weight = {"reverse_kl": torch.ones_like(ratio), "kl": ratio, "js": ratio / (1 + ratio)}[divergence]
    return weight / _mean_over_processes(weight)


def _mean_over_processes(numbers: Tensor) -> Tensor:
    total = numbers.mean()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total


def denoising_loss(denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Return the squared error (B,) of the network's own output at noised images: its pretraining loss."""
    x_t = denoiser.schedule.add_noise(x0, noise, t)
    target = from_x0(x0, x_t, t, denoiser.schedule, denoiser.family.prediction_type)
    return mean_square(denoiser.raw(x_t, t, cond), target)


def diagnostics(x0: Tensor, real: Tensor, fake: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Return metrics of a student's images (B, ...) and of both denoisings of them at times (B,)."""
    return {**score_gap(real, fake, t), "fake_score_error_ratio": fake_score_error_ratio(x0, real, fake)}


def score_gap(real: Tensor, fake: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Return the mean absolute difference of the two denoisings by third of the times; 0 for a third without a time.

    It shrinks as the student's images approach the teacher's, down to the noise of the fake score's own training. If it
    grows at high noise, the fake score lags behind.
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

    Only the fake score is trained on these images: the ratio is 1 at the start, and at most 1 while it keeps up. It is
    above 1 also where a fake score's rate is so high that its noise costs more than it has learnt; below 1 under
    guidance even then, which makes the real score's error larger.
    """
    clean = x0.detach().float()
    error = (fake.detach().float() - clean).square().mean()
    return error / (real.detach().float() - clean).square().mean().clamp(min=SMALLEST_DIVISOR)
