"""Predictions: every output type says the same of an image, diffusers agrees, and guidance is one batched call."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from oracles import SCHEDULES, VP_PROCESSES, Gaussian, Oracle, native_types, points, teacher_denoiser, three_clusters

from stepdistill.diffusion.prediction import Prediction, from_x0, to_prediction
from stepdistill.diffusion.reading import read_discrete_vp
from stepdistill.diffusion.schedule import Karras, RectifiedFlow, expand
from stepdistill.diffusion.trig import Trig

TIMES = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
every_type = pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        pytest.param(schedule, prediction_type, id=f"{name}-{prediction_type}")
        for name, schedule in SCHEDULES.items()
        for prediction_type in native_types(schedule)
    ],
)


def noisy(schedule, t=TIMES):
    x_0, noise = torch.randn(2, len(t), 2, 1, 1, dtype=torch.float64)
    return x_0, noise, schedule.add_noise(x_0, noise, t)


@every_type
def test_output_and_clean_image_are_two_names_of_one_thing(schedule, prediction_type):
    x_0, _, x_t = noisy(schedule)
    output = from_x0(x_0, x_t, TIMES, schedule, prediction_type)
    prediction = to_prediction(output, x_t, TIMES, schedule, prediction_type)
    torch.testing.assert_close(prediction.x0, x_0, atol=1e-9, rtol=0)
    again = from_x0(prediction.x0, x_t, TIMES, schedule, prediction_type)
    torch.testing.assert_close(again, output, atol=1e-9, rtol=1e-9)


@every_type
def test_clean_image_and_noise_make_up_the_state(schedule, prediction_type):
    """For any output of any network, not only a consistent one."""
    _, output, x_t = noisy(schedule)
    prediction = to_prediction(output, x_t, TIMES, schedule, prediction_type)
    alpha, sigma = (expand(coefficient, x_t) for coefficient in schedule(TIMES))
    torch.testing.assert_close(prediction.to_state(alpha, sigma), x_t, atol=1e-9, rtol=1e-9)


@every_type
def test_the_true_output_gives_back_the_noise(schedule, prediction_type):
    x_0, noise, x_t = noisy(schedule)
    output = from_x0(x_0, x_t, TIMES, schedule, prediction_type)
    torch.testing.assert_close(
        to_prediction(output, x_t, TIMES, schedule, prediction_type).eps, noise, atol=1e-7, rtol=0
    )


@every_type
def test_a_perfect_network_called_through_its_family_sees_what_it_should(schedule, prediction_type):
    oracle = three_clusters(schedule, prediction_type)
    _, _, x_t = noisy(schedule)
    seen = teacher_denoiser(oracle.double())(x_t, TIMES, {})
    torch.testing.assert_close(seen.x0, oracle.predict(x_t, TIMES), atol=1e-6, rtol=0)


def test_the_words_for_velocities():
    x_0, noise, x_t = noisy(SCHEDULES["cosine"])
    alpha, sigma = (expand(coefficient, x_t) for coefficient in SCHEDULES["cosine"](TIMES))
    truth = Prediction(x_0, noise)
    v = from_x0(x_0, x_t, TIMES, SCHEDULES["cosine"], "v_prediction")
    torch.testing.assert_close(truth.velocity(alpha, sigma), v, atol=1e-9, rtol=0)
    torch.testing.assert_close(truth.flow(), noise - x_0)
    flow = from_x0(x_0, RectifiedFlow().add_noise(x_0, noise, TIMES), TIMES, RectifiedFlow(), "flow")
    torch.testing.assert_close(flow, noise - x_0)


def test_trigflow_output_is_the_tangent_of_the_quarter_circle():
    """sigma_d F = dx/dangle = cos z - sin x_0, with z of the data's standard deviation."""
    schedule = Trig(0.5)
    x_0, noise, x_t = noisy(schedule)
    angle = expand(schedule.timestep(TIMES), x_t)
    output = from_x0(x_0, x_t, TIMES, schedule, "trigflow")
    torch.testing.assert_close(0.5 * output, angle.cos() * 0.5 * noise - angle.sin() * x_0, atol=1e-9, rtol=0)


# -------------------------------------------------------------------------------------- the same as diffusers


@pytest.mark.parametrize("process", VP_PROCESSES.values(), ids=VP_PROCESSES.keys())
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_is_pred_original_sample_at_every_timestep(process, prediction_type):
    scheduler = DDIMScheduler(**process, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    schedule = read_discrete_vp(scheduler.config)
    # at zero terminal signal an epsilon-network cannot tell the clean image: neither library is right there
    last = 998 if prediction_type == "epsilon" and schedule(torch.ones(1))[0] == 0 else 999
    x_t, output = torch.randn(2, 1, 2, 1, 1)
    for timestep in range(last + 1):
        t = torch.tensor([(timestep + 1) / 1000], dtype=torch.float64)
        theirs = scheduler.step(output, timestep, x_t).pred_original_sample
        ours = to_prediction(output, x_t, t, schedule, prediction_type).x0
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4 if prediction_type == "epsilon" else 1e-5)


