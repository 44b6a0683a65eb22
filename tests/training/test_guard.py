"""The guard: after the first number that is not finite nothing is stepped, and the place is named."""

from types import SimpleNamespace

import pytest
import torch

from stepdistill.training.divergence import ADVICE, DivergenceError, DivergenceGuard, patience_of
from stepdistill.training.guards import FiniteGuard, NonFiniteError
from stepdistill.training.reporting import Reporter

NAN, INF = float("nan"), float("inf")


def scalars(**values):
    return {f"student/{name}": torch.tensor(value) for name, value in values.items()}


@pytest.fixture
def guard() -> FiniteGuard:
    return FiniteGuard(torch.device("cpu"))


def test_finite_numbers_pass(guard):
    for step in range(3):
        flag = guard.check(step, "student", scalars(loss=1e30, grad_norm=0.0))
    assert flag.item() == 0
    guard.raise_if_tripped()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_step_turn_and_term_are_named(guard, bad):
    guard.check(6, "student", scalars(loss=1.0, huber=2.0, grad_norm=1.0))
    assert guard.check(7, "student", scalars(loss=1.0, huber=bad, grad_norm=bad)).item() == 1
    with pytest.raises(NonFiniteError, match=r"step 8, rank 0, turn 'student': 'huber' is not .*; no weight was"):
        guard.raise_if_tripped()


def test_a_gradient_alone_is_named(guard):
    guard.check(0, "student", scalars(loss=1.0, grad_norm=NAN))
    with pytest.raises(NonFiniteError, match="step 1, rank 0, turn 'student': 'grad_norm'"):
        guard.raise_if_tripped()


def test_the_flag_stays_up_and_keeps_the_first_place(guard):
    guard.check(3, "student", scalars(loss=NAN))
    guard.check(4, "fake", {"fake/loss": torch.tensor(NAN)})
    assert guard.check(5, "student", scalars(loss=1.0)).item() == 1
    with pytest.raises(NonFiniteError, match="step 4, rank 0, turn 'student': 'loss'"):
        guard.raise_if_tripped()


def test_a_term_that_appears_late_is_named_too(guard):
    guard.check(0, "student", scalars(loss=1.0))
    guard.check(1, "fake", {"fake/loss": torch.tensor(1.0), "fake/gan": torch.tensor(INF)})
    with pytest.raises(NonFiniteError, match="step 2, rank 0, turn 'fake': 'gan'"):
        guard.raise_if_tripped()


def test_the_place_survives_a_long_run(guard):
    guard.check(3_000_000, "student", scalars(loss=NAN))
    with pytest.raises(NonFiniteError, match="step 3000001,"):
        guard.raise_if_tripped()


def test_a_fused_optimiser_steps_nothing_while_the_flag_is_up(guard):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)

    def step(number, gradient):
        parameter.grad = torch.full((3,), gradient)
        optimizer.found_inf = guard.check(number, "student", scalars(loss=1.0, grad_norm=gradient))
        optimizer.step()
        moments = {name: tensor.clone() for name, tensor in optimizer.state[parameter].items()}
        return parameter.detach().clone(), moments

    before, moments = step(0, 1.0)
    assert not torch.equal(before, torch.ones(3))
    for number, gradient in ((1, NAN), (2, 1.0)):
        after, moments_after = step(number, gradient)
        assert torch.equal(after, before)
        assert all(torch.equal(moments_after[name], moments[name]) for name in moments)


# ------------------------------------------------------------------------------------------------ divergence

SIGNS = {
    "the fake score lags": ({"student/fake_score_error_ratio": 1.6}, {"student/fake_score_error_ratio": 0.9}),
    "the diversity collapsed": ({"student/diversity_ratio": 0.02}, {"student/diversity_ratio": 0.7}),
    "the critic is saturated": (
        {"critic/accuracy_real": 1.0, "critic/accuracy_fake": 1.0},
        {"critic/accuracy_real": 1.0, "critic/accuracy_fake": 0.8},
    ),
}


