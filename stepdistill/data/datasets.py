"""Data sets of images, of prompts, and of nothing (noise)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.batch import RawBatch
from stepdistill.data.base import DataConfig, Dataset
from stepdistill.data.buckets import Buckets, sort_into
from stepdistill.data.clips import open_reader, read_clip, read_frame_size
from stepdistill.data.columns import first_texts, several
from stepdistill.data.decoding import UnreadableImageError, read_pixels, read_shape
from stepdistill.data.listing import STRAY, Listing, list_samples, sample_name, suffixes_of
from stepdistill.data.loader import Unreadable
from stepdistill.data.prompts import read_prompts
from stepdistill.files.words import visible

NOISE_EPOCH = 2**16


LONGEST_GAP = 100  # unreadable samples in a row before the search for a readable one ends


def open_data(
    config: DataConfig, *, channels: int, size: tuple[int, ...], num_classes: int | None, takes_text: bool = False
) -> Dataset:
    """Open a ``data:`` section for a teacher, and check what can be checked without decoding all of it.

    That is: the path, the rules of its form, that it is not empty, every label, the shape of an ``.npz``, and that the
    first image decodes.

    Args:
        config: the section.
        channels: the teacher's image channels; files are converted to 1 or 3, only an ``.npz`` can have others.
        size: the teacher's image (height, width) in pixels; of clips (frames, height, width).
        num_classes: number of the teacher's classes without its null class; None if it takes none: labels are ignored.
        takes_text: whether the teacher needs a caption for every sample.

    Raises:
        ValueError: naming the file, key or sample.
    """
    check_stated(config, channels, size, takes_text=takes_text)
    _check_clips_can_be_read(config, size)
    if config.name == "prompts":
        return PromptDataset(config, size=(channels, *size))
    if config.name == "noise":
        return NoiseDataset(config.max_samples, size=(channels, *size), num_classes=num_classes)
    listing = list_samples(config)
    _check_images(config, listing, channels, size)
    _check_labels_exist(config, listing, num_classes)
    if takes_text:
        _check_captions(config, listing)
    dataset = ImageDataset(listing, config, size=(channels, *size), num_classes=num_classes)
    Unreadable(len(dataset)).count(dataset.load([0]))
    return dataset


def check_stated(config: DataConfig, channels: int, size: tuple[int, ...], *, takes_text: bool) -> None:
    """Raise ``ValueError`` for keys that contradict a teacher's images (channels, size) or its kind of condition."""
    height, width = size[-2:]
    if config.fps is not None and len(size) == 2:
        raise ValueError(f"data.fps: got {config.fps:g}, but the teacher makes images")
    if config.resolution not in (None, min(height, width)):
        raise ValueError(f"data.resolution: got {config.resolution}, but the teacher's images are {height}x{width}")
    if config.channels not in (None, channels):
        raise ValueError(f"data.channels: got {config.channels}, but the teacher's images have {channels}")
    if config.name == "prompts" and not takes_text:
        raise ValueError("data.name: expected 'images', got 'prompts', but the teacher takes no text")
    if config.name == "noise" and takes_text:
        raise ValueError("data.name: expected 'prompts' or 'images', got 'noise', but the teacher takes text")
    if config.caption_dropout and not takes_text:
        raise ValueError(
            f"data.caption_dropout: expected 0, because the teacher takes no text, got {config.caption_dropout:g}"
        )


