"""The sampler of students that emit a policy: a call a segment of the time axis, then many steps without the network.

Self-contained: it is copied into an export as ``scheduler/policy.py``.
"""

import math

import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput


class PolicyScheduler(SchedulerMixin, ConfigMixin):
    """pi-Flow (Chen et al. 2025, arXiv 2510.14974) with its DX policy, for flows and for processes with betas.

    The network's output has the channels of several predictions beside each other. Each gives a clean image, at even
    times of the segment; between them the clean image is interpolated.

    Args:
        num_train_timesteps: timesteps of the process.
        beta_start: as of ``DDIMScheduler``, like the next four.
        beta_end: see above.
        beta_schedule: see above; None is a flow.
        trained_betas: see above.
        rescale_betas_zero_snr: see above.
        prediction_type: of one prediction: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow"``.
        shift: how far a flow's times are moved towards noise.
        last_segment: length of the last segment, relative to the others.
        substeps: steps of a segment.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "flow",
        shift: float = 1.0,
        last_segment: float = 0.5,
        substeps: int = 32,
    ) -> None:
        self.angles = None
        if beta_schedule is not None:
            process = DDIMScheduler(
                num_train_timesteps=num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                trained_betas=trained_betas,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
            )
            kept = process.alphas_cumprod.double()
            self.angles = torch.cat([torch.zeros(1).double(), torch.atan2((1 - kept).sqrt(), kept.sqrt())])
        self.set_timesteps(4)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the times at which the network is called.

        Args:
            num_inference_steps: number of calls.
            device: of the timesteps.
        """
        total = self.config.num_train_timesteps
        length = 1 / (num_inference_steps - 1 + self.config.last_segment)
        self.edges = [1 - length * place for place in range(num_inference_steps)] + [0.0]
        if self.angles is None:
            self.timesteps = torch.tensor([total * self._shifted(raw) for raw in self.edges[:-1]], device=device)
        else:
            positions = [round(total * raw) for raw in self.edges]
            self.edges = [position / total for position in positions]
            self.timesteps = torch.tensor([position - 1 for position in positions[:-1]], device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """The state at the end of the segment.

        Args:
            model_output: predictions beside each other, (B, points C, H, W).
            timestep: at which the segment begins.
            sample: the state there, (B, C, H, W).
            return_dict: return a ``SchedulerOutput`` instead of a tuple.
        """
        place = int((self.timesteps.double().cpu() - float(timestep)).abs().argmin())
        start, end = self.edges[place : place + 2]
        clean = [self._clean(output, start, sample) for output in model_output.split(sample.shape[1], 1)]
        count, x = self.config.substeps, sample
        for substep in range(count):
            alpha, sigma = self._coefficients(start + (end - start) * substep / count)
            then_alpha, then_sigma = self._coefficients(start + (end - start) * (substep + 1) / count)
            x0 = self._at(clean, substep / count)
            x = then_alpha * x0 + then_sigma * ((x - alpha * x0) / sigma)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _at(self, clean: list[torch.Tensor], share: float) -> torch.Tensor:
        """The clean image at a share of the segment."""
        position = share * (len(clean) - 1)
        left = min(int(position), max(0, len(clean) - 2))
        return torch.lerp(clean[left], clean[min(left + 1, len(clean) - 1)], position - left)

    def _clean(self, output: torch.Tensor, start: float, sample: torch.Tensor) -> torch.Tensor:
        """The clean image of a prediction."""
        alpha, sigma = self._coefficients(start)
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * output) / alpha
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * output
        return output if self.config.prediction_type == "sample" else sample - sigma * output

    def _shifted(self, raw: float) -> float:
        return self.config.shift * raw / (1 + (self.config.shift - 1) * raw)

    def _coefficients(self, raw: float) -> tuple[float, float]:
        """Signal and noise at a time; between timesteps, the angle of both is interpolated."""
        if self.angles is None:
            return 1 - self._shifted(raw), self._shifted(raw)
        position = raw * self.config.num_train_timesteps
        left = min(int(position), len(self.angles) - 2)
        angle = float(torch.lerp(self.angles[left], self.angles[left + 1], position - left))
        return (0.0 if angle == math.pi / 2 else math.cos(angle)), math.sin(angle)
