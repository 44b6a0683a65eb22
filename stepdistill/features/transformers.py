"""Vision models of ``transformers`` as feature networks.

The image processor's work is done in torch, so that it runs on the images' device and is described exactly:
:meth:`FeatureExtractor.preprocessing` is part of what a reference must match.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stepdistill.assets import FEATURES
from stepdistill.features.base import FeatureExtractor
from stepdistill.files.weights import READING, refuse_incomplete
from stepdistill.files.words import nearest
from stepdistill.loading.pickles import refuse_pickles
from stepdistill.loading.settings import refuse_settings
from stepdistill.networks.hooks import capture_outputs


class TransformersFeatures(FeatureExtractor):
    """A ``transformers`` vision model: its pooled output, or the joint text-image embedding of CLIP and SigLIP.

    The image processor's resize, crop and normalisation are done in torch, on the images' device. The antialiased
    resize goes across, then down, and rounds to whole pixel values after each, as PIL does: the same to one level.
    Grey images are repeated to three channels.
    """

    in_channels = 3
    repeats_grey = True
    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, settings: dict[str, Any], name: str) -> None:
        super().__init__()
        self.name, self.settings = name, settings
        self.kind = "clip" if network.config.model_type.startswith("clip") else "other"
        self.network: Any = network.requires_grad_(False).eval()
        for name in ("mean", "std"):  # on the network's device: a copy for every batch would be a host sync
            self.register_buffer(name, torch.tensor(settings[name]).view(1, -1, 1, 1), persistent=False)
        self.num_features = self.embed(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]

    @classmethod
    def from_pretrained(cls, path: str) -> TransformersFeatures:
        """Load a folder or hub id that holds a vision model and its ``preprocessor_config.json``.

        Nothing of it is run or unpickled: the model must be one of transformers' own, its weights safetensors.

        Raises:
            ValueError: if there is no model or image processor, the file lacks some of the weights, or code or pickles
                would have to be opened.
        """
        import transformers

        refuse_untrusted(Path(path))
        try:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            processor = transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
            architecture = (getattr(config, "architectures", None) or [""])[0]
            # AutoModel would drop the projection of a CLIP vision model, and CMMD is defined after it.
            projected = architecture.endswith("WithProjection")
            loader = (
                getattr(transformers, architecture, transformers.AutoModel) if projected else transformers.AutoModel
            )
            with READING:
                network, info = loader.from_pretrained(
                    path, output_loading_info=True, dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
                    ignore_mismatched_sizes=True,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            hint = nearest(path, [*FEATURES, "inception", "efficientnet"])
            raise ValueError(f"features {path!r}: expected a vision model, got none{hint}\n{error}") from error
        refuse_incomplete(network, info, f"features {path!r}", heads=True)
        return cls(network, _processor_settings(processor, path), Path(path).name)

    def embed(self, images: Tensor) -> Tensor:
        """Return the pooled output (B, d) of the vision model."""
        pixels = self.pixels(images)
        joint = hasattr(self.network, "get_image_features")
        output = self.network.get_image_features(pixel_values=pixels) if joint else self.network(pixel_values=pixels)
        for name in ("image_embeds", "pooler_output"):
            pooled: Tensor | None = getattr(output, name, None)
            if pooled is not None:
                return pooled.flatten(1)
        if not torch.is_tensor(output):  # as transformers 4 returns from get_image_features
            raise ValueError(f"features {self.name!r}: {type(self.network).__name__} has no pooled output")
        return output.flatten(1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of four blocks (B, C, N) of the vision model."""
        body = getattr(self.network, "vision_model", self.network)
        return capture_outputs(body, _block_names(body), lambda: body(pixel_values=self.smooth_pixels(images)))

    def check_preprocessing(self) -> None:
        """Raise ``ValueError`` if the image processor maps black and white far from what networks are trained on.

        They are trained on a few units about 0. A processor that forgets to rescale makes hundreds, and one with a
        factor too many makes the same grey of every image; the network returns features all the same.
        """
        bounds, scale = torch.tensor([[0.0], [255.0]]), self.settings["scale"]
        shown = (bounds * scale - torch.tensor(self.settings["mean"])) / torch.tensor(self.settings["std"])
        low, high, span = shown.min().item(), shown.max().item(), (shown[1] - shown[0]).min().item()
        if not (max(-low, high) <= 10 and span >= 0.5):
            raise ValueError(
                f"method.features: the image processor of {self.name!r} maps black to white to {low:.4g} to "
                f"{high:.4g}, expected a few units about 0; look at do_rescale, rescale_factor, image_mean and "
                "image_std in its preprocessor_config.json"
            )

    def smooth_pixels(self, images: Tensor) -> Tensor:
        """Return the network's input for the whole of images (B, 1 or 3, H, W) in [0, 1]: differentiable.

        It is :meth:`pixels` without rounding, and without a crop, beyond which no pixel would have a gradient: the
        frame is resized to the crop's size instead.
        """
        x, size = images.expand(-1, 3, -1, -1) * 255, tuple(self.settings["crop"])
        if not size and self.settings["size"]:
            size = _output_size(x.shape[-2:], self.settings["size"])
        return self._scale(interpolate(x, size, mode=self._mode, antialias=True) if size else x)

    def pixels(self, images: Tensor) -> Tensor:
        """Return the network's input (B, 3, h, w) float32, normalised, of uint8 ``images`` (B, 3, H, W)."""
        x = images.float()
        if self.settings["size"]:
            height, width = _output_size(x.shape[-2:], self.settings["size"])
            x = self._resize(self._resize(x, (x.shape[-2], width)), (height, width))
        return self._scale(_centre_crop(x, *self.settings["crop"]) if self.settings["crop"] else x)

    @property
    def _mode(self) -> str:
        return {2: "bilinear", 3: "bicubic"}[self.settings["resample"]]

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return interpolate(x, size, mode=self._mode, antialias=True).round().clamp(0, 255)

    def _scale(self, x: Tensor) -> Tensor:
        """Scale and normalise images (B, 3, h, w) in [0, 255]."""
        return (x * self.settings["scale"] - self.mean.to(x)) / self.std.to(x)

    def preprocessing(self) -> dict[str, Any]:
        """Return size, resampling, crop, scale, mean and standard deviation."""
        return self.settings


