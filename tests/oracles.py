r"""Teachers in closed form, and a small network that can be trained beside them.

For data of known density, what a perfect network sees in ``x_t = alpha x_0 + sigma eps`` is known exactly. With data
``sum_k pi_k N(mu_k, tau^2 I)``, ``x_t`` is a mixture again, of ``N(alpha mu_k, (alpha^2 tau^2 + sigma^2) I)``, so

.. math:: \hat x_0 = \sum_k r_k \frac{\alpha \tau^2 x_t + \sigma^2 \mu_k}{\alpha^2 \tau^2 + \sigma^2},
    \qquad r_k \propto \pi_k N(x_t; \alpha \mu_k, (\alpha^2 \tau^2 + \sigma^2) I).

One component is a Gaussian, ``tau = 0`` is a set of points, and a class is a subset of the components. The modules have
the interface of diffusers' UNets: ``network(sample, timestep, class_labels).sample``, in any prediction type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond, RawBatch
from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.reading import read_discrete_vp, read_schedule
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule, RectifiedFlow, edm_scalings, expand
from stepdistill.diffusion.trig import Trig
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

VP_PROCESSES = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
}
"""Noise processes of diffusers' schedulers."""

SCHEDULES: dict[str, NoiseSchedule] = {
    **{name: read_discrete_vp(process) for name, process in VP_PROCESSES.items()},
    "flow": RectifiedFlow(),
    "karras": Karras(),
    "trig": Trig(),
}


def native_types(schedule: NoiseSchedule) -> tuple[str, ...]:
    """The prediction types that networks of a schedule come in."""
    match schedule:
        case DiscreteVP():
            return ("epsilon", "v_prediction", "sample")
        case RectifiedFlow():
            return ("flow", "sample")
        case Karras():
            return ("edm", "epsilon", "sample")
        case _:
            return ("trigflow", "sample")


def time_of(schedule: NoiseSchedule, timestep: Tensor) -> Tensor:
    """The time that a network is told by ``timestep``: the inverse of ``schedule.timestep``, float64."""
    timestep = timestep.double()
    match schedule:
        case DiscreteVP():
            return (timestep + 1) / schedule.num_timesteps
        case RectifiedFlow():
            return timestep / schedule.num_timesteps
        case Karras():
            return schedule.time_of((4 * timestep / schedule.noise_scale).exp())
        case _:
            return timestep / (math.pi / 2)


def points(*rows: Sequence[float]) -> Tensor:
    """2-D points as the images they are here: (B, 2, 1, 1), float64."""
    return torch.tensor(rows, dtype=torch.float64)[..., None, None]


class Oracle(nn.Module):
    """The perfect network for a mixture of Gaussians of one width.

    Args:
        means: the centres, (K, C).
        std: standard deviation of every component; 0 for points.
        schedule: the noise process.
        prediction_type: what :meth:`forward` returns.
        classes: the class of every component (K,); without it, labels are ignored.
        weights: how likely the components are (K,); equally, by default.
    """

    means: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Tensor,
        std: float,
        schedule: NoiseSchedule,
        prediction_type: str,
        *,
        classes: Sequence[int] | None = None,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        weights = torch.ones(len(means)) if weights is None else weights
        self.std = std
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.classes = None if classes is None else torch.tensor(classes)
        self.register_buffer("means", means.double())
        self.register_buffer("log_weights", (weights / weights.sum()).double().log())

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the answers."""
        return self.means.dtype

    def predict(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The expectation of ``x_0`` given ``x_t`` (B, C, 1, 1), computed in float64."""
        x = x_t.double().flatten(1)
        alpha, sigma = (coefficient.double()[:, None] for coefficient in self.schedule(t))
        means, variance = self.means.double(), alpha**2 * self.std**2 + sigma**2
        distance = (x[:, None] - alpha[..., None] * means).square().sum(2)
        responsibility = (self.prior(class_labels, len(x)) - distance / (2 * variance)).softmax(1)
        x0 = (alpha * self.std**2 * x + sigma**2 * responsibility @ means) / variance
        return x0.reshape(x_t.shape)

    def prior(self, class_labels: Tensor | None, size: int) -> Tensor:
        """Log-probabilities (B, K) of the components; a label that no component has means "no class"."""
        log_weights = self.log_weights.double().expand(size, -1)
        if class_labels is None or self.classes is None:
            return log_weights
        mine = self.classes == class_labels[:, None]
        return log_weights.masked_fill(~mine & mine.any(1, keepdim=True), -torch.inf)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        t = time_of(self.schedule, timestep)
        x_t = sample.double()
        if self.prediction_type == "edm":  # the network sees c_in x_t
            _, sigma = self.schedule(t)
            x_t = x_t / edm_scalings(expand(sigma, x_t), self.schedule.sigma_data)[2]
        output = from_x0(self.predict(x_t, t, class_labels), x_t, t, self.schedule, self.prediction_type)
        return SimpleNamespace(sample=output.to(sample.dtype))

    def draw(self, size: int, class_labels: Tensor | None = None) -> Tensor:
        """Exact samples of the data (size, C, 1, 1), float64."""
        component = self.prior(class_labels, size).exp().multinomial(1).squeeze(1)
        centres = self.means.double()[component]
        return (centres + self.std * torch.randn_like(centres))[..., None, None]


