"""Where a critic's features of clean images come from: a feature network, or the teacher itself."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.discriminators.augmentation import diff_augment
from stepdistill.discriminators.backbones import Backbone, open_backbone
from stepdistill.families.base import Family
from stepdistill.features.base import FeatureExtractor
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.randomness import Draws


class FeatureSource(abc.ABC):
    """Features of clean images for a critic; a plain object, so that no checkpoint holds its weights."""

    shapes: Sequence[Sequence[int]]
    """Shapes of the features, without the batch."""
    num_embedded: int
    """Length of an image's embedding."""

    @abc.abstractmethod
    def extract(self, x0: Tensor, cond: Cond, draws: Draws) -> list[Tensor]:
        """Return features of clean images (B, ...), in the space that the denoising network works in."""

    @abc.abstractmethod
    def embed(self, x0: Tensor, cond: Cond) -> Tensor:
        """Return one vector per image (B, num_embedded), without gradient."""

    def networks(self) -> dict[str, FeatureExtractor]:
        """Return the feature network by its configuration key; nothing if it is the teacher."""
        return {}


class ImageFeatureSource(FeatureSource):
    """A feature network on decoded images; real and fake images are augmented in the same way."""

    def __init__(self, family: Family, backbone: Backbone, *, augment: bool) -> None:
        self.family = family
        self.backbone = backbone
        self.augment = augment
        self.shapes, self.num_embedded = backbone.shapes, backbone.num_features

    def extract(self, x0: Tensor, cond: Cond, draws: Draws) -> list[Tensor]:
        del cond
        images = self.family.decode(x0)
        return self.backbone(diff_augment(images, draws) if self.augment else images)

    def embed(self, x0: Tensor, cond: Cond) -> Tensor:
        del cond
        return self.backbone.embed(self.family.decode(x0))

    def networks(self) -> dict[str, FeatureExtractor]:
        return {"method.features": self.backbone.network}


class TeacherFeatureSource(FeatureSource):
    """The teacher's own blocks, run on clean images."""

    def __init__(self, teacher: Denoiser) -> None:
        self.blocks = BlockFeatures(teacher)
        self.shapes = self.blocks.shapes()
        self.num_embedded = self.shapes[-1][0]

    def extract(self, x0: Tensor, cond: Cond, draws: Draws) -> list[Tensor]:
        del draws
        return self.blocks.clean(x0, cond)

    @torch.no_grad()
    def embed(self, x0: Tensor, cond: Cond) -> Tensor:
        return self.blocks.clean(x0, cond)[-1].flatten(2).mean(2)


def open_feature_source(features: str, family: Family, teacher: Denoiser, *, augment: bool) -> FeatureSource:
    """Open what ``method.features`` names: ``"teacher"``, or a feature network.

    Raises:
        ValueError: if the network measures students, or cannot process the teacher's images.
    """
    if features == "teacher":
        return TeacherFeatureSource(teacher)
    device = next(family.network.parameters()).device
    with torch.no_grad():
        channels, height, width = family.decode(torch.zeros(1, *family.sample_shape, device=device)).shape[1:]
    return ImageFeatureSource(family, open_backbone(features, channels, (height, width)), augment=augment)
