"""The data sources: images, prompts, and nothing (noise)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepdistill.batch import RawBatch
from stepdistill.data.base import DataConfig, Dataset
from stepdistill.data.decoding import UnreadableImageError, read_pixels
from stepdistill.data.listing import IMAGE_SUFFIXES, STRAY, Listing, list_prompts, list_samples, sample_name
from stepdistill.data.loader import Unreadable

NOISE_EPOCH = 2**16


LONGEST_GAP = 100  # unreadable samples in a row before a search for a readable one ends


def open_data(
    config: DataConfig, *, channels: int, size: tuple[int, int], num_classes: int | None, takes_text: bool = False
) -> Dataset:
    """Open the data of a ``data:`` section for a teacher, and check what can be checked without decoding all of it.

    Checked here: the path, the rules of its form, that it is not empty, every label, an ``.npz``'s shape, and that
    the first image decodes.

    Args:
        config: the section.
        channels: the teacher's image channels; files can be made 1 or 3, only an ``.npz`` has others.
        size: the teacher's image (height, width) in pixels.
        num_classes: the teacher's classes without its null class; None if it takes none, then labels are left out.
        takes_text: whether the teacher wants a caption for every sample.

    Raises:
        ValueError: naming the file, key or sample.
    """
    if config.name == "prompts" and not takes_text:
        raise ValueError("data.name: 'prompts' is for teachers that take text, this one does not; wanted 'images'")
    if config.name == "noise" and takes_text:
        raise ValueError("data.name: 'noise' says no prompts, but the teacher takes text; wanted 'prompts' or 'images'")
    if config.name == "prompts":
        return PromptDataset(config, size=(channels, *size))
    if config.name == "noise":
        return NoiseDataset(config.max_samples, size=(channels, *size), num_classes=num_classes)
    _check_stated(config, channels, size)
    listing = list_samples(config)
    _check_images(config, listing, channels, size)
    _check_labels_exist(config, listing, num_classes)
    if takes_text:
        _check_captions(config, listing)
    dataset = ImageDataset(listing, config, size=(channels, *size), num_classes=num_classes)
    Unreadable(len(dataset)).count(dataset.load([0]))
    return dataset


class NoiseDataset(Dataset):
    """No data at all: class labels in turn, for methods that start from noise.

    An epoch holds every class equally often (give or take one, if ``length`` is set), and a sample's label is its
    index modulo the number of classes.
    """

    def __init__(self, length: int | None, *, size: tuple[int, int, int], num_classes: int | None) -> None:
        classes = num_classes or 1
        self._length = length or -(-NOISE_EPOCH // classes) * classes
        self.size, self.num_classes, self.flip = size, num_classes, False

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """``noise[index]``."""
        return f"noise[{index}]"

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Labels only."""
        labels = torch.tensor(indices, dtype=torch.int64) % self.num_classes if self.num_classes else None
        return RawBatch(None, labels, None, tuple(indices))


