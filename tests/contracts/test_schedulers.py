"""Every scheduler of diffusers as every family's teacher: its process and its images are right, or it is refused."""

import json

import diffusers
import numpy as np
import pytest
import torch
from contracts.cases import asked_of, generators
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from stepdistill.diffusion.reading import FLOW_SCHEDULERS, VP_SCHEDULERS, read_schedule
from stepdistill.diffusion.samplers import DDIM, ConsistencySampler, sample
from stepdistill.diffusion.schedule import DiscreteVP, Karras, RectifiedFlow
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.export.contract import call_arguments
from stepdistill.export.generators import handed_on
from stepdistill.families.dit import DiT
from stepdistill.families.flux import Flux
from stepdistill.families.loading import families
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.sdxl import SDXL
from stepdistill.inference.solvers import make_solver
from stepdistill.losses.consistency import moved_to
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

EVERY = [name for name in dir(diffusers) if name.endswith("Scheduler") and name != "FlaxScheduler"]


def config_of(scheduler):
    return json.loads(scheduler.to_json_string())


def opened(name):
    """A scheduler with its own defaults; None where it needs arguments or a package that is not installed."""
    try:
        return getattr(diffusers, name)()
    except (TypeError, ImportError):
        return None


def default_config(name):
    """A scheduler's config with its own defaults, as far as they can be had."""
    scheduler = opened(name)
    return {"_class_name": name} if scheduler is None else config_of(scheduler)


@pytest.mark.parametrize("name", EVERY)
def test_a_process_is_read_as_its_scheduler_has_it_or_refused_by_name(name):
    """RELIABILITY row 26."""
    scheduler = opened(name)
    try:
        schedule, _ = read_schedule({"_class_name": name} if scheduler is None else config_of(scheduler))
    except ValueError as reason:
        assert name in str(reason)
        return
    timesteps = torch.arange(1000)
    if scheduler is None:  # it needs torchsde, and has betas like the others
        assert name == "DPMSolverSDEScheduler"
    elif isinstance(schedule, DiscreteVP):
        alpha, _ = schedule((timesteps + 1) / 1000)
        torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), atol=1e-6, rtol=0)
    elif isinstance(schedule, RectifiedFlow):
        alpha, sigma = schedule(scheduler.sigmas[:1000].double())
        assert torch.equal(alpha + sigma, torch.ones(len(sigma), dtype=torch.float64))
        torch.testing.assert_close(schedule.timestep(sigma).float(), scheduler.timesteps[: len(sigma)])
    else:
        check_edm(schedule, scheduler)


def check_edm(schedule, scheduler):
    assert isinstance(schedule, Karras)
    scheduler.set_timesteps(10)
    sigma = scheduler.sigmas[:10]
    t, x = schedule.time_of(sigma), torch.randn(10, 1, 2, 2)
    embedded = schedule.timestep(t).float()
    torch.testing.assert_close(embedded, scheduler.timesteps.float(), atol=1e-3, rtol=1e-4)
    seen = torch.cat([scheduler.scale_model_input(x[:1], scheduler.timesteps[0])])
    torch.testing.assert_close(schedule.network_input(x, t)[:1], seen)


# ------------------------------------------------------------------------------------------- every family


@pytest.fixture(scope="module")
def teachers():
    """One teacher a family, whose scheduler is exchanged."""
    return {name: cls.tiny() for name, cls in families().items()}


def with_scheduler(family, name):
    """The same teacher with another scheduler."""
    if family.pipe is None:
        return Pixel(family.network, default_config(name), family.null_class)
    family.pipe.scheduler = opened(name)
    frames = {"frames": family.image_shape[1]} if family.makes_clips else {}
    return type(family)(family.pipe, resolution=family.image_shape[-2:], **frames)


@torch.no_grad()
def apart(family, sampler):
    """The largest difference between the images of the family's pipeline and of our sampler."""
    pipeline, own = family.pipeline(family.network, sampler, 1.0), generators(2, 0)
    pipeline.set_progress_bar_config(disable=True)
    call = call_arguments(family, pipeline, sampler, 1.0)
    with handed_on(pipeline, own):
        images, *_ = pipeline(**asked_of(family, 2), generator=own, output_type="np", return_dict=False, **call)
    own = generators(2, 0)
    start = family.schedule.initial_noise(torch.stack([torch.randn(family.sample_shape, generator=g) for g in own]))
    denoise = Denoiser(family, CopyBank(family.network), "teacher").conditioned(family.example_cond(range(2)))
    expected = family.decode(sample(denoise, sampler, start, lambda x: family.later_noise(own)))
    return (torch.from_numpy(np.asarray(images)).movedim(-1, 1) - expected).abs().max()


REPRESENTATIVE = {
    "DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "CMStochasticIterativeScheduler",
}  # fmt: skip
"""One of every kind; by the test above, the other schedulers with betas have the process of the first."""


def walk(teachers, names):
    """How many (family, scheduler) are refused, and how many are sampled as our sampler does."""
    refused = right = 0
    for name in names:
        for family in teachers.values():
            if opened(name) is None:
                continue
            try:
                teacher = with_scheduler(family, name)
            except ValueError as reason:
                assert name in str(reason), (name, family)
                refused += 1
                continue
            for sampler in samplers(teacher):
                assert apart(teacher, sampler) < 1e-4, (name, type(family), sampler.name)  # 0 levels of 255
            right += 1
    return refused, right


def samplers(teacher):
    grid = teacher.schedule.grid
    yield DDIM(teacher.schedule, grid(2))
    yield ConsistencySampler(teacher.schedule, grid(1 if isinstance(teacher.schedule, Karras) else 2))


