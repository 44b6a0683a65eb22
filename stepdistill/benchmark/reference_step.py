"""Training steps as scripts of users write them, to measure this package's beside: plain, correct, and without care.

Every role is a full copy in single precision, guidance is two calls of the network, the optimiser walks through the
parameters one by one, the average is a loop, and the loss is read on every step. The mathematics is that of LCM (Luo et
al. 2023, arXiv 2310.04378) and of DMD2 without its critic (Yin et al. 2024, arXiv 2405.14867).
"""

from __future__ import annotations

import abc
from typing import final

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.guidance import guide
from stepdistill.diffusion.prediction import Prediction
from stepdistill.families.base import Family
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

DECAY, CLIP = 0.999, 1.0


class ReferenceStep(abc.ABC):
    """A plain step of a method, around the network of an opened teacher.

    Args:
        family: the teacher's.
        guidance: guidance weight of the teacher, 0 is none.
        device: where everything is.
        dtype: that in which networks compute, by autocast.
    """

    def __init__(self, family: Family, guidance: float, device: torch.device, dtype: torch.dtype) -> None:
        self.family, self.guidance, self.dtype = family, guidance, dtype
        self.bank = CopyBank(family.network)
        self.bank.fork("student")
        self.bank.fork("ema", trainable=False)
        self.fork()
        self.bank.to(device)
        self.teacher, self.student = Denoiser(family, self.bank, "teacher"), Denoiser(family, self.bank, "student")
        self.optimizer = self.make_optimizer("student")

    @abc.abstractmethod
    def fork(self) -> None:
        """Add the further networks of the method."""

    def make_optimizer(self, role: str) -> torch.optim.Optimizer:
        """Return Adam over a role's parameters, one by one."""
        return torch.optim.AdamW(self.bank.params(role), lr=1e-5, foreach=False, fused=False)

    @abc.abstractmethod
    def step(self, batch: Batch) -> float:
        """Train one step, and return the student's loss."""

    def guided(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """Return the teacher's guided prediction, by two calls."""
        conditional = self.teacher(x_t, t, cond)
        if self.guidance == 0:
            return conditional
        null = self.teacher(x_t, t, self.family.null_cond(cond))
        return guide(conditional, null, self.guidance, x_t, t, self.family.schedule)

    def autocast(self, batch: Batch) -> torch.autocast:
        """Return a context in which networks compute in the wanted precision."""
        return torch.autocast(batch.x0.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def descend(self, loss: Tensor, role: str, optimizer: torch.optim.Optimizer) -> float:
        """Step a role's optimiser on a loss, and return its value."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.bank.params(role), CLIP, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def average(self) -> None:
        """Move the student's average, parameter by parameter."""
        for slow, fast in zip(self.bank.params("ema"), self.bank.params("student"), strict=True):
            slow.mul_(DECAY).add_(fast, alpha=1 - DECAY)


@final
class ReferenceLcm(ReferenceStep):
    """Consistency distillation over a step of DDIM; the average is its target."""

    def fork(self) -> None:
        self.target = Denoiser(self.family, self.bank, "ema")

    def step(self, batch: Batch) -> float:
        schedule, device = self.family.schedule, batch.x0.device
        t = 0.1 + 0.8 * torch.rand(batch.size).to(device)
        s = t - 0.02
        x_t = schedule.add_noise(batch.x0, torch.randn_like(batch.x0), t)
        with self.autocast(batch):
            x0 = self.student(x_t, t, batch.cond).x0
            with torch.no_grad():
                clean, noise = self.guided(x_t, t, batch.cond)
                target = self.target(schedule.add_noise(clean, noise, s), s, batch.cond).x0
        loss = nn.functional.huber_loss(x0.float(), target.float(), delta=1e-3)
        value = self.descend(loss, "student", self.optimizer)
        self.average()
        return value


@final
class ReferenceDmd2(ReferenceStep):
    """A student of one step, moved along the difference of a fake and the teacher's score, and the fake score."""

    def fork(self) -> None:
        self.bank.fork("fake")
        self.fake, self.fake_optimizer = Denoiser(self.family, self.bank, "fake"), self.make_optimizer("fake")

    def step(self, batch: Batch) -> float:
        schedule, device = self.family.schedule, batch.x0.device
        one = torch.ones(batch.size, device=device)
        with self.autocast(batch):
            x0 = self.student(schedule.initial_noise(torch.randn_like(batch.x0)), one, batch.cond).x0
            t = 0.02 + 0.96 * torch.rand(batch.size).to(device)
            x_t = schedule.add_noise(x0.detach(), torch.randn_like(x0), t)
            with torch.no_grad():
                gradient = self.fake(x_t, t, batch.cond).x0 - self.guided(x_t, t, batch.cond).x0
        loss = nn.functional.mse_loss(x0.float(), (x0 - gradient).detach().float())
        value = self.descend(loss, "student", self.optimizer)
        with self.autocast(batch):
            difference = self.fake(x_t, t, batch.cond).x0 - x0.detach()
        self.descend(difference.float().square().mean(), "fake", self.fake_optimizer)
        self.average()
        return value


REFERENCES: dict[str, type[ReferenceStep]] = {"lcm": ReferenceLcm, "dmd2": ReferenceDmd2}
"""By the name of the method."""
