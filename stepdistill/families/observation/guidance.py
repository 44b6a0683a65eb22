"""How a pipeline is asked for guidance, and for none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.batch import Cond
from stepdistill.diffusion.guidance import GuidanceRule
from stepdistill.families.observation.checking import find_guidance
from stepdistill.families.observation.reading import NoGuidance
from stepdistill.families.observation.replay import Replay, SeveralPredictions, read_calls
from stepdistill.families.observation.watching import Record, Watched

NAMES = ("guidance_scale", "true_cfg_scale")
"""Arguments of calls that are a guidance scale. One that is None by default is not used."""
NO_PROMPT = " "
"""The null prompt of calls that guide only if they are told one, as Qwen-Image's own examples have it."""


def scale_argument(parameters: Mapping[str, Any]) -> str | None:
    """Return the argument of a call that is its guidance scale; None if it has none."""
    return next((name for name in NAMES if name in parameters and parameters[name].default is not None), None)


def is_input(watched: Watched, conditions: Mapping[str, Sequence[Any]], name: str) -> bool:
    """Return whether the guidance scale is an argument of the network, as FLUX.1-dev takes it."""
    low, high = (watched.first(conditions, **{name: scale}).arguments[0].tensors() for scale in (2.0, 4.0))
    alike = [key for key in low if key in high and low[key].shape == high[key].shape]
    return any(not low[key].equal(high[key]) for key in alike)


def read_unguided(
    watched: Watched, asked: str, conditions: Sequence[Any], name: str | None
) -> tuple[Replay, list[Record], float]:
    """Return what a call without guidance tells, the call, and the scale that is none: 1, or 0 as for Z-Image."""
    if name is None:
        return *read_calls(watched, asked, conditions, {}), 1.0
    try:
        return *read_calls(watched, asked, conditions, {name: 1.0}), 1.0
    except SeveralPredictions:
        return *read_calls(watched, asked, conditions, {name: 0.0}), 0.0


def read_guidance(
    replay: Replay, prompts: Sequence[Any], guided: Mapping[str, Any]
) -> tuple[Cond, GuidanceRule, dict[str, Any]]:
    """Return the null condition of guided calls, their rule, and what they are given beside their scale.

    Args:
        replay: what unguided calls told.
        prompts: those of :func:`stepdistill.families.observation.replay.read_calls`.
        guided: the scale :data:`stepdistill.families.observation.checking.GUIDED` as an argument.

    Raises:
        ValueError: if guidance is of no kind that can be repeated.
    """
    try:
        return *find_guidance(replay, prompts, guided), {}
    except NoGuidance:
        if "negative_prompt" not in replay.watched.parameters:
            raise
    given = {"negative_prompt": NO_PROMPT}
    return *find_guidance(replay, prompts, {**guided, **given}), given
