"""Optimisers whose moments take few bits: near Adam, resumed to the bit, and planned as they are held."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from contracts.cases import STEPS, checkpoint_bytes, make_trainer, sections, teacher_for, train_until
from torch import nn

from stepdistill.networks.sharding import is_share
from stepdistill.training import optimizers
from stepdistill.training.config import resolve
from stepdistill.training.memory import held_bytes
from stepdistill.training.optimizer_state import optimizer_tensors, restore_optimizer
from stepdistill.training.optimizers import FEW_BITS, OptimConfig, check_installed, step_at
from stepdistill.training.run import Run

NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(find_spec(few.package) is None, reason=f"{few.package} is not installed")
    )
    for name, few in FEW_BITS.items()
]


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles a step for each shape, which says nothing more here, and takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(64, 96)), nn.Parameter(torch.randn(65, 65)), nn.Parameter(torch.randn(7))]


def step(optimizer, params, number, flag=0.0):
    generator = torch.Generator().manual_seed(number)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    step_at(optimizer, 1e-2 / (1 + number), torch.tensor(flag))


def state_bytes(optimizer):
    """Bytes of moments; bitsandbytes has one table for all."""
    held = {}
    for entries in optimizer.state.values():
        for value in entries.values():
            if torch.is_tensor(value) and value.ndim:
                held[id(value)] = held_bytes(value)
    return sum(held.values())


@pytest.mark.parametrize("name", NAMES)
def test_it_steps_about_as_adam_and_not_while_a_number_is_not_finite(name):
    ours, theirs, begin = parameters(), parameters(), parameters()
    optimizer, adam = OptimConfig(name=name, lr=1e-2).make([ours]), OptimConfig(lr=1e-2).make([theirs])
    for number in range(3):
        step(optimizer, ours, number)
        step(adam, theirs, number)
    for mine, exact, first in zip(ours, theirs, begin, strict=True):
        assert (mine - exact).norm() < 0.2 * (exact - first).norm()
    before = [parameter.detach().clone() for parameter in ours]
    step(optimizer, ours, 3, flag=1.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_its_state_is_restored_to_the_bit_and_is_as_large_as_planned(name):
    config, params, copies = OptimConfig(name=name, weight_decay=0.1), parameters(), parameters()
    optimizer, resumed = config.make([params]), config.make([copies])
    for number in range(2):
        step(optimizer, params, number)
    with torch.no_grad():
        for copied, parameter in zip(copies, params, strict=True):
            copied.copy_(parameter)
    restore_optimizer(resumed, optimizer_tensors(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    for number in range(2, 4):
        step(optimizer, params, number)
        step(resumed, copies, number)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    planned = sum(config.state_bytes(parameter.numel()) for parameter in params)
    assert state_bytes(optimizer) == pytest.approx(planned, rel=0.1)  # a table of bitsandbytes is no part of the plan
    assert planned < 0.75 * sum(8 * parameter.numel() for parameter in params)


@pytest.mark.product
@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_ends_in_the_same_bits(tmp_path, name):
    def run(place):
        mapping = sections(tmp_path / place, teacher_for("lcm"), "lcm", save_every=2)
        mapping["optim"]["student"] |= {"name": name}
        return Run(resolve(mapping))

    run("straight").train()
    train_until(run("stopped"), 2)
    run("stopped").train()
    wanted, found = (checkpoint_bytes(tmp_path / place / "run", STEPS) for place in ("straight", "stopped"))
    assert wanted == found and "optimizer-student.safetensors" in wanted


def test_the_plan_knows_the_optimiser(tmp_path):
    mapping = sections(tmp_path, teacher_for("lcm"), "lcm")
    run = Run(resolve(mapping))
    optimizer = make_trainer(run).optimizers["student"]
    for parameter in run.distiller.bank.params("student"):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    (row,) = (line for line in run.plan().splitlines() if line.strip().startswith("student "))
    assert float(row.split()[-1]) == pytest.approx(state_bytes(optimizer) / 1e6, abs=0.06)
    mapping["optim"]["student"] |= {"name": "adamw_8bit"}
    plan = resolve(mapping).optim["student"]
    assert plan.state_bytes(65536) == 2 * (65536 + 4 * 256 + 1024) and plan.state_bytes(100) == 800


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"optim\.fake\.name: bnb_adamw_8bit needs the package bitsandbytes.*pip inst"):
        check_installed({"student": OptimConfig(), "fake": OptimConfig(name="bnb_adamw_8bit")})


def test_networks_that_are_divided_are_refused(monkeypatch):
    monkeypatch.setattr(optimizers, "is_share", lambda tensor: True)
    with pytest.raises(ValueError, match=r"optim\.\*\.name: expected adamw or radam.*got adamw_4bit"):
        OptimConfig(name="adamw_4bit").make([parameters()])
    assert not is_share(parameters()[0])


@pytest.mark.parametrize(
    ("method", "weight"), [("dmd2", "gan_weight"), ("sid", "gan_weight"), ("tcd", "adversarial_weight")]
)
def test_settings_of_a_head_that_is_not_trained_are_refused(tmp_path, method, weight):
    mapping = sections(tmp_path, teacher_for(method), method)
    mapping["method"][weight] = 0
    mapping["optim"] = {"head": {"lr": 1e-2}}
    with pytest.raises(ValueError, match=r"^optim\.head: expected none, because these options of the method train no"):
        Run(resolve(mapping))
