"""Half precision: losses are scaled, what overflows is left out, and the scales are resumed."""

import json

import pytest
import torch
from contracts.cases import STEPS, checkpoint_bytes, make_run, make_trainer, train_until
from torch import nn

from stepdistill.training.guards import NonFiniteError, SkippedStepError
from stepdistill.training.parallelism import choose_parallelism
from stepdistill.training.scaling import LossScaling

CPU = torch.device("cpu")


def move(scaling, parameter, gradient):
    """One backward of a loss with this gradient; its numbers, unscaled."""
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = None
    scaling.of("student").scale((parameter * gradient).sum()).backward()
    scaling.unscale("student", [optimizer])
    return {"student/loss": torch.tensor(1.0), "student/grad_norm": parameter.grad.norm()}


def test_gradients_are_those_of_the_loss_whatever_the_scale():
    parameter = nn.Parameter(torch.ones(3))
    for precision in ("fp32", "bf16", "fp16"):
        scaling = LossScaling(precision, CPU)
        numbers = move(scaling, parameter, torch.tensor([3.0, 0.0, 4.0]))
        assert numbers["student/grad_norm"] == 5
        scaling.check("student", numbers)
        assert list(scaling.logged()) == (["student/loss_scale"] if precision == "fp16" else [])


def test_an_overflow_halves_the_scale_and_leaves_the_step_out():
    scaling, parameter = LossScaling("fp16", CPU), nn.Parameter(torch.ones(3))
    scale = scaling.of("student").get_scale()
    with pytest.raises(SkippedStepError, match="turn 'student': the gradient overflowed at a scale of 65536"):
        scaling.check("student", move(scaling, parameter, torch.tensor(torch.inf)))
    assert scaling.logged()["student/loss_scale"] == scale / 2


def test_a_loss_that_is_not_finite_is_the_guards():
    scaling, parameter = LossScaling("fp16", CPU), nn.Parameter(torch.ones(3))
    numbers = move(scaling, parameter, torch.tensor(torch.nan))
    scaling.check("student", numbers | {"student/loss": torch.tensor(torch.nan)})


def test_processes_agree_whose_loss_it_is(monkeypatch):
    """The gradient is the processes' mean; if the loss of one is not finite, none may leave before the guard's sum."""
    scaling, parameter = LossScaling("fp16", CPU), nn.Parameter(torch.ones(3))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.zero_())
    scaling.check("student", move(scaling, parameter, torch.tensor(torch.nan)))


def test_a_gradient_that_overflows_unscaled_ends_the_run():
    scaling, parameter = LossScaling("fp16", CPU), nn.Parameter(torch.ones(3))
    for _ in range(17):
        with pytest.raises(SkippedStepError):
            scaling.check("student", move(scaling, parameter, torch.tensor(torch.nan)))
    with pytest.raises(NonFiniteError, match=r"not finite in fp16 at a scale of 0\.5"):
        scaling.check("student", move(scaling, parameter, torch.tensor(torch.nan)))


def test_scales_survive_a_checkpoint():
    scaling, resumed, parameter = LossScaling("fp16", CPU), LossScaling("fp16", CPU), nn.Parameter(torch.ones(3))
    with pytest.raises(SkippedStepError):
        scaling.check("student", move(scaling, parameter, torch.tensor(torch.inf)))
    scaling.check("student", move(scaling, parameter, torch.tensor(1.0)))
    resumed.resume(json.loads(json.dumps(scaling.state())))
    assert resumed.state() == scaling.state() and resumed.state()["student"]["_growth_tracker"] == 1
    for one in (scaling, resumed):
        one.check("student", move(one, parameter, torch.tensor(1.0)))
    assert resumed.state() == scaling.state()


def test_a_step_in_half_precision_that_overflows_moves_nothing(tmp_path):
    run = make_run(tmp_path, "lcm", precision="fp16", ema=0.5, nan_policy="raise")
    trainer = make_trainer(run)
    scaler = trainer.scaling.of("student")
    batch = next(trainer._batches())
    before = {role: [p.clone() for p in run.distiller.bank.params(role)] for role in ("student", "ema")}
    scaler.scale(torch.ones(()))  # makes the scale
    scaler.update(new_scale=2.0**100)
    trainer._train_on(0, [batch])
    for role, params in before.items():
        assert all(torch.equal(a, b) for a, b in zip(params, run.distiller.bank.params(role), strict=True))
    assert trainer.step == 1 and scaler.get_scale() == 2.0**99 and not trainer.guard.flag
    scaler.update(new_scale=1024.0)
    trainer._train_on(1, [batch])
    assert any(not torch.equal(a, b) for a, b in zip(before["ema"], run.distiller.bank.params("ema"), strict=True))


def test_a_stopped_run_ends_in_the_same_bits(tmp_path):
    def run(place):
        return make_run(tmp_path / place, "lcm", precision="fp16", save_every=2)

    run("straight").train()
    train_until(run("stopped"), 2)
    run("stopped").train()
    wanted, found = (checkpoint_bytes(tmp_path / place / "run", STEPS) for place in ("straight", "stopped"))
    assert wanted == found
    states = [json.loads((tmp_path / place / f"run/checkpoint-{STEPS}/state.json").read_text())["scales"]
              for place in ("straight", "stopped")]  # fmt: skip
    assert states[0] == states[1] and states[0]["student"]["scale"] > 0


def test_networks_that_are_divided_are_refused(monkeypatch):
    monkeypatch.setattr("stepdistill.training.fsdp.is_wanted", lambda accelerator: True)
    with pytest.raises(ValueError, match=r"train\.precision: expected bf16 or fp32.*got fp16"):
        choose_parallelism(None, "fp16")
