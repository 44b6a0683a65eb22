"""The generators of a call, handed on to the scheduler by every pipeline.

Stock pipelines of SD3, FLUX and DiT draw the initial noise from ``generator``, but do not pass it to
``scheduler.step``: what a step adds comes from torch's global generator (diffusers#13677). An image would then depend
on its batch and on whatever was drawn before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Generators = torch.Generator | Sequence[torch.Generator] | None
"""What a pipeline's call takes as ``generator``: one for all images, one for each, or torch's global one."""


@contextlib.contextmanager
def handed_on(pipeline: Any, generator: Generators) -> Iterator[None]:
    """Have the scheduler draw from ``generator`` inside the context, whether the pipeline hands it on or not.

    Args:
        pipeline: a diffusers pipeline.
        generator: of the call; None changes nothing.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    if generator is None or scheduler is None or "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    original, count = scheduler.step, _number_of(generator)

    @functools.wraps(original)  # pipelines look at its signature
    def step(output: Tensor, t: Tensor, state: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {"generator": generator} | kwargs
        if len(state) != 2 * count:
            return original(output, t, state, *args, **given)
        # DiTPipeline keeps a second copy of its states for guidance; every image has one noise
        stepped = original(output[:count], t, state[:count], *args, **given)
        return tree_map(lambda leaf: torch.cat([leaf, leaf]) if torch.is_tensor(leaf) else leaf, stepped)

    with patched(scheduler, "step", step):
        yield


def _number_of(generator: torch.Generator | Sequence[torch.Generator]) -> int:
    """Return how many images have a generator of their own; 0 if all share one."""
    return 0 if isinstance(generator, torch.Generator) else len(generator)


@contextlib.contextmanager
def patched(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute inside the context, and leave it as it was."""
    own = vars(thing).get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(thing, name)
        else:
            setattr(thing, name, own)
