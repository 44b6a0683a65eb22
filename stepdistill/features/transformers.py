"""The large networks that judge: any vision model of ``transformers``, and the literature's Inception-v3.

Each does its own resizing in torch, so that it runs on the images' device and is written down exactly:
:meth:`FeatureExtractor.preprocessing` is part of what a reference must match.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stepdistill.config import nearest
from stepdistill.features.base import FeatureExtractor


class TransformersFeatures(FeatureExtractor):
    """A ``transformers`` vision model: its pooled output, or the joint text-image embedding of CLIP and SigLIP.

    The image processor's resize, crop and normalisation are done in torch, on the images' device. The antialiased
    resize goes across, then down, and rounds to whole pixel values after each, as PIL does: the same to one level.
    Grey images are repeated to three channels.
    """

    in_channels = 3
    repeats_grey = True

    def __init__(self, network: Any, settings: dict[str, Any], name: str) -> None:
        super().__init__()
        self.name, self.settings = name, settings
        self.kind = "clip" if network.config.model_type.startswith("clip") else "other"
        self.network: Any = network.requires_grad_(False).eval()
        self.num_features = self.embed(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]

    @classmethod
    def from_pretrained(cls, path: str) -> TransformersFeatures:
        """Load a folder or hub id that holds a vision model and its ``preprocessor_config.json``.

        Raises:
            ValueError: nothing there, no image processor, or weights that are missing from the file.
        """
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(path)
            processor = transformers.AutoImageProcessor.from_pretrained(path)
            architecture = (getattr(config, "architectures", None) or [""])[0]
            # AutoModel would drop the projection of a CLIP vision model, and CMMD is defined after it.
            projected = architecture.endswith("WithProjection")
            loader = getattr(transformers, architecture) if projected else transformers.AutoModel
            network, info = loader.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            hint = nearest(path, ["embedded", "inception"])
            raise ValueError(f"features {path!r}: no vision model there{hint}\n{error}") from error
        if info["missing_keys"]:
            keys = ", ".join(sorted(info["missing_keys"])[:3])
            kind = type(network).__name__
            raise ValueError(
                f"features {path!r}: {kind} needs weights that the file lacks, they would be random: {keys}"
            )
        return cls(network, _processor_settings(processor, path), Path(path).name)

    def embed(self, images: Tensor) -> Tensor:
        """Pooled output (B, d) of the vision model."""
        pixels = self.pixels(images)
        joint = hasattr(self.network, "get_image_features")
        output = self.network.get_image_features(pixel_values=pixels) if joint else self.network(pixel_values=pixels)
        pooled = output if isinstance(output, Tensor) else output.get("image_embeds", output.get("pooler_output"))
        if pooled is None:
            raise ValueError(f"features {self.name!r}: {type(self.network).__name__} has no pooled output")
        return pooled.flatten(1)

    def pixels(self, images: Tensor) -> Tensor:
        """The network's input (B, 3, h, w) float32, normalised, from uint8 ``images`` (B, 3, H, W)."""
        x = images.float()
        if self.settings["size"]:
            height, width = _output_size(x.shape[-2:], self.settings["size"])
            x = self._resize(self._resize(x, (x.shape[-2], width)), (height, width))
        if self.settings["crop"]:
            x = _centre_crop(x, *self.settings["crop"])
        mean, std = (x.new_tensor(self.settings[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        return (x * self.settings["scale"] - mean) / std

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        mode = {2: "bilinear", 3: "bicubic"}[self.settings["resample"]]
        return interpolate(x, size, mode=mode, antialias=True).round().clamp(0, 255)

    def preprocessing(self) -> dict[str, Any]:
        """Size, resampling, crop, scale, mean and standard deviation."""
        return self.settings


def _processor_settings(processor: Any, path: str) -> dict[str, Any]:
    """The five facts of a transformers image processor, as JSON values."""
    sizes = dict(processor.size) if processor.do_resize else {}
    size = {key: int(value) for key, value in sizes.items() if value}
    if size and size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"features {path!r}: cannot resize to {size}; expected shortest_edge, or height and width")
    if size and int(processor.resample) not in (2, 3):
        raise ValueError(f"features {path!r}: resample {processor.resample}; expected 2 (bilinear) or 3 (bicubic)")
    crops = getattr(processor, "do_center_crop", False)
    crop = [int(processor.crop_size["height"]), int(processor.crop_size["width"])] if crops else []
    normalises = processor.do_normalize
    return {
        "size": size,
        "resample": int(processor.resample),
        "crop": crop,
        "scale": float(processor.rescale_factor) if processor.do_rescale else 1.0,
        "mean": [float(value) for value in processor.image_mean] if normalises else [0.0, 0.0, 0.0],
        "std": [float(value) for value in processor.image_std] if normalises else [1.0, 1.0, 1.0],
    }


def _output_size(found: tuple[int, ...], wanted: dict[str, int]) -> tuple[int, int]:
    """Height and width after the resize; the long edge is cut to a whole number as transformers does."""
    if "height" in wanted:
        return wanted["height"], wanted["width"]
    height, width = found
    short, edge = min(height, width), wanted["shortest_edge"]
    return (edge, int(edge * width / short)) if height <= width else (int(edge * height / short), edge)


def _centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    if top < 0 or left < 0:
        raise ValueError(f"features: cannot crop {height}x{width} out of {x.shape[-2]}x{x.shape[-1]} images")
    return x[..., top : top + height, left : left + width]
