"""Data: from files to batches in a fixed order.

:mod:`~stepdistill.data.base` says what a data source is, :mod:`~stepdistill.data.listing` finds the samples of a path,
:mod:`~stepdistill.data.pixels` turns one file into pixels, :mod:`~stepdistill.data.sources` makes batches of them, and
:mod:`~stepdistill.data.order` decides which sample comes when.
"""

from stepdistill.data.base import DataConfig, Dataset, RawBatch, locate_data
from stepdistill.data.order import loader, sample_indices
from stepdistill.data.sources import open_data

__all__ = ["DataConfig", "Dataset", "RawBatch", "loader", "locate_data", "open_data", "sample_indices"]
