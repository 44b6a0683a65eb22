"""A critic of steps: did the teacher take this step, or the student?

SDXL-Lightning (Lin et al. 2024, arXiv 2402.13929) judges pairs: the state ``x_t`` where a step begins, and the state
where it lands. A step of the teacher from ``x_t`` is real, a step of the student from the same ``x_t`` is not. So the
critic sees whether the student follows the teacher's path. Without ``x_t`` it sees only whether the landed state is a
likely one, which a student of few steps can obey where it cannot follow. Both are one set of heads, on the features of
the landed state beside those of ``x_t``, or beside zeros.

Here the features are those of the frozen teacher; the paper describes training the critic's backbone, too. A landed
state may be noised up before it is judged, real and generated ones to the same level: at high levels structure counts,
at low levels texture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.ode import noise_up
from stepdistill.discriminators.conditioning import condition_vector
from stepdistill.discriminators.critics import TIME_WAVES
from stepdistill.discriminators.feature_sources import MAX_BLOCKS, spaced_features
from stepdistill.discriminators.heads import Heads
from stepdistill.losses.adversarial import AdversarialLoss, Logits, critic_loss, critic_metrics, generator_loss
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import clean_time
from stepdistill.randomness import Draws


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What a step of the teacher and one of the student have in common when they are judged."""

    begin: list[Tensor]
    """Features of the states where the steps begin, one (B, C, ...) per head; empty if these are not judged."""
    t: Tensor
    """Times (B,) of these states; 0 where there are none."""
    s: Tensor
    """Times (B,) at which the steps end."""
    level: Tensor
    """Times (B,) that landed states are noised up to; where one is below ``s``, or nearly 0, a little more."""
    cond: Cond
    """Condition of the batch."""


class PairCritic(nn.Module):
    """Heads on the teacher's features of where a step lands, and of where it begins.

    Args:
        teacher: the network whose features are used, and whose schedule noises.
        loss: the adversarial loss.
        max_blocks: most blocks of the teacher with a head.
    """

    def __init__(self, teacher: Denoiser, *, loss: AdversarialLoss = "softplus", max_blocks: int = MAX_BLOCKS) -> None:
        super().__init__()
        self.features, shapes = spaced_features(teacher, max_blocks)
        self.schedule = teacher.schedule
        self.num_classes = teacher.family.num_classes
        self.loss = loss
        example = condition_vector(teacher.family.example_cond([0]), 1, self.num_classes)
        beside = [(2 * channels, *places) for channels, *places in shapes]
        self.heads = Heads(beside, example.shape[1] + 2 * TIME_WAVES)

    def pair(self, x_t: Tensor, t: Tensor, s: Tensor, level: Tensor, cond: Cond) -> StepContext:
        """Return the context of steps from ``x_t`` (B, ...) at ``t`` (B,) to ``s`` (B,), judged with ``x_t``."""
        with torch.no_grad():
            return StepContext(self.features(x_t, t, cond), t, s, level, cond)

    def alone(self, s: Tensor, level: Tensor, cond: Cond) -> StepContext:
        """Return the context of steps to ``s`` (B,) that are judged by where they land alone."""
        return StepContext([], torch.zeros_like(s), s, level, cond)

    def forward(self, landed: Tensor, context: StepContext, draws: Draws) -> Logits:
        """Return logits (B, positions) per head of landed states (B, ...)."""
        return self.logits(self.extract(landed, context, draws), context)

    def extract(self, landed: Tensor, context: StepContext, draws: Draws) -> list[Tensor]:
        """Return the features, one per head, of landed states (B, ...) noised up."""
        level = self.level(context)
        return self.features(noise_up(landed, context.s, level, self.schedule, draws.normal_like), level, context.cond)

    def level(self, context: StepContext) -> Tensor:
        """Return the times (B,) that landed states are noised up to."""
        return torch.maximum(context.level, context.s).clamp(min=clean_time(self.schedule))

    def logits(self, landed: list[Tensor], context: StepContext) -> Logits:
        """Return logits (B, positions) of the features of landed states, per head."""
        begin = context.begin or [torch.zeros_like(feature) for feature in landed]
        both = [torch.cat(maps, 1) for maps in zip(landed, begin, strict=True)]
        return self.heads(both, self.condition(context, self.level(context)))

    def condition(self, context: StepContext, level: Tensor) -> Tensor:
        """Return the condition and both times as a vector (B, d)."""
        vector = condition_vector(context.cond, len(level), self.num_classes).to(level.device)
        waves = [(k * math.pi * t).cos() for t in (context.t, level) for k in range(TIME_WAVES)]
        return torch.cat([vector, torch.stack(waves, 1).to(vector.dtype)], 1)

    def student_loss(self, landed: Tensor, context: StepContext, draws: Draws) -> Tensor:
        """Return the adversarial loss of the student's landed states (B, ...)."""
        return generator_loss(self(landed, context, draws), self.loss)

    def critic_loss(
        self, real: Tensor, fake: Tensor, context: StepContext, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the critic's loss on where the teacher and the student land (B, ...), and metrics."""
        real_logits, fake_logits = self(real, context, draws), self(fake, context, draws)
        return critic_loss(real_logits, fake_logits, self.loss), critic_metrics(real_logits, fake_logits)

    def both_losses(
        self, real: Tensor, fake: Tensor, context: StepContext, draws: Draws
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the student's loss, which does not reach the heads, the critic's, and metrics.

        Args:
            real: where the teacher lands, (B, ...).
            fake: where the student lands, (B, ...).
            context: what both have in common.
            draws: source of noise.
        """
        with torch.no_grad():
            real_features = self.extract(real, context, draws)
        fake_features = self.extract(fake, context, draws)
        real_logits = self.logits(real_features, context)
        fake_logits = self.logits([feature.detach() for feature in fake_features], context)
        with unmoved(self.heads):
            student = generator_loss(self.logits(fake_features, context), self.loss)
        return student, critic_loss(real_logits, fake_logits, self.loss), critic_metrics(real_logits, fake_logits)


@contextlib.contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Compute inside the context without gradients of a module's parameters; they still flow through it."""
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
