"""The observed family: equal to every hand-written one, and to the calls of pipelines that have none."""

import functools
import inspect

import numpy as np
import pytest
import torch
from contracts.cases import generators, pipeline_images, save_teacher, train_student
from contracts.observed_teachers import KNOWN, VARIANTS, observe, observe_unknown
from families.unknown_pipelines import UNKNOWN

from stepdistill import load_pipeline
from stepdistill.batch import RawBatch
from stepdistill.diffusion.samplers import DDIM, sample
from stepdistill.export.contract import call_arguments
from stepdistill.families.config import TeacherConfig
from stepdistill.families.dit import DiT
from stepdistill.families.loading import load_teacher
from stepdistill.families.observation.arguments import Arguments
from stepdistill.families.observation.checking import check_decodes, check_repeats, find_null
from stepdistill.families.observation.reading import find_lengths
from stepdistill.families.observation.replay import ROWS, read_calls
from stepdistill.families.observation.watching import Watched
from stepdistill.families.observed import Observed
from stepdistill.families.sd import SD
from stepdistill.families.tiny import tiny_aura_flow
from stepdistill.families.wan import Wan
from stepdistill.methods import find_method
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

PROMPTS = ["a cat", "two dogs on a sofa"]


PAIRS = [pytest.param(name, marks=pytest.mark.product if name in VARIANTS else ()) for name in KNOWN]


@pytest.fixture(scope="module", params=PAIRS)
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
    assert type(observed.schedule) is type(known.schedule)
    for steps in (1, 2, 4):
        close(observed.schedule.grid(steps), known.schedule.grid(steps), 1e-6)
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


ROUNDED = ("chroma", "flux", "flux-schnell", "qwen_image")
"""Families that round the time as their pipeline does in bfloat16."""
HALVES = [
    pytest.param(name, marks=() if name == "wan-5b" else pytest.mark.product) for name in KNOWN if name not in ROUNDED
]


@torch.no_grad()
@pytest.mark.parametrize("name", HALVES)
def test_networks_in_half_precision_are_called_as_the_hand_written_family_does(name):
    """Wan 2.2 TI2V-5B: times of one a token, too, stay exact."""
    known = KNOWN[name]()
    known.network.to(torch.bfloat16)
    observed = observe(known)
    assert bool(observed.null) == (observed.guidance_convention != "an input of the network")
    x_t, t = torch.randn(2, *known.sample_shape), torch.tensor([0.3, 0.9], dtype=torch.float64)
    ours, theirs = (one.call(one.network, x_t, t, one.embed(PROMPTS)).float() for one in (observed, known))
    close(ours, theirs, 2e-2 if observed.replay.lengths else 0)  # one by one, sums are rounded otherwise


@torch.no_grad()
def test_labels_and_guidance_within_one_batch_are_observed_too():
    """DiT: learned variance, doubled states, class labels. The family takes prompts; what it observes with does not."""
    known = DiT.tiny()
    watched, labels = Watched(known.pipe, "transformer", {}), list(range(sum(ROWS)))
    replay, (record,) = read_calls(watched, "class_labels", labels, {"guidance_scale": 1.0})
    check_repeats(replay, record)
    check_decodes(replay, record, 0)
    null, _ = find_null(replay, labels[: ROWS[0]], {"guidance_scale": 3.0})
    (name,) = null
    assert null[name].tolist() == [1000]
    x_t, t, cond = torch.randn(2, *known.sample_shape), torch.tensor([0.3, 0.9]), known.example_cond([3, 4])
    ours = replay.call(known.network, x_t, t, {name: cond["class_labels"]})
    close(ours, known.call(known.network, x_t, t, cond))


def test_what_holds_places_for_the_image_too_gets_so_many_more():
    def call(rows, length):
        shapes = {"text": (rows, length, 4), "mask": (rows, length + 16), "size": (rows, 2), "x": (rows, 3, 4, 4)}
        return Arguments.of(lambda **kwargs: None, (), {name: torch.zeros(shape) for name, shape in shapes.items()})

    assert find_lengths(call(3, 7), call(5, 9), (3, 5), "x", 100) == {"text": 100, "mask": 116}


# --------------------------------------------------------------------------------- pipelines without a family

