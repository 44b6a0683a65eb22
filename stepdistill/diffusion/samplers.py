r"""Few-step samplers, and the contract that makes training, evaluation and the exported pipeline agree.

A sampler is a descending grid of times and a rule that turns what the network sees at ``t`` into the state at the next
time ``s``. It is used three times with the same numbers: in training, to roll a student out (:func:`rollout`); in
evaluation (:func:`sample`); and after export, by the diffusers scheduler that :meth:`Sampler.scheduler` names. That the
two agree is tested to 1e-5, because a student is only as good as the grid it is called on.

Training-free solvers (DPM-Solver++, UniPC, Heun, ...) are diffusers' own, see :mod:`stepdistill.inference.solvers`.

References: DDIM, Song et al. 2021 (arXiv 2010.02502), Eq. 12; multistep consistency sampling, Song et al. 2023
(2303.01469), Algorithm 1.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.diffusion.ode import Noise, noise_up, ode_step
from stepdistill.diffusion.prediction import Denoise, Prediction, end_point
from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule, RectifiedFlow, Trig, expand, noise_process


class Sampler(abc.ABC):
    """The rule a student is sampled with.

    Args:
        schedule: the networks' schedule.
        times: n + 1 strictly descending times, from where the first call happens to 0.

    Raises:
        ValueError: if the times do not descend, or do not end at 0.
    """

    name: ClassVar[str]
    """What a sampling contract calls the rule; it stays when the class is renamed."""

    def __init__(self, schedule: NoiseSchedule, times: Tensor) -> None:
        times = times.double().cpu()
        if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[-1] != 0:
            raise ValueError(f"sampler times must strictly descend to 0; found {times.tolist()}")
        self.schedule = schedule
        self.times = times
        self.pipeline_kwargs: dict[str, Any] = {}
        """What the twin's ``step``, and so a call of its pipeline, must be given besides the number of steps."""

    @property
    def steps(self) -> int:
        """How many network calls a sample takes."""
        return len(self.times) - 1

    def target_time(self, s: Tensor) -> Tensor | None:
        """What a network that takes a second time is told on a step to ``s`` (B,); None for all other networks."""
        del s
        return None

    @abc.abstractmethod
    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """The state at times ``s`` (B,) from what the network sees at ``t`` (B,)."""

    @abc.abstractmethod
    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        """The diffusers scheduler that takes the same steps.

        Args:
            teacher: the config of the teacher's scheduler, whose noise process is kept.

        Raises:
            ValueError: if no stock scheduler can express this grid.
        """

    def contract(self) -> dict[str, Any]:
        """What a caller must know to sample as trained: JSON values."""
        timesteps = self.schedule.timestep(self.times[:-1])
        return {"sampler": self.name, "steps": self.steps, "timesteps": timesteps.tolist()}


class DDIM(Sampler):
    """The deterministic step ``x_s = alpha_s x_0 + sigma_s eps``: DDIM, and Euler for flows and EDM."""

    name = "DDIM"

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t, noise
        alpha_s, sigma_s = (expand(coefficient, prediction.x0) for coefficient in self.schedule(s))
        return prediction.to_state(alpha_s, sigma_s)

    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

        if isinstance(self.schedule, RectifiedFlow):
            return flow_scheduler(FlowMatchEulerDiscreteScheduler, self.schedule)
        if isinstance(self.schedule, Karras):
            if not torch.equal(self.times, self.schedule.grid(self.steps)):
                raise ValueError(f"no stock scheduler takes these {self.steps} Euler steps: not the grid of Karras")
            from stepdistill.pipelines.noise_embedding import ConsistencyEulerScheduler

            rule = EDMEulerScheduler if self.schedule.noise_scale == 1 else ConsistencyEulerScheduler
            return rule(**edm_process(self.schedule))
        check_trailing_grid(self)
        # without clipping and with a last step to clean data, whatever the teacher's own sampler did
        return DDIMScheduler.from_config(
            noise_process(teacher), timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )


