"""Students of the 2-D mixture trained against a critic, and whether they cover its modes."""

from __future__ import annotations

from typing import Any

import torch
from mixtures import NEARER, batch_of, draw, landing, make
from oracles import CENTRES, Oracle, PointNet, teacher_denoiser
from torch import Tensor
from torch.nn.functional import mse_loss

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import DDIM, sample
from stepdistill.methods.base import Distiller
from stepdistill.networks.bank import STUDENT
from stepdistill.randomness import Draws, derive_seed


def taught_by(method: type[Distiller], oracle: Oracle, num_classes: int | None = None, **options: Any) -> Distiller:
    """A distiller in float64 whose teacher is the oracle, in a network that has blocks for a critic to watch."""
    network = PointNet(oracle.schedule, oracle, num_classes=num_classes or 0).double()
    distiller = make(method, network, oracle, num_classes, **options)
    return distiller.double()


def train_adversarially(
    method: type[Distiller],
    oracle: Oracle,
    moves: int,
    *,
    lr: float = 4e-3,
    size: int = 128,
    seed: int = 0,
    imitated: Oracle | None = None,
    **options: Any,
) -> Distiller:
    """A student of the oracle after ``moves`` of all turns, their learning rates falling to 0.

    It starts as the oracle, whose answer to noise is one point for all, or as a student of one step of ``imitated``.
    ``seed`` is of the method's own draws; networks and batches are of the global state.

    Without waves the student draws its cliffs between the clusters too flat, and a critic on its teacher's features is
    too short-sighted to tell it so.
    """
    distiller = make(method, PointNet(oracle.schedule, oracle, waves=32), oracle, **options)
    if imitated is not None:
        imitate_ends(distiller, imitated)
    for stage in distiller.stages(moves):
        distiller.stage = stage
        distiller.begin_stage()
        train_stage(distiller, oracle, lr=lr, size=size, seed=seed)
    return distiller


def train_stage(distiller: Distiller, oracle: Oracle, *, lr: float, size: int, seed: int) -> None:
    """Train all turns through the present stage."""
    optimizers = {
        name: torch.optim.Adam(turn.params, lr=lr, betas=(0.0, 0.99)) for name, turn in distiller.turns.items()
    }
    trained = [parameter for turn in distiller.turns.values() for parameter in turn.params]
    for step in range(distiller.stage.steps):
        distiller.step_in_stage = step
        batch = batch_of(oracle, size)
        batch = Batch(batch.x0.float(), batch.cond, batch.size)
        for name, turn in distiller.turns.items():
            if not turn.when(step):
                continue
            own = {id(parameter) for parameter in turn.params}
            for parameter in trained:
                parameter.requires_grad_(id(parameter) in own)
            loss = sum(distiller(name, batch, Draws(derive_seed(step, name) + seed, size)).terms.values())
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].param_groups[0]["lr"] = lr * (1 - step / distiller.stage.steps)
            optimizers[name].step()
        distiller.after_step()


def imitate_ends(distiller: Distiller, oracle: Oracle, moves: int = 100, lr: float = 1e-2) -> None:
    """Regress the student's answers to pure noise on where the oracle's paths from that noise end."""
    schedule = oracle.schedule
    noise = schedule.initial_noise(torch.randn(2048, 2, 1, 1))
    with torch.no_grad():
        ends = sample(teacher_denoiser(oracle).conditioned({}), DDIM(schedule, schedule.grid(24)), noise)
    params = distiller.bank.params(STUDENT)
    optimizer = torch.optim.Adam(params, lr=lr)
    for move in range(moves):
        batch = torch.randint(len(noise), (128,))
        answers = distiller.student(noise[batch], torch.ones(128, dtype=torch.float64), {}).x0
        optimizer.zero_grad()
        mse_loss(answers, ends[batch].to(answers.dtype)).backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - move / moves)
        optimizer.step()


def mode_shares(distiller: Distiller, size: int) -> tuple[Tensor, float]:
    """How the student's samples fall to the nearest centre (3,), and the share farther than 4 widths from it."""
    distance = (draw(distiller, size).flatten(1)[:, None].double() - CENTRES).norm(dim=2)
    nearest, mode = distance.min(1)
    return mode.bincount(minlength=3) / size, (nearest > 0.8).double().mean().item()


def mode_test(shares: Tensor, size: int) -> float:
    """Chi-square of the modes' shares against thirds."""
    return (size * (shares - 1 / 3).square() / (1 / 3)).sum().item()


def check_landings(distiller: Distiller, oracle: Oracle) -> None:
    """Assert of one student in 1, 2 and 4 calls that it covers all modes, and is nearer to them than its teacher."""
    for steps in (1, 2, 4):
        student, teacher = landing(distiller, oracle, steps, size=6000)
        shares, stray = mode_shares(distiller, 3000)
        assert mode_test(shares, 1) < 0.02 and stray < 0.2, (steps, shares, stray)
        assert student < NEARER[steps] * teacher, (steps, student, teacher)
