"""Small trainings on data of known density, and students that are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from oracles import Oracle, OracleFamily, PointNet, time_of
from torch import Tensor, nn

from stepdistill.denoiser import edm_scalings, from_x0
from stepdistill.families.base import Batch
from stepdistill.methods.base import Distiller, Stage
from stepdistill.networks import CopyBank
from stepdistill.randomness import Draws, derive_seed
from stepdistill.sampling import bind, sample
from stepdistill.schedule import Karras, NoiseSchedule, expand


class Known(nn.Module):
    """A network whose consistency function is ``end(x_t, t, class_labels)``."""

    dtype = torch.float64

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, end: Callable[..., Tensor]) -> None:
        super().__init__()
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.end = end

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        t, x_t = time_of(self.schedule, timestep), sample.double()
        if not isinstance(self.schedule, Karras):
            x0 = self.end(x_t, t, class_labels)
            return SimpleNamespace(sample=from_x0(x0, x_t, t, self.schedule, self.prediction_type).nan_to_num())
        # f = c_skip x_t + c_out F, Song et al. 2023, Appendix C, solved for F
        sigma, sigma_min, sigma_data = (
            expand(self.schedule(t)[1], x_t),
            self.schedule.sigma_min,
            self.schedule.sigma_data,
        )
        x_t = x_t / edm_scalings(sigma, sigma_data)[2]
        c_skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
        c_out = (sigma - sigma_min) * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        output = torch.where(c_out.abs() > 1e-9, (self.end(x_t, t, class_labels) - c_skip * x_t) / c_out, 0)
        return SimpleNamespace(sample=output)


def make(
    method: type[Distiller], network: nn.Module, oracle: Oracle, num_classes: int | None = None, **options: Any
) -> Distiller:
    """A distiller of ``network`` (the oracle itself, or a trainable network that starts as it), 100 steps long."""
    config = dict(VP_CONFIG)
    family = OracleFamily(
        network, oracle.schedule, oracle.prediction_type, num_classes=num_classes, scheduler_config=config
    )
    distiller = method(family, CopyBank(network), method.Config(**options))
    distiller.stage = Stage("train", 100)
    return distiller


VP_CONFIG = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000, "prediction_type": "v_prediction"}


def put(distiller: Distiller, network: nn.Module) -> None:
    """Let ``network`` play every role but the teacher's."""
    for role in distiller.bank.roles[1:]:
        distiller.bank.networks[role] = network


def batch_of(oracle: Oracle, size: int, num_classes: int | None = None) -> Batch:
    """Exact data in float64, with random labels where there are classes."""
    labels = None if num_classes is None else torch.randint(0, num_classes, (size,))
    return Batch(oracle.draw(size, labels), {} if labels is None else {"class_labels": labels}, size)


def loss_of(distiller: Distiller, batch: Batch, seed: int = 0) -> Tensor:
    """The student's loss."""
    return distiller("student", batch, Draws(seed, batch.size)).terms["loss"]


def train(
    method: type[Distiller],
    oracle: Oracle,
    train_steps: int,
    *,
    num_classes: int | None = None,
    lr: float = 1e-2,
    **options: Any,
) -> Distiller:
    """A student of the oracle after ``train_steps`` of Adam, its learning rate falling to 0."""
    network = PointNet(oracle.schedule, oracle, num_classes=num_classes or 0)
    distiller = make(method, network, oracle, num_classes, **options)
    distiller.stage = distiller.stages(train_steps)[0]
    distiller.begin_stage()
    params = distiller.bank.params("student")
    optimizer = torch.optim.Adam(params, lr=lr, betas=(0.9, 0.99))
    for step in range(train_steps):
        distiller.done = step
        batch = batch_of(oracle, 256, num_classes)
        batch = Batch(batch.x0.float(), batch.cond, batch.size)
        loss = loss_of(distiller, batch, derive_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / train_steps)
        optimizer.step()
        distiller.after_step()
    return distiller


@torch.no_grad()
def draw(distiller: Distiller, size: int, labels: Tensor | None = None) -> Tensor:
    """Samples of the student with its own sampler."""
    noise = torch.randn(size, 2, 1, 1)
    cond = {} if labels is None else {"class_labels": labels}
    return sample(bind(distiller.student, cond), distiller.sampler(), distiller.schedule.initial_noise(noise))
