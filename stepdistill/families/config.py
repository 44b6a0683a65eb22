"""The ``teacher`` section of a configuration."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The ``teacher`` section."""

    path: str
    """A diffusers pipeline folder, a folder with ``unet/`` and ``scheduler/``, a hub id, or ``embedded``."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen teacher's weights; students always train in float32."""
    family: str | None = None
    """Overrides the detection: the name of a file in ``stepdistill/families``."""
    null_class: int | None = None
    """The class label that means "no class", where the teacher was trained with one."""
    resolution: int | None = None
    """Side in pixels of the (square) images, where not the one that the teacher samples at when nobody says."""
    guidance_scale: float | None = None
    """What a teacher that takes guidance as an input (FLUX.1-dev) is asked with; others are guided by the method."""
    trust_remote_code: bool = False
    """Whether Python files that lie in the teacher's folder may run; its student's export then brings them along."""
    trust_pickles: bool = False
    """Whether weights may be read that are there as pickles (``.bin``) only; what is exported is safetensors."""
