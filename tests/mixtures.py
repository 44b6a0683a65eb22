"""Small trainings on data of known density, and students that are known in closed form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from oracles import Oracle, OracleFamily, PointNet, sliced_wasserstein, time_of
from torch import Tensor, nn

from stepdistill.batch import Batch
from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.samplers import Sampler, sample
from stepdistill.diffusion.schedule import Karras, NoiseSchedule, edm_scalings, expand
from stepdistill.methods.base import Distiller, Stage
from stepdistill.networks.bank import EMA, STUDENT
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws, derive_seed


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
    method: type[Distiller],
    network: nn.Module,
    oracle: Oracle,
    num_classes: int | None = None,
    *,
    ema: bool = False,
    family: type[OracleFamily] = OracleFamily,
    **options: Any,
) -> Distiller:
    """A distiller of ``network`` (the oracle itself, or a trainable network that starts as it), 100 steps long."""
    config = dict(VP_CONFIG)
    networks = family(
        network, oracle.schedule, oracle.prediction_type, num_classes=num_classes, scheduler_config=config
    )
    networks.widen(method.head_points(method.Config(**options)))
    distiller = method(networks, CopyBank(network), method.Config(**options), ema=ema)
    distiller.stage = Stage("train", 100)
    return distiller


class TwoTimes(OracleFamily):
    """Networks that have a method ``jump`` for a second time."""

    def call(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: Mapping[str, Tensor],
        *,
        w: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        return super().call(network, x_t, t, cond) if s is None else network.jump(x_t, t, s)


class ToldNet(nn.Module):
    """The oracle and small trainable networks, zero at first, whose shares say where a jump leads to."""

    dtype = torch.float32

    def __init__(self, oracle: Oracle, waves: int = 0) -> None:
        super().__init__()
        self.oracle = oracle
        self.by_s = nn.ModuleList(PointNet(oracle.schedule, waves=waves) for _ in range(3))
        for net in self.by_s:
            nn.init.zeros_(net.fc3.weight)
            nn.init.zeros_(net.fc3.bias)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        return self.oracle(sample, timestep, class_labels)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The output at times ``t`` for a step to times ``s``, each (B,)."""
        timestep, u = self.oracle.schedule.timestep(t), expand(2 * s - 1, x_t)  # Legendre's polynomials on [0, 1]
        output = self.oracle(x_t, timestep).sample
        for share, net in zip((torch.ones_like(u), u, (3 * u**2 - 1) / 2), self.by_s, strict=True):
            output = output + share * net(x_t, timestep).sample
        return output


VP_CONFIG = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000, "prediction_type": "v_prediction"}


def walked(step: Callable[..., Tensor], grid: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Where states ``x`` at times ``t`` (B,) of the grid get by ``step(x, now, then)`` along the rest of it."""
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        x = torch.where((t >= now - 1e-9)[:, None, None, None], step(x, now.expand(len(x)), then.expand(len(x))), x)
    return x


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
    network: nn.Module | None = None,
    num_classes: int | None = None,
    lr: float = 1e-2,
    seed: int = 0,
    **options: Any,
) -> Distiller:
    """A student of the oracle after all its stages: Adam, the rate falling to 0 in each, an average as the result."""
    torch.manual_seed(seed)
    network = network or PointNet(oracle.schedule, oracle, num_classes=num_classes or 0)
    distiller = make(method, network, oracle, num_classes, ema=True, **options)
    (turn,) = distiller.turns.values()
    for stage in distiller.stages(train_steps):
        distiller.stage = stage
        distiller.begin_stage()
        optimizer = torch.optim.Adam(turn.params, lr=lr, betas=(0.9, 0.99))
        for step in range(stage.steps):
            distiller.step_in_stage = step
            batch = batch_of(oracle, 256, num_classes)
            batch = Batch(batch.x0.float(), batch.cond, batch.size)
            optimizer.zero_grad()
            loss_of(distiller, batch, derive_seed(seed, stage.name, step)).backward()
            torch.nn.utils.clip_grad_norm_(turn.params, 1.0)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / stage.steps)
            optimizer.step()
            distiller.after_step()
            distiller.bank.blend(EMA, STUDENT, keep=min(0.98, (1 + step) / (10 + step)))
    return distiller


def draw(distiller: Distiller, size: int) -> Tensor:
    """Samples of the finished student with its own sampler."""
    return draw_from(distiller.result, distiller.sampler(), size)


@torch.no_grad()
def draw_from(denoiser: Denoiser, sampler: Sampler, size: int) -> Tensor:
    """Samples (size, 2, 1, 1) of an unconditional network."""
    x = sampler.schedule.initial_noise(turned(size))
    return sample(denoiser.conditioned({}), sampler, x, lambda x: turned(len(x)))


def turned(size: int) -> Tensor:
    """Standard normal points (size, 2, 1, 1), of every three the others being the first turned by thirds of a circle.

    Three clusters are then met evenly: where a student's shares are uneven, that is not the chance of its noise.
    """
    third = 2 * math.pi / 3
    turn = torch.tensor([[math.cos(third), -math.sin(third)], [math.sin(third), math.cos(third)]])
    x = torch.randn(size // 3 + 1, 2)
    return torch.stack([x, x @ turn, x @ turn @ turn], 1).flatten(0, 1)[:size, :, None, None]


def evenly(oracle: Oracle, size: int) -> Tensor:
    """Exact data (size, 2) of equally likely clusters, as many of each."""
    return oracle.means[torch.arange(size) % len(oracle.means)] + oracle.std * torch.randn(size, 2)


NEARER = {1: 0.25, 2: 0.5, 4: 0.6}
"""By number of calls: how far a student may be from the data, as a part of its teacher's distance in as many calls."""

NEARER_FROM_DATA = {1: 0.4, 2: 0.65, 4: 0.85}
"""The same for students that are trained without a teacher, whose pairs are noisier."""


def landing(distiller: Distiller, oracle: Oracle, steps: int, size: int = 21_000) -> tuple[float, float]:
    """How far from the data, by sliced Wasserstein, the student is in ``steps`` calls, and its teacher in as many.

    Two sets of exact data of this size, in equal parts of three clusters, are 0.004 to 0.007 apart.
    """
    distiller.config = dataclasses.replace(distiller.config, steps=steps)
    exact = evenly(oracle, size)
    student, teacher = (
        sliced_wasserstein(draw_from(denoiser, distiller.sampler(), size), exact)
        for denoiser in (distiller.result, distiller.teacher)
    )
    return student, teacher
