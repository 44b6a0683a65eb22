"""The timesteps that ``LCMScheduler`` and ``TCDScheduler`` pick.

They make an even grid of a process's timesteps, ``original_inference_steps`` of them, and pick evenly out of that.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def evenly_picked(length: int, steps: int) -> list[int]:
    """Return the ``steps`` places that are picked in a list of ``length``.

    They are ``floor(i length / steps)`` in numpy's floating point, which may put a whole number just below itself.
    """
    return np.floor(np.linspace(0, length, num=steps, endpoint=False)).astype(int).tolist()


def origin_steps(times: Tensor, total: int) -> int | None:
    """Return the length of the finest grid of ``total`` timesteps out of which exactly ``times`` are picked, if any.

    Args:
        times: of a sampler, descending and with a 0 at the end (n + 1,).
        total: timesteps of the process.
    """
    steps = len(times) - 1
    places = (total - (times[:-1] * total).round().long()).tolist()
    for origin in range(total, steps - 1, -1):
        if total % origin == 0 and places == [place * (total // origin) for place in evenly_picked(origin, steps)]:
            return origin
    return None
