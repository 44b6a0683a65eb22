"""What a data source is: a finite, indexed set of samples that loads any of them, in any order, without state."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias

from stepdistill.assets import EMBEDDED
from stepdistill.batch import Batch, RawBatch
from stepdistill.families.base import Family

Fit: TypeAlias = Literal["crop", "pad", "stretch"]


TABLE_KEYS = ("split", "subset", "revision")
"""Keys that say which of a Hugging Face dataset's tables is meant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data:`` section.

    Attributes:
        name: ``images`` (see ``path``); for methods that need no images, ``noise``, or ``prompts`` of a text teacher;
            ``cache`` is either one's latents and embeddings, a folder that ``scripts/cache.py`` wrote.
        path: a folder of images, an ``.npz``, WebDataset tars or a Hugging Face dataset: saved on disk, a folder of
            parquet files, or its id on the hub, ``owner/name``, where there is no folder ``owner``; ``embedded``
            (fashion) or ``emoji`` (with names), which travel with the package; of ``prompts`` a ``.txt`` (one a line)
            or a ``.jsonl`` (an object a line, see ``caption_column``).
        split: of a Hugging Face dataset; ``train`` where it has splits.
        subset: of a Hugging Face dataset that has several: what ``load_dataset`` takes as its ``name``.
        revision: the commit of a dataset on the hub, 40 hex digits; the newest where none is given. A run that goes on
            wants the one that it began with.
        resolution: if given, the teacher's short side in pixels; allows an ``.npz`` of another size, which is resized.
        channels: if given, the teacher's channels; allows an ``.npz`` with other channels (1 or 3), which is converted.
        fit: how an image of other proportions becomes square: ``crop`` resizes its short side and cuts the rest off at
            the centre, ``pad`` resizes its long side and fills up with white, ``stretch`` distorts it.
        batch_size: samples per micro-batch and process.
        num_workers: loading processes beside each training process; 0 loads in the training process.
        flip: mirror half of the images, chosen by their position in the order.
        caption_dropout: the share of captions that are left empty, chosen by their position in the order.
        max_samples: keep a fixed random subset of this size; for ``noise``, the length of an epoch.
        bad_files: ``skip`` takes the next readable sample for an unreadable one and warns; ``error`` stops.
        label_column: name of the label in ``metadata.jsonl`` or the Hugging Face dataset; ``label`` where present.
        caption_column: name of the caption there; ``text`` where present.
        image_column: name of the image in the Hugging Face dataset.
    """

    name: Literal["images", "noise", "prompts", "cache"]
    path: str | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    resolution: int | None = None
    channels: int | None = None
    fit: Fit = "crop"
    batch_size: int = 64
    num_workers: int = 0
    flip: bool = False
    caption_dropout: float = 0.0
    max_samples: int | None = None
    bad_files: Literal["error", "skip"] = "skip"
    label_column: str | None = None
    caption_column: str | None = None
    image_column: str = "image"

    def __post_init__(self) -> None:
        if self.name == "images" and not self.path:
            raise ValueError("path: missing; expected a folder of images, an .npz or a Hugging Face dataset")
        if self.name == "prompts" and not self.path:
            raise ValueError("path: missing; expected a .txt with a prompt a line, or a .jsonl")
        if self.name == "cache" and not self.path:
            raise ValueError("path: missing; expected a folder that scripts/cache.py wrote")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout: found {self.caption_dropout}, expected 0 to 1")
        if self.name == "noise" and self.path:
            raise ValueError(f"path: found {self.path!r}, but 'noise' reads no data; did you mean name: images?")
        for key in TABLE_KEYS if self.name in ("noise", "prompts") else ():  # a cache was made of such a dataset
            if (value := getattr(self, key)) is not None:
                raise ValueError(f"{key}: found {value!r}, but {self.name!r} reads no dataset")
        if self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision: found {self.revision!r}, expected a commit of 40 hex digits")
        for key in ("resolution", "channels", "batch_size", "max_samples"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: found {value}, expected at least 1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers: found {self.num_workers}, expected at least 0")


def locate_data(config: DataConfig) -> DataConfig:
    """The section with the name of data that travels with the package replaced by its file."""
    path = EMBEDDED.get(config.path or "")
    return config if path is None else dataclasses.replace(config, path=str(path))


class Dataset(abc.ABC):
    """Samples 0 ... len - 1. Loading has no state, so any process may load any sample at any time.

    Attributes:
        size: (C, H, W) of an image.
        num_classes: labels are in [0, num_classes); None if there are no labels.
        flip: whether :func:`~stepdistill.data.loader.loader` mirrors half of the images.
        caption_dropout: the share of captions that it leaves empty.
        captions: every sample's text, by its index; None where the teacher takes none.
        labels: every sample's class likewise, where they come from files.
        is_encoded: whether samples come as the network sees them, so that training needs no encoder.
        version: which content the path had, where the path alone does not say: a dataset of the hub, or parquet files.
    """

    size: tuple[int, int, int]
    num_classes: int | None
    flip: bool
    caption_dropout: float = 0.0
    captions: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    is_encoded: ClassVar[bool] = False
    version: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """What a person calls this sample: its path, or its row in a file."""

    @abc.abstractmethod
    def load(self, indices: Sequence[int]) -> RawBatch:
        """The samples at ``indices``, as many and in that order.

        Raises:
            ValueError: if a sample cannot be read and may not be skipped; it names the sample.
        """

    def encode(self, family: Family, raw: RawBatch) -> Batch:
        """Return a loaded batch as the networks of ``family`` see it."""
        return family.encode(raw)
