"""The observed family: equal to every hand-written one, and to the calls of pipelines that have none."""

import inspect

import numpy as np
import pytest
import torch
from contracts.cases import generators, pipeline_images, save_teacher, train_student
from families.unknown_pipelines import UNKNOWN, cog_view4, make

from stepdistill import load_pipeline
from stepdistill.batch import RawBatch
from stepdistill.diffusion.native_grids import StepShiftedFlow
from stepdistill.diffusion.samplers import DDIM, sample
from stepdistill.export.contract import call_arguments
from stepdistill.families.config import TeacherConfig
from stepdistill.families.dit import DiT
from stepdistill.families.flux import Flux
from stepdistill.families.flux2 import Flux2
from stepdistill.families.latent import TextToImageFamily
from stepdistill.families.loading import families, load_teacher
from stepdistill.families.observation.replay import ROWS, check_decodes, check_repeats, find_null, read_calls
from stepdistill.families.observation.watching import Watched
from stepdistill.families.observed import Observed, tiny_aura_flow
from stepdistill.families.pixart import PixArt
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.wan import Wan
from stepdistill.methods import find_method
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

LONG_AND_SHORT = {"zimage": "is a list of embeddings of several lengths", "qwen_image": "has another length with other"}
"""Families whose networks take prompts of several lengths, and what is said of them."""
KNOWN = {
    name: cls.tiny
    for name, cls in families().items()
    if issubclass(cls, TextToImageFamily) and cls is not Observed and name not in LONG_AND_SHORT
}


class Schnell(Flux):
    """With prompts as long as its pipeline's call makes them by default, which observation keeps to."""

    sequence_length = 512


KNOWN |= {
    "flux-schnell": lambda: Schnell.tiny(guidance_embeds=False), "flux2-dev": lambda: Flux2.tiny(guidance_embeds=True),
    "sd-v": lambda: SD.tiny(prediction_type="v_prediction"), "sd3.5": lambda: SD3.tiny(dual_attention=True),
    "pixart-sigma": lambda: PixArt.tiny(sigma=True),
}  # fmt: skip
PROMPTS = ["a cat", "two dogs on a sofa"]


def observe(family):
    frames = family.image_shape[1] if family.makes_clips else None
    return Observed(family.pipe, resolution=family.image_shape[-2:], frames=frames)


@pytest.fixture(scope="module", params=KNOWN)
def both(request):
    """A hand-written family, and the same pipeline observed."""
    family = KNOWN[request.param]()
    return family, observe(family)


