"""Stock pipelines that tell their network the time at which a step ends.

Self-contained: it is copied into an export as ``pipeline.py`` and loaded with
``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``. Each class is a stock one; its call only adds the
second time to what the network is given, for any number of steps.
"""

import functools
import inspect
from typing import Any

import torch
from diffusers import (
    DiTPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)


class SecondTime:
    """A forward hook that makes the network's timesteps (B, 2): now, and at the end of the step.

    Networks see the scheduler's timesteps times a factor, which the first call of all, at its first timestep, tells.
    """

    def __init__(self, scheduler: Any, eta: float) -> None:
        self.scheduler = scheduler
        self.eta = eta
        self.factor = 0.0

    def __call__(self, network: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the network with both times."""
        bound = inspect.signature(network.forward).bind(*args, **kwargs)
        size = len(next(iter(bound.arguments.values())))
        now = torch.as_tensor(bound.arguments["timestep"]).float().expand(size)
        self.factor = self.factor or float(now[0]) / float(self.scheduler.timesteps[0])
        end = self.factor * self.end(float(now[0]) / self.factor)
        bound.arguments["timestep"] = torch.stack([now, torch.full_like(now, end)], 1)
        return bound.args, bound.kwargs

    def end(self, now: float) -> float:
        """The timestep that the step from ``now`` leads to; the end is 0 in TCD."""
        timesteps = self.scheduler.timesteps.float().cpu()
        nearest = timesteps[(timesteps - now).abs().argmin()]
        later = timesteps[timesteps < nearest]
        if isinstance(self.scheduler, TCDScheduler):
            return float(torch.floor((1 - self.eta) * (later[0] if len(later) else torch.zeros(()))))
        return float(later[0]) if len(later) else self.clean()

    def clean(self) -> float:
        """The timestep of clean data: -1 of a discrete process, 0 of a flow, a noise level of almost 0 for EDM."""
        if hasattr(self.scheduler, "precondition_noise"):
            return float(self.scheduler.precondition_noise(torch.tensor(1e-44, dtype=torch.float64)))
        return -1.0 if "beta_schedule" in self.scheduler.config else 0.0


def two_times(pipeline: Any) -> Any:
    """A class of pipelines whose calls tell the network the second time."""
    plain = pipeline.__call__

    @functools.wraps(plain)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        network = self.components.get("unet") or self.components["transformer"]
        hook = SecondTime(self.scheduler, kwargs.get("eta", 0.0))
        handle = network.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return plain(self, *args, **kwargs)
        finally:
            handle.remove()

    pipeline.__call__ = call
    return pipeline


@two_times
class TwoTimeStableDiffusionPipeline(StableDiffusionPipeline):
    """Of Stable Diffusion."""


@two_times
class TwoTimeStableDiffusionXLPipeline(StableDiffusionXLPipeline):
    """Of SDXL."""


@two_times
class TwoTimeStableDiffusion3Pipeline(StableDiffusion3Pipeline):
    """Of Stable Diffusion 3."""


@two_times
class TwoTimeDiTPipeline(DiTPipeline):
    """Of DiT."""


@two_times
class TwoTimePixArtAlphaPipeline(PixArtAlphaPipeline):
    """Of PixArt-alpha."""


@two_times
class TwoTimePixArtSigmaPipeline(PixArtSigmaPipeline):
    """Of PixArt-sigma."""


@two_times
class TwoTimeSanaPipeline(SanaPipeline):
    """Of Sana."""


@two_times
class TwoTimeFluxPipeline(FluxPipeline):
    """Of FLUX.1."""