class PromptDataset(Dataset):
    """Prompts without images, for methods that start from noise."""

    num_classes = None
    flip = False

    def __init__(self, config: DataConfig, *, size: tuple[int, int, int]) -> None:
        prompts = list_prompts(config)
        self.captions = self._prompts = [prompts[row] for row in _subset(len(prompts), config.max_samples)]
        self.size, self.caption_dropout, self._path = size, config.caption_dropout, config.path

    def __len__(self) -> int:
        return len(self._prompts)

    def name(self, index: int) -> str:
        """The path of the file, and which of its prompts."""
        return f"{self._path}[{index}]"

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Captions only."""
        return RawBatch(None, None, tuple(self._prompts[index] for index in indices), tuple(indices))


class ImageDataset(Dataset):
    """Images, decoded when they are asked for.

    A sample that cannot be read gives way to the next index that can (with its own label and caption), or stops the
    run, as ``bad_files`` says.
    """

    def __init__(
        self, listing: Listing, config: DataConfig, *, size: tuple[int, int, int], num_classes: int | None
    ) -> None:
        self._listing, self._path, self._skip = listing, config.path, config.bad_files == "skip"
        self._rows, self._fit = _subset(len(listing.images), config.max_samples), config.fit
        self.size, self.num_classes, self.flip = size, num_classes, config.flip
        self.caption_dropout, self.version = config.caption_dropout, listing.version
        if listing.captions is not None:
            self.captions = [listing.captions[int(row)] or "" for row in self._rows]
        if num_classes is not None:
            assert listing.labels is not None, "open_data has checked it"
            self.labels = listing.labels[self._rows].tolist()
            self._check_labels(num_classes)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The path of the image, or the path of the data set and the row in it."""
        return sample_name(self._listing.images, int(self._rows[index]), self._path)

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Decode the samples at ``indices``."""
        unreadable: list[str] = []
        found, pixels = zip(*(self._next_readable(index, unreadable) for index in indices), strict=True)
        images = torch.from_numpy(np.stack(pixels)).float().div(127.5).sub(1)
        return RawBatch(images, self._labels(found), self._captions(found), found, unreadable=tuple(unreadable))

    def _next_readable(self, start: int, unreadable: list[str]) -> tuple[int, np.ndarray]:
        channels, *size = self.size
        tries = min(len(self), LONGEST_GAP)
        for step in range(tries):
            index = (start + step) % len(self)
            try:
                source = self._listing.images[int(self._rows[index])]
                return index, read_pixels(source, channels, (size[0], size[1]), self._fit)
            except UnreadableImageError as error:
                unreadable.append(f"{self.name(index)}: {error}")
                if not self._skip:
                    raise ValueError(f"unreadable image {unreadable[-1]} (data.bad_files=skip passes by)") from error
        raise ValueError(f"{tries} images in a row are unreadable; the last is {unreadable[-1]}")

    def _labels(self, indices: Sequence[int]) -> Tensor | None:
        if self.labels is None:
            return None
        return torch.tensor([self.labels[index] for index in indices], dtype=torch.int64)

    def _captions(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        if self._listing.captions is None:
            return None
        captions = [self._listing.captions[int(self._rows[index])] for index in indices]
        for index, caption in zip(indices, captions, strict=True):
            if not isinstance(caption, str):
                raise ValueError(f"{self.name(index)}: the caption is {caption!r}, expected text ('' for none)")
        return tuple(str(caption) for caption in captions)

    def _check_labels(self, num_classes: int) -> None:
        labels = np.asarray(self.labels)
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(wrong):
            raise ValueError(
                f"{self.name(int(wrong[0]))}: label {labels[wrong[0]]}, expected 0 to {num_classes - 1}, the teacher's"
                f" classes ({len(wrong)} of {len(labels)} samples are out of range)"
            )


def _subset(length: int, max_samples: int | None) -> np.ndarray:
    if max_samples is None or max_samples >= length:
        return np.arange(length)
    return np.sort(np.random.default_rng(0).permutation(length)[:max_samples])


def _check_stated(config: DataConfig, channels: int, size: tuple[int, int]) -> None:
    height, width = size
    if config.resolution not in (None, min(size)):
        raise ValueError(f"data.resolution: found {config.resolution}, but the teacher's images are {height}x{width}")
    if config.channels not in (None, channels):
        raise ValueError(f"data.channels: found {config.channels}, but the teacher's images have {channels}")


def _check_images(config: DataConfig, listing: Listing, channels: int, size: tuple[int, int]) -> None:
    if not len(listing.images):
        raise ValueError(f"data.path: {config.path}: no images (looked for {', '.join(IMAGE_SUFFIXES)})")
    if isinstance(listing.images, np.ndarray):
        _check_array(config, listing.images.shape[1:], (*size, channels))
    elif channels not in (1, 3):
        raise ValueError(f"data.path: {config.path}: the teacher's images have {channels} channels, files have 1 or 3")


def _check_array(config: DataConfig, found: tuple[int, ...], wanted: tuple[int, int, int]) -> None:
    if found == wanted:
        return
    shapes = f"{config.path}: images (H, W, C) are {found}, the teacher's are {wanted}"
    if found[:2] != wanted[:2] and config.resolution is None:
        raise ValueError(f"{shapes}; give data.resolution={min(wanted[:2])} to resize them")
    if found[2] != wanted[2] and config.channels is None:
        raise ValueError(f"{shapes}; give data.channels={wanted[2]} to convert them")
    if not {found[2], wanted[2]} <= {1, 3}:
        raise ValueError(f"{shapes}; only images of 1 or 3 channels can be resized or converted")


def _check_labels_exist(config: DataConfig, listing: Listing, num_classes: int | None) -> None:
    if num_classes is None:
        return
    if listing.labels is None:
        raise ValueError(f"data.path: {config.path}: no labels, but the teacher has {num_classes} classes")
    if listing.num_folders is None:
        return
    if STRAY in listing.labels:
        stray = listing.images[int(np.argmax(listing.labels == STRAY))]
        raise ValueError(f"data.path: {config.path} has class folders, but {stray} lies beside them: it has no class")
    if listing.num_folders != num_classes:
        raise ValueError(
            f"data.path: {config.path}: {listing.num_folders} class folders hold images, the teacher has {num_classes}"
            " classes; folders are numbered by name, so all are needed (or give the labels in a metadata.jsonl)"
        )


def _check_captions(config: DataConfig, listing: Listing) -> None:
    if listing.captions is None:
        raise ValueError(
            f"data.path: {config.path}: no captions, but the teacher takes text; wanted 'text' in a metadata.jsonl, a "
            ".txt beside every image, or data.caption_column"
        )
    missing = [row for row, caption in enumerate(listing.captions) if not isinstance(caption, str)]
    if missing:
        first = sample_name(listing.images, missing[0], config.path)
        raise ValueError(
            f"data.path: {config.path}: {len(missing)} of {len(listing.captions)} images have no caption; the first is "
            f"{first} ('' or an empty .txt is the empty caption)"
        )
