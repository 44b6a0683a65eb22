"""Where a critic's features of clean images come from: a feature network, or the teacher itself."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.discriminators.augmentation import diff_augment
from stepdistill.discriminators.backbones import Backbone, open_backbone
from stepdistill.discriminators.heads import aspect_of, grid_shape
from stepdistill.families.base import Family
from stepdistill.features.base import FeatureExtractor
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.networks.hooks import spaced_blocks
from stepdistill.randomness import Draws

MAX_BLOCKS = 5
"""Blocks of a teacher with a head, as in SANA-Sprint (arXiv 2503.09641); a head on each of FLUX.1's 57 blocks would
take a gigabyte an image."""


class FeatureSource(abc.ABC):
    """Features of clean images for a critic; a plain object, so that no checkpoint holds its weights."""

    shapes: Sequence[Sequence[int]]
    """Shapes of the features, without the batch."""
    num_embedded: int
    """Length of an image's embedding."""

    decodes: bool
    """Whether images are decoded for it."""

    @abc.abstractmethod
    def see(self, x0: Tensor) -> Tensor:
        """Return what is seen of clean images (B, ...) of the denoising network's space: it is decoded here, once."""

    @abc.abstractmethod
    def extract(self, seen: Tensor, cond: Cond, draws: Draws) -> list[Tensor]:
        """Return features of what was seen of clean images (B, ...)."""

    @abc.abstractmethod
    def embed(self, seen: Tensor, cond: Cond) -> Tensor:
        """Return one vector per image (B, num_embedded), without gradient."""

    def networks(self) -> dict[str, FeatureExtractor]:
        """Return the feature network by its configuration key; nothing if it is the teacher."""
        return {}


class ImageFeatureSource(FeatureSource):
    """A feature network on decoded images; real and fake images are augmented in the same way."""

    decodes = True

    def __init__(self, family: Family, backbone: Backbone, *, augment: bool) -> None:
        self.family = family
        self.backbone = backbone
        self.augment = augment
        self.shapes, self.num_embedded = backbone.shapes, backbone.num_features

    def see(self, x0: Tensor) -> Tensor:
        return self.family.decode(x0)

    def extract(self, seen: Tensor, cond: Cond, draws: Draws) -> list[Tensor]:
        del cond
        return self.backbone(diff_augment(seen, draws) if self.augment else seen)

    def embed(self, seen: Tensor, cond: Cond) -> Tensor:
        del cond
        return self.backbone.embed(seen)

    def networks(self) -> dict[str, FeatureExtractor]:
        return {"method.features": self.backbone.network}


class TeacherFeatureSource(FeatureSource):
    """The teacher's own blocks, run on clean images."""

    decodes = False

    def __init__(self, teacher: Denoiser, max_blocks: int = MAX_BLOCKS) -> None:
        self.blocks, self.shapes = spaced_features(teacher, max_blocks)
        self.num_embedded = self.shapes[-1][0]

    def see(self, x0: Tensor) -> Tensor:
        return x0

    def extract(self, seen: Tensor, cond: Cond, draws: Draws) -> list[Tensor]:
        del draws
        return self.blocks.clean(seen, cond)

    @torch.no_grad()
    def embed(self, seen: Tensor, cond: Cond) -> Tensor:
        return self.blocks.clean(seen, cond)[-1].flatten(2).mean(2)


class MapFeatures:
    """Features of a teacher's blocks, in which tokens that cover the image have the shape of a map of its proportions.

    Heads so see neighbours in both directions (LADD), whatever size an image has.
    """

    def __init__(self, blocks: BlockFeatures) -> None:
        self.blocks = blocks

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Return the features of images (B, ...) at times (B,)."""
        return laid_out(self.blocks(x_t, t, cond), x_t)

    def clean(self, x0: Tensor, cond: Cond) -> list[Tensor]:
        """Return the features of clean images (B, ...), at a time of almost no noise."""
        return laid_out(self.blocks.clean(x0, cond), x0)


def laid_out(features: Sequence[Tensor], images: Tensor) -> list[Tensor]:
    """Return features (B, C, ...) of images (B, C, ..., H, W), with tokens that cover these as maps."""
    aspect, maps = aspect_of(images.shape[1:]), []
    for feature in features:
        maps.append(feature.reshape(len(feature), *grid_shape(feature.shape[1:], aspect)))
    return maps


def spaced_features(teacher: Denoiser, max_blocks: int) -> tuple[MapFeatures, list[tuple[int, ...]]]:
    """Return features of up to ``max_blocks`` blocks of the teacher, evenly spaced, and their shapes at its size."""
    family = teacher.family
    blocks = BlockFeatures(teacher, spaced_blocks(family.network, family.feature_blocks, max_blocks))
    aspect = aspect_of(family.sample_shape)
    return MapFeatures(blocks), [grid_shape(shape, aspect) for shape in blocks.shapes()]


def open_feature_source(
    features: str, family: Family, teacher: Denoiser, *, augment: bool, max_blocks: int = MAX_BLOCKS
) -> FeatureSource:
    """Open what ``method.features`` names: at most ``max_blocks`` blocks of the ``"teacher"``, or a feature network.

    Raises:
        ValueError: if the network measures students, or cannot process the teacher's images.
    """
    if features == "teacher":
        return TeacherFeatureSource(teacher, max_blocks)
    device = next(family.network.parameters()).device
    with torch.no_grad():
        channels, *size = family.decode(torch.zeros(1, *family.sample_shape, device=device)).shape[1:]
    if len(size) != 2:
        raise ValueError(f"method.features: expected 'teacher' for a teacher of clips, got {features!r}, of images")
    height, width = size
    return ImageFeatureSource(family, open_backbone(features, channels, (height, width)), augment=augment)