def refuse_untrusted(folder: Path) -> None:
    """Raise ``ValueError`` if a vision model in a folder would need its own code or pickles."""
    if not folder.is_dir():
        return  # a hub id: transformers gets no permission either
    try:
        refuse_settings(folder, "a network that measures or judges brings no code: use a model of transformers' own")
        refuse_pickles(folder, "save it again with save_pretrained(..., safe_serialization=True)")
    except ValueError as error:
        raise ValueError(f"features {str(folder)!r}: {error}") from error


def _processor_settings(processor: Any, path: str) -> dict[str, Any]:
    """Return resizing, crop and normalisation of a transformers image processor, as JSON values."""
    size = {}
    if processor.do_resize:
        size = {key: int(value) for key, value in dict(processor.size).items() if value}
    if size and size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"features {path!r}: size: expected shortest_edge, or height and width, got {size}")
    if size and int(processor.resample) not in (2, 3):
        raise ValueError(f"features {path!r}: resample: expected 2 (bilinear) or 3 (bicubic), got {processor.resample}")
    crops = getattr(processor, "do_center_crop", False)
    crop = [int(processor.crop_size["height"]), int(processor.crop_size["width"])] if crops else []
    mean = list(map(float, processor.image_mean)) if processor.do_normalize else [0.0, 0.0, 0.0]
    std = list(map(float, processor.image_std)) if processor.do_normalize else [1.0, 1.0, 1.0]
    return {
        "size": size,
        "resample": int(processor.resample),
        "crop": crop,
        "scale": float(processor.rescale_factor) if processor.do_rescale else 1.0,
        "mean": mean,
        "std": std,
    }


def _block_names(network: nn.Module) -> list[str]:
    """Return the last blocks of each quarter of a transformer: [2, 5, 8, 11] of twelve, as in StyleGAN-T."""
    longest, blocks = "", nn.ModuleList()
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(blocks):
            longest, blocks = name, module
    quarters = min(4, len(blocks))
    return [f"{longest}.{(i + 1) * len(blocks) // quarters - 1}" for i in range(quarters)]


def _output_size(size: tuple[int, ...], settings: dict[str, int]) -> tuple[int, int]:
    """Return height and width after the resize; the long edge is rounded down, as transformers does."""
    if "height" in settings:
        return settings["height"], settings["width"]
    height, width = size
    short, edge = min(height, width), settings["shortest_edge"]
    return (edge, int(edge * width / short)) if height <= width else (int(edge * height / short), edge)


def _centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    if top < 0 or left < 0:
        raise ValueError(
            f"features: expected images of at least {height}x{width} to crop, got {x.shape[-2]}x{x.shape[-1]}"
        )
    return x[..., top : top + height, left : left + width]
