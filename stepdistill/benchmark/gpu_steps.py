"""Step cost at real sizes: every method eager and compiled, beside its floor and a plain reference step.

Networks have random weights, and latents and embeddings are random, as in :mod:`stepdistill.benchmark.step_cost`. The
device's speed is that of its own large matrix product in bfloat16, measured in the same run.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from stepdistill.benchmark.floor import (
    FLOORS,
    begin,
    clock,
    count_flops,
    example_batch,
    floor_config,
    forward_of,
    step_over_floor,
    turn_flops,
)
from stepdistill.benchmark.reference_step import REFERENCES
from stepdistill.benchmark.step_cost import WARMUP, make_distiller, make_family, make_trainer, now
from stepdistill.evaluation.cost import peak_memory
from stepdistill.families.base import Family
from stepdistill.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: a family's size, a method of :data:`~stepdistill.benchmark.floor.FLOORS`, a bank, and a batch."""

    family: str
    floor: str
    bank: str
    batch_size: int

    @property
    def name(self) -> str:
        """``"sdxl, dmd2, guided, adapter"``."""
        return f"{self.family}, {self.floor}, {self.bank}"


CASES = (
    Case("sd", "lcm, guided", "copy", 8),
    Case("sd", "lcm, guided", "adapter", 8),
    Case("sd", "dmd2, guided", "copy", 8),
    Case("sd", "dmd2, guided", "adapter", 8),
    Case("sd", "scm, difference", "copy", 8),
    Case("sdxl", "dmd2, guided", "adapter", 2),
    Case("flux", "dmd2", "adapter", 2),
    Case("sdxl", "lcm, guided", "adapter", 2),
    Case("flux", "lcm", "adapter", 2),
    Case("flux", "lcm", "copy", 2),
    Case("sdxl", "lcm, guided", "copy", 2),
    Case("flux", "dmd2", "copy", 2),
    Case("sdxl", "dmd2, guided", "copy", 2),
    Case("sdxl", "scm, difference", "copy", 2),
    Case("flux", "scm, difference", "copy", 2),
)
"""The most wanted first: what no longer fits into the time is named as left out."""


def config_of(case: Case, device: torch.device, compiled: bool) -> RunConfig:
    """Return the configuration of a case: bfloat16 on a GPU, checkpointing for the large networks."""
    on_gpu = device.type != "cpu"
    train = {"precision": "bf16" if on_gpu else "fp32", "compile": compiled}
    large = on_gpu and case.family != "sd"
    return floor_config(
        FLOORS[case.floor], case.batch_size, train={**train, "gradient_checkpointing": large},
        bank={"name": case.bank, "rank": 64 if on_gpu else 2},
    )  # fmt: skip


def open_family(case: Case, device: torch.device, tiny: bool) -> Family:
    """Return the teacher of a case, on a GPU in bfloat16."""
    torch.manual_seed(0)
    family = make_family(case.family, tiny, device)
    if device.type != "cpu":
        nn.Module.to(family.network, dtype=torch.bfloat16)
    return family


