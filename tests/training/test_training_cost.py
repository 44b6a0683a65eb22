"""What a training cost: counts that can be made by hand, the same however the run was interrupted or divided."""

import json

import pytest
import torch
from contracts.cases import make_run, train_until

from stepdistill.export.contract import read_contract
from stepdistill.families.pixel import Pixel
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.bank import TEACHER
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.training.cost import TrainingCost, counted

COUNTS = ("steps", "images", "teacher_forwards")


def counts(cost):
    return [cost[name] for name in COUNTS]


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_progressive_costs_two_mentor_forwards_and_a_student_step(tmp_path, bank):
    make_run(tmp_path, "progressive", bank, steps=6, accumulation=2, ema=0.9).train()
    images = 6 * 2 * 4  # steps, micro-batches, images of each
    cost = read_contract(tmp_path / "run/pipeline").origin.training
    assert counts(cost) == [6, images, (2 + 3) * images]
    assert cost["cpu_minutes"] > 0 and 0 < cost["wall_minutes"] < 1
    first_halving = read_contract(tmp_path / "run/pipeline-4-steps").origin.training
    assert counts(first_halving) == [2, images / 3, 5 * images / 3]  # the last halving is twice as long
    assert first_halving["wall_minutes"] < cost["wall_minutes"]


def test_a_resumed_run_costs_what_a_straight_one_does(tmp_path):
    train_until(make_run(tmp_path, "progressive", steps=6), 2)
    before = json.loads((tmp_path / "run/checkpoint-2/state.json").read_text())["cost"]
    assert counts(before) == [2, 8, 40]
    make_run(tmp_path, "progressive", steps=6).train()
    cost = read_contract(tmp_path / "run/pipeline").origin.training
    assert counts(cost) == [6, 24, 120]
    assert cost["wall_minutes"] > before["wall_minutes"] and cost["cpu_minutes"] > before["cpu_minutes"]
    make_run(tmp_path, "progressive", steps=6).train()  # finished: nothing is trained, and nothing is added
    assert read_contract(tmp_path / "run/pipeline").origin.training == cost


@pytest.mark.parametrize("adapters", [False, True])
def test_a_forward_is_one_and_a_derivative_two_more(adapters):
    family = Pixel.tiny()
    network = family.network
    bank = AdapterBank(network, rank=2, targets=family.lora_targets) if adapters else CopyBank(network)
    bank.fork("student")
    x, t, cond = torch.randn(5, *family.sample_shape), torch.full((5,), 0.5), family.example_cond(range(5))

    def cost_of(role, x, grad=True):
        cost = TrainingCost()
        with counted(bank, cost), bank.using(role) as network, torch.set_grad_enabled(grad):
            family.call(network, x, t, cond)
        return cost.teacher_forwards

    assert cost_of("student", x) == 3 * 5
    assert cost_of("student", x, grad=False) == 5
    assert cost_of(TEACHER, x.clone().requires_grad_()) == 3 * 5  # the gradient passes through to the image
    for parameter in bank.params("student"):  # another network's turn
        parameter.requires_grad_(False)
    assert cost_of("student", x) == cost_of(TEACHER, x) == 5
    with bank.using(TEACHER) as network:
        family.call(network, x, t, cond)
        assert not network._forward_pre_hooks


def test_a_forward_mode_derivative_counts_as_another_forward(tmp_path):
    run = make_run(tmp_path, "scm", steps=1)
    x, t, cond = torch.randn(5, *run.family.sample_shape), torch.full((5,), 0.5), run.family.example_cond(range(5))
    for derive, forwards in ((run.distiller.student.jvp, 2), (run.distiller.student.with_derivative, 2 + 2)):
        cost = TrainingCost()
        with counted(run.distiller.bank, cost):
            derive(x, t, cond, torch.ones_like(x), torch.ones_like(t))
        assert cost.teacher_forwards == forwards * 5
