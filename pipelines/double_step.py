"""The stochastic sampler of guided distillation: two steps forth in one call, one back in noise.

Self-contained: it is copied into an export as ``scheduler/double_step.py``.
"""

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class DoubleStepScheduler(DDIMScheduler):
    """Meng et al. 2022 (arXiv 2210.03142), Section 3.3, on diffusers' "trailing" grid of a VP process.

    A step from t is a DDIM step two grid points down, then fresh noise one point back up; the last is a plain DDIM
    step to clean data. Options are those of ``DDIMScheduler``, of which those on sampling and clipping have no effect.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """The state one grid point below ``timestep``; arguments as for ``DDIMScheduler.step``."""
        stride = self.config.num_train_timesteps // self.num_inference_steps
        x0, eps = self._read(model_output, int(timestep), sample)
        end = int(timestep) - stride
        if end < 0:
            return DDIMSchedulerOutput(prev_sample=x0, pred_original_sample=x0) if return_dict else (x0,)
        alpha_k, sigma_k = self._coefficients(end - stride)
        alpha_s, sigma_s = self._coefficients(end)
        ratio = alpha_s / alpha_k
        fresh = (sigma_s**2 - (ratio * sigma_k) ** 2).clamp(min=0).sqrt()
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        state = (ratio * (alpha_k * x0 + sigma_k * eps) + fresh * noise).to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=state, pred_original_sample=x0) if return_dict else (state,)

    def _coefficients(self, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(alpha, sigma)`` at a timestep; below 0 lies clean data."""
        square = self.alphas_cumprod[timestep] if timestep >= 0 else torch.ones(())
        return square.sqrt(), (1 - square).sqrt()

    def _read(self, output: torch.Tensor, timestep: int, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean image and the noise that the network sees."""
        alpha, sigma = self._coefficients(timestep)
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * output, sigma * sample + alpha * output
        if self.config.prediction_type == "sample":
            return output, (sample - alpha * output) / sigma
        return (sample - sigma * output) / alpha, output