class NoiseDataset(Dataset):
    """Class labels in turn and no images, for methods that start from noise.

    An epoch holds every class equally often (give or take one, if ``length`` is set), and a sample's label is its
    index modulo the number of classes.
    """

    def __init__(self, length: int | None, *, size: tuple[int, ...], num_classes: int | None) -> None:
        classes = num_classes or 1
        self._length = length or -(-NOISE_EPOCH // classes) * classes
        self.size, self.num_classes, self.flip = size, num_classes, False

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """Return ``noise[index]``."""
        return f"noise[{index}]"

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Return labels only."""
        labels = torch.tensor(indices, dtype=torch.int64) % self.num_classes if self.num_classes else None
        return RawBatch(None, labels, None, tuple(indices))


class PromptDataset(Dataset):
    """Prompts without images, for methods that start from noise."""

    num_classes = None
    flip = False

    def __init__(self, config: DataConfig, *, size: tuple[int, ...]) -> None:
        prompts = read_prompts(Path(str(config.path)), config.caption_column)
        chosen = [prompts[row] for row in _subset(len(prompts), config.max_samples)]
        self.captions = self._prompts = [texts[0] for texts in chosen]
        self.choices = several(chosen)
        self.size, self.caption_dropout, self._path = size, config.caption_dropout, config.path

    def __len__(self) -> int:
        return len(self._prompts)

    def name(self, index: int) -> str:
        """Return the path of the file, and which of its prompts it is."""
        return f"{self._path}[{index}]"

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Return captions only."""
        return RawBatch(None, None, tuple(self._prompts[index] for index in indices), tuple(indices))


class ImageDataset(Dataset):
    """Images that are decoded when they are loaded.

    A sample that cannot be read is replaced by the next one that can be (with its own label and caption), or stops the
    run, depending on ``bad_files``.
    """

    def __init__(self, listing: Listing, config: DataConfig, *, size: tuple[int, ...], num_classes: int | None) -> None:
        self._listing, self._path, self._skip = listing, config.path, config.bad_files == "skip"
        self._rows, self._fit = _subset(len(listing.images), config.max_samples), config.fit
        self._fps = config.fps
        self.size, self.num_classes, self.flip = size, num_classes, config.flip
        self.caption_dropout, self.version = config.caption_dropout, listing.version
        if config.buckets:
            self.buckets = self._sorted([(size[0], size[1]) for size in config.buckets])
        if listing.captions is not None:
            chosen = [listing.captions[row] for row in self._rows]
            self.captions = first_texts(chosen)
            self.choices = several(chosen) if self.captions else None
        if num_classes is not None:
            assert listing.labels is not None, "open_data checks it"
            self.labels = listing.labels[self._rows].tolist()
            self._check_labels(num_classes)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Return the path of the image, or the path of the data set and the row in it."""
        return sample_name(self._listing.images, int(self._rows[index]), self._path)

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Decode the samples at ``indices``."""
        unreadable: list[str] = []
        readable, images = [], []
        size = self.size[1:] if self.buckets is None else (*self.size[1:-2], *self.buckets.size_of[indices[0]])
        fetched = self._fetch(indices)
        for index in indices:
            found, image = self._next_readable(index, size, fetched, unreadable)
            readable.append(found)
            images.append(image)
        labels, captions = self._labels(readable), self._captions(readable)
        return RawBatch(_scaled(images), labels, captions, tuple(readable), unreadable=tuple(unreadable))

    def _sorted(self, sizes: Sequence[tuple[int, int]]) -> Buckets:
        """Sort all samples by the headers of their files; one without is in the first bucket until it is read."""
        shapes = []
        for row in self._rows:
            try:
                shapes.append(self._size_in_header(self._listing.images[int(row)]))
            except UnreadableImageError:
                shapes.append(sizes[0])
        return sort_into(sizes, shapes)

    def _size_in_header(self, source: Any) -> tuple[int, int]:
        """Return the (height, width) of a sample before it is resized."""
        if self._fps is not None:
            return read_frame_size(source)
        _, height, width = read_shape(source)
        return height, width

    def _fetch(self, indices: Sequence[int]) -> Mapping[int, Any]:
        """Return the images of these samples by their row, where several at a time are had sooner than one by one."""
        if self._listing.fetch is None:
            return {}
        return self._listing.fetch([int(self._rows[index]) for index in indices])

    def _next_readable(
        self, start: int, size: Sequence[int], fetched: Mapping[int, Any], unreadable: list[str]
    ) -> tuple[int, np.ndarray]:
        tries = min(len(self), LONGEST_GAP)
        for step in range(tries):
            index = (start + step) % len(self)
            try:
                row = int(self._rows[index])
                source = fetched[row] if row in fetched else self._listing.images[row]
                return index, self._read(source, size)
            except UnreadableImageError as error:
                unreadable.append(visible(f"{self.name(index)}: {error}"))
                if not self._skip:
                    raise ValueError(f"unreadable image {unreadable[-1]} (data.bad_files=skip skips it)") from error
        raise ValueError(f"{tries} images in a row are unreadable; the last is {unreadable[-1]}")

    def _read(self, source: Any, size: Sequence[int]) -> np.ndarray:
        if self._fps is not None:
            return read_clip(source, size, self._fps, self._fit)
        return read_pixels(source, self.size[0], size, self._fit)

    def _labels(self, indices: Sequence[int]) -> Tensor | None:
        if self.labels is None:
            return None
        return torch.tensor([self.labels[index] for index in indices], dtype=torch.int64)

    def _captions(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        return None if self.captions is None else tuple(self.captions[index] for index in indices)

    def _check_labels(self, num_classes: int) -> None:
        labels = np.asarray(self.labels)
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(wrong):
            first = visible(self.name(int(wrong[0])))
            raise ValueError(
                f"{first}: label: expected 0 to {num_classes - 1}, the teacher's classes, got "
                f"{labels[wrong[0]]} ({len(wrong)} of {len(labels)} samples are out of range)"
            )


def _scaled(images: Sequence[np.ndarray]) -> Tensor:
    """Return pixels uint8 as (B, C, ...) in [-1, 1]; image by image, because one stays in the processor's cache.

    They lie in memory as the pixels do: that decides which kernels an encoder runs, and with them the last bits.
    """
    pixels = torch.from_numpy(np.stack(images))
    scaled = torch.empty_like(pixels, dtype=torch.float32)
    for row, image in zip(scaled, pixels, strict=True):
        row.copy_(image).div_(127.5).sub_(1)
    return scaled


def _subset(length: int, max_samples: int | None) -> np.ndarray:
    if max_samples is None or max_samples >= length:
        return np.arange(length)
    return np.sort(np.random.default_rng(0).permutation(length)[:max_samples])


def _check_clips_can_be_read(config: DataConfig, size: tuple[int, ...]) -> None:
    if config.fps is not None:
        open_reader()
    if config.buckets and len(size) == 3 and config.fps is None:
        raise ValueError("data.buckets: expected none, or data.fps: clips in an .npz have one size")


def _check_images(config: DataConfig, listing: Listing, channels: int, size: tuple[int, ...]) -> None:
    if not len(listing.images):
        others = f"; left out: {listing.left_out}" if listing.left_out else ""
        raise ValueError(f"data.path: {config.path}: no images (looked for {', '.join(suffixes_of(config))}){others}")
    if config.fps is not None and listing.array_shape is not None:
        raise ValueError(f"data.fps: expected none: {config.path} holds frames, and no videos to take them from")
    if len(size) == 3 and config.fps is None:
        _check_clips(config, listing.array_shape, (*size, channels))
    elif listing.array_shape is not None:
        _check_array(config, listing.array_shape, (*size, channels))
    elif channels not in (1, 3):
        raise ValueError(f"data.path: {config.path}: the teacher's images have {channels} channels, files have 1 or 3")


def _check_clips(config: DataConfig, found: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(
            f"data.path: {config.path}: expected an .npz of clips (N, F, H, W, C) of the teacher's {expected}, "
            f"or data.fps for files of videos; got {'files of images' if found is None else found}"
        )


def _check_array(config: DataConfig, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found == expected:
        return
    if len(found) != len(expected):
        raise ValueError(f"{config.path}: images (H, W, C) are clips {found}, the teacher's are {expected}")
    shapes = f"{config.path}: images (H, W, C) are {found}, the teacher's are {expected}"
    if found[:2] != expected[:2] and config.resolution is None:
        raise ValueError(f"{shapes}; give data.resolution={min(expected[:2])} to resize them")
    if found[2] != expected[2] and config.channels is None:
        raise ValueError(f"{shapes}; give data.channels={expected[2]} to convert them")
    if not {found[2], expected[2]} <= {1, 3}:
        raise ValueError(f"{shapes}; only images of 1 or 3 channels can be resized or converted")


def _check_labels_exist(config: DataConfig, listing: Listing, num_classes: int | None) -> None:
    if num_classes is None:
        return
    if listing.labels is None:
        reason = listing.no_labels or f"data.path: {config.path}: no labels"
        raise ValueError(
            f"{reason}, but the teacher has {num_classes} classes; expected a folder for each, 'label' in a "
            "metadata.jsonl or a table, a .cls or .json beside every image of a tar, or data.label_column"
        )
    if listing.num_folders is None:
        return
    if STRAY in listing.labels:
        stray = listing.images[int(np.argmax(listing.labels == STRAY))]
        raise ValueError(f"data.path: {config.path} has class folders, but {stray} lies beside them and has no class")
    if listing.num_folders != num_classes:
        raise ValueError(
            f"data.path: {config.path}: {listing.num_folders} class folders hold images, the teacher has {num_classes}"
            " classes; folders are numbered by name, so all are needed (or give the labels in a metadata.jsonl)"
        )


def _check_captions(config: DataConfig, listing: Listing) -> None:
    if listing.captions is None:
        raise ValueError(
            f"{listing.no_captions or f'data.path: {config.path}: no captions'}, but the teacher takes text; expected "
            "'text' in a metadata.jsonl, a .txt beside every image, or data.caption_column"
        )
    missing = [row for row, texts in enumerate(listing.captions) if not texts]
    if missing:
        first = visible(sample_name(listing.images, missing[0], config.path))
        raise ValueError(
            f"data.path: {config.path}: {len(missing)} of {len(listing.captions)} images have no caption; the first is "
            f"{first} ('' or an empty .txt is the empty caption)"
        )
