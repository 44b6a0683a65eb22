"""What the arguments of a watched call are: state, times, conditions; and what becomes of the network's output.

Every finding is checked against all steps of the call; what does not hold is a ``ValueError`` that says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.observation.arguments import Arguments
from stepdistill.families.observation.comparing import CLOSE, apart, proportion
from stepdistill.families.observation.noise import time_of
from stepdistill.families.observation.watching import Ask, Record, Step


class SeveralLengths(ValueError):
    """The embeddings of prompts are as long as their prompts, or as the longest of a batch."""


class NoGuidance(ValueError):
    """A call that is asked for guidance makes one prediction a step."""


# ---------------------------------------------------------------------------------------- state and times


@dataclasses.dataclass(frozen=True)
class Line:
    """A time argument: ``slope * timestep + start``, with the shape of its trailing axes."""

    slope: float
    start: float
    tail: tuple[int, ...]

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Return the argument (B, ...) at timesteps (B,), float32."""
        values = (self.slope * timesteps.double() + self.start).float()
        return values.reshape(-1, *[1] * len(self.tail)).expand(-1, *self.tail)


def changing(steps: Sequence[Step]) -> list[str]:
    """Return the arguments that change from step to step; raise ``ValueError`` if one of them is not numbers."""
    every = [ask.arguments for step in steps for ask in step.asks[:1]]
    first, names = every[0], []
    for name, leaf in first.leaves.items():
        tensor = first.tensors().get(name)
        for other in every[1:]:
            if name not in other.leaves or other.structure != first.structure:
                raise ValueError(f"its arguments change from step to step ({name})")
            if tensor is None:
                if type(leaf) is not list and other.leaves[name] != leaf:
                    raise ValueError(f"its argument {name} changes from step to step")
            elif not torch.equal(other.tensors()[name], tensor):
                names.append(name)
                break
    return names


def find_state(steps: Sequence[Step], names: Sequence[str]) -> str:
    """Return the argument that is the scheduler's state, up to a factor a step."""
    found = []
    for name in names:
        values = [step.asks[0].arguments.tensors()[name] for step in steps]
        if all(proportion(value, step.state) is not None for value, step in zip(values, steps, strict=True)):
            found.append(name)
    if len(found) != 1:
        raise ValueError(f"expected one argument that is the scheduler's state, found {found or 'none'}")
    return found[0]


def find_times(steps: Sequence[Step], names: Sequence[str], rows: int, schedule: NoiseSchedule) -> dict[str, Line]:
    """Return the arguments that are the time, each a line in the schedule's timestep."""
    t = torch.tensor([time_of(schedule, step.timestep) for step in steps], dtype=torch.float64)
    timesteps = schedule.timestep(t).tolist()
    found = {}
    for name in names:
        values = [step.asks[0].arguments.tensors()[name].double() for step in steps]
        if any(value.min() != value.max() for value in values):
            raise ValueError(f"its argument {name} changes from step to step, and is neither its state nor a time")
        found[name] = line_through(name, timesteps, [value.flatten()[0].item() for value in values], values[0], rows)
    return found


def line_through(name: str, x: Sequence[float], y: Sequence[float], like: Tensor, rows: int) -> Line:
    """Return the line through times ``y`` at timesteps ``x``; raise ``ValueError`` if they are on none."""
    slope = float(f"{(y[-1] - y[0]) / (x[-1] - x[0]):.5g}")
    start = round(y[0] - slope * x[0], 5)
    errors = [abs(slope * timestep + start - time) for timestep, time in zip(x, y, strict=True)]
    if max(errors) > 1e-6 * max(map(abs, y)):
        raise ValueError(f"its argument {name} is no line in the scheduler's timestep: {y} at {x}")
    tail = tuple(like.shape[1:]) if like.ndim > 1 and like.shape[0] == rows else ()
    return Line(slope, start, tail)


# ------------------------------------------------------------------------------------------------- output


def read_output(output: Tensor, rows: int, like: Tensor) -> Tensor:
    """Return a network's output in the shape of states (B, ...): further channels are a variance and dropped."""
    if output.ndim == like.ndim and output.shape[1] > like.shape[1]:
        output = output[:, : like.shape[1]]
    if output.numel() != rows * like[:1].numel():
        raise ValueError(f"its network returns {tuple(output.shape)} for states {tuple(like.shape)}")
    return output.reshape(rows, *like.shape[1:])


def find_sign(steps: Sequence[Step], rows: int) -> float:
    """Return the factor, 1 or -1, with which the network's output is given to the scheduler."""
    signs = set()
    for step in steps:
        output = read_output(step.asks[0].output, rows, step.state[:rows])
        ratio = proportion(step.output[:rows], output)
        if ratio is None or abs(abs(ratio) - 1) > CLOSE:
            off = apart(output, read_output(step.output, len(step.output), step.state)[:rows])
            raise ValueError(f"what it gives to its scheduler is not its network's output: they are {off:.2g} apart")
        signs.add(round(ratio))
    if len(signs) != 1:
        raise ValueError("the sign of its network's output changes from step to step")
    return float(signs.pop())


