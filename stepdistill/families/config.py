"""The ``teacher`` section of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from stepdistill.files.ranges import FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt, Share

Resolution: TypeAlias = PositiveInt | tuple[PositiveInt, PositiveInt]
"""Side of square images in pixels, or their height and width."""


OPTIONS = (
    "config", "variant", "lora", "lora_weights", "embeddings", "null_class", "guidance_rescale", "guidance_interval",
)  # fmt: skip
"""Keys beside the path that say which weights and classes a teacher has, and how it is guided."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The ``teacher`` section."""

    path: str
    """A diffusers pipeline folder, a folder with ``unet/`` and ``scheduler/``, a single-file checkpoint, a hub id,
    ``embedded``, ``embedded-flow`` or ``faces``."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    variant: str | None = None
    """Which of several precisions of the files is read (``fp16``); None is the plain files, or else what there is."""
    config: str | None = None
    """For a single-file checkpoint: folder or hub id of a pipeline of its kind. Of a whole Stable Diffusion or SDXL,
    only settings and tokenizers are read from there, and None is the original one on the hub; of a network alone, all
    other parts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen teacher's weights; students always train in float32."""
    quantization: Literal["int8", "nf4"] | None = None
    """Fewer bits for the frozen layers under adapters: torchao's ``int8``, or bitsandbytes' ``nf4``."""
    family: str | None = None
    """Name of a file in ``stepdistill/families``, in place of detection."""
    null_class: NonNegativeInt | None = None
    """The class label that means "no class", if the teacher was trained with one."""
    resolution: Resolution | None = None
    """Side in pixels of square images, or ``[height, width]``; None is the teacher's default."""
    frames: PositiveInt | None = None
    """Number of frames of a video teacher's clips; None is its pipeline's default."""
    lora: str | tuple[str, ...] = ()
    """LoRAs that are fused into the teacher before it is distilled: files, folders with one, or hub ids."""
    lora_weights: FiniteFloat | tuple[FiniteFloat, ...] = ()
    """Their weights, as many as there are LoRAs; empty is 1 for each."""
    embeddings: Mapping[str, str] | None = None
    """Textual inversion: for a word that prompts may use, the file, folder or hub id of its embeddings."""
    guidance_scale: NonNegativeFloat | None = None
    """Guidance input of a teacher that has one (FLUX.1-dev); others are guided by the method."""
    guidance_rescale: NonNegativeFloat | None = None
    """What the teacher's pipeline calls ``guidance_rescale`` (Stable Diffusion, SDXL) or ``cfg_normalization``."""
    guidance_interval: tuple[Share, Share] | None = None
    """Times above the first and up to the second at which the teacher is guided; None is all."""
    trust_remote_code: bool = False
    """Whether Python files in the teacher's folder may run; its student's export then contains them."""
    trust_pickles: bool = False
    """Whether weights that exist only as pickles (``.bin``) may be read; exports are safetensors."""

    def __post_init__(self) -> None:
        if self.resolution is not None and len(sides_of(self.resolution)) != 2:
            raise ValueError(f"resolution: expected a side or [height, width], got {list(sides_of(self.resolution))}")
        interval = self.guidance_interval
        if interval is not None and (len(interval) != 2 or interval[0] >= interval[1]):
            raise ValueError(f"guidance_interval: expected [low, high], got {list(interval)}")
        if len(weights := several(self.lora_weights)) not in (0, len(several(self.lora))):
            raise ValueError(f"lora_weights: expected one for each of teacher.lora, got {list(weights)}")

    def added_loras(self) -> list[tuple[str, float]]:
        """Return :attr:`lora` with its weights."""
        paths = several(self.lora)
        return list(zip(paths, several(self.lora_weights) or (1.0,) * len(paths), strict=True))

    def options(self) -> dict[str, Any]:
        """Return the keys beside :attr:`path` that say which teacher it is (:data:`OPTIONS`), where set."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) not in (None, (), {})}


def sides_of(resolution: Resolution) -> tuple[int, ...]:
    """Return the (height, width) of a resolution."""
    return (resolution, resolution) if type(resolution) is int else tuple(resolution)  # type: ignore[arg-type]


def several(value: Any) -> tuple[Any, ...]:
    """Return the values of a key that takes one or several.

    >>> several("a"), several(("a", "b"))
    (('a',), ('a', 'b'))
    """
    return tuple(value) if type(value) in (tuple, list) else (value,)
