"""A second time for networks of diffusers, and for the pipelines that sample them."""

from __future__ import annotations

from typing import Any

import torch

LAYERS = ("second.linear_1", "second.linear_2")
"""The layers of the second time's branch, which get adapters too."""


def give_second_time(network: Any) -> None:
    """Make a network take two times, in place; the branch of the second ends in zeros.

    Raises:
        ValueError: if there is no such network of its class.
    """
    from stepdistill.pipelines import two_times

    extended = getattr(two_times, f"TwoTime{type(network).__name__}", None)
    if extended is None:
        raise ValueError(f"teacher.family: {type(network).__name__} takes no second time; choose one-time students")
    with torch.random.fork_rng([]):  # the same branch in every process and every resumed run
        torch.manual_seed(0)
        two_times.add_second_time(network)
    network.__class__ = extended


def two_time_pipeline(pipeline: type) -> type:
    """Return the pipeline that does as ``pipeline`` and tells its network the second time."""
    from stepdistill.pipelines import two_time_pipelines

    return getattr(two_time_pipelines, f"TwoTime{pipeline.__name__}")
