"""Every method on flow and EDM teachers, at its own default of steps: it trains and is exported, or is refused."""

import pytest
from contracts.cases import PIXELS, case, pipeline_images, reference_images, refusal, train_student

from stepdistill import load_pipeline
from stepdistill.families.base import MIN_ALPHA
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.methods import find_method, method_names

REFUSED = {
    # noised again at several steps, which diffusers' EDM schedulers do for consistency models only
    ("add", "pixel-edm"), ("ladd", "pixel-edm"), ("dmd2", "pixel-edm"), ("sid", "pixel-edm"),
    ("pi_flow", "pixel-edm"),  # policies are followed on flows and on processes with betas
}  # fmt: skip
"""What no scheduler can express; a method or a kind that is missing here is trained."""

EVERY = [(method, kind) for method in method_names() for kind in ("pixel-flow", "pixel-edm")]


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_a_method_trains_and_exports_or_is_refused(tmp_path, method, kind):
    family = PIXELS[kind]()
    assert (refusal(method, family) is not None) == ((method, kind) in REFUSED)
    if (method, kind) in REFUSED:
        return
    check_student(tmp_path, family, method)


@pytest.mark.parametrize("kind", ["pixel", "pixel-unconditional"])
@pytest.mark.parametrize("method", ["ict", "ect"])
def test_a_student_that_starts_below_pure_noise_is_sampled_so_by_a_bare_call(tmp_path, method, kind):
    """The largest noise level of the default is below that of cosine betas."""
    check_student(tmp_path, PIXELS[kind](), method)


def check_student(folder, family, method):
    run = train_student(folder, family, method, "copy", options=as_shipped(method))
    images = pipeline_images(load_pipeline(run.folder / "pipeline"), run.family, 3, seed=7)
    assert (images - reference_images(run, 3, seed=7)).abs().max() < 1e-5
    assert images.std() > 0.01


@pytest.mark.parametrize("method", method_names())
def test_a_teacher_of_the_noise_is_guarded_by_one_rule_in_every_method(method):
    """Where its first step sees no signal, a student predicts the velocity, or the method is refused."""
    config = build(find_method(method).Config, case(method).options, "method")
    linear = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    assert refusal(method, Pixel.tiny(scheduler=linear | {"prediction_type": "epsilon"})) is None
    family = PIXELS["pixel-epsilon"]()
    start = find_method(method).make_sampler(config, family).times[0]
    signal, _ = family.schedule(start)
    guarded = find_method(method).needs_velocity(config, family) or signal >= MIN_ALPHA
    reason = refusal(method, family)
    assert (reason is None) if guarded else ("almost zero" in reason)


STAGED = {"tract": {"steps": 2, "via": [4]}, "guided": {"steps": 4, "start": 8}}
"""Methods that need other options with them."""


def as_shipped(method):
    """The steps of a method's own default, or two where that is one and it can have more."""
    small, steps = case(method).options, build(find_method(method).Config, {}, "method").steps
    return STAGED.get(method, {} if "start" in small else {"steps": max(steps, small.get("steps", steps))})
