"""A pipeline's calls of its network, repeated with other states, times and conditions; and its decoding.

:func:`read_calls` makes the pipeline's own calls and reads them. :mod:`stepdistill.families.observation.checking`
compares what it returns with these calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stepdistill.batch import Cond
from stepdistill.diffusion.native_grids import StepShiftedFlow
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import Karras, NoiseSchedule, RectifiedFlow
from stepdistill.families.observation.arguments import Arguments, as_leaf, first_output, in_precision, repeated
from stepdistill.families.observation.comparing import apart
from stepdistill.families.observation.noise import makes_grid, read_process, read_shift, read_told
from stepdistill.families.observation.reading import (
    Line,
    SeveralLengths,
    changing,
    find_conditions,
    find_lengths,
    find_packing,
    find_sign,
    find_state,
    find_times,
    read_output,
)
from stepdistill.families.observation.watching import Record, Watched
from stepdistill.families.vaes import dtype_of

LENGTH = "length"
"""Ending of the condition that says how long the rows of another are."""
LONGEST = 1024
"""The greatest length of a prompt's embedding, where the call has no ``max_sequence_length`` that says it."""
FEW_STEPS = 4
"""A number of steps far from a call's default."""
ROWS = (3, 5)
"""Samples of the watched calls: two numbers that no argument has by chance."""