def test_edm_prediction_is_pred_original_sample():
    scheduler, schedule = EDMEulerScheduler(), Karras()
    scheduler.set_timesteps(18)
    x_t, output = torch.randn(2, 1, 2, 1, 1)
    for timestep, t in zip(scheduler.timesteps, schedule.grid(18)[:-1], strict=True):
        theirs = scheduler.step(output, timestep, x_t).pred_original_sample
        torch.testing.assert_close(
            to_prediction(output, x_t, t[None], schedule, "edm").x0, theirs, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_without_signal_the_noise_is_the_state_whatever_the_network_says(prediction_type):
    t = torch.ones(4, dtype=torch.float64)
    x_t, output = torch.randn(2, 4, 2, 1, 1)
    prediction = to_prediction(output, x_t, t, SCHEDULES["zero_snr"], prediction_type)
    torch.testing.assert_close(prediction.eps, x_t, atol=0, rtol=0)
    assert prediction.x0.isfinite().all()


def test_an_unknown_prediction_type_is_named():
    x = torch.zeros(1, 2, 1, 1)
    with pytest.raises(ValueError, match="expected one of epsilon, .*, got 'velocity'"):
        to_prediction(x, x, TIMES[:1], SCHEDULES["flow"], "velocity")
    with pytest.raises(ValueError, match="expected one of epsilon, .*, got 'velocity'"):
        from_x0(x, x, TIMES[:1], SCHEDULES["flow"], "velocity")


@every_type
def test_images_keep_their_precision(schedule, prediction_type):
    x = torch.randn(len(TIMES), 2, 1, 1)
    assert to_prediction(x.bfloat16(), x, TIMES, schedule, prediction_type).x0.dtype == torch.float32


# --------------------------------------------------------------------------------------------------- guidance


class CountingOracle(Oracle):
    """Counts how often and with how many images it is called."""

    def forward(self, sample, timestep, class_labels=None):
        self.sizes = [*getattr(self, "sizes", []), len(sample)]
        return super().forward(sample, timestep, class_labels)


@every_type
def test_guidance_is_the_closed_form_in_one_call(schedule, prediction_type):
    oracle = CountingOracle(
        points((1, 0), (0, 1), (-1, -1)).flatten(1), 0.3, schedule, prediction_type, classes=(0, 1, 2)
    )
    denoiser = teacher_denoiser(oracle, num_classes=3)
    _, _, x_t = noisy(schedule)
    labels = torch.arange(len(x_t)) % 3
    w = torch.linspace(-1, 7, len(x_t), dtype=torch.float64)
    seen, _ = denoiser.guided_and_conditional(x_t, TIMES, {"class_labels": labels}, w)
    assert oracle.sizes == [2 * len(x_t)]
    conditional, unconditional = oracle.predict(x_t, TIMES, labels), oracle.predict(x_t, TIMES)
    expected = (1 + expand(w, x_t)) * conditional - expand(w, x_t) * unconditional
    torch.testing.assert_close(seen.x0, expected, atol=1e-6, rtol=0)
    # linear in the noise as well: the guided noise belongs to the guided clean image
    alpha, sigma = (expand(coefficient, x_t) for coefficient in schedule(TIMES))
    torch.testing.assert_close(alpha * seen.x0 + sigma * seen.eps, x_t, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("w", "which"), [(0.0, "cond"), (-1.0, "null")])
def test_weight_zero_is_conditional_and_minus_one_unconditional(w, which):
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction", conditional=True)
    denoiser = teacher_denoiser(oracle, num_classes=3)
    _, _, x_t = noisy(oracle.schedule)
    labels = torch.arange(len(x_t)) % 3
    conds = {"cond": {"class_labels": labels}, "null": {"class_labels": torch.full_like(labels, 3)}}
    guided, _ = denoiser.guided_and_conditional(x_t, TIMES, conds["cond"], w)
    torch.testing.assert_close(guided, denoiser(x_t, TIMES, conds[which]))


# ------------------------------------------------------------------------------------- the oracles themselves


@pytest.mark.parametrize("name", ["cosine", "flow", "karras", "trig"])
def test_a_mixture_of_equal_components_is_the_gaussian(name):
    schedule = SCHEDULES[name]
    mean = torch.tensor([0.4, -1.0], dtype=torch.float64)
    _, _, x_t = noisy(schedule)
    one, many = Gaussian(mean, 0.5, schedule, "sample"), Oracle(mean.expand(3, 2), 0.5, schedule, "sample")
    torch.testing.assert_close(many.predict(x_t, TIMES), one.predict(x_t, TIMES))


def test_an_oracle_is_the_regression_of_the_clean_image():
    """Its error is orthogonal to every function of the state: here constants, the state and the oracle itself."""
    oracle = three_clusters(SCHEDULES["cosine"], "sample")
    x_0 = oracle.draw(200_000)
    t = torch.full((len(x_0),), 0.5, dtype=torch.float64)
    x_t = oracle.schedule.add_noise(x_0, torch.randn_like(x_0), t)
    seen = oracle.predict(x_t, t)
    for probe in (torch.ones_like(x_t), x_t, seen, x_t**2):
        assert ((x_0 - seen) * probe).mean().abs() < 0.01
    assert (x_0 - seen).square().mean() < 0.9 * x_0.square().mean()


@pytest.mark.parametrize("name", ["cosine", "flow", "karras"])
def test_a_point_is_seen_from_anywhere(name):
    schedule = SCHEDULES[name]
    mean = torch.tensor([0.4, -1.0], dtype=torch.float64)
    _, _, x_t = noisy(schedule)
    point = Gaussian(mean, 0.0, schedule, "sample")
    torch.testing.assert_close(point.predict(x_t, TIMES), mean[:, None, None].expand_as(x_t))
