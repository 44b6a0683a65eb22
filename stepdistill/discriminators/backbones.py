"""Frozen networks that a critic sees images through: gradients pass to the image, parameters never move.

Any network of :mod:`stepdistill.features.base` will do (a ``transformers`` vision model such as DINOv2 or CLIP, a small
classifier, an exported program of one's own) except one: *the network that judges never trains*. A student that was
trained to please a network scores well with it and no better with people (Kynkaanniemi et al. 2022, arXiv 2203.06026).

Judges see bytes; a critic's images are real numbers that are not rounded, so that they have a gradient. The resizing
and normalisation are those of the network's image processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stepdistill.features.base import FeatureExtractor
from stepdistill.features.classifier import SmallConvNet
from stepdistill.features.exported import ExportedFeatures
from stepdistill.features.identity import OTHERS, refuse_judge
from stepdistill.features.inception import InceptionFeatures
from stepdistill.features.loading import load_features
from stepdistill.features.transformers import TransformersFeatures, _centre_crop, _output_size
from stepdistill.networks.hooks import capture_outputs


class Backbone:
    """A frozen feature network as critics see it; a plain object, so that no checkpoint holds its weights.

    Args:
        network: a small classifier, a transformers vision model or an exported program.
        channels: of the images that it will see.
        size: height and width of those images.

    Raises:
        ValueError: if it cannot see such images.
    """

    def __init__(self, network: FeatureExtractor, channels: int, size: tuple[int, int]) -> None:
        self.network = network.requires_grad_(False).eval()
        wanted = (1, network.in_channels) if network.repeats_grey else (network.in_channels,)
        if channels not in wanted:
            raise ValueError(
                f"method.features: {network.name!r} sees images of {network.in_channels} channels, but the teacher's "
                f"have {channels}"
            )
        if isinstance(network, TransformersFeatures):
            check_range(network)
        try:
            probe = self(torch.zeros(1, channels, *size))
            self.num_features = self.embed(torch.zeros(1, channels, *size)).shape[1]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"method.features: {network.name!r} cannot see images of {channels} x {size[0]} x {size[1]}: {error}"
            ) from error
        self.shapes = [feature.shape[1:] for feature in probe]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Features, shallow to deep, of images (B, C, H, W) in [0, 1]."""
        x, network = self._place(images)
        if isinstance(network, ExportedFeatures):
            return network.maps(x * 2 - 1)
        names, body, call = _views(network)
        return capture_outputs(body, names, lambda: call(x))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """One vector (B, num_features) an image in [0, 1], without gradient."""
        x, network = self._place(images)
        return network(x.mul(255).round().to(torch.uint8)).float()

    def _place(self, images: Tensor) -> tuple[Tensor, FeatureExtractor]:
        self.network.to(images.device)
        return images.float(), self.network


def _views(network: FeatureExtractor) -> tuple[list[str], nn.Module, Callable[[Tensor], object]]:
    """Which modules give the features, of which network, and how that is called with images in [0, 1]."""
    if isinstance(network, SmallConvNet):
        names = [str(i) for i in range(1, len(network.body))]
        return names, network.body, lambda x: network.body(x * 2 - 1)
    assert isinstance(network, TransformersFeatures)
    body = getattr(network.network, "vision_model", network.network)
    return _block_names(body), body, lambda x: body(pixel_values=smooth_pixels(x, network.settings))


def _block_names(network: nn.Module) -> list[str]:
    """Four blocks at the end of each quarter of a transformer's: [2, 5, 8, 11] of twelve, as in StyleGAN-T."""
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    name, blocks = max(lists.items(), key=lambda item: len(item[1]))
    quarters = min(4, len(blocks))
    return [f"{name}.{(i + 1) * len(blocks) // quarters - 1}" for i in range(quarters)]


def smooth_pixels(images: Tensor, settings: dict[str, Any]) -> Tensor:
    """What an image processor makes of images (B, 1 or 3, H, W) in [0, 1], without its rounding: differentiable."""
    x = images.expand(-1, 3, -1, -1) * 255
    if settings["size"]:
        mode = {2: "bilinear", 3: "bicubic"}[settings["resample"]]
        x = interpolate(x, _output_size(x.shape[-2:], settings["size"]), mode=mode, antialias=True)
    if settings["crop"]:
        x = _centre_crop(x, *settings["crop"])
    mean, std = (x.new_tensor(settings[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (x * settings["scale"] - mean) / std


def check_range(network: TransformersFeatures) -> None:
    """Raise ``ValueError`` if an image processor makes of black and white what no network was trained on.

    Networks were trained on a few units about 0. One whose processor forgets to rescale is shown hundreds, or with a
    factor too many the same grey for every image; it gives features all the same.
    """
    bounds, scale = torch.tensor([[0.0], [255.0]]), network.settings["scale"]
    shown = (bounds * scale - torch.tensor(network.settings["mean"])) / torch.tensor(network.settings["std"])
    low, high, span = shown.min().item(), shown.max().item(), (shown[1] - shown[0]).min().item()
    if not (max(-low, high) <= 10 and span >= 0.5):
        raise ValueError(
            f"method.features: the image processor of {network.name!r} makes {low:.4g} to {high:.4g} of black to "
            "white, wanted a few units about 0; look at do_rescale, rescale_factor, image_mean and image_std in its "
            "preprocessor_config.json"
        )


def open_backbone(spec: str, channels: int, size: tuple[int, int]) -> Backbone:
    """The critic's feature network that ``spec`` names, see :func:`stepdistill.features.loading.load_features`.

    Raises:
        ValueError: if it is a judge, or cannot see the teacher's images.
    """
    network = load_features(spec)
    refuse_judge({"method.features": network}, load_features("embedded"))
    if isinstance(network, InceptionFeatures):
        raise ValueError(f"method.features: {spec!r} is FID's network, and a judge must not train; wanted {OTHERS}")
    return Backbone(network, channels, size)