def close(a, b, bound=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= bound * b.abs().max().clamp(min=1)


@torch.no_grad()
def test_it_calls_the_network_as_the_hand_written_family_does(both):
    known, observed = both
    assert observed.sample_shape == known.sample_shape and observed.image_shape == known.image_shape
    assert observed.prediction_type == known.prediction_type
    x_t, t = torch.randn(2, *known.sample_shape), torch.tensor([0.3, 0.9], dtype=torch.float64)
    theirs, ours = (family.embed(PROMPTS) for family in both)
    close(observed.call(observed.network, x_t, t, ours), known.call(known.network, x_t, t, theirs))
    if observed.null:
        ours, theirs = observed.null_cond(ours), known.null_cond(theirs)
        close(observed.call(observed.network, x_t, t, ours), known.call(known.network, x_t, t, theirs))


def test_it_has_a_null_condition_where_the_hand_written_family_has(both):
    known, observed = both
    try:
        known.null_cond(known.embed(PROMPTS))
    except ValueError:
        assert not observed.null
        with pytest.raises(ValueError, match="expected guidance_scale: 1"):
            observed.check_guidance(3.0)
    else:
        assert observed.null


@torch.no_grad()
def test_it_decodes_noises_and_draws_as_the_hand_written_family_does(both):
    known, observed = both
    x0, t = torch.randn(2, *known.sample_shape), torch.linspace(0.01, 1, 7)
    close(observed.decode(x0), known.decode(x0))
    for ours, theirs in zip(observed.schedule(t), known.schedule(t), strict=True):
        close(ours, theirs, 1e-6)
    if type(known.schedule) is not StepShiftedFlow:  # what one call shows is the shift of its own number of steps
        close(observed.schedule.grid(4), known.schedule.grid(4), 1e-6)
    assert torch.equal(*(one.later_noise(generators(2, 0)) for one in both))
    assert observed.hands_generators_on == known.hands_generators_on
    assert observed.scales_states == known.scales_states and observed.loads_lora == known.loads_lora


def test_decoding_has_the_gradient_of_the_vae(both):
    known, observed = both
    x0, gradients = torch.randn(1, *known.sample_shape), []
    for family in both:
        x = x0.clone().requires_grad_()
        family.decode(x).square().sum().backward()
        gradients.append(x.grad)
    close(*gradients, bound=1e-4)
    assert gradients[0].abs().max() > 0


@torch.no_grad()
def test_labels_and_guidance_within_one_batch_are_observed_too():
    """DiT: learned variance, doubled states, class labels. The family takes prompts; what it observes with does not."""
    known = DiT.tiny()
    watched, labels = Watched(known.pipe, "transformer", {}), list(range(sum(ROWS)))
    replay, record = read_calls(watched, "class_labels", labels, {"guidance_scale": 1.0})
    check_repeats(replay, record, replay.condition(labels[: ROWS[0]]))
    check_decodes(replay, record, 0)
    null = find_null(replay, labels[: ROWS[0]], {"guidance_scale": 3.0})
    (name,) = null
    assert null[name].tolist() == [1000]
    x_t, t, cond = torch.randn(2, *known.sample_shape), torch.tensor([0.3, 0.9]), known.example_cond([3, 4])
    ours = replay.call(known.network, x_t, t, {name: cond["class_labels"]})
    close(ours, known.call(known.network, x_t, t, cond))


# --------------------------------------------------------------------------------- pipelines without a family

QUICK = ("cog_view3", "ltx")
OTHERS = [pytest.param(name, marks=pytest.mark.product) for name in UNKNOWN if name not in QUICK]


@pytest.fixture(scope="module", params=["aura_flow", *QUICK, *OTHERS])
def unknown(request):
    if request.param == "aura_flow":
        return Observed.tiny()
    pipe, options = make(request.param)
    return Observed(pipe, **options)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2])
def test_an_unknown_pipeline_draws_what_our_sampler_draws(unknown, steps):
    """Under a student's scheduler, of which nothing was observed while it was opened."""
    sampler = DDIM(unknown.schedule, unknown.schedule.grid(steps))
    unknown.check_sampler(sampler)
    pipeline = unknown.pipeline(unknown.network, sampler)
    pipeline.set_progress_bar_config(disable=True)
    call = call_arguments(unknown, pipeline, sampler, 1.0)
    given = {"generator": generators(2, 0), "output_type": "np", "return_dict": False}
    images = torch.from_numpy(np.asarray(pipeline(PROMPTS, **given, **call)[0])).movedim(-1, 1)
    noise = torch.stack([torch.randn(unknown.sample_shape, generator=one) for one in generators(2, 0)])
    denoise = Denoiser(unknown, CopyBank(unknown.network), "teacher").conditioned(unknown.embed(PROMPTS))
    close(unknown.decode(sample(denoise, sampler, unknown.schedule.initial_noise(noise))), images, 1e-4)
    assert images.std() > 1e-3


def test_an_unknown_pipeline_is_guided(unknown):
    assert unknown.null, unknown._why_unguided


