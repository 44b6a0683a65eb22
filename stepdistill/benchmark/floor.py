"""The floor of a training step: what its network calls cost, and how far above it a step is.

The unit F is one forward of the network without a graph, at the batch of the step. A student's update is 3 F (its
forward, and a backward of twice that), a call without gradient 1 F; a method's floor is the sum over its algorithm box.
Floating-point operations are counted exactly, of matrix products, convolutions and attention. Seconds are those of the
trainer's whole step with optimiser and average, over the floor times the seconds of one forward, both measured in turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepdistill.batch import Batch
from stepdistill.benchmark.reference_step import REFERENCES
from stepdistill.benchmark.step_cost import WARMUP, make_distiller, make_trainer, now
from stepdistill.benchmark.tables import markdown_table
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.methods.base import Distiller
from stepdistill.randomness import Draws
from stepdistill.training.config import RunConfig, resolve
from stepdistill.training.trainer import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """A method with options, and the floor of each of its turns in F."""

    method: Mapping[str, Any]
    """The ``method`` section."""
    turns: Mapping[str, int]


FLOORS: dict[str, Floor] = {
    "ct": Floor(method={"name": "ct"}, turns={"student": 4}),
    "ect": Floor(method={"name": "ect"}, turns={"student": 4}),
    "ict": Floor(method={"name": "ict"}, turns={"student": 4}),
    "cd, Heun": Floor(method={"name": "cd"}, turns={"student": 6}),
    "lcm": Floor(method={"name": "lcm"}, turns={"student": 5}),
    "lcm, guided": Floor(method={"name": "lcm", "guidance_scale": 2.0}, turns={"student": 6}),
    "tcd": Floor(method={"name": "tcd"}, turns={"student": 5}),
    "tract": Floor(method={"name": "tract"}, turns={"student": 5}),
    "progressive": Floor(method={"name": "progressive", "steps": 1}, turns={"student": 5}),
    "guided": Floor(method={"name": "guided"}, turns={"student": 5}),
    "dmd2": Floor(
        method={"name": "dmd2", "steps": 1, "gan_weight": 0.0, "student_update_interval": 1},
        turns={"student": 5, "fake": 4},
    ),
    "dmd2, guided": Floor(
        method={"name": "dmd2", "steps": 1, "gan_weight": 0.0, "student_update_interval": 1, "guidance_scale": 2.0},
        turns={"student": 6, "fake": 4},
    ),
    "scm, difference": Floor(method={"name": "scm", "tangent": "difference"}, turns={"student": 5}),
    "scm, jvp": Floor(method={"name": "scm", "tangent": "jvp"}, turns={"student": 5}),
    "flowmap, jvp": Floor(method={"name": "flowmap", "target": "jvp"}, turns={"student": 5}),
}
"""Methods without an adversarial term, whose cost depends on how deep the critic's features lie."""


def floor_config(floor: Floor, batch_size: int, **sections: Any) -> RunConfig:
    """Return the configuration of a step at a floor, with an average."""
    train = {"steps": 1000, "output_dir": "unused", "ema": 0.999, **sections.pop("train", {})}
    data = {"name": "noise", "batch_size": batch_size}
    return resolve(
        {"teacher": {"path": "unused"}, "method": dict(floor.method), "data": data, "train": train, **sections}
    )


def example_batch(family: Family, size: int, device: torch.device) -> Batch:
    """Return random samples with conditions."""
    return Batch(torch.randn(size, *family.sample_shape), family.example_cond(range(size)), size).to(device)


def forward_of(distiller: Distiller, batch: Batch) -> Callable[[], Tensor]:
    """Return one forward of the teacher's network at a batch."""
    t = torch.full((batch.size,), 0.5, device=batch.x0.device)

    @torch.no_grad()
    def forward() -> Tensor:
        return distiller.teacher.raw(batch.x0, t, batch.cond)

    return forward