def measure_case(case: Case, *, tiny: bool, repeats: int, compiled: bool) -> dict[str, Any]:
    """Return the cost of a step of ours, as JSON values."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    family, config = open_family(case, device, tiny), config_of(case, device, compiled)
    distiller = make_distiller(config, family, device)
    trainer = make_trainer(config, distiller)
    batch = example_batch(family, case.batch_size, trainer.device)
    begin(trainer)
    found: dict[str, Any] = {}
    if not compiled:  # the counter sees no compiled graph, and the work is the same
        with trainer.parallelism.autocast():
            unit, turns = count_flops(forward_of(distiller, batch)), turn_flops(distiller, batch)
        found = {
            "flops_F": turns,
            "flops": sum(turns.values()) * unit,
            "floor_F": floor_of(case),
        }
    forget_peak()
    seconds, forward = step_over_floor(trainer, batch, 1, repeats)
    trainer.guard.raise_if_tripped()
    return {**found, "seconds": seconds, "forward_seconds": forward, "images_per_second": case.batch_size / seconds,
            **peak_memory(trainer.device)}  # fmt: skip


def floor_of(case: Case) -> float:
    """Return the floor of a step in F; turns that train adapters compute no gradient of the weights below them."""
    turns = FLOORS[case.floor].turns
    return sum(turns.values()) - (len(turns) if case.bank == "adapter" else 0)


def measure_reference(case: Case, *, tiny: bool, repeats: int) -> dict[str, Any]:
    """Return the cost of the plain reference step of a case's method, as JSON values."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.manual_seed(0)
    family = make_family(case.family, tiny, device)
    method = FLOORS[case.floor].method
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    reference = REFERENCES[method["name"]](family, method.get("guidance_scale", 1.0) - 1, device, dtype)
    batch, seconds = example_batch(family, case.batch_size, device), []
    forget_peak()
    for _ in range(WARMUP + repeats):
        start = clock()
        reference.step(batch)
        seconds.append(clock() - start)
    return {"seconds": min(seconds[WARMUP:]), **peak_memory(device)}


def forget_peak() -> None:
    """Let the GPU's peak of memory begin again."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured, or why nothing was."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"left_out": "out of memory"}
    except (ValueError, RuntimeError) as error:
        return {"left_out": str(error).partition("\n")[0]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def matrix_speed(size: int) -> float:
    """Return the device's TFLOP/s of a square matrix product in bfloat16."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=torch.accelerator.current_accelerator() or "cpu")
    seconds = []
    for _ in range(5):
        start = now()
        for _ in range(10):
            a @ a
        seconds.append((now() - start) / 10)
    return 2 * size**3 / min(seconds) / 1e12


def step_rows(
    cases: Sequence[Case], *, tiny: bool, repeats: int, minutes: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a row per case: ours eager and compiled, and its ratios; what is beyond the minutes is left out."""
    end, peak = time.monotonic() + 60 * minutes, matrix_speed(256 if tiny else 8192)
    for case in cases:
        if time.monotonic() > end:
            yield case.name, {"left_out": f"the {minutes:g} minutes were over"}
            continue
        options: dict[str, Any] = {"tiny": tiny, "repeats": repeats}
        eager = attempt(partial(measure_case, case, **options, compiled=False))
        row = {"batch_size": case.batch_size, "matrix_tflops": peak, "eager": speeds(eager, eager, peak)}
        if "seconds" in eager:
            compiled = attempt(partial(measure_case, case, **options, compiled=True))
            row["compiled"] = speeds(compiled, eager, peak)
        yield case.name, row


def speeds(found: dict[str, Any], eager: dict[str, Any], peak: float) -> dict[str, Any]:
    """Add to a measurement TFLOP/s, the share of the device's speed, and seconds over the floor (in eager forwards)."""
    if "seconds" not in found:
        return found
    tflops = eager["flops"] / found["seconds"] / 1e12
    over = found["seconds"] / (eager["floor_F"] * eager["forward_seconds"])
    return {**found, "tflops": tflops, "share_of_matrix_speed": tflops / peak, "seconds_over_floor": over}


def reference_rows(
    cases: Sequence[Case], *, tiny: bool, repeats: int, minutes: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a row per case of a method with a reference: its seconds, ours, and the ratio of the two."""
    end = time.monotonic() + 60 * minutes
    for case in cases:
        if FLOORS[case.floor].method["name"] not in REFERENCES or case.bank != "copy":
            continue
        if time.monotonic() > end:
            yield case.name, {"left_out": f"the {minutes:g} minutes were over"}
            continue
        options: dict[str, Any] = {"tiny": tiny, "repeats": repeats}
        plain = attempt(partial(measure_reference, case, **options))
        ours = attempt(partial(measure_case, case, **options, compiled=False))
        row: dict[str, Any] = {"batch_size": case.batch_size, "reference": plain, "ours": ours}
        if "seconds" in plain and "seconds" in ours:
            row["times_faster"] = plain["seconds"] / ours["seconds"]
        yield case.name, row
