"""The reference that samples are compared with: images, or a file of statistics that knows what made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from stepdistill.assets import EMBEDDED, FASHION
from stepdistill.data.remote import downloaded, ending, is_address
from stepdistill.evaluation.image_set import ImageSet, format_shape
from stepdistill.evaluation.metrics.frechet import Moments
from stepdistill.evaluation.metrics.rows import FeatureRows
from stepdistill.features.base import FeatureExtractor
from stepdistill.files.arrays import array_headers, read_arrays
from stepdistill.files.hashing import sha256_of
from stepdistill.files.reading import parse_json
from stepdistill.files.words import nearest, shown
from stepdistill.files.writing import atomic_write, check_new_file
from stepdistill.inference.sampling import Images


class FeatureFacts(TypedDict):
    """What a file says of the network that made it."""

    name: str
    sha256: NotRequired[str]


class ImageFacts(TypedDict):
    """What a file says of its images; ``shape`` is (C, H, W)."""

    sha256: NotRequired[str]
    shape: NotRequired[list[int]]


_KEYS = ("mu", "sigma", "n", "features", "rows", "labels", "images", "arr_0")

PART = 500
"""Images of a reference that are in memory at a time."""


def check_reference_place(path: Path | None) -> None:
    """Raise ``ValueError`` if no statistics can be written at ``path``, or would replace anything but our own."""
    check_new_file(path, ".npz")
    if path is None or not path.is_file() or not path.stat().st_size:
        return
    if not {"mu", "sigma", "features"} <= array_headers(path).keys():
        raise ValueError(f"{path}: expected a new file or earlier statistics to replace, got another .npz")


def check_size(spec: str, size: int | None) -> None:
    """Raise ``ValueError`` if ``size`` is asked of a reference whose images have another and are not resized.

    Args:
        spec: as :meth:`Reference.open` takes it.
        size: side that images are resized to; None leaves them as they are.
    """
    own = None if size is None else _fixed_shape(spec)
    if own is not None and list(own[1:]) != [size, size]:
        raise ValueError(
            f"size: expected none, or that of reference {spec!r}, which is {format_shape(own)} and not resized, got "
            f"{size}"
        )


def _fixed_shape(spec: str) -> Sequence[int] | None:
    """Return the shape (C, H, W) of a reference that is not resized; None of any other, and where it is unknown."""
    if spec == "embedded":
        return ImageSet(FASHION / "train_subset.npz", limit=2).shape
    path = Path(spec)
    if path.suffix != ".npz" or not path.is_file() or not holds_statistics(path):
        return None
    facts = _about(read_arrays(path, ("images",)), "images", ImageFacts, f"reference {spec!r}") or {}
    return facts.get("shape")


@dataclass(frozen=True)
class ReferenceStatistics:
    """Moments of a reference set, and the ``describe()`` of the features that they were computed with.

    Files of three kinds can be read: ours, ADM's and clean-fid's. The last two do not name their network, which is
    Inception, and are accepted for Inception only. Nor do they state how images were resized: the user has to match
    that (``load_features(..., resize=)``).

    Attributes:
        moments: of all images of the set.
        features: description of the network.
        rows: (N, d) features of some of the images, for the metrics that moments are not enough for.
        labels: (N,) int, the classes of ``rows``.
        images: size, count and hash of the images, as far as known.
        pixels: (N, C, H, W) uint8, images in ADM's files, which hold no features.
    """

    moments: Moments
    features: Mapping[str, Any]
    rows: Tensor | None = None
    labels: Tensor | None = None
    images: Mapping[str, Any] | None = None
    pixels: Tensor | None = None

    @classmethod
    def of(cls, moments: Moments, features: FeatureExtractor, **known: Any) -> ReferenceStatistics:
        """Return statistics that ``features`` made; ``known`` are the other attributes."""
        return cls(moments, features.describe(), **known)

    def write(self, path: str | Path) -> None:
        """Write ``mu`` (d,), ``sigma`` (d, d), both float64, ``n``, ``features`` (JSON) and what else is known."""
        mean, cov = self.moments.mean.cpu().numpy(), self.moments.cov.cpu().numpy()
        arrays: dict[str, Any] = {"mu": mean, "sigma": cov, "n": self.moments.n or 0}
        if self.rows is not None:
            arrays["rows"] = self.rows.numpy()
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        if self.images is not None:
            arrays["images"] = np.array(json.dumps(dict(self.images)))
        with atomic_write(Path(path)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, features=json.dumps(dict(self.features)), **arrays)

    @classmethod
    def read(cls, path: str | Path) -> ReferenceStatistics:
        """Read a file of any of the three kinds.

        Raises:
            ValueError: if there is no such file, or it holds no statistics.
        """
        path, name = Path(path), f"reference {str(path)!r}"
        try:
            found, content = list(array_headers(path)), read_arrays(path, _KEYS)
        except ValueError as error:
            raise ValueError(f"reference {error}, expected an .npz of statistics") from None
        if "mu" not in content or "sigma" not in content:
            raise ValueError(f"{name}: expected mu and sigma, got {', '.join(found)}")
        moments = _moments(content, name)
        rows, labels = _rows(content, len(moments.mean), name)
        features = _about(content, "features", FeatureFacts, name) or {"name": "inception"}
        return cls(
            moments, features, rows, labels, _about(content, "images", ImageFacts, name), _pixels(content, name),
        )  # fmt: skip

    def describe(self, path: Path) -> dict[str, Any]:
        """Return what is known of these statistics, read from ``path``, as JSON values."""
        return {"kind": "statistics", "sha256": sha256_of(path), "images": self.moments.n, **(self.images or {})}

    def check(self, features: FeatureExtractor) -> Moments:
        """Return the moments, if ``features`` made them.

        Raises:
            ValueError: if the network, its weights or its preprocessing differ; names both.
        """
        ours = features.describe()
        for key in ("sha256", "preprocessing") if "sha256" in self.features else ("name",):
            if ours[key] != self.features.get(key):
                raise ValueError(
                    f"reference made with features {self.features['name']!r} ({key} {shown(self.features.get(key))}), "
                    f"not {features.name!r} ({key} {ours[key]!r}): make one with these features, or give "
                    "--features that network"
                )
        if features.num_features != len(self.moments.mean):
            raise ValueError(f"reference of length {len(self.moments.mean)}, features of {features.num_features}")
        return self.moments


class Reference:
    """What samples are compared with: moments of all images, and features of some of them.

    Args:
        moments: of all images.
        rows: (N, d) features of single images, for the metrics that moments are not enough for.
        labels: (N,) int, the classes of ``rows``.
        images: the images of ``rows``.
        image_set: where the images of ``rows`` are read from, as many from the first, when they are asked for.
        about: what is known of the reference, as JSON values: for result files.
    """

    def __init__(
        self,
        moments: Moments,
        *,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        images: Images | None = None,
        image_set: ImageSet | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.moments, self.rows, self.labels = moments, rows, labels
        self.about = dict(about or {})
        self._images, self._image_set = images, image_set

    @classmethod
    def open(
        cls, features: FeatureExtractor, spec: str, *, max_images: int = 10_000, size: int | None = None
    ) -> Reference:
        """Open the reference that a user names.

        Args:
            features: embeds its images, or made its statistics.
            spec: ``"embedded"``, a ``.npz`` of statistics (ours, ADM's, clean-fid's), or images as ``data.path`` takes
                them (``"faces"``, too). What lies at an address is copied to this machine, once.
            max_images: images whose features are kept, at most.
            size: images are resized and cropped to a square of this side.

        Raises:
            ValueError: if there is no such reference, or its statistics are of other features.
        """
        if spec == "embedded":
            return cls.of_embedded(features, max_images)
        if is_address(spec) and ending(spec).endswith(".npz"):
            spec = downloaded(spec)
        elif is_address(spec):
            return cls.of_images(features, ImageSet(spec, size=size), max_images)
        path = EMBEDDED.get(spec, Path(spec))
        if not path.exists():
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ValueError(f"reference: no file or folder {spec!r}{nearest(path.name, siblings)}")
        if path.suffix == ".npz" and holds_statistics(path):
            return cls.of_statistics(features, path, max_images)
        return cls.of_images(features, ImageSet(path, size=size), max_images)

    @classmethod
    def of_embedded(cls, features: FeatureExtractor, max_images: int) -> Reference:
        """Open the statistics and the images that travel with the package."""
        path, image_set = FASHION / "reference.npz", ImageSet(FASHION / "train_subset.npz", limit=max_images)
        statistics = ReferenceStatistics.read(path)
        about = statistics.describe(path) | {"shape": list(image_set.shape)}
        return cls._of_few(features, statistics.check(features), image_set.read(range(len(image_set))), about)

    @classmethod
    def of_statistics(cls, features: FeatureExtractor, path: Path, max_images: int) -> Reference:
        """Read a file of statistics, with the images or features that it may hold."""
        statistics = ReferenceStatistics.read(path)
        moments, about = statistics.check(features), statistics.describe(path)
        if statistics.pixels is not None:
            return cls._of_few(features, moments, Images(statistics.pixels[:max_images]), about)
        return cls(moments, rows=statistics.rows, labels=statistics.labels, about=about)

    @classmethod
    def _of_few(
        cls, features: FeatureExtractor, moments: Moments, images: Images, about: Mapping[str, Any]
    ) -> Reference:
        return cls(moments, rows=features.extract(images.pixels), labels=images.labels, images=images, about=about)

    @classmethod
    def of_images(cls, features: FeatureExtractor, image_set: ImageSet, max_images: int) -> Reference:
        """Take the moments of all images, and keep the features of the first ``max_images`` (they are shuffled)."""
        digest, rows = hashlib.sha256(), FeatureRows(sync_on_compute=False)
        for start in range(0, len(image_set), PART):
            images = image_set.read(range(start, min(start + PART, len(image_set))))
            digest.update(f"{tuple(images.pixels.shape[1:])}".encode())
            digest.update(images.pixels.contiguous().numpy().tobytes())
            rows.update({"features": features.extract(images.pixels)})
            if images.labels is not None:
                rows.update({"labels": images.labels})
        found = rows.compute()
        about = {
            "kind": "images", "sha256": digest.hexdigest(), "images": len(image_set), "shape": list(image_set.shape),
        }  # fmt: skip
        labels = found["labels"][:max_images] if "labels" in found else None
        moments = Moments.of(found["features"])
        return cls(moments, rows=found["features"][:max_images], labels=labels, image_set=image_set, about=about)

    @property
    def images(self) -> Images | None:
        """The images of :attr:`rows`, read when they are first asked for; None where they are unknown."""
        if self._images is None and self._image_set is not None and self.rows is not None:
            self._images = self._image_set.read(range(len(self.rows)))
        return self._images

    def statistics(self, features: FeatureExtractor) -> ReferenceStatistics:
        """Return this reference, which ``features`` made, as a file can hold it."""
        known = {key: self.about[key] for key in ("sha256", "shape") if key in self.about}
        return ReferenceStatistics.of(self.moments, features, rows=self.rows, labels=self.labels, images=known)

    def describe(self) -> dict[str, Any]:
        """Return what is known of the reference, as JSON values."""
        return {"images": self.moments.n, **self.about}


def holds_statistics(path: Path) -> bool:
    """Return whether a ``.npz`` is to be read as statistics: it holds no images, or cannot be read at all."""
    try:
        names = array_headers(path).keys()
    except ValueError:
        return True  # whoever reads it names what is wrong
    return "mu" in names or not names & {"images", "arr_0"}


# ------------------------------------------------------------------------------------- what a file of statistics holds


def _moments(content: Mapping[str, np.ndarray], name: str) -> Moments:
    for key in ("mu", "sigma", "n"):
        if key in content and content[key].dtype.kind not in "fiu":
            raise ValueError(f"{name}: {key}: expected numbers, got {content[key].dtype}")
    mean = torch.from_numpy(content["mu"].astype(np.float64))
    cov = torch.from_numpy(content["sigma"].astype(np.float64))
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"{name}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} do not fit")
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in mu or sigma")
    count = content.get("n", np.array(0))
    if count.shape or not 0 <= count < 2**63:
        raise ValueError(f"{name}: n: expected the number of images, got {shown(count)}")
    return Moments(int(count) or None, mean, cov)


def _rows(content: Mapping[str, np.ndarray], length: int, name: str) -> tuple[Tensor | None, Tensor | None]:
    """Return features (N, length) and labels (N,) of single images, where the file has them."""
    rows, labels = content.get("rows"), content.get("labels")
    if rows is not None and (rows.dtype.kind != "f" or rows.ndim != 2 or rows.shape[1] != length):
        raise ValueError(f"{name}: rows: expected float (N, {length}), got {rows.dtype} {rows.shape}")
    if labels is not None and (labels.dtype.kind not in "iu" or rows is None or labels.shape != rows.shape[:1]):
        raise ValueError(f"{name}: labels: expected a whole number for every row, got {labels.dtype} {labels.shape}")
    return _tensor(rows), _tensor(labels)


def _pixels(content: Mapping[str, np.ndarray], name: str) -> Tensor | None:
    """Return the images (N, C, H, W) of ADM's files, where there are any."""
    pixels = content.get("arr_0")
    if pixels is None or pixels.dtype != np.uint8:
        return None
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise ValueError(f"{name}: arr_0: expected images (N, H, W, C), got {pixels.shape}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _about(content: Mapping[str, np.ndarray], key: str, hint: Any, name: str) -> Any:
    """Return what a file says of its features or images, which is JSON; None if it says nothing."""
    return parse_json(str(content[key]), f"{name}: {key}", hint) if key in content else None


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