class SeveralPredictions(ValueError):
    """A call makes more than one prediction a step."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """What was learnt of a pipeline's calls."""

    watched: Watched
    asked: str
    """The argument of the call that is one condition a sample: ``"prompt"`` or ``"class_labels"``."""
    unguided: Mapping[str, Any]
    """Arguments of a call without guidance."""
    schedule: NoiseSchedule
    prediction_type: str
    scheduler_config: Mapping[str, Any]
    template: Arguments
    """The network's arguments in a call of ``ROWS[0]`` samples."""
    state: str
    times: Mapping[str, Line]
    conditions: tuple[str, ...]
    lengths: Mapping[str, int]
    """The greatest length of conditions whose rows (L, ...) have several; empty if none has."""
    per_sample: tuple[str, ...]
    """Lists of one equal entry a sample."""
    sign: float
    sample_shape: tuple[int, ...]
    loop_shape: tuple[int, ...]
    places: Tensor | None
    """See :func:`stepdistill.families.observation.reading.find_packing`."""
    makes_grid: bool
    """See :func:`stepdistill.families.observation.noise.makes_grid`."""
    output: Tensor
    """Some output of the network, (1, ...)."""

    def pack(self, states: Tensor) -> Tensor:
        """Return states (B, C, ...) as the pipeline's loop holds them."""
        flat = states.flatten(1) if self.places is None else states.flatten(1)[:, self.places.to(states.device)]
        return flat.reshape(len(states), *self.loop_shape)

    def unpack(self, packed: Tensor) -> Tensor:
        """Invert :meth:`pack`."""
        flat = packed.flatten(1)
        if self.places is not None:
            flat = flat[:, self.places.argsort().to(packed.device)]
        return flat.reshape(len(packed), *self.sample_shape)

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction that the pipeline would give its scheduler, at states (B, C, ...) and times (B,).

        Prompts of several lengths are asked for one by one, as what fills them up may be seen by the network. Not by
        groups of one length: every process of a sharded network must ask it as often.
        """
        if not self.lengths:
            return self._call(network, x_t, t, cond)
        return torch.cat(
            [self._call(network, x_t[i : i + 1], t[i : i + 1], row) for i, row in enumerate(self.rows_of(cond))]
        )

    def rows_of(self, cond: Mapping[str, Tensor]) -> Iterator[Cond]:
        """Yield the condition of each sample as its prompt alone has it: cut to its length."""
        counts = {name: cond[f"{name}.{LENGTH}"].tolist() for name in self.lengths}
        for i in range(len(next(iter(cond.values())))):
            row = {name: cond[name][i : i + 1] for name in self.conditions}
            yield {name: row[name][:, : counts[name][i]] if name in counts else row[name] for name in row}

    def _call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        rows, like = len(x_t), self.template.leaves
        state = self.pack(self.schedule.network_input(x_t, t))
        shape = self.template.tensors()[self.state].shape[1:]
        leaves: dict[str, Any] = {self.state: as_leaf(state.reshape(rows, *shape), like[self.state])}
        timesteps = self.schedule.timestep(t)
        leaves |= {name: as_leaf(cond[name], like[name]) for name in self.conditions}
        leaves |= {name: repeated(like[name], rows) for name in self.per_sample}
        for name, leaf in like.items():
            if name not in leaves and torch.is_tensor(leaf):
                leaves[name] = leaf.to(x_t.device)
        dtype = dtype_of(network)
        cast = {name: in_precision(leaf, dtype) for name, leaf in leaves.items()}
        arguments = self.template.with_leaves(cast | {name: line(timesteps) for name, line in self.times.items()})
        output = first_output(network(**arguments))
        return self.unpack(self.sign * read_output(output, rows, state))

    def condition(self, asked: Sequence[Any]) -> Cond:
        """Return the condition of prompts or labels, as the pipeline's own call embeds them.

        Prompts of several lengths are embedded one by one: some pipelines fill them up to the longest of a batch.

        Raises:
            ValueError: if embeddings have another length than others had, or are too long.
        """
        batches = [[one] for one in asked] if self.lengths else [asked]
        found = [
            self.cond_of(self.watched.first({self.asked: batch}, **self.unguided).arguments[0].tensors())
            for batch in batches
        ]
        return {name: torch.cat([cond[name] for cond in found]) for name in found[0]}

    def cond_of(self, tensors: Mapping[str, Tensor]) -> Cond:
        """Return the condition among the numbers of a call's arguments, filled up with zeros to one length."""
        cond = {}
        for name in self.conditions:
            if name not in tensors:
                raise ValueError(f"{name}: expected embeddings, got none")
            value, expected = tensors[name], tuple(self.template.tensors()[name].shape[1:])
            value = value.float() if value.is_floating_point() else value
            if name in self.lengths:
                cond[f"{name}.{LENGTH}"] = torch.full((len(value),), value.shape[1], device=value.device)
                value, expected = filled(value, self.lengths[name]), (self.lengths[name], *expected[1:])
            if value.shape[1:] != expected:
                raise ValueError(f"{name}: expected embeddings {expected}, got {tuple(value.shape[1:])}")
            cond[name] = value
        return cond

    def check_grid(self, asked: Sequence[Arguments], scheduler: Any, sampler: Sampler) -> None:
        """Raise ``ValueError`` unless a student's pipeline steps as its sampler does.

        Args:
            asked: the arguments of the network in a call of the student's pipeline.
            scheduler: of that pipeline, after the call.
            sampler: the student's.
        """
        times, found = self.schedule.timestep(sampler.times[:-1]), []
        for name, line in self.times.items():
            told = torch.stack([arguments.tensors()[name].double().flatten()[0] for arguments in asked])
            expected = line(times).double().flatten(1)[:, 0] if line.tail else line(times).double()
            found.append(len(told) == len(expected) and apart(told, expected) < 1e-4)
        sigmas = getattr(scheduler, "sigmas", None)
        if self.prediction_type == "flow" and sigmas is not None:
            stepped = sigmas[: sampler.steps].double().cpu()
            found.append(len(sigmas) > sampler.steps and apart(stepped, sampler.times[:-1]) < 1e-4)
        if not all(found):
            raise ValueError(
                f"method: a call of {type(self.watched.pipe).__name__} cannot be told the {sampler.steps} steps of "
                f"this sampler, which begin at {sampler.times[:-1].tolist()}"
            )

    def decode(self, x0: Tensor, asked: Any) -> Tensor:
        """Return the images (B, C, ..., H, W) in [0, 1] that the pipeline makes of clean states (B, C, ...).

        Args:
            x0: clean states.
            asked: any condition of one sample.
        """
        output = self.output.to(x0.device).expand(len(x0), *self.output.shape[1:])
        return self.watched.decode(self.pack(x0), {self.asked: [asked] * len(x0)}, output, **self.unguided).float()


def filled(value: Tensor, length: int) -> Tensor:
    """Return rows (B, L, ...) filled up with zeros to ``length``; longer ones as they are."""
    return pad(value, (0, 0) * (value.ndim - 2) + (0, max(length - value.shape[1], 0)))


