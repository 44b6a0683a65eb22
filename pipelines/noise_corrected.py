"""DDIM that knows what the noise is at pure noise.

Self-contained: it is copied into an export as ``scheduler/noise_corrected.py``.
"""

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput


class NoiseCorrectedScheduler(DDIMScheduler):
    """Imagine Flash (Kohler et al. 2024, arXiv 2405.05224): at the first step, the noise is the sample itself.

    A noise-predicting network errs there, and DDIM would carry the error on. All other steps are DDIM's, for any number
    of them: ``DDIMScheduler`` itself misses its own next timestep where that number does not divide the timesteps.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """The state at the timestep after ``timestep``; arguments as for ``DDIMScheduler.step``."""
        x0 = super().step(model_output, timestep, sample, generator=generator).pred_original_sample
        later = self.timesteps[self.timesteps < int(timestep)]
        if len(later) == 0:
            state = x0
        else:
            now, then = self.alphas_cumprod[int(timestep)], self.alphas_cumprod[later[0]]
            first = int(timestep) == int(self.timesteps[0])
            noise = sample if first else (sample - now.sqrt() * x0) / (1 - now).sqrt()
            state = (then.sqrt() * x0 + (1 - then).sqrt() * noise).to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=state, pred_original_sample=x0) if return_dict else (state,)
