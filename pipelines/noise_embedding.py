"""EDM schedulers for networks that embed the noise level as another scheduler's do.

Diffusers' two EDM schedulers tell the network different numbers: ``EDMEulerScheduler`` ln(sigma) / 4, as EDM does,
and ``CMStochasticIterativeScheduler`` 1000 times that. A student keeps its teacher's number under any sampler.
Self-contained: it is copied into an export as ``scheduler/noise_embedding.py``.
"""

import numpy as np
import torch
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler


class EDMConsistencyScheduler(CMStochasticIterativeScheduler):
    """Multistep consistency sampling of a network that embeds ln(sigma) / 4."""

    def sigma_to_t(self, sigmas: float | np.ndarray) -> np.ndarray:
        """What the network embeds at noise levels ``sigmas``."""
        return super().sigma_to_t(sigmas) / 1000


class ConsistencyEulerScheduler(EDMEulerScheduler):
    """Euler steps of a network that embeds 250 ln(sigma)."""

    def precondition_noise(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """What the network embeds at a noise level ``sigma``."""
        return 1000 * super().precondition_noise(sigma)