@pytest.mark.parametrize("cause", SIGNS)
def test_a_standing_sign_stops_the_run_and_is_named(cause):
    bad, good = SIGNS[cause]
    divergence = DivergenceGuard(patience=2, rows=3)
    for step, values in enumerate([good, bad, bad, good, bad, bad]):  # never three in a row
        divergence.check(step, {"student/loss": 1.0, **values})
    with pytest.raises(DivergenceError, match=f"step 6: {cause}, since step 4") as stopped:
        divergence.check(6, bad)
    assert ADVICE[cause] in str(stopped.value)


def test_logs_without_diagnostics_say_nothing():
    divergence = DivergenceGuard(patience=0, rows=1)
    for step in range(5):
        divergence.check(step, {"student/loss": float(step)})


def test_the_last_good_step_is_the_one_before_the_first_sign_that_stands():
    divergence = DivergenceGuard(patience=100, rows=3)
    assert divergence.good_until is None
    for step, lag in [(10, 0.9), (20, 2.0), (30, 2.0)]:
        divergence.check(
            step, {"student/fake_score_error_ratio": lag, "student/diversity_ratio": 0.05 if step == 30 else 0.9}
        )
    assert divergence.good_until == 19
    divergence.check(40, {"student/fake_score_error_ratio": 0.9, "student/diversity_ratio": 0.05})
    assert divergence.good_until == 29
    divergence.check(50, {"student/fake_score_error_ratio": 0.9, "student/diversity_ratio": 0.9})
    assert divergence.good_until is None


def stopped_at(steps, log_every, shows):
    """The step at which a run is stopped whose rows show a collapse where ``shows`` says so; None if it ends."""
    divergence = DivergenceGuard(patience_of(steps))
    for step in range(log_every, steps + 1, log_every):
        try:
            divergence.check(step, {"student/diversity_ratio": 0.02 if shows(step) else 0.7})
        except DivergenceError:
            return step
    return None


@pytest.mark.parametrize(
    ("steps", "log_every", "wanted"),
    [
        (300, 10, 200),
        (300, 1, 200),
        (600, 10, 300),
        (1500, 10, 600),
        (40_000, 10, 600),
        (5000, 100, 1000),
        (90, 10, None),
    ],
)
def test_a_run_that_collapsed_at_step_100_is_stopped_in_time(steps, log_every, wanted):
    assert stopped_at(steps, log_every, lambda step: step >= min(100, steps // 2)) == wanted


@pytest.mark.parametrize("steps", [300, 600, 1500, 40_000])
def test_a_phase_that_passes_stops_no_run(steps):
    first = patience_of(steps)
    assert stopped_at(steps, 10, lambda step: first <= step < 2 * first) is None


def test_rows_that_deceive_by_chance_stop_no_run():
    """One row in ten at random, of 100,000: a thousand pairs, and no ten in a row."""
    deceives = (torch.rand(100_001, generator=torch.Generator().manual_seed(0)) < 0.1).tolist()
    divergence = DivergenceGuard(patience=0)
    for step, deceived in enumerate(deceives):
        divergence.check(step, {"student/diversity_ratio": 0.02 if deceived else 0.7})


def test_all_processes_judge_a_run_by_the_average_of_their_numbers(tmp_path):
    told = []
    accelerator = SimpleNamespace(
        num_processes=2, is_main_process=False, device=torch.device("cpu"),
        log=lambda values, step: told.append(values),
        reduce=lambda scalars, reduction: (scalars + 3) / 2,  # the other process has 3 everywhere
    )  # fmt: skip
    reporter = Reporter(accelerator, tmp_path, 10)
    reporter.collect({"student/loss": torch.tensor(1.0), "critic/loss": torch.tensor(5.0, dtype=torch.float64)})
    assert reporter.write(1, SimpleNamespace(name="train"), {}) == {"student/loss": 2.0, "critic/loss": 4.0}
    assert told[0]["critic/loss"] == 4.0 and reporter.write(2, SimpleNamespace(name="train"), {}) == {}
