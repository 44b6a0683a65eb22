"""What callers ask of a student by habit with its teacher, and why it cannot give it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from stepdistill.export.contract import Contract, Number
from stepdistill.files.schema import convert


def check_habits(contract: Contract, call: Mapping[str, Any]) -> None:
    """Warn of guidance on top of guidance, and of a negative prompt that nothing reads.

    Args:
        contract: the student's.
        call: all arguments of a call of its pipeline.

    Raises:
        ValueError: if guidance is an input of the student, and out of the range that it was trained for.
    """
    name, none = guidance_argument(contract)
    scale = call.get(name)
    if scale is None or contract.origin.method is None:
        return
    bounds = convert(contract.origin.method_facts.get("guidance_range", []), list[Number], "guidance_range")
    if bounds:
        if not min(bounds) <= scale <= max(bounds):
            raise ValueError(
                f"guidance_scale: got {scale:g}, but this student was trained for {min(bounds):g} to {max(bounds):g}"
            )
        return
    baked_in = contract.origin.guidance_distilled
    if scale > none and baked_in not in (None, 1) and (name == "guidance_scale" or call.get("negative_prompt")):
        warnings.warn(
            f"{name}: got {scale:g}, but a scale of {baked_in:g} is baked into this student: it is guided twice, with "
            f"two network calls a step; leave the argument out, or give {none:g}",
            stacklevel=3,
        )
    if scale <= none and call.get("negative_prompt"):
        warnings.warn(
            f"negative_prompt: nothing reads it in a call without guidance ({name} is {scale:g})", stacklevel=3
        )


def guidance_argument(contract: Contract) -> tuple[str, float]:
    """Return the name of a pipeline's guidance scale, and the value up to which a call is not guided.

    Qwen-Image's is ``true_cfg_scale``, which does nothing without a negative prompt; Z-Image's counts from 0, as a
    contract tells whose own call has less than 1.
    """
    name = "true_cfg_scale" if "true_cfg_scale" in contract.call else "guidance_scale"
    usual = contract.call.get(name)
    return name, 1.0 if usual is None else min(usual, 1.0)
