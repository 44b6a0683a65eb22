"""What a step holds is counted on shapes as on numbers, and a turn keeps one graph of its student."""

import pytest
import torch
from torch import nn

from stepdistill.benchmark.floor import FLOORS, example_batch, floor_config
from stepdistill.benchmark.step_cost import make_distiller, make_family
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.randomness import Draws
from stepdistill.training.activations import LiveBytes, activations, step_peak

CPU = torch.device("cpu")


def test_what_lives_at_once_is_counted():
    weight = nn.Parameter(torch.ones(10, 10))
    with LiveBytes([weight]) as counted:
        a = weight + 1  # 400 bytes
        b = a.view(100)
        del a
        c = b * 2  # 400 more
        assert counted.live == 800
        del b, c
        assert counted.live == 0 and counted.peak == 800


@pytest.mark.parametrize(("bank", "checkpointing"), [("copy", False), ("adapter", True)])
def test_shapes_alone_count_what_a_step_of_numbers_holds(bank, checkpointing):
    train = {"gradient_checkpointing": checkpointing}
    config = floor_config(FLOORS["lcm"], 2, train=train, bank={"name": bank, "rank": 2})
    family = make_family("sd", True, CPU)
    distiller = make_distiller(config, family, CPU)
    before = {name: tensor.clone() for name, tensor in distiller.bank.state("student").items()}
    counted = activations(distiller, config.train, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in distiller.bank.state("student").items())
    batch = example_batch(family, 2, CPU)
    held = step_peak(distiller.student, distiller.teacher, batch.x0, batch.cond) / 1e6
    assert counted == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("name", FLOORS)
def test_a_turn_keeps_the_activations_of_one_student_graph(name):
    floor, family = FLOORS[name], load_teacher(TeacherConfig(path="embedded"))
    distiller = make_distiller(floor_config(floor, 2), family, CPU)
    distiller.stage = distiller.stages(100)[0]
    distiller.begin_stage()
    for turn in distiller.turns.values():
        for parameter in turn.params:
            parameter.requires_grad_(turn.name == "student")
    batch, known = example_batch(family, 2, CPU), [*distiller.parameters(), *distiller.buffers()]
    t = torch.full((2,), 0.5)
    with LiveBytes(known) as graph:
        output = distiller.student.raw(batch.x0, t, batch.cond)
        one = graph.live
    del output
    with LiveBytes(known) as counted:
        losses = distiller("student", batch, Draws(0, 2))
        assert counted.live < 1.2 * one
    assert losses.terms