class ConsistencySampler(Sampler):
    """Predict the clean image, then noise it afresh: multistep consistency sampling, and DMD2's and ADD's.

    A discrete grid may begin below pure noise, at whole timesteps: no scheduler would by itself, so calls name them.
    """

    name = "Renoise"

    def __init__(self, schedule: NoiseSchedule, times: Tensor) -> None:
        super().__init__(schedule, times)
        if isinstance(schedule, DiscreteVP) and self.times[0] < 1:
            timesteps = schedule.timestep(self.times[:-1])
            if (timesteps - timesteps.round()).abs().max() > 1e-6:
                raise ValueError(f"sampler times must be whole timesteps; found the timesteps {timesteps.tolist()}")
            self.pipeline_kwargs = {"timesteps": timesteps.round().long().tolist()}

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t
        alpha_s, sigma_s = (expand(coefficient, prediction.x0) for coefficient in self.schedule(s))
        return alpha_s * prediction.x0 + sigma_s * noise(prediction.x0)

    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, SCMScheduler

        if isinstance(self.schedule, Trig):
            return SCMScheduler(sigma_data=self.schedule.sigma_data)
        if isinstance(self.schedule, Karras) and self.steps == 1:
            return DDIM(self.schedule, self.times).scheduler(teacher)
        if isinstance(self.schedule, Karras):
            raise ValueError(f"no stock scheduler re-noises an EDM student at these {self.steps} times; wanted 1 step")
        if isinstance(self.schedule, RectifiedFlow):
            return flow_scheduler(FlowMatchEulerDiscreteScheduler, self.schedule, stochastic_sampling=True)
        assert isinstance(self.schedule, DiscreteVP)
        return LCMScheduler.from_config(
            noise_process(teacher),
            original_inference_steps=origin_steps(self) if self.times[0] == 1 else self.schedule.num_timesteps,
            timestep_scaling=1e4,  # c_skip < 1e-8 on every timestep but 0: the network's x_0 itself
            set_alpha_to_one=True,
            clip_sample=False,
        )


class ConsistencyKarras(Sampler):
    """Multistep consistency sampling of EDM-style students (Song et al. 2023, Algorithm 1).

    A trajectory ends at ``sigma_min``: that noise is already there when fresh noise lifts it to the next level.

    Args:
        schedule: the networks' schedule.
        steps: network calls of a sample.
        points: noise levels of Karras' grid from sigma_max to sigma_min, of which every (points // steps)-th is used.
    """

    name = "ConsistencyKarras"

    def __init__(self, schedule: Karras, steps: int, points: int) -> None:
        grid, stride = schedule.grid(points), points // steps
        super().__init__(schedule, torch.cat([grid[: stride * steps : stride], grid[-1:]]))
        self.points = points
        self.karras = schedule

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        _, sigma_t = (expand(coefficient, prediction.x0) for coefficient in self.schedule(t))
        _, sigma_s = self.schedule(s)
        x_end = end_point(prediction, prediction.to_state(torch.ones_like(sigma_t), sigma_t), t, self.schedule)
        lift = (sigma_s**2 - self.karras.sigma_min**2).clamp(min=0).sqrt()
        return x_end + expand(lift, x_end) * noise(x_end)

    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        from diffusers import CMStochasticIterativeScheduler

        from stepdistill.pipelines.noise_embedding import EDMConsistencyScheduler

        del teacher
        rule = EDMConsistencyScheduler if self.karras.noise_scale == 1 else CMStochasticIterativeScheduler
        return rule(num_train_timesteps=self.points, clip_denoised=False, **edm_process(self.karras))


