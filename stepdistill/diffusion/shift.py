"""The shift of a flow's grid towards noise (Esser et al. 2024, SD3, arXiv 2403.03206, Eq. 23).

Large images need more noise to be destroyed, and therefore more steps at high noise. The shift s moves a time u of the
even grid to ``t = s u / (1 + (s - 1) u)``, which multiplies the noise-to-signal ratio ``t / (1 - t)`` by s. A shift of
1 changes nothing, and the shift ``1 / s`` is the inverse.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Times = TypeVar("Times", float, Tensor)


def shifted(u: Times, shift: float) -> Times:
    """Return the times of places ``u`` in [0, 1] on the even grid.

    >>> shifted(0.5, 3.0)
    0.75
    """
    return shift * u / (1 + (shift - 1) * u)


def unshifted(t: Times, shift: float) -> Times:
    """Return the places on the even grid of times ``t`` in [0, 1]: the inverse of :func:`shifted`."""
    return t / (shift - (shift - 1) * t)
