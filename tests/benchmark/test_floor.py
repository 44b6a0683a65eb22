"""A step's FLOPs, forwards and backwards, are those of its network calls, within 2 %."""

import functools

import pytest
import torch

from stepdistill.benchmark.floor import FLOORS, count_flops, example_batch, floor_config, floor_table, turn_flops
from stepdistill.benchmark.step_cost import make_distiller
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.methods import find_method
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FLOORS)
def test_a_step_costs_its_network_calls(name):
    floor, family = FLOORS[name], load_teacher(TeacherConfig(path="embedded"))
    distiller = make_distiller(floor_config(floor, 2), family, CPU)
    distiller.stage = distiller.stages(100)[0]
    distiller.begin_stage()
    assert turn_flops(distiller, example_batch(family, 2, CPU)) == pytest.approx(dict(floor.turns), rel=0.02)


# -------------------------------------------------------------------------------------------------- both banks


def bank_of(name, family):
    if name == "copy":
        return CopyBank(family.network)
    return AdapterBank(family.network, rank=1, targets=family.lora_targets)


@functools.cache
def units(name):
    """The cost of every kind of call under a bank, in forwards of the teacher."""
    family = Pixel.tiny()
    bank = bank_of(name, family)
    bank.fork("student")
    teacher, student = (Denoiser(family, bank, role) for role in ("teacher", "student"))
    batch, t = example_batch(family, 4, CPU), torch.full((4,), 0.5, dtype=torch.float64)
    x, dx = batch.x0.clone().requires_grad_(), torch.ones_like(batch.x0)
    calls = {
        "learned": lambda: student.raw(batch.x0, t, batch.cond).sum().backward(),
        "derived": lambda: student.with_derivative(batch.x0, t, batch.cond, dx, t)[0].x0.sum().backward(),
        "rested": lambda: student.raw(batch.x0, t, batch.cond),
        "passed by the teacher": lambda: teacher.raw(x, t, batch.cond).sum().backward(),
        "passed": lambda: student.raw(x, t, batch.cond).sum().backward(),
    }
    found = {"teacher": 1.0}
    with torch.no_grad():
        whole = count_flops(lambda: teacher.raw(batch.x0, t, batch.cond))
        found["rested"] = count_flops(calls.pop("rested")) / whole
    for kind, call in calls.items():
        for parameter in bank.params("student"):
            parameter.requires_grad_(kind in ("learned", "derived"))
        found[kind] = count_flops(call) / whole
    return found


def test_on_copies_a_backward_is_two_forwards_and_one_for_the_input_alone():
    assert units("copy") == pytest.approx(
        {"teacher": 1, "rested": 1, "learned": 3, "derived": 4, "passed": 2, "passed by the teacher": 2}, rel=0.02
    )


LEARNED = {"rested": 1, "learned": 1}
"""A fake score's turn after a rollout of one call."""
STEPS = {
    "cdm": ({"most_steps": 1, "guidance_scale": 2.0},
            {"student": {"learned": 2, "teacher": 4, "rested": 2}, "fake": LEARNED}),
    "tdm": ({"steps": 2, "guidance_scale": 2.0},
            {"student": {"rested": 2, "learned": 1, "teacher": 2}, "fake": {"rested": 2, "learned": 1}}),
    "sid": ({"steps": 1, "guidance_scale": 2.0},
            {"student": {"learned": 1, "passed by the teacher": 2, "passed": 1}, "fake": LEARNED}),
    "dmd2": ({"steps": 1, "gan_weight": 0.0, "split": True, "guidance_scale": 2.0},
             {"student": {"learned": 1, "teacher": 3, "rested": 1}, "fake": LEARNED}),
    "rcm": ({"most_steps": 1, "tangent": "jvp", "guidance_scale": 2.0},
            {"student": {"derived": 1, "learned": 1, "teacher": 4, "rested": 1}, "fake": LEARNED}),
    "flowmap": ({"slices": "two", "target": "jvp", "guidance_scale": 2.0},
                {"student": {"derived": 1, "learned": 1, "teacher": 2}}),
    "pi_flow": ({"states": 2, "points": 1, "guidance_scale": 2.0}, {"student": {"learned": 1, "teacher": 4}}),
    "tcd": ({"segments": (2,), "steps": 2, "target": "edge", "guidance_scale": 2.0},
            {"student": {"learned": 1, "teacher": 2, "rested": 1}}),
}  # fmt: skip
"""The calls of a step as METHODS_2026 states them (14.9, 15.5, 16.3, 17.4, 18.1, 20 and 23.1)."""


@pytest.mark.parametrize("bank", ["copy", "adapter"])
@pytest.mark.parametrize("name", STEPS)
def test_under_both_banks_a_step_costs_the_calls_that_the_papers_state(name, bank):
    (options, turns), method, family = STEPS[name], find_method(name), Pixel.tiny()
    distiller = method(family, bank_of(bank, family), method.Config(**options))
    distiller.stage = distiller.stages(100)[0]
    found = turn_flops(distiller, example_batch(family, 4, CPU))
    for turn, calls in turns.items():
        assert found[turn] == pytest.approx(sum(count * units(bank)[kind] for kind, count in calls.items()), rel=0.02)


def test_seconds_stand_beside_those_of_a_plain_step():
    table = floor_table(["lcm", "ect"], batch_size=1, repeats=1)
    (lcm, ect) = (row.strip("| ").split(" | ") for row in table.splitlines()[2:])
    assert lcm[0] == "lcm" and min(map(float, lcm[1:])) > 0
    assert ect[0] == "ect" and len(ect) == 5  # no plain step of it


def test_a_product_is_counted_as_multiplications_and_additions():
    assert count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5
