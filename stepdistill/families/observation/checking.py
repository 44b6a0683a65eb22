"""What was learnt of a pipeline's calls, checked against them: predictions, guidance and decoded images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.diffusion.guidance import PLAIN, GuidanceRule, guide
from stepdistill.diffusion.prediction import Prediction, to_prediction
from stepdistill.diffusion.schedule import expand
from stepdistill.families.observation.comparing import CLOSE, apart, distance, proportion
from stepdistill.families.observation.noise import time_of
from stepdistill.families.observation.reading import halves
from stepdistill.families.observation.replay import ROWS, Replay
from stepdistill.families.observation.watching import Record
from stepdistill.families.vaes import dtype_of

GUIDED = 3.0
"""The guidance scale at which a call is watched."""
CHECKED = 1e-4
"""Largest difference of a repeated prediction or a decoded image, as a share of the largest number."""
ROUGHLY = 0.1
"""The same for networks in half precision, which round otherwise in batches of another size."""
RULES = (PLAIN, GuidanceRule("token"), GuidanceRule("row"))
"""What pipelines do with a guided prediction, in the order in which it is tried; clips know the first alone."""


def states_of(replay: Replay, record: Record) -> list[tuple[Tensor, Tensor]]:
    """Return the states (B, C, ...) and times (B,) of a call's steps; check that the pipeline scales them as we do."""
    found = []
    scales = float(getattr(replay.watched.pipe.scheduler, "init_noise_sigma", 1.0)) != 1
    for step in record.steps:
        value = step.asks[0].arguments.tensors()[replay.state][: ROWS[0]].float()
        t = torch.full((ROWS[0],), time_of(replay.schedule, step.timestep), dtype=torch.float64)
        ones = torch.ones(ROWS[0], 1)
        factor = replay.schedule.network_input(ones, t)
        alpha, sigma = replay.schedule.coefficients(t, ones)
        expected = (factor / (alpha**2 + sigma**2).sqrt() * alpha if factor.allclose(ones) else factor)[0].item()
        ratio = proportion(value, step.state[: ROWS[0]])
        wanted = expected if scales else 1.0
        if ratio is None or abs(ratio - wanted) > 1e-3 * wanted:
            raise ValueError(
                f"{type(replay.watched.pipe.scheduler).__name__} expects states times {wanted:.4g} at timestep "
                f"{step.timestep:g}, but its network sees them times {ratio}"
            )
        x_t = replay.unpack(value.reshape(ROWS[0], *replay.loop_shape))
        found.append((x_t / expand(factor.flatten(), x_t), t))
    return found


@torch.no_grad()
def check_repeats(replay: Replay, record: Record) -> None:
    """Raise ``ValueError`` unless the call's predictions are repeated."""
    cond = replay.condition(record.asked[replay.asked])
    for (x_t, t), step in zip(states_of(replay, record), record.steps, strict=True):
        ours = replay.call(replay.watched.network, x_t, t, cond).float()
        off = apart(ours, replay.unpack(step.output[: ROWS[0]]))
        if off > bound(replay):
            raise ValueError(f"repeated at timestep {step.timestep:g}, its network's prediction is {off:.2g} apart")


def bound(replay: Replay) -> float:
    """Return how far predictions may be apart that are called equal."""
    return CHECKED if dtype_of(replay.watched.network) is torch.float32 else ROUGHLY


@torch.no_grad()
def check_decodes(replay: Replay, record: Record, asked: Any) -> None:
    """Raise ``ValueError`` unless the call's last states are decoded to its images."""
    assert record.images is not None, "the call came to its end"
    images = replay.decode(replay.unpack(record.steps[-1].stepped[: ROWS[0]]), asked)
    if images.shape != record.images.shape or apart(images, record.images.float()) > CHECKED:
        raise ValueError("its last states, decoded again, are not its images")


@torch.no_grad()
def find_null(replay: Replay, conditions: Sequence[Any], guided: Mapping[str, Any]) -> tuple[Cond, GuidanceRule]:
    """Return the null condition (1, ...) of a guided call, and what the call does with its guided predictions.

    Args:
        replay: what an unguided call told.
        conditions: ``ROWS[0]`` prompts or labels, of one length if their embeddings have several.
        guided: arguments of a call with guidance scale :data:`GUIDED`.

    Raises:
        ValueError: if the call makes no null prediction, or guides in another way.
    """
    cond = replay.condition(conditions)
    record = replay.watched.run({replay.asked: conditions}, **guided)
    parts = [replay.cond_of(part) for part in halves(record.steps[0], ROWS[0])]
    off = [sum(distance(part[name], cond[name]) for name in cond) for part in parts]
    found = parts[off.index(max(off))]
    null = {name: value[:1].to(cond[name]) for name, value in found.items()}
    for name, value in found.items():
        if distance(value, null[name].expand_as(value)) > CLOSE:
            raise ValueError(f"the null condition depends on the prompt ({name})")
    return null, find_rule(replay, record, cond, null)


def find_rule(replay: Replay, record: Record, cond: Cond, null: Cond) -> GuidanceRule:
    """Return what a guided call does with its predictions; raise ``ValueError`` if it is none of :data:`RULES`."""
    both = {name: torch.cat([cond[name], null[name].expand_as(cond[name])]) for name in cond}
    gaps = dict.fromkeys(RULES if len(replay.sample_shape) == 3 else RULES[:1], 0.0)
    for (x_t, t), step in zip(states_of(replay, record), record.steps, strict=True):
        output = replay.call(replay.watched.network, torch.cat([x_t, x_t]), torch.cat([t, t]), both).float()
        given, free = (read(replay, part, x_t, t) for part in output.chunk(2))
        theirs = read(replay, replay.unpack(step.output[: ROWS[0]]), x_t, t).flow()
        for rule in gaps:
            ours = guide(given, free, GUIDED - 1, x_t, t, replay.schedule, rule).flow()
            gaps[rule] = max(gaps[rule], apart(ours, theirs))
    nearest = min(gaps, key=lambda each: gaps[each])
    rule = next((each for each in gaps if gaps[each] <= CHECKED), nearest)
    if gaps[rule] > bound(replay):
        raise ValueError(
            f"its guidance is not unconditional + scale * (conditional - unconditional): {gaps[PLAIN]:.2g} apart"
        )
    return rule


def find_guidance(replay: Replay, prompts: Sequence[Any], guided: Mapping[str, Any]) -> tuple[Cond, GuidanceRule]:
    """Return the null condition of guided calls, and their rule; prompts of several lengths are watched one by one.

    Raises:
        ValueError: as :func:`find_null`, and if calls with other prompts have another null condition or rule.
    """
    if not replay.lengths:
        return find_null(replay, prompts[: ROWS[0]], guided)
    (null, rule), (other, again) = (
        find_null(replay, [prompt] * ROWS[0], guided) for prompt in (prompts[1], prompts[-1])
    )
    for name, value in null.items():
        if distance(value, other[name]) > CLOSE:
            raise ValueError(f"the null condition depends on the prompt ({name})")
    if rule != again:
        raise ValueError(f"its guidance depends on the prompt: {rule.rescale} and {again.rescale}")
    return null, rule


def read(replay: Replay, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
    """Return what a network's output (B, ...) predicts at states (B, ...) and times (B,)."""
    return to_prediction(output, x_t, t, replay.schedule, replay.prediction_type)