def read_calls(
    watched: Watched, asked: str, conditions: Sequence[Any], unguided: Mapping[str, Any]
) -> tuple[Replay, list[Record]]:
    """Return what calls without guidance tell, and those of ``ROWS[0]`` samples.

    Args:
        watched: the pipeline.
        asked: see :class:`Replay`.
        conditions: at least ``sum(ROWS)``, the last of which is long. If they are of several lengths, calls are watched
            with the second alone and with the last alone.
        unguided: arguments of a call without guidance.
    """
    few, many = conditions[: ROWS[0]], conditions[ROWS[0] : sum(ROWS)]
    try:
        replay, record = read_call(watched, asked, (few, many), unguided, None)
    except SeveralLengths:
        limit = watched.parameters.get("max_sequence_length")
        few, long = [conditions[1]] * ROWS[0], [conditions[-1]] * ROWS[1]
        replay, record = read_call(watched, asked, (few, long), unguided, LONGEST if limit is None else limit.default)
        return replay, [record, watched.run({asked: long[: ROWS[0]]}, **unguided)]
    return replay, [record]


def with_own_grids(
    watched: Watched, condition: Mapping[str, Sequence[Any]], unguided: Mapping[str, Any], flow: RectifiedFlow
) -> RectifiedFlow:
    """Return a flow with the grids of its call, if their shift depends on the number of steps, as for FLUX.2."""

    @functools.cache
    def shift_of(steps: int) -> float:
        if steps == 1:  # a grid of one step has none
            return flow.shift
        watched.first(condition, **unguided, num_inference_steps=steps)
        return read_shift(watched.pipe.scheduler, flow.shift)

    if type(flow) is not RectifiedFlow or abs(shift_of(FEW_STEPS) - flow.shift) < 1e-3 * flow.shift:
        return flow
    return StepShiftedFlow(shift_of, flow.num_timesteps)


def read_call(
    watched: Watched, asked: str, conditions: tuple[Sequence[Any], Sequence[Any]], unguided: Mapping[str, Any],
    limit: int | None,
) -> tuple[Replay, Record]:  # fmt: skip
    """Return what a call with the first conditions tells, beside one with the others, and the call.

    Args:
        watched: the pipeline.
        asked: see :class:`Replay`.
        conditions: ``ROWS`` of them; each of one length, if ``limit`` is a number.
        unguided: arguments of a call without guidance.
        limit: the greatest length of a prompt's embedding, None if all are of one.

    Raises:
        SeveralLengths: if ``limit`` is None and they are not.
    """
    schedule, prediction_type, config = read_process(watched.pipe.scheduler)
    rows = ROWS[0]
    many = watched.first({asked: conditions[1]}, **unguided).arguments[0]
    match schedule:
        case RectifiedFlow():
            schedule = RectifiedFlow(read_shift(watched.pipe.scheduler, schedule.shift), schedule.num_timesteps)
    own_grid = makes_grid(watched.pipe.scheduler, schedule)
    record = watched.run({asked: conditions[0]}, **unguided)
    steps = record.steps
    if any(len(step.asks) != 1 or len(step.asks[0].output) != rows for step in steps):
        raise SeveralPredictions("without guidance it makes more than one prediction a step")
    match schedule:
        case RectifiedFlow():
            schedule = read_told(watched.pipe.scheduler, schedule, steps)
            schedule = with_own_grids(watched, {asked: conditions[0][:1]}, unguided, schedule)
    names = changing(steps)
    state = find_state(steps, names)
    times = find_times(steps, [name for name in names if name != state], rows, schedule)
    template = steps[0].asks[0].arguments
    lengths = {} if limit is None else find_lengths(template, many, ROWS, state, limit)
    found = find_conditions(template, many, ROWS, (state, *times, *lengths)) + (*lengths,)
    lists = [name for name, leaf in template.leaves.items() if type(leaf) is list and name not in (state, *found)]
    sample_shape, places = find_packing(record, rows)
    match schedule:
        case Karras():
            schedule.initial_sigma = steps[0].state.std().item() / record.draws[-1].std().item()
    replay = Replay(
        watched, asked, unguided, schedule, prediction_type, config, template, state, times, found, lengths,
        tuple(name for name in lists if len(template.leaves[name]) != len(many.leaves[name])),
        find_sign(steps, rows), sample_shape, tuple(steps[0].state.shape[1:]), places, own_grid,
        steps[0].asks[0].output[:1],
    )  # fmt: skip
    return replay, record
