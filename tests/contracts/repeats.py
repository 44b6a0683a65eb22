"""The repeat test: images are a function of their seed, whatever was drawn before and whatever their batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.inference.sampling import class_count, sample_images

COUNT = 4


def images_of(pipeline: Any, prompts: list[str] | None, **options: Any) -> Tensor:
    """Four images (or ``count``) as bytes, after other draws from the global generator than the call before."""
    torch.rand(7)
    options = {"count": COUNT} | options
    return sample_images(
        pipeline, options.pop("count"), seed=3, num_classes=class_count(pipeline), captions=prompts, **options
    ).pixels


def check_repeats(pipeline: Any, prompts: list[str] | None, **call: Any) -> None:
    """A repeat, batches of 1 and 4, and of 2 in the halves that two processes take: 0 levels apart."""
    whole = images_of(pipeline, prompts, batch_size=4, call=call)
    assert whole.float().std() > 1
    for size in (4, 1):
        assert torch.equal(images_of(pipeline, prompts, batch_size=size, call=call), whole), size
    halves = [images_of(pipeline, prompts, first=first, count=2, call=call) for first in (0, 2)]
    assert torch.equal(torch.cat(halves), whole)