QUICK = ("cog_view4", "ltx")
OTHERS = [pytest.param(name, marks=pytest.mark.product) for name in UNKNOWN if name not in QUICK]


opened = functools.cache(observe_unknown)


@pytest.fixture(scope="module", params=["aura_flow", *QUICK, *OTHERS])
def unknown(request):
    return Observed.tiny() if request.param == "aura_flow" else opened(request.param)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2])
def test_an_unknown_pipeline_draws_what_our_sampler_draws(unknown, steps):
    """Under a student's scheduler, of which nothing was observed while it was opened."""
    sampler = DDIM(unknown.schedule, unknown.schedule.grid(steps))
    unknown.check_sampler(sampler)
    pipeline = unknown.pipeline(unknown.network, sampler)
    pipeline.set_progress_bar_config(disable=True)
    call = call_arguments(unknown, pipeline, sampler, 1.0)
    call |= {"output_type": "np", "return_dict": False}
    # a call of CogView 4 fills prompts up to the longest, and its images depend on that
    alone = type(pipeline).__name__ == "CogView4Pipeline"
    every = [*zip(PROMPTS, generators(2, 0), strict=True)]
    parts = [[one] for one in every] if alone else [every]
    drawn = [pipeline([p for p, _ in part], generator=[g for _, g in part], **call)[0] for part in parts]
    images = np.concatenate([np.asarray(each) for each in drawn])
    images = torch.from_numpy(images).movedim(-1, 1)
    noise = torch.stack([torch.randn(unknown.sample_shape, generator=one) for one in generators(2, 0)])
    denoise = Denoiser(unknown, CopyBank(unknown.network), "teacher").conditioned(unknown.embed(PROMPTS))
    close(unknown.decode(sample(denoise, sampler, unknown.schedule.initial_noise(noise))), images, 1e-4)
    assert images.std() > 1e-3


def test_times_whose_fractions_a_call_drops_are_refused():
    """CogView 4: three steps would be at 666.67 thousandths of noise, and its call tells the network 666."""
    family = opened("cog_view4")
    with pytest.raises(ValueError, match="a call of CogView4Pipeline cannot be told the 3 steps of this sampler"):
        family.check_sampler(DDIM(family.schedule, family.schedule.grid(3)))


def test_an_unknown_pipeline_is_guided(unknown):
    if unknown.guidance_convention == "an input of the network":
        assert "guidance" in unknown.replay.conditions and not unknown.null
    else:
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


def test_sizes_that_the_pipeline_does_not_make_are_refused():
    family = Observed.tiny()
    family.check_size((16, 32), "shapes[0]")
    with pytest.raises(ValueError, match=r"shapes\[1\]: got \[16, 17\]: .* divisible by"):
        family.check_size((16, 17), "shapes[1]")
    refused(family.pipe, "its call makes no frames of 5 asked for", frames=5)


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


def test_noise_levels_that_are_not_those_of_the_timesteps_are_refused(monkeypatch):
    from diffusers import FlowMatchEulerDiscreteScheduler

    set_timesteps = FlowMatchEulerDiscreteScheduler.set_timesteps

    def quieter(self, *args, **kwargs):
        set_timesteps(self, *args, **kwargs)
        self.sigmas = self.sigmas * 0.9

    functools.update_wrapper(quieter, set_timesteps)  # whose signature pipelines ask for
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "set_timesteps", quieter)
    refused(tiny_aura_flow(), "its scheduler steps from noise levels")


def test_a_guidance_input_of_a_network_that_has_none_is_refused():
    refused(tiny_aura_flow(), "teacher.guidance_scale: got 3.5", guidance_scale=3.5)


def test_images_are_refused_before_training(tmp_path):
    family = Observed.tiny()
    with pytest.raises(ValueError, match=r"data.name: expected 'prompts' or 'pairs'"):
        train_student(tmp_path, family, "lcm", "copy", data={"name": "images", "path": str(tmp_path / "images")})
    with pytest.raises(ValueError, match="encodes no images"):
        family.encode(RawBatch(torch.zeros(1, *family.image_shape), None, ("one",), (0,)))


def test_critics_on_the_networks_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no blocks of"):
        train_student(tmp_path, Observed.tiny(), "ladd", "copy")
