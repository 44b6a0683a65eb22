"""Images from the student of a running distillation."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.diffusion.samplers import DDIM, sample
from stepdistill.diffusion.schedule import DiscreteVP
from stepdistill.export.model_card import SampleSheet
from stepdistill.families.base import Family
from stepdistill.families.latent import TextToImageFamily
from stepdistill.inference.grids import make_grid, to_uint8
from stepdistill.inference.sampling import Images, generators_of

if TYPE_CHECKING:
    from stepdistill.methods.base import Distiller

SHEET = 8
"""Columns of a model card's picture."""
TEACHER_STEPS = 50
"""Of its teacher's row."""
PIXELS = 2**22
"""So many pixels are made at a time, four images of 1024 by 1024, so that samples fit where a training does."""


@torch.no_grad()
def student_images(
    distiller: Distiller, count: int, *, seed: int = 0, batch_size: int = 100, device: torch.device | str = "cpu"
) -> Images:
    """Sample the student of a running distillation: its export will give the same images for the same seeds."""
    family = distiller.family
    batch_size = min(batch_size, images_at_a_time(family))
    distiller.bank.eval()
    began, pixels, labels = time.perf_counter(), [], []
    with family.on_device(device), distiller.bank.beside_teacher(distiller.result_role):
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            images, cond = _student_batch(distiller, indices, seed, device)
            pixels.append(to_uint8(images).cpu())
            labels.append(cond.get("class_labels", torch.zeros(0)).cpu())
    sampled_labels = torch.cat(labels) if family.num_classes else None
    return Images(torch.cat(pixels), sampled_labels, distiller.sampler().steps, (time.perf_counter() - began) / count)


def _student_batch(
    distiller: Distiller, indices: range, seed: int, device: torch.device | str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the images (B, C, H, W) of these indices, in [0, 1], and their conditions."""
    family = distiller.family
    generators = generators_of(seed, indices)
    cond = {name: value.to(device) for name, value in family.example_cond(indices).items()}

    def fresh(x: Tensor) -> Tensor:
        return family.later_noise(generators).to(x.device, x.dtype)

    noise = torch.stack([torch.randn(family.sample_shape, generator=one) for one in generators])
    start = distiller.schedule.initial_noise(noise.to(device))
    x0 = sample(distiller.result.conditioned(cond), distiller.sampler(), start, fresh)
    return family.decode(x0.float()), cond


def images_at_a_time(family: Family) -> int:
    """Return how many images or clips of a family are made at a time."""
    return max(1, PIXELS // math.prod(family.image_shape[1:]))


class SampleSheets:
    """The first samples of a run's student, above its teacher's by DDIM from the same noise and conditions.

    The teacher's half is made once for a guidance, however often the student is exported.

    Args:
        distiller: of the run.
        seed: of the noise.
    """

    def __init__(self, distiller: Distiller, seed: int) -> None:
        self.distiller, self.seed = distiller, seed
        schedule, self.teacher_steps = distiller.schedule, TEACHER_STEPS
        if isinstance(schedule, DiscreteVP):
            self.teacher_steps = min(TEACHER_STEPS, schedule.num_timesteps)
        self.by_guidance: dict[float, Tensor] = {}

    def make(self) -> SampleSheet:
        """Return the sheet of the student as it is now."""
        distiller, device = self.distiller, next(self.distiller.parameters()).device
        student = student_images(distiller, SHEET, seed=self.seed, device=device).pixels / 255
        guidance = distiller.result.w or getattr(distiller.config, "guidance_scale", 1.0) - 1
        if guidance not in self.by_guidance:
            self.by_guidance[guidance] = self.teacher_images(guidance, device)
        picture = make_grid(torch.cat([student, self.by_guidance[guidance]]), columns=SHEET)
        return SampleSheet(picture, self.teacher_steps, conditions_of(distiller.family, range(SHEET)))

    @torch.no_grad()
    def teacher_images(self, guidance: float, device: torch.device) -> Tensor:
        """Return the teacher's images (N, C, H, W), in [0, 1], at this guidance, on the CPU."""
        family, schedule, indices = self.distiller.family, self.distiller.schedule, range(SHEET)
        generators = generators_of(self.seed, indices)
        noise = torch.stack([torch.randn(family.sample_shape, generator=one) for one in generators])
        ddim = DDIM(schedule, schedule.grid(self.teacher_steps))
        with family.on_device(device):
            cond = {name: value.to(device) for name, value in family.example_cond(indices).items()}
            x0 = sample(self.distiller.teacher.guided(cond, guidance), ddim, schedule.initial_noise(noise.to(device)))
            return torch.cat([family.decode(some).cpu() for some in x0.float().split(images_at_a_time(family))])


def conditions_of(family: Family, indices: range) -> list[str]:
    """Return the conditions of :meth:`Family.example_cond` in words; none of an unconditional teacher."""
    if isinstance(family, TextToImageFamily):
        return family.example_prompts(indices)
    number = family.num_classes
    return [f"class {index % number}" for index in indices] if number else []
