"""A pipeline's calls of its network, repeated with other states, times and conditions; and its decoding.

:func:`observe` makes the pipeline's own calls and reads them. What it returns is checked: it repeats the network's
predictions of these calls, with and without guidance, and decodes their last states to their images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.guidance import guide
from stepdistill.diffusion.prediction import to_prediction
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import Karras, NoiseSchedule, RectifiedFlow, expand
from stepdistill.families.observation.arguments import Arguments, as_leaf, first_output, in_precision, repeated
from stepdistill.families.observation.reading import (
    CLOSE,
    Line,
    apart,
    changing,
    find_conditions,
    find_packing,
    find_sign,
    find_state,
    find_times,
    halves,
    makes_grid,
    proportion,
    read_output,
    read_process,
    read_shift,
    time_of,
)
from stepdistill.families.observation.watching import Record, Watched
from stepdistill.families.vaes import dtype_of

ROWS = (3, 5)
"""Samples of the watched calls: two numbers that no argument has by chance."""
GUIDED = 3.0
"""The guidance scale at which a call is watched."""
CHECKED = 1e-4
"""Largest difference of a repeated prediction or a decoded image, as a share of the largest number."""
ROUGHLY = 0.1
"""The same for networks in half precision, which round otherwise in batches of another size."""


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
    per_sample: tuple[str, ...]
    """Lists of one equal entry a sample."""
    sign: float
    sample_shape: tuple[int, ...]
    loop_shape: tuple[int, ...]
    places: Tensor | None
    """See :func:`stepdistill.families.observation.reading.find_packing`."""
    makes_grid: bool
    """See :func:`stepdistill.families.observation.reading.makes_grid`."""
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
        """Return the prediction that the pipeline would give its scheduler, at states (B, C, ...) and times (B,)."""
        rows, like = len(x_t), self.template.leaves
        state = self.pack(self.schedule.network_input(x_t, t))
        shape = self.template.tensors()[self.state].shape[1:]
        leaves: dict[str, Any] = {self.state: as_leaf(state.reshape(rows, *shape), like[self.state])}
        timesteps = self.schedule.timestep(t)
        leaves |= {name: line(timesteps) for name, line in self.times.items()}
        leaves |= {name: as_leaf(cond[name], like[name]) for name in self.conditions}
        leaves |= {name: repeated(like[name], rows) for name in self.per_sample}
        for name, leaf in like.items():
            if name not in leaves and torch.is_tensor(leaf):
                leaves[name] = leaf.to(x_t.device)
        dtype = dtype_of(network)
        arguments = self.template.with_leaves({name: in_precision(leaf, dtype) for name, leaf in leaves.items()})
        output = first_output(network(**arguments))
        return self.unpack(self.sign * read_output(output, rows, state))

    def condition(self, asked: Sequence[Any]) -> Cond:
        """Return the condition of prompts or labels, as the pipeline's own call embeds them.

        Raises:
            ValueError: if embeddings have another length than others had.
        """
        found = self.watched.first({self.asked: asked}, **self.unguided).arguments[0].tensors()
        cond = {}
        for name in self.conditions:
            value, expected = found[name], self.template.tensors()[name].shape[1:]
            if value.shape[1:] != expected:
                raise ValueError(f"{name}: expected embeddings {tuple(expected)}, got {tuple(value.shape[1:])}")
            cond[name] = value.float() if value.is_floating_point() else value
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


def read_calls(
    watched: Watched, asked: str, conditions: Sequence[Any], unguided: Mapping[str, Any]
) -> tuple[Replay, Record]:
    """Return what a call without guidance tells, and the call; ``conditions`` are at least ``sum(ROWS)``."""
    schedule, prediction_type, config = read_process(watched.pipe.scheduler)
    rows, others = ROWS[0], {asked: conditions[ROWS[0] : sum(ROWS)]}
    many = watched.first(others, **unguided).arguments[0]
    match schedule:
        case RectifiedFlow():
            schedule = RectifiedFlow(read_shift(watched.pipe.scheduler, schedule.shift), schedule.num_timesteps)
    own_grid = makes_grid(watched.pipe.scheduler, schedule)
    record = watched.run({asked: conditions[:rows]}, **unguided)
    steps = record.steps
    if any(len(step.asks) != 1 or len(step.asks[0].output) != rows for step in steps):
        raise SeveralPredictions("without guidance it makes more than one prediction a step")
    names = changing(steps)
    state = find_state(steps, names)
    times = find_times(steps, [name for name in names if name != state], rows, schedule)
    template = steps[0].asks[0].arguments
    found = find_conditions(template, many, ROWS, (state, *times))
    lists = [name for name, leaf in template.leaves.items() if type(leaf) is list and name not in (state, *found)]
    sample_shape, places = find_packing(record, rows)
    match schedule:
        case Karras():
            schedule.initial_sigma = steps[0].state.std().item() / record.draws[-1].std().item()
    replay = Replay(
        watched, asked, unguided, schedule, prediction_type, config, template, state, times, found,
        tuple(name for name in lists if len(template.leaves[name]) != len(many.leaves[name])),
        find_sign(steps, rows), sample_shape, tuple(steps[0].state.shape[1:]), places, own_grid,
        steps[0].asks[0].output[:1],
    )  # fmt: skip
    return replay, record


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
def check_repeats(replay: Replay, record: Record, cond: Cond) -> None:
    """Raise ``ValueError`` unless the call's predictions are repeated."""
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
def find_null(replay: Replay, conditions: Sequence[Any], guided: Mapping[str, Any]) -> Cond:
    """Return the null condition (1, ...) of a guided call, and check that guidance is as diffusers defines it.

    Args:
        replay: what an unguided call told.
        conditions: ``ROWS[0]`` prompts or labels.
        guided: arguments of a call with guidance scale :data:`GUIDED`.

    Raises:
        ValueError: if the call makes no null prediction, or guides in another way.
    """
    cond = replay.condition(conditions)
    record = replay.watched.run({replay.asked: conditions}, **guided)
    parts, _ = halves(record.steps[0], ROWS[0])
    off = [sum(distance(part[name], cond[name]) for name in replay.conditions) for part in parts]
    null = {name: value[:1].to(cond[name]) for name, value in parts[off.index(max(off))].items() if name in cond}
    for name, value in parts[off.index(max(off))].items():
        if name in cond and (value.shape != cond[name].shape or distance(value, null[name].expand_as(value)) > CLOSE):
            raise ValueError(f"the null condition depends on the prompt ({name})")
    both = {name: torch.cat([cond[name], null[name].expand_as(cond[name])]) for name in cond}
    for (x_t, t), step in zip(states_of(replay, record), record.steps, strict=True):
        output = replay.call(replay.watched.network, torch.cat([x_t, x_t]), torch.cat([t, t]), both).float()
        given, free = (read(replay, part, x_t, t) for part in output.chunk(2))
        ours = guide(given, free, GUIDED - 1, x_t, t, replay.schedule)
        theirs = read(replay, replay.unpack(step.output[: ROWS[0]]), x_t, t)
        if (gap := apart(ours.flow(), theirs.flow())) > bound(replay):
            raise ValueError(
                f"its guidance is not unconditional + scale * (conditional - unconditional): {gap:.2g} apart"
            )
    return null


def read(replay: Replay, output: Tensor, x_t: Tensor, t: Tensor) -> Any:
    """Return a prediction."""
    return to_prediction(output, x_t, t, replay.schedule, replay.prediction_type)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two conditions; infinity for other shapes."""
    return (a.float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")
