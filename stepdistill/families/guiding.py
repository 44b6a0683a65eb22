"""Guidance as a teacher's own pipeline gives it if asked: ``teacher.guidance_rescale``, ``teacher.guidance_interval``.

The family then guides its teacher as a call of the pipeline does with :func:`guiding_arguments`. Students are called
without guidance, and know nothing of it.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, TypeVar

from stepdistill.diffusion.guidance import TIE, GuidanceRule, PipelineRescale
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.diffusion.shift import unshifted
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig

AMOUNTS: dict[PipelineRescale, tuple[float, float, str]] = {
    "deviation": (0.0, 1.0, "between 0 and 1, a share"),
    "global": (0.0, float("inf"), "at least 0, a multiple of the conditional norm"),
    "row": (1.0, 1.0, "0 or 1"),
}
"""Least and largest amount of a rescaling beside 0, which is none, and what it is."""
AnyFamily = TypeVar("AnyFamily", bound=Family)


def guided_as_asked(family: AnyFamily, config: TeacherConfig) -> AnyFamily:
    """Let a newly opened teacher be guided as its section asks.

    Raises:
        ValueError: if its pipeline cannot rescale, or the teacher knows no guidance.
    """
    if config.guidance_rescale:
        family.guidance_rule = rescaling(family, config.guidance_rescale)
    if config.guidance_interval is not None:
        family.check_guidance(2.0)
        family.guidance_rule = dataclasses.replace(family.guidance_rule, interval=config.guidance_interval)
    return family


def rescaling(family: Family, amount: float) -> GuidanceRule:
    """Return the rule by which the family's pipeline rescales; raise ``ValueError`` if it takes no such argument."""
    kind = family.can_rescale
    if kind not in AMOUNTS:
        raise ValueError(
            f"teacher.guidance_rescale: expected none, because a teacher of {type(family).__name__} takes no such "
            f"option, got {amount:g}"
        )
    least, most, meaning = AMOUNTS[kind]
    if not least <= amount <= most:
        raise ValueError(f"teacher.guidance_rescale: expected {meaning}, got {amount:g}")
    return GuidanceRule(kind, amount, family.prediction_type)


def guiding_arguments(family: Family) -> dict[str, Any]:
    """Return the arguments with which a call of the teacher's own pipeline guides as the family does.

    Raises:
        ValueError: if there are none.
    """
    rule, arguments = family.guidance_rule, dict[str, Any]()
    if family.can_rescale == "deviation" and rule.rescale != "none":
        arguments["guidance_rescale"] = rule.amount
    elif family.can_rescale != "none" and rule.rescale != "none":
        arguments["cfg_normalization"] = True if rule.rescale == "row" else rule.amount
    return arguments | truncation(family)


def truncation(family: Family) -> dict[str, Any]:
    """Return the arguments with which a call of the pipeline guides in the family's interval; ``ValueError`` if none.

    Pipelines can end guidance early, and cannot begin it late.
    """
    low, high = family.guidance_rule.interval
    if (low, high) == (0, 1):
        return {}
    taken = inspect.signature(type(family.pipe).__call__).parameters if family.pipe else {}
    if high == 1 and "cfg_truncation" in taken:
        return {"cfg_truncation": 1 - (low + TIE)}  # of the network's time, which runs from noise to data
    if high == 1 and "cfg_trunc_ratio" in taken:
        return {"cfg_trunc_ratio": 1 - before_shift(family, low)}  # of the number of steps
    raise ValueError(
        f"teacher.guidance_interval: expected [0, 1] to sample the teacher by its own pipeline, a call of which cannot "
        f"guide at some times alone ({type(family).__name__}), got {[low, high]}"
    )


def before_shift(family: Family, t: float) -> float:
    """Return the place in [0, 1] of a time of a flow on an even grid, before the shift."""
    match family.schedule:
        case RectifiedFlow(shift=shift):
            return unshifted(t, shift)
        case other:
            raise AssertionError(f"expected a flow, got {type(other).__name__}")
