"""The ``data`` section, and a data source: a finite, indexed set of samples, loaded in any order and without state."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias

from stepdistill.assets import EMBEDDED
from stepdistill.batch import Batch, RawBatch
from stepdistill.data.buckets import Buckets
from stepdistill.families.base import Family
from stepdistill.files.places import Place
from stepdistill.files.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Share
from stepdistill.files.schema import refuse_unread

Fit: TypeAlias = Literal["crop", "pad", "stretch"]


TABLE_KEYS = ("split", "subset", "revision")
"""Keys that choose among the tables of a Hugging Face dataset."""

PATHS = {
    "images": "a folder of images, an .npz, a Hugging Face dataset or an address of tars",
    "prompts": "a .txt with a prompt a line, a .csv, .tsv, .json or .jsonl",
    "cache": "a folder that scripts/cache.py wrote",
    "pairs": "a folder that scripts/make_pairs.py wrote",
}
"""By ``data.name``, what ``data.path`` has to be."""

_FILE_KEYS = ("fit", "bad_files", "fps", "image_column", "label_column")
UNREAD_KEYS = {
    "noise": (*_FILE_KEYS, "flip", "caption_column", "caption_dropout"),
    "prompts": (*_FILE_KEYS, "flip"),
    "pairs": (*_FILE_KEYS, "caption_column", *TABLE_KEYS),
}
"""By ``data.name``, the keys that are about images in files, which there are none of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data:`` section.

    Attributes:
        name: ``images`` (see ``path``); ``noise`` or, for a teacher that takes text, ``prompts``, for methods that need
            no images; ``cache`` is a folder of latents and embeddings that ``scripts/cache.py`` wrote; ``pairs`` are
            the teacher's own samples, which ``scripts/make_pairs.py`` wrote.
        path: a folder of images, an ``.npz``, WebDataset tars or a Hugging Face dataset: saved on disk, a folder of
            parquet files or one file, or its id on the hub, ``owner/name``, where there is no folder ``owner``;
            an address of tars or parquet files (``https://``, ``s3://``, ``hf://``, ...);
            ``embedded`` (fashion) or ``faces`` (captioned), which are part of the package; for ``prompts`` a file of
            any form in :mod:`stepdistill.data.prompts`.
        split: of a Hugging Face dataset, or of a folder of splits; ``train`` by default, where there are splits.
        subset: of a Hugging Face dataset that has several; the ``name`` argument of ``load_dataset``.
        revision: commit of a dataset on the hub, 40 hex digits; the newest by default. A resumed run needs the one that
            it started with.
        download: whether copies of the files at an address are kept on this machine, and read.
        resolution: the teacher's short side in pixels; if given, an ``.npz`` of another size is resized.
        channels: the teacher's channels; if given, an ``.npz`` with other channels (1 or 3) is converted.
        buckets: sizes ``[height, width]`` of images, for latent teachers; a sample goes into the one with the nearest
            proportions, and a batch holds samples of one. By default all have the teacher's size. From a cache those
            that it was made with.
        fit: how an image of other proportions becomes square: ``crop`` resizes its short side and crops the centre,
            ``pad`` resizes its long side and pads with white, ``stretch`` distorts it.
        batch_size: samples per micro-batch and process.
        num_workers: loading processes beside each training process; 0 loads in the training process.
        flip: mirror half of the images, chosen by their position in the order.
        caption_dropout: share of captions that are replaced by the empty one, chosen by their position in the order.
        max_samples: size of a fixed random subset to keep; for ``noise``, the length of an epoch.
        bad_files: ``skip`` takes the next readable sample for an unreadable one and warns; ``error`` stops.
        fps: for video teachers, frames a second at which the videos of a folder or of tars are read.
        label_column: name of the label in a folder's metadata or the Hugging Face dataset; ``label`` if present.
        caption_column: name of the caption there; ``text`` if present. In a file of prompts ``text``, ``prompt`` or
            ``caption``.
        image_column: name of the image in the Hugging Face dataset.
    """

    name: Literal["images", "noise", "prompts", "cache", "pairs"]
    path: Place | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    download: bool = False
    resolution: PositiveInt | None = None
    channels: PositiveInt | None = None
    buckets: tuple[tuple[PositiveInt, ...], ...] = ()
    fit: Fit = "crop"
    batch_size: PositiveInt = 64
    num_workers: NonNegativeInt = 0
    flip: bool = False
    caption_dropout: Share = 0.0
    max_samples: PositiveInt | None = None
    bad_files: Literal["error", "skip"] = "skip"
    fps: PositiveFloat | None = None
    label_column: str | None = None
    caption_column: str | None = None
    image_column: str = "image"

    def __post_init__(self) -> None:
        self._check_source()
        self._check_buckets()

    def _check_buckets(self) -> None:
        if self.buckets and self.name not in ("images", "cache"):
            raise ValueError(f"buckets: expected none with {self.name!r}, whose samples have one size")
        for place, bucket in enumerate(self.buckets):
            if len(bucket) != 2:
                raise ValueError(f"buckets[{place}]: expected [height, width], got {list(bucket)}")

    def _check_source(self) -> None:
        if self.name in PATHS and not self.path:
            raise ValueError(f"path: missing; expected {PATHS[self.name]}")
        if self.name == "noise" and self.path:
            raise ValueError(f"path: got {self.path!r}, but 'noise' reads no data; did you mean name: images?")
        if self.name in ("noise", "prompts"):  # a cache may have been made from a table
            for key in TABLE_KEYS:
                if (value := getattr(self, key)) is not None:
                    raise ValueError(f"{key}: got {value!r}, but {self.name!r} reads no dataset")
            if self.download:
                raise ValueError(f"download: expected false, because {self.name!r} reads no files at an address")
        refuse_unread(self, UNREAD_KEYS.get(self.name, ()), True, f"with {self.name!r}, which reads no image files")
        if self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision: expected a commit of 40 hex digits, got {self.revision!r}")


def locate_data(config: DataConfig) -> DataConfig:
    """Return the section with the name of a data set of the package replaced by its file."""
    path = EMBEDDED.get(config.path or "")
    return config if path is None else dataclasses.replace(config, path=str(path))


class Dataset(abc.ABC):
    """Samples 0 ... len - 1. Loading has no state, so any process may load any sample at any time.

    Attributes:
        size: (C, H, W) of an image, or (C, F, H, W) of a clip.
        num_classes: labels are in [0, num_classes); None if there are no labels.
        flip: whether :func:`~stepdistill.data.loader.loader` mirrors half of the images.
        caption_dropout: share of captions that it replaces by the empty one.
        captions: text of every sample, by its index, of several the first; None if the teacher takes none.
        buckets: samples by their size; None if all have one.
        choices: all texts of every sample likewise, of which each visit draws one; None if no sample has several.
        labels: class of every sample likewise, if it comes from files.
        is_encoded: whether samples are stored as the network sees them, so that training needs no encoder.
        version: which content the path had, if the path alone does not tell: a dataset of the hub, or parquet files.
    """

    size: tuple[int, ...]
    num_classes: int | None
    flip: bool
    caption_dropout: Share = 0.0
    buckets: Buckets | None = None
    captions: Sequence[str] | None = None
    choices: Sequence[tuple[str, ...]] | None = None
    labels: Sequence[int] | None = None
    is_encoded: ClassVar[bool] = False
    version: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Return the sample's name for messages: its path, or its row in a file."""

    @abc.abstractmethod
    def load(self, indices: Sequence[int]) -> RawBatch:
        """Return the samples at ``indices``, in that order.

        Raises:
            ValueError: if a sample cannot be read and may not be skipped; it names the sample.
        """

    def read_encoded(self, raw: RawBatch) -> Batch | None:
        """Return what is stored of a loaded batch, as the networks see it; None if samples are not stored so.

        Raises:
            ValueError: if it cannot be read.
        """
        del raw
        return None

    def encode(self, family: Family, raw: RawBatch) -> Batch:
        """Return a loaded batch as the networks of ``family`` see it."""
        found = self.read_encoded(raw) if raw.encoded is None else raw.encoded
        return family.encode(raw) if found is None else found
