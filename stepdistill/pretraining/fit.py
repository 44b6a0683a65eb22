"""Train a small pixel teacher from scratch, so that there is something to distil without a download.

The denoising loss of the chosen prediction type, ``|| target(x0, eps, t) - network(x_t, t, label) ||^2`` with t
uniform over the scheduler's timesteps, AdamW with a warm-up and a cosine decay, an exponential moving average
as the result, and labels dropped to a null class so that classifier-free guidance works (Ho & Salimans,
arXiv 2207.12598). This is deliberately plain: a teacher is a means here. The distillation loop, with its
checkpoints and exact resume, is :mod:`stepdistill.training.trainer`.
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
from diffusers import DDPMScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

WARMUP_STEPS = 200


Network = TypeVar("Network", bound=nn.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How one network is fitted; ``model`` is passed to its class."""

    model: dict[str, Any]
    steps: int = 10_000
    batch_size: int = 128
    lr: float = 1e-3
    ema: float = 0.9995
    seed: int = 0
    log_every: int = 100
    save_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, wanted at least 1")


def denoising_loss(network: nn.Module, scheduler: DDPMScheduler, x0: Tensor, **cond: Tensor | None) -> Tensor:
    """Mean squared error of the scheduler's prediction type at uniform timesteps.

    Args:
        network: predicts as ``scheduler`` says.
        scheduler: of the noise process.
        x0: clean images or latents (B, C, H, W), of about unit scale.
        cond: what the network is called with besides: ``class_labels``, ``encoder_hidden_states``.
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


def warmup_cosine(step: int, steps: int) -> float:
    """Learning-rate factor: linear over the first steps, then half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1 + np.cos(np.pi * step / steps))


def fit(
    network: Network,
    loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor],
    *,
    count: int,
    config: FitConfig,
    accelerator: Accelerator,
    log: Path,
    save: Callable[[Network], object] = lambda average: None,
) -> Network:
    """Minimise a loss over random batches, and return the moving average of the network.

    Args:
        network: what is trained.
        loss: of the network on the samples at an index (B,) in [0, ``count``), with a generator for what is random.
        count: number of samples.
        config: batch size, steps and rates.
        accelerator: device, precision and processes.
        log: where a JSON line goes every ``log_every`` steps.
        save: called with the average every ``save_every`` steps and at the end, on the main process.
    """
    network = network.to(accelerator.device)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, config.steps))
    wrapped, optimizer = accelerator.prepare(network, optimizer)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    started = time.perf_counter()
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
        keep = min(config.ema, (1 + step) / (10 + step))
        live = [parameter.detach() for parameter in network.parameters()]
        torch._foreach_lerp_(list(average.parameters()), live, 1 - keep)
        if step % config.log_every == 0 and accelerator.is_main_process:
            row = {"step": step, "loss": value.item(), "seconds": round(time.perf_counter() - started, 1)}
            progress.set_postfix(loss=f"{row['loss']:.4f}")
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if (step % config.save_every == 0 or step == config.steps) and accelerator.is_main_process:
            save(average)
    return average
