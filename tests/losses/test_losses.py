"""Distances and weightings: each weighting is the squared error of the quantity it is named after."""

import pytest
import torch
from oracles import SCHEDULES

from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.losses.regression import mean_square, pseudo_huber, weighted, x0_weight

TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def errors(schedule, prediction_type):
    """Squared errors per sample, of the clean image and of the output that stands for it, for the same state."""
    a, b, noise = torch.randn(3, len(TIMES), 2, 3, 3, dtype=torch.float64)
    x_t = schedule.add_noise(a, noise, TIMES)
    outputs = [from_x0(x0, x_t, TIMES, schedule, prediction_type) for x0 in (a, b)]
    return mean_square(a, b), mean_square(*outputs)


@pytest.mark.parametrize(
    ("prediction_type", "weighting"), [("sample", "constant"), ("epsilon", "snr"), ("v_prediction", "snr_plus_one")]
)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_weighting_is_the_error_of_what_it_is_named_after(name, prediction_type, weighting):
    clean, other = errors(SCHEDULES[name], prediction_type)
    weight = x0_weight(SCHEDULES[name].log_snr(TIMES), weighting)
    torch.testing.assert_close(weight.float() * clean, other, rtol=1e-4, atol=0)


def test_truncated_snr_is_the_larger_of_two_errors():
    schedule = SCHEDULES["cosine"]
    clean, noise = errors(schedule, "epsilon")
    weight = x0_weight(schedule.log_snr(TIMES), "truncated_snr")
    torch.testing.assert_close(weight.float() * clean, torch.maximum(clean, noise), rtol=1e-4, atol=0)


def test_an_error_of_a_flow_counts_one_over_t_squared():
    clean, flow = errors(RectifiedFlow(), "flow")
    torch.testing.assert_close((clean / TIMES**2).float(), flow, rtol=1e-4, atol=0)


def test_pure_noise_has_a_weight_except_for_an_error_of_the_noise():
    log_snr = SCHEDULES["zero_snr"].log_snr(torch.ones(1))
    weights = {w: x0_weight(log_snr, w).item() for w in ("constant", "snr", "truncated_snr", "snr_plus_one")}
    assert weights == {"constant": 1, "snr": 0, "truncated_snr": 1, "snr_plus_one": 1}


def test_mean_square_is_a_mean_a_sample_in_float32():
    a, b = torch.zeros(2, 3, 4, 4), torch.stack([torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), 300.0)])
    assert mean_square(a, b).tolist() == [4, 90000]
    assert mean_square(a.half(), b.half()).tolist() == [4, 90000]  # 90000 is infinite in half precision


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    a = torch.zeros(2, 1, 2, 2)
    b = torch.stack([torch.full((1, 2, 2), 1e-3), torch.full((1, 2, 2), 1e3)])
    near, far = pseudo_huber(a, b, c=0.5)
    norms = b.flatten(1).norm(dim=1)
    assert near.item() == pytest.approx(norms[0].item() ** 2 / (2 * 0.5), rel=0.1)
    assert far.item() == pytest.approx(norms[1].item() - 0.5, rel=1e-3)
    assert pseudo_huber(a, a, c=0.5).tolist() == [0, 0]


def test_weighted_is_the_mean_of_products_and_passes_gradients():
    distance = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = weighted(torch.tensor([2.0, 4.0], dtype=torch.float64), distance)
    loss.backward()
    assert loss.item() == 7 and loss.dtype == torch.float32
    assert distance.grad.tolist() == [1, 2]
