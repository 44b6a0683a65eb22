"""The rows of training-free solvers: which there are, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.families.base import Family
from stepdistill.inference.solvers import check_steps, solver_of, steps_within


class SolverRow(NamedTuple):
    """A solver within a number of network calls per image, with or without guidance."""

    solver: str
    calls: int
    guided: bool

    @property
    def name(self) -> str:
        """``"UniPC, 4 calls, guided"``."""
        plural, guidance = "s" if self.calls > 1 else "", ", guided" if self.guided else ""
        return f"{self.solver}, {self.calls} call{plural}{guidance}"

    @property
    def steps(self) -> int:
        """Steps of the solver that fit into the calls; a guided step is two calls."""
        return steps_within(self.solver, self.calls, guided=self.guided)


def solver_rows(solvers: Mapping[str, Sequence[int]], *, guided: bool) -> list[SolverRow]:
    """Return the rows of a table, by calls; more calls that allow no further step make no row of their own.

    >>> for row in solver_rows({"Heun": [1, 2, 3]}, guided=True):
    ...     print(row.name)
    Heun, 1 call
    Heun, 2 calls, guided
    Heun, 3 calls
    """
    rows: dict[tuple[str, int, bool], SolverRow] = {}
    for solver, budgets in solvers.items():
        for calls in sorted(budgets):
            for guidance in (False, True) if guided else (False,):
                row = SolverRow(solver, calls, guidance)
                if row.steps:
                    rows.setdefault((solver, row.steps, guidance), row)
    return sorted(rows.values(), key=lambda row: row.calls)


def check_solvers(config: BenchmarkConfig, family: Family) -> None:
    """Raise ``ValueError`` for a solver that the teacher lacks, or for more steps than it has timesteps."""
    check_steps(family.scheduler_config, config.teacher_steps, "teacher_steps", config.teacher.path)
    for solver, calls in config.solvers.items():
        solver_of(family, solver)
        steps = steps_within(solver, max(calls, default=1))
        check_steps(family.scheduler_config, steps, f"solvers.{solver}", config.teacher.path)
