"""Reference statistics: what samples are compared with, as a file that knows what made it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import Moments
from stepdistill.features.base import FeatureExtractor

_KEYS = ("mu", "sigma", "n", "features", "rows", "labels", "images", "arr_0")


@dataclass(frozen=True)
class ReferenceStatistics:
    """Moments of a reference set, and the ``describe()`` of the features they were taken with.

    Three files are read: ours, ADM's and clean-fid's. The last two say nothing of their network, which is Inception;
    only Inception is let near them. Nor do they say how images were resized: that stays for the user to match
    (``load_features(..., resize=)``).

    Attributes:
        moments: of all images of the set.
        features: what they were taken with.
        rows: (N, d) features of some of the images, for the metrics that moments are not enough for.
        labels: (N,) their classes.
        images: what is known of the images themselves: size, count, hash.
        pixels: (N, C, H, W) uint8, the images that travel in ADM's files, of which no features are stored.
    """

    moments: Moments
    features: Mapping[str, Any]
    rows: Tensor | None = None
    labels: Tensor | None = None
    images: Mapping[str, Any] | None = None
    pixels: Tensor | None = None

    @classmethod
    def of(cls, moments: Moments, features: FeatureExtractor, **known: Any) -> ReferenceStatistics:
        """Statistics as ``features`` makes them; ``known``: the other attributes."""
        return cls(moments, features.describe(), **known)

    def write(self, path: str | Path) -> None:
        """Write ``mu`` (d,), ``sigma`` (d, d), both float64, ``n``, ``features`` (JSON) and what else is known."""
        mean, cov = self.moments.mean.cpu().numpy(), self.moments.cov.cpu().numpy()
        rows, labels = (
            {} if value is None else {name: value.numpy()}
            for name, value in (("rows", self.rows), ("labels", self.labels))
        )
        images = {} if self.images is None else {"images": np.array(json.dumps(dict(self.images)))}
        arrays: dict[str, Any] = {"mu": mean, "sigma": cov, "n": self.moments.n or 0, **rows, **labels, **images}
        np.savez_compressed(path, features=json.dumps(dict(self.features)), **arrays)

    @classmethod
    def read(cls, path: str | Path) -> ReferenceStatistics:
        """Read any of the three kinds of file.

        Raises:
            ValueError: no such file, or no statistics in it.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                content = {key: archive[key] for key in _KEYS if key in archive.files}
                found = archive.files
        except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"reference {str(path)!r}: not an .npz of statistics ({error})") from error
        if "mu" not in content or "sigma" not in content:
            raise ValueError(f"reference {str(path)!r}: expected mu and sigma, found {', '.join(found)}")
        mean, cov = (torch.from_numpy(content[key].astype(np.float64)) for key in ("mu", "sigma"))
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"reference {str(path)!r}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} do not fit")
        n = int(content["n"]) or None if "n" in content else None
        features = json.loads(str(content["features"])) if "features" in content else {"name": "inception"}
        images = json.loads(str(content["images"])) if "images" in content else None
        rows, labels, pixels = (_tensor(content.get(key)) for key in ("rows", "labels", "arr_0"))
        pixels = None if pixels is None or pixels.dtype != torch.uint8 else pixels.permute(0, 3, 1, 2)
        return cls(Moments(n, mean, cov), features, rows, labels, images, pixels)

    def check(self, features: FeatureExtractor) -> Moments:
        """The moments, if ``features`` is what made them.

        Raises:
            ValueError: another network, other weights or another preprocessing; names both.
        """
        ours = features.describe()
        for key in ("sha256", "preprocessing") if "sha256" in self.features else ("name",):
            if ours[key] != self.features[key]:
                raise ValueError(
                    f"reference made with features {self.features['name']!r} ({key} {self.features[key]!r}), "
                    f"not {features.name!r} ({key} {ours[key]!r}): make one with the same features, or judge with those"
                )
        if features.num_features != len(self.moments.mean):
            raise ValueError(f"reference of length {len(self.moments.mean)}, features of {features.num_features}")
        return self.moments


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)
