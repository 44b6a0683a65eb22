"""A step's FLOPs are those of its network calls, within 2 %."""

import pytest
import torch

from stepdistill.benchmark.floor import FLOORS, count_flops, example_batch, floor_config, floor_table, turn_flops
from stepdistill.benchmark.step_cost import make_distiller
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FLOORS)
def test_a_step_costs_its_network_calls(name):
    floor, family = FLOORS[name], load_teacher(TeacherConfig(path="embedded"))
    distiller = make_distiller(floor_config(floor, 2), family, CPU)
    distiller.stage = distiller.stages(100)[0]
    distiller.begin_stage()
    assert turn_flops(distiller, example_batch(family, 2, CPU)) == pytest.approx(dict(floor.turns), rel=0.02)


def test_seconds_stand_beside_those_of_a_plain_step():
    table = floor_table(["lcm", "ect"], batch_size=1, repeats=1)
    (lcm, ect) = (row.strip("| ").split(" | ") for row in table.splitlines()[2:])
    assert lcm[0] == "lcm" and min(map(float, lcm[1:])) > 0
    assert ect[0] == "ect" and len(ect) == 5  # no plain step of it


def test_a_product_is_counted_as_multiplications_and_additions():
    assert count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5