class Gaussian(Oracle):
    """The perfect network for ``N(mean, std^2 I)``, whose ODE is solved in closed form; ``std`` = 0 is one point."""

    def __init__(self, mean: Tensor, std: float, schedule: NoiseSchedule, prediction_type: str) -> None:
        super().__init__(mean[None], std, schedule, prediction_type)

    def centre(self, x: Tensor, t: Tensor) -> Tensor:
        """``alpha_t mean``, broadcastable to ``x``."""
        alpha, _ = self.schedule(t)
        return expand(alpha, x) * self.means[0].to(x.dtype)[:, None, None]

    def gain(self, t: Tensor, s: Tensor) -> Tensor:
        """What one DDIM step multiplies ``x_t - alpha_t mean`` by, (B,)."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.schedule(t), self.schedule(s)
        return (alpha_s * alpha_t * self.std**2 + sigma_s * sigma_t) / (alpha_t**2 * self.std**2 + sigma_t**2)

    def solve(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact solution of the probability-flow ODE from ``t`` to ``s``."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.schedule(t), self.schedule(s)
        ratio = ((alpha_s**2 * self.std**2 + sigma_s**2) / (alpha_t**2 * self.std**2 + sigma_t**2)).sqrt()
        return self.centre(x_t, s) + expand(ratio, x_t) * (x_t - self.centre(x_t, t))


class PointNet(nn.Module):
    """A small trainable network for 2-D points; with an oracle it starts as that oracle, exactly.

    A student of few calls is a map with cliffs between the clusters, which a network of plain coordinates is slow to
    learn (its "spectral bias"); it is quicker with ``waves`` random sines and cosines of the point.
    """

    directions: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule,
        oracle: Oracle | None = None,
        *,
        num_classes: int = 0,
        width: int = 64,
        waves: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.oracle = oracle
        self.num_classes = num_classes
        self.register_buffer("directions", 2 * torch.randn(2, waves))
        self.fc1 = nn.Linear(2 + 2 * waves + 7 + num_classes, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 2)
        if oracle is not None:
            nn.init.zeros_(self.fc3.weight)
            nn.init.zeros_(self.fc3.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.fc1.weight.dtype

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        t = time_of(self.schedule, timestep)[:, None]
        waves = torch.cat([t, *[f(k * math.pi * t) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]], 1)
        points = sample.flatten(1).to(self.dtype)
        phases = points @ self.directions
        features = [points, phases.sin(), phases.cos(), waves]
        if self.num_classes:
            assert class_labels is not None
            features.append((class_labels[:, None] == torch.arange(self.num_classes)).double())  # no class: all zero
        x = torch.cat([feature.to(self.dtype) for feature in features], 1)
        for layer in (self.fc1, self.fc2):
            x = nn.functional.silu(layer(x))
        output = self.fc3(x)[..., None, None]
        if self.oracle is not None:
            known = self.oracle(sample, timestep, class_labels).sample.to(output.dtype)
            output = output + known.repeat(1, output.shape[1] // 2, 1, 1)
        return SimpleNamespace(sample=output)


class OracleFamily(Family):
    """The family of networks that see 2-D points, (B, 2, 1, 1), as they are."""

    component = "unet"
    network_classes = ("Oracle", "Gaussian", "PointNet")
    feature_blocks = ("fc2",)
    lora_targets = ("fc1", "fc2", "fc3")
    head = "fc3"
    sample_shape = (2, 1, 1)

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: str,
        *,
        num_classes: int | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.num_classes = num_classes
        self.scheduler_config = dict(scheduler_config or {})

    @classmethod
    def load(cls, folder: Path, config: TeacherConfig) -> OracleFamily:
        raise NotImplementedError("an oracle is written down, not loaded")

    @classmethod
    def tiny(cls, seed: int = 0) -> OracleFamily:
        torch.manual_seed(seed)
        config = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").config
        schedule, prediction_type = read_schedule(config)
        return cls(PointNet(schedule), schedule, prediction_type, scheduler_config=config)

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
        assert w is None and s is None, "these networks take neither a guidance weight nor a second time"
        if self.prediction_type == "edm":
            _, sigma = self.schedule(t)
            x_t = edm_scalings(expand(sigma, x_t), self.schedule.sigma_data)[2] * x_t
        return network(x_t.to(network.dtype), self.schedule.timestep(t), cond.get("class_labels")).sample

    def widen(self, points: int) -> None:
        if points == 1:
            return
        narrow = self.network.get_submodule("fc3")
        wide = nn.Linear(narrow.in_features, 2 * points).to(narrow.weight)
        with torch.no_grad():
            wide.weight.copy_(narrow.weight.repeat(points, 1))
            wide.bias.copy_(narrow.bias.repeat(points))
        self.network.fc3 = wide
        self.points = points

    def encode(self, raw: RawBatch) -> Batch:
        cond = {} if self.num_classes is None or raw.labels is None else {"class_labels": raw.labels}
        return Batch(raw.images, cond, len(raw.indices))

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        if self.num_classes is None:
            raise ValueError("this oracle has no classes, so it cannot be guided")
        return {name: torch.full_like(labels, self.num_classes) for name, labels in cond.items()}

    def example_cond(self, indices: Sequence[int]) -> Cond:
        if self.num_classes is None:
            return {}
        return {"class_labels": torch.tensor([index % self.num_classes for index in indices])}

    def pipeline(self, network: nn.Module, sampler: Sampler, guidance_scale: float) -> Any:
        raise NotImplementedError("diffusers has no pipeline for 2-D points")

    def teacher_pipeline(self, scheduler: Any | None) -> Any:
        raise NotImplementedError("diffusers has no pipeline for 2-D points")


def teacher_denoiser(oracle: Oracle, num_classes: int | None = None) -> Denoiser:
    """An oracle as methods see it: through a family and a bank."""
    family = OracleFamily(oracle, oracle.schedule, oracle.prediction_type, num_classes=num_classes)
    return Denoiser(family, CopyBank(oracle), "teacher")


CENTRES = points((1.5, 0.0), (-0.75, 1.3), (-0.75, -1.3)).flatten(1)
"""Three clusters at the corners of a triangle."""


def three_clusters(schedule: NoiseSchedule, prediction_type: str, *, conditional: bool = False) -> Oracle:
    """The mixture most tests use: three clusters of width 0.2, each a class of its own if ``conditional``."""
    return Oracle(CENTRES, 0.2, schedule, prediction_type, classes=(0, 1, 2) if conditional else None)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Sliced Wasserstein-2 distance of two samples (N, 2, ...) of equal size, over evenly spread directions."""
    assert len(a) == len(b)
    angle = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    projected = [(x.double().flatten(1) @ axes).sort(0).values for x in (a, b)]
    return (projected[0] - projected[1]).square().mean().sqrt().item()