def count_flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of a call; on a CPU attention runs unfused, or it would not be counted."""
    plain = contextlib.nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain:
        run()
    return int(counter.get_total_flops())


def turn_flops(distiller: Distiller, batch: Batch) -> dict[str, float]:
    """Return the cost of every turn's loss and its backward, in F."""
    unit = count_flops(forward_of(distiller, batch))
    found = {}
    for turn in distiller.turns.values():
        for other in distiller.turns.values():
            for parameter in other.params:
                parameter.requires_grad_(other is turn)
        found[turn.name] = count_flops(partial(_backward, distiller, turn.name, batch)) / unit
        distiller.zero_grad(set_to_none=True)
    return found


def _backward(distiller: Distiller, turn: str, batch: Batch) -> None:
    losses = distiller(turn, batch, Draws(0, batch.size, device=batch.x0.device))
    torch.stack(list(losses.terms.values())).sum().backward()


def begin(trainer: Trainer) -> None:
    """Put a trainer at its first step."""
    trainer.distiller.stage = trainer.distiller.stages(trainer.config.steps)[0]
    trainer._begin_stage()


def clock() -> float:
    """Return the CPU seconds of this process, or the time at which the GPU has finished its work."""
    return now() if torch.accelerator.is_available() else time.process_time()


def step_over_floor(trainer: Trainer, batch: Batch, forwards: int, repeats: int) -> tuple[float, float]:
    """Return the least seconds of a step and of ``forwards`` forward passes, measured in turn.

    A floor of forwards in a row takes as long as a step, so that what else a machine does disturbs both alike.
    """
    forward, steps, floors = forward_of(trainer.distiller, batch), [], []
    begin(trainer)
    for number in range(WARMUP + repeats):
        with trainer.parallelism.autocast():
            start = clock()
            for _ in range(forwards):
                forward()
            between = clock()
        trainer._step(number, [batch])
        trainer.step += 1
        floors.append(between - start)
        steps.append(clock() - between)
    return min(steps[WARMUP:]), min(floors[WARMUP:])


def plain_seconds(floor: Floor, batch: Batch, repeats: int) -> float | None:
    """Return the least seconds of a plain reference step around the embedded teacher; None without a reference."""
    kind = REFERENCES.get(floor.method["name"])
    if kind is None:
        return None
    family, device = load_teacher(TeacherConfig(path="embedded")), batch.x0.device
    reference = kind(family, floor.method.get("guidance_scale", 1.0) - 1, device, torch.float32)
    seconds = []
    for _ in range(WARMUP + repeats):
        start = clock()
        reference.step(batch)
        seconds.append(clock() - start)
    return min(seconds[WARMUP:])


HEADER = ("method", "floor, F", "FLOPs, F", "FLOPs / floor", "seconds / floor", "plain step's")


def floor_table(names: Iterable[str] = tuple(FLOORS), batch_size: int = 16, repeats: int = 9) -> str:
    """Return a Markdown table of methods, as copies of the embedded teacher: FLOPs and seconds over the floor.

    The last column is the same ratio of seconds of the plain reference step, where there is one
    (:mod:`stepdistill.benchmark.reference_step`).
    """
    lines = [HEADER, ("---",) * len(HEADER)]
    for name in names:
        lines.append(floor_row(name, batch_size, repeats))
    return markdown_table(lines)


def floor_row(name: str, batch_size: int, repeats: int) -> tuple[str, ...]:
    """Return the row of a method under :data:`HEADER`."""
    floor, family = FLOORS[name], load_teacher(TeacherConfig(path="embedded"))
    config = floor_config(floor, batch_size)
    distiller = make_distiller(config, family, torch.device("cpu"))
    trainer = make_trainer(config, distiller)
    batch = example_batch(family, batch_size, trainer.device)
    begin(trainer)
    flops, least = sum(turn_flops(distiller, batch).values()), sum(floor.turns.values())
    step, seconds = step_over_floor(trainer, batch, least, repeats)
    plain = plain_seconds(floor, batch, repeats)
    ratios = (f"{flops / least:.3f}", f"{step / seconds:.2f}")
    return (name, str(least), f"{flops:.2f}", *ratios, "" if plain is None else f"{plain / seconds:.2f}")