class StrategicStochasticSampler(Sampler):
    """Strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159): jump to (1 - gamma) s, then noise up to s.

    Like ``TCDScheduler``, a discrete process ends at timestep 0 and counts gamma's fraction in whole timesteps.

    Args:
        schedule: the networks' schedule.
        times: as for every sampler.
        gamma: 0 is deterministic (DDIM), 1 noises the clean image afresh.
        two_time: whether the network is told where it jumps to.
    """

    name = "TCD"

    def __init__(self, schedule: NoiseSchedule, times: Tensor, gamma: float, *, two_time: bool = False) -> None:
        super().__init__(schedule, times)
        self.gamma = gamma
        self.two_time = two_time
        self.pipeline_kwargs = {"eta": gamma}

    def targets(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Where a step to ``s`` jumps to, and where it ends, each of the shape of ``s``."""
        if not isinstance(self.schedule, DiscreteVP):
            return (1 - self.gamma) * s, s
        timestep = (s.double() * self.schedule.num_timesteps - 1).round().clamp(min=0)
        # the scheduler multiplies in float32, and a whole number there may be a hair less in float64
        below = torch.floor((1 - self.gamma) * timestep.float()).double()
        return (below + 1) / self.schedule.num_timesteps, (timestep + 1) / self.schedule.num_timesteps

    def target_time(self, s: Tensor) -> Tensor | None:
        return self.targets(s)[0] if self.two_time else None

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t
        below, end = self.targets(s)
        x_below = ode_step(prediction, self.schedule, below)
        return x_below if self.gamma == 0 else noise_up(x_below, below, end, self.schedule, noise)

    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        from diffusers import TCDScheduler

        if not isinstance(self.schedule, DiscreteVP):
            if self.gamma == 0:
                return DDIM(self.schedule, self.times).scheduler(teacher)
            raise ValueError(f"gamma: found {self.gamma}; no stock scheduler noises flows or EDM back up, wanted 0")
        return TCDScheduler.from_config(
            noise_process(teacher), original_inference_steps=origin_steps(self), clip_sample=False
        )

    def contract(self) -> dict[str, Any]:
        return super().contract() | {"gamma": self.gamma}


class DoubleStep(Sampler):
    """The stochastic sampler of guided distillation (Meng et al. 2022, arXiv 2210.03142, Section 3.3).

    From every time but the last, one call jumps two grid points down; fresh noise leads back up by one. The last step
    goes straight to clean data, a jump of one point: :meth:`landing` says which jumps a student must be trained for.
    """

    name = "DoubleStep"

    def landing(self, s: Tensor) -> Tensor:
        """Where the call whose step ends at grid times ``s`` (B,) jumps to: one grid point below, or ``s`` = 0."""
        times = self.times.to(s.device)
        nearest = (times - s[:, None]).abs().argmin(1)
        return times[(nearest + 1).clamp(max=self.steps)]

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t
        landing = self.landing(s)
        return noise_up(ode_step(prediction, self.schedule, landing), landing, s, self.schedule, noise)

    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        if not isinstance(self.schedule, DiscreteVP):
            raise ValueError(
                "the stochastic double-step sampler is exported for VP teachers only, not for flows or EDM"
            )
        check_trailing_grid(self)
        from stepdistill.pipelines.double_step import DoubleStepScheduler

        return DoubleStepScheduler(**noise_process(teacher), timestep_spacing="trailing", clip_sample=False)


class NoiseCorrected(Sampler):
    """DDIM whose first step takes the initial noise itself for the noise (Kohler et al. 2024, arXiv 2405.05224).

    A network that predicts noise errs at pure noise, where its answer is divided by almost nothing; the noise in that
    state is known. Where a network says so of itself (velocity, clean image at zero terminal SNR; flow), this is DDIM.
    """

    name = "NoiseCorrected"

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del noise
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            tuple(expand(coefficient, prediction.x0) for coefficient in self.schedule(time)) for time in (t, s)
        )
        x_t = prediction.to_state(alpha_t, sigma_t)
        known = x_t / self.schedule.initial_noise(torch.ones_like(x_t))
        eps = torch.where(expand(t == 1, x_t) > 0, known, prediction.eps)
        return Prediction(prediction.x0, eps).to_state(alpha_s, sigma_s)

    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        if not isinstance(self.schedule, DiscreteVP):
            raise ValueError("noise correction is exported for VP teachers only; flows need none, EDM wants steps: 1")
        assert torch.equal(self.times, self.schedule.grid(self.steps)), "wanted the trailing grid"
        from stepdistill.pipelines.noise_corrected import NoiseCorrectedScheduler

        return NoiseCorrectedScheduler(
            **noise_process(teacher), timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )


def edm_process(schedule: Karras) -> dict[str, float]:
    """What diffusers' EDM schedulers are told of a process."""
    return {name: getattr(schedule, name) for name in ("sigma_min", "sigma_max", "sigma_data", "rho")}


def check_trailing_grid(sampler: Sampler) -> None:
    """Raise ``ValueError`` unless stock schedulers' "trailing" spacing of ``sampler.steps`` gives ``sampler.times``."""
    assert isinstance(sampler.schedule, DiscreteVP)
    total, steps = sampler.schedule.num_timesteps, sampler.steps
    if total % steps or not torch.equal(sampler.times, sampler.schedule.grid(steps)):
        possible = [n for n in range(1, 65) if total % n == 0]
        raise ValueError(
            f"no stock scheduler samples this grid of {steps} steps exactly: "
            f"steps must divide the teacher's {total} timesteps, for example {possible}"
        )


def origin_steps(sampler: Sampler) -> int:
    """The finest grid out of which ``LCMScheduler`` and ``TCDScheduler`` pick exactly ``sampler.times``.

    Raises:
        ValueError: if there is none.
    """
    assert isinstance(sampler.schedule, DiscreteVP)
    total, steps = sampler.schedule.num_timesteps, sampler.steps
    wanted = (sampler.times[:-1] * total).round().long().tolist()
    for origin in range(total, steps - 1, -1):
        if total % origin == 0 and wanted == [total - origin * i // steps * (total // origin) for i in range(steps)]:
            return origin
    raise ValueError(
        f"no stock scheduler samples at the timesteps {[i - 1 for i in wanted]}: it takes every n-th of a grid whose "
        f"number of steps must divide the teacher's {total} timesteps"
    )


def flow_scheduler(cls: type, schedule: RectifiedFlow, **options: Any) -> Any:
    """A flow-matching scheduler without shift: that of the student's grid is in the explicit sigmas of its pipeline."""
    return cls(num_train_timesteps=schedule.num_timesteps, shift=1.0, **options)


def sample(denoise: Denoise, sampler: Sampler, x: Tensor, noise: Noise = torch.randn_like) -> Tensor:
    """Run all steps from the initial state ``x`` (B, ...) at ``sampler.times[0]`` to clean images.

    Args:
        denoise: the prediction at states (B, ...) and times (B,), conditioning and guidance already inside.
        sampler: grid and rule.
        x: initial state, ``schedule.initial_noise(unit noise)``.
        noise: source of fresh noise for stochastic samplers.
    """
    return rollout(denoise, sampler, x, sampler.steps, noise)


def rollout(denoise: Denoise, sampler: Sampler, x: Tensor, steps: int, noise: Noise) -> Tensor:
    """The state at ``sampler.times[steps]``; with ``steps`` = 0 the initial state itself.

    Gradients follow the caller's mode: wrap the call in ``torch.no_grad`` for a student's backward simulation.
    """
    for t, s in zip(sampler.times[:steps], sampler.times[1 : steps + 1], strict=True):
        t_batch, s_batch = t.expand(len(x)).to(x.device), s.expand(len(x)).to(x.device)
        aim = sampler.target_time(s_batch)
        prediction = denoise(x, t_batch) if aim is None else denoise(x, t_batch, aim)
        x = sampler.step(prediction, t_batch, s_batch, noise)
    return x