# ------------------------------------------------------------------------------------------------ packing


def find_packing(record: Record, rows: int) -> tuple[tuple[int, ...], Tensor | None]:
    """Return the shape (C, ...) in which a call draws its noise, and where each number goes in its loop.

    The second is (N,): the state is ``noise.flatten()[places]`` in the loop's shape; None if nothing moves.
    """
    state = record.steps[0].state[:rows]
    for start in range(len(record.draws) - rows + 1):
        drawn = record.draws[start : start + rows]
        if any(draw.numel() * rows != state.numel() or draw.shape != drawn[0].shape for draw in drawn):
            continue
        noise, flat = torch.cat(drawn).float().flatten(1), state.flatten(1)
        scaled = noise * (flat.norm() / noise.norm())
        shape = tuple(drawn[0].shape[1:])
        shape = shape[1:] if len(shape) > 3 and shape[0] == 1 else shape  # one frame of an image
        if apart(scaled, flat) < CLOSE:
            return shape, None
        places = np.empty(noise.shape[1], dtype=np.int64)
        # a second sample tells apart numbers that were drawn twice
        places[np.lexsort(flat.flip(0).numpy())] = np.lexsort(noise.flip(0).numpy())
        if apart(scaled[:, torch.from_numpy(places)], flat) < CLOSE:
            return shape, torch.from_numpy(places)
    raise ValueError("its first state is no rearrangement of noise that it draws")


# ---------------------------------------------------------------------------------------------- conditions


def find_conditions(few: Arguments, many: Arguments, rows: tuple[int, int], known: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments with one row a sample, of two calls with different numbers of samples.

    Raises:
        ValueError: if another argument depends on the prompts, or prompts have embeddings of several lengths.
    """
    if few.structure != many.structure:
        raise ValueError("its network's arguments change with the prompts")
    numbers, more, found = few.tensors(), many.tensors(), []
    for name, leaf in few.leaves.items():
        if name in known:
            continue
        a, b = numbers.get(name), more.get(name)
        if a is None or b is None:
            check_constant(name, leaf, many.leaves[name], rows)
        elif a.ndim and (len(a), len(b)) == rows:
            if a.shape[1:] != b.shape[1:]:
                raise SeveralLengths(
                    f"its argument {name} has another length with other prompts: {tuple(a.shape)}, {tuple(b.shape)}"
                )
            found.append(name)
        elif a.shape != b.shape or not torch.equal(a, b):
            raise ValueError(f"its argument {name} depends on the batch, but has not one row a sample")
    return tuple(found)


def find_lengths(few: Arguments, many: Arguments, rows: tuple[int, int], state: str, limit: int) -> dict[str, int]:
    """Return arguments whose rows (L, ...) have another length in the call with other prompts, and the greatest.

    That is ``limit`` for the shortest; another may have further places for the image's tokens.
    """
    numbers, more = few.tensors(), many.tensors()
    alike = [name for name, a in numbers.items() if name in more and name != state and a.ndim == more[name].ndim > 1]
    shapes = {name: (numbers[name].shape, more[name].shape) for name in alike}
    found = {name: a[1] for name, (a, b) in shapes.items() if (a[0], b[0]) == rows and a[1] != b[1] and a[2:] == b[2:]}
    return {name: limit + length - min(found.values()) for name, length in found.items()}


def check_constant(name: str, one: Any, other: Any, rows: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless both are equal, or are lists of one equal entry a sample."""
    if type(one) is not list or type(other) is not list:
        if one != other:
            raise ValueError(f"its argument {name} changes with the prompts")
        return
    if any(torch.is_tensor(entry) for entry in one):
        raise SeveralLengths(f"its argument {name} is a list of embeddings of several lengths")
    if one != other and ((len(one), len(other)) != rows or any(entry != one[0] for entry in [*one, *other])):
        raise ValueError(f"its argument {name} changes with the prompts")


# ------------------------------------------------------------------------------------------------ guidance


def halves(step: Step, rows: int) -> list[Mapping[str, Tensor]]:
    """Return the arguments of both of a guided step's predictions, of one call or of two.

    Raises:
        ValueError: if there are not two.
    """
    asks: list[Ask] = step.asks
    if len(asks) == 2 and len(asks[0].output) == rows:
        return [ask.arguments.tensors() for ask in asks]
    count = sum(len(ask.output) for ask in asks) / rows
    if count == 1:
        raise NoGuidance("a guided step makes one prediction a sample, expected a conditional and a null one")
    if len(asks) != 1 or count != 2:
        raise ValueError(f"a guided step makes {count:g} predictions a sample, expected a conditional and a null one")
    return [asks[0].arguments.part(start, rows).tensors() for start in (0, rows)]
