"""The training loop of small teachers, autoencoders and CLIPs, so that there is something to distil without a download.

It minimises a loss by AdamW with a warm-up and a cosine decay, and returns an exponential moving average. Teachers
minimise the denoising loss of their prediction type, ``|| target(x0, eps, t) - network(x_t, t, label) ||^2`` with t
uniform over the scheduler's timesteps (of a flow: over [0, 1]), and drop labels to a null class for classifier-free
guidance (Ho & Salimans, arXiv 2207.12598). The loop of distillation, with checkpoints and exact resume, is
:mod:`stepdistill.training.trainer`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepdistill.files.ranges import Decay, PositiveFloat, PositiveInt, Seed
from stepdistill.randomness import derive_seed

WARMUP_STEPS = 200


Network = TypeVar("Network", bound=nn.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Options of one network's training; ``model`` is passed to its class."""

    model: dict[str, Any]
    steps: PositiveInt = 10_000
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 1e-3
    ema: Decay = 0.9995
    seed: Seed = 0
    log_every: PositiveInt = 100
    save_every: PositiveInt = 1000


def denoising_loss(network: nn.Module, scheduler: DDPMScheduler, x0: Tensor, **cond: Tensor | None) -> Tensor:
    """Return the mean squared error of the scheduler's prediction type at uniform timesteps.

    Args:
        network: predicts what ``scheduler.config.prediction_type`` names.
        scheduler: the noise process.
        x0: clean images or latents (B, C, H, W), of about unit scale.
        cond: further arguments of the network: ``class_labels``, ``encoder_hidden_states``.
    """
    noise = torch.randn_like(x0)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
    x_t = scheduler.add_noise(x0, noise, timesteps)
    targets = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(x0, noise, timesteps),
        "sample": lambda: x0,
    }
    target = targets[scheduler.config.prediction_type]()
    prediction = network(x_t, timesteps, **cond).sample
    return nn.functional.mse_loss(prediction.float(), target.float())


def flow_matching_loss(
    network: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler, x0: Tensor, **cond: Tensor | None
) -> Tensor:
    """Return the mean squared error of the velocity ``eps - x0`` at ``x_t = (1 - t) x0 + t eps`` (arXiv 2210.02747).

    Args:
        network: predicts the velocity, told the timestep ``T t``.
        scheduler: knows T, the number of its timesteps; its shift moves a sampler's grid only.
        x0: clean images (B, C, H, W).
        cond: further arguments of the network: ``class_labels``.
    """
    noise = torch.randn_like(x0)
    t = torch.rand(len(x0), device=x0.device)
    x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
    prediction = network(x_t, scheduler.config.num_train_timesteps * t, **cond).sample
    return nn.functional.mse_loss(prediction.float(), noise - x0)


def warmup_cosine(step: int, steps: int) -> float:
    """Return the learning rate's factor: linear over the first steps, then half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1 + np.cos(np.pi * step / steps))


def fit(
    network: Network, loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor], *, count: int, config: FitConfig,
    accelerator: Accelerator, log: Path, save: Callable[[Network], object] = lambda average: None,
) -> Network:  # fmt: skip
    """Minimise a loss over random batches, and return the moving average of the network.

    Args:
        network: the network to train.
        loss: takes the network, indices (B,) of samples in [0, ``count``) and a generator for all randomness.
        count: number of samples.
        config: batch size, steps and rates.
        accelerator: device, precision and processes.
        log: file that gets a JSON line every ``log_every`` steps.
        save: called with the average every ``save_every`` steps and at the end, on the main process.
    """
    network = network.to(accelerator.device)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, config.steps))
    wrapped, optimizer = accelerator.prepare(network, optimizer)
    if accelerator.num_processes > 1:  # losses draw noise and timesteps globally: from other numbers in every process
        torch.manual_seed(derive_seed(config.seed, accelerator.process_index))
    losses = _LossLog(log)
    progress = tqdm(range(1, config.steps + 1), disable=not accelerator.is_main_process, desc=log.parent.name)
    for step in progress:
        generator = torch.Generator().manual_seed(config.seed + accelerator.process_index + 1000 * step)
        index = torch.randint(count, (config.batch_size,), generator=generator)
        with accelerator.autocast():
            value = loss(wrapped, index, generator)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        _blend(average, network, min(config.ema, (1 + step) / (10 + step)))
        if not accelerator.is_main_process:
            continue
        if step % config.log_every == 0:
            progress.set_postfix(loss=f"{value.item():.4f}")
            losses.append(step, value.item())
        if step % config.save_every == 0 or step == config.steps:
            save(average)
    return average


@torch.no_grad()
def _blend(average: nn.Module, network: nn.Module, keep: float) -> None:
    """Move an average towards a network: ``average = keep * average + (1 - keep) * network``."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)


class _LossLog:
    """A file of JSON lines with step, loss and seconds since the start, which replaces that of an earlier training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)

    def append(self, step: int, loss: float) -> None:
        row = {"step": step, "loss": loss, "seconds": round(time.perf_counter() - self.started, 1)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