# ---------------------------------------------------------------------------------------- students


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lcm", {"guidance_scale": 3.0}), ("progressive", {}),
        pytest.param("tdm", {}, marks=pytest.mark.product),
        pytest.param("dmd2", {"gan_weight": 0.0}, marks=pytest.mark.product),
        pytest.param("sid", {}, marks=pytest.mark.product),
    ],
)  # fmt: skip
def test_methods_train_and_export_without_images(tmp_path, method, options):
    run = train_student(tmp_path, Observed.tiny(), method, "adapter", options=options)
    assert run.config.data.name == ("pairs" if find_method(method).needs_images else "prompts")
    pipeline = load_pipeline(run.folder / "pipeline")
    assert type(pipeline).__name__ == "AuraFlowPipeline"
    assert pipeline_images(pipeline, run.family, 2, seed=1).isfinite().all()


# ---------------------------------------------------------------------------------------- what is refused


def refused(pipe, why, **options):
    with pytest.raises(ValueError, match=why) as said:
        Observed(pipe, **{"resolution": 16, **options})
    assert str(said.value).startswith("teacher.family: ") and "\n" not in str(said.value)


def test_a_saved_pipeline_without_a_family_is_observed_by_detection(tmp_path):
    folder = save_teacher(Observed.tiny(), tmp_path)
    assert type(load_teacher(TeacherConfig(path=str(folder), resolution=16))) is Observed
    with pytest.raises(ValueError, match="cannot be observed: its call with prompts alone fails: "):
        load_teacher(TeacherConfig(path=str(folder)))  # the call's default is 1024 pixels: too many for the miniature


def test_a_known_pipeline_is_observed_on_request(tmp_path):
    folder = save_teacher(SD.tiny(), tmp_path)
    assert type(load_teacher(TeacherConfig(path=str(folder), family="observed"))) is Observed
    assert type(load_teacher(TeacherConfig(path=str(folder)))) is SD


@pytest.mark.parametrize("name", LONG_AND_SHORT)
def test_prompts_of_several_lengths_are_refused(name):
    refused(families()[name].tiny().pipe, LONG_AND_SHORT[name])


def test_padding_to_the_longest_prompt_is_refused():
    refused(cog_view4(), "has another length with other", resolution=32)


def test_several_networks_are_refused():
    pipe = Wan.tiny().pipe
    pipe.register_modules(transformer_2=pipe.transformer)
    refused(pipe, "expected one network, transformer or unet, got transformer, transformer_2")


def test_a_network_that_remembers_is_refused():
    pipe = tiny_aura_flow()
    forward, calls = pipe.transformer.forward, []

    def remembering(*args, **kwargs):
        calls.append(args)
        return tuple(output * len(calls) for output in forward(*args, **kwargs))

    remembering.__signature__ = inspect.signature(forward)
    pipe.transformer.forward = remembering
    refused(pipe, "what it gives to its scheduler|repeated at timestep")


def test_a_tail_that_is_not_repeated_is_refused():
    pipe = tiny_aura_flow()
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **kwargs: decode(z + torch.randn_like(z), **kwargs)
    refused(pipe, "decoded again, are not its images")


def test_a_scheduler_that_the_pipeline_does_not_scale_for_is_refused():
    from diffusers import EulerDiscreteScheduler

    pipe = tiny_aura_flow()
    pipe.scheduler = EulerDiscreteScheduler()
    refused(pipe, "EulerDiscreteScheduler expects states times|its first state")


def test_a_guidance_input_of_a_network_that_has_none_is_refused():
    refused(tiny_aura_flow(), "teacher.guidance_scale: got 3.5", guidance_scale=3.5)


def test_images_are_refused_before_training(tmp_path):
    family = Observed.tiny()
    with pytest.raises(ValueError, match=r"data.name: expected 'prompts' or 'pairs'"):
        train_student(tmp_path, family, "lcm", "copy", data={"name": "images", "path": str(tmp_path)})
    with pytest.raises(ValueError, match="encodes no images"):
        family.encode(RawBatch(torch.zeros(1, *family.image_shape), None, ("one",), (0,)))


def test_critics_on_the_networks_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no blocks of"):
        train_student(tmp_path, Observed.tiny(), "ladd", "copy")