def test_a_family_samples_every_process_that_it_accepts(teachers):
    """RELIABILITY row 26."""
    assert walk(teachers, sorted(REPRESENTATIVE)) == (36, 24)


@pytest.mark.parametrize("make", [SD.tiny, SDXL.tiny, Pixel.tiny, SD3.tiny])
def test_a_family_samples_at_levels_of_ones_own(make):
    teacher = make()
    for steps in (2, 3, 4):
        grid = teacher.schedule.grid(steps)
        times = moved_to(1.4, teacher.schedule, grid, teacher.schedule.grid(2)[1])
        assert not torch.equal(times, grid)
        assert apart(teacher, ConsistencySampler(teacher.schedule, times)) < 1e-4  # 0 levels of 255


@pytest.mark.product
def test_every_scheduler_with_every_family(teachers):
    refused, right = walk(teachers, EVERY)
    print(f"{refused} refused, {right} right")
    assert refused and right


@pytest.mark.parametrize("make", [SD.tiny, SDXL.tiny, Pixel.tiny])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_edm_teacher_is_read_as_its_own_pipeline_reads_it(make, prediction_type):
    """The first step of EDM's own scheduler, with its scaling of the input and its sign of the output."""
    family, scheduler = make(), EDMEulerScheduler(sigma_max=20.0, prediction_type=prediction_type)
    if family.pipe is None:
        teacher = Pixel(family.network, config_of(scheduler), family.null_class)
    else:
        family.pipe.scheduler = scheduler
        teacher = type(family)(family.pipe)
    sampler = DDIM(teacher.schedule, teacher.schedule.grid(3))
    assert to_diffusers(sampler, teacher.scheduler_config).config.prediction_type == prediction_type
    scheduler.set_timesteps(3)
    cond, x = teacher.example_cond(range(2)), 20 * torch.randn(2, *teacher.sample_shape)
    seen = []
    hook = teacher.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    t = sampler.times[:1].expand(2)
    with torch.no_grad():
        prediction = Denoiser(teacher, CopyBank(teacher.network), "teacher")(x, t, cond)
        output = Denoiser(teacher, CopyBank(teacher.network), "teacher").raw(x, t, cond)
    hook.remove()
    torch.testing.assert_close(seen[0], scheduler.scale_model_input(x, scheduler.timesteps[0]))
    expected = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample
    torch.testing.assert_close(prediction.x0, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- what a config may say


@pytest.mark.parametrize("kind", ["sigmoid", "laplace", "exp"])
def test_betas_that_ddim_does_not_know_are_the_schedulers_own(kind):
    own = HeunDiscreteScheduler(beta_schedule=kind) if kind == "exp" else DDPMScheduler(beta_schedule=kind)
    schedule, _ = read_schedule(config_of(own))
    alpha, _ = schedule((torch.arange(1000).double() + 1) / 1000)
    torch.testing.assert_close(alpha**2, own.alphas_cumprod.double(), atol=1e-7, rtol=0)
    for sampler in (DDIM(schedule, schedule.grid(2)), ConsistencySampler(schedule, schedule.grid(2))):
        exported = to_diffusers(sampler, config_of(own))
        again = type(exported).from_config(json.loads(exported.to_json_string()))
        assert torch.equal(again.alphas_cumprod, own.alphas_cumprod)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (config_of(DDIMScheduler()) | {"beta_schedule": "sigmoid"}, "DDIMScheduler knows no beta_schedule 'sigmoid'"),
        (config_of(DDIMScheduler()) | {"prediction_type": "noise"}, "prediction_type: expected one of .*'noise'"),
        (config_of(EDMEulerScheduler()) | {"prediction_type": "sample"}, "EDMEulerScheduler: prediction_type"),
        (
            config_of(EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")),
            "EulerDiscreteScheduler: timestep_type: expected 'discrete', got 'continuous'",
        ),
        (config_of(UniPCMultistepScheduler()) | {"use_flow_sigmas": True}, "got True and 'epsilon'"),
        (config_of(UniPCMultistepScheduler()) | {"prediction_type": "flow_prediction"}, "got False and 'flow"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        (config_of(DDIMScheduler(rescale_betas_zero_snr=True)), "'epsilon' at zero terminal SNR"),
    ],
)
def test_what_is_no_process_of_a_teacher_is_refused(config, why):
    """RELIABILITY row 26."""
    with pytest.raises(ValueError, match=why):
        read_schedule(config)


def test_every_name_that_is_read_is_a_scheduler():
    ours = {"DoubleStepScheduler", "NoiseCorrectedScheduler"}
    assert {*VP_SCHEDULERS, *FLOW_SCHEDULERS} - ours <= set(EVERY)


def test_a_solver_that_a_pipeline_does_not_scale_for_is_refused():
    """DiTPipeline goes on with the scaled state, so Euler's and Heun's images would be wrong."""
    family = DiT.tiny()
    for name in ("Euler", "Heun"):
        with pytest.raises(ValueError, match="DiTPipeline does not scale"):
            family.teacher_pipeline(make_solver(name, family.scheduler_config))
    solver = make_solver("UniPC", family.scheduler_config)
    assert family.teacher_pipeline(solver).scheduler is solver


def test_channels_that_do_not_fit_are_refused_with_both_numbers():
    """RELIABILITY row 26."""
    for cls in (SD, DiT, Flux):
        family = cls.tiny()
        family.pipe.vae.register_to_config(latent_channels=8)
        with pytest.raises(ValueError, match="expected latents of 4 channels, .*got latent_channels 8"):
            type(family)(family.pipe)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="got 1 in and 2 out"):
        Pixel(network, default_config("DDIMScheduler"))
