"""Every family's miniature against diffusers: its noise, its predictions, its stock pipeline's calls, its files."""

import contextlib
import inspect

import pytest
import torch
from contracts.cases import PIXELS, pipeline_images, save_teacher, teacher_section
from contracts.observed_teachers import OBSERVED
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill import load_pipeline
from stepdistill.batch import RawBatch
from stepdistill.diffusion.reading import noise_process
from stepdistill.diffusion.samplers import DDIM
from stepdistill.diffusion.schedule import DiscreteVP, Karras, RectifiedFlow
from stepdistill.discriminators.heads import aspect_of, grid_shape
from stepdistill.export.contract import call_arguments
from stepdistill.families.chroma import Chroma
from stepdistill.families.config import TeacherConfig
from stepdistill.families.flux import Flux
from stepdistill.families.flux2 import Flux2
from stepdistill.families.loading import families, load_teacher
from stepdistill.families.pixart import PixArt
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.wan import Wan
from stepdistill.networks.activation_checkpointing import enable_checkpointing
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.networks.hooks import middle_block

MINIATURES = {name: cls.tiny for name, cls in families().items()} | PIXELS
MINIATURES |= {
    "flux-schnell": lambda: Flux.tiny(guidance_embeds=False),
    "sd3.5": lambda: SD3.tiny(dual_attention=True),
    "flux2-dev": lambda: Flux2.tiny(guidance_embeds=True),
    "sd-v": lambda: SD.tiny(prediction_type="v_prediction"),
    "pixart-sigma": lambda: PixArt.tiny(sigma=True),
}
LOSSLESS = {"pixel"}  # families whose decode(encode(images)) gives the images back


SLOW = {"wan-5b": lambda: Wan.tiny(residual=True)} | OBSERVED
EVERY = MINIATURES | SLOW
TEACHERS = [*MINIATURES, *(pytest.param(name, marks=pytest.mark.product) for name in SLOW)]


@pytest.fixture(params=TEACHERS)
def family(request):
    return EVERY[request.param]()


@pytest.fixture(params=TEACHERS, scope="module")
def shared(request):
    """One for all tests that only call its network."""
    return EVERY[request.param]()


def states(family, count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((count, *family.sample_shape), generator=generator) for _ in range(2)]


def denoiser_of(family):
    return Denoiser(family, CopyBank(family.network), "teacher")


# ------------------------------------------------------------------------------------------------ processes


def test_add_noise_is_the_schedulers_at_every_timestep(shared):
    family, schedule, total = shared, shared.schedule, 1000
    index = torch.arange(total)
    x0, noise = torch.randn(total, 1, 2, 2), torch.randn(total, 1, 2, 2)
    if isinstance(schedule, DiscreteVP):
        t = (index + 1) / schedule.num_timesteps
        expected = DDIMScheduler(**noise_process(family.scheduler_config)).add_noise(x0, noise, index)
    elif isinstance(schedule, RectifiedFlow):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=schedule.shift)
        t = scheduler.sigmas[:total].double()
        expected = scheduler.scale_noise(x0, scheduler.timesteps, noise)
    else:
        assert isinstance(schedule, Karras)
        scheduler = edm_scheduler(schedule)
        scheduler.set_timesteps(total)
        t = schedule.time_of(scheduler.sigmas[:total])
        expected = scheduler.add_noise(x0, noise, scheduler.timesteps)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t.double()), expected, atol=2e-5, rtol=1e-5)


def edm_scheduler(schedule):
    return EDMEulerScheduler(schedule.sigma_min, schedule.sigma_max, schedule.sigma_data)


def original_sample(family, output, t, x_t):
    """The scheduler's own reading of a network's output as a clean image."""
    schedule = family.schedule
    if isinstance(schedule, DiscreteVP):
        scheduler = DDIMScheduler(**noise_process(family.scheduler_config), clip_sample=False)
        scheduler.set_timesteps(schedule.num_timesteps)
        return scheduler.step(output, round(schedule.timestep(t).item()), x_t).pred_original_sample
    if isinstance(schedule, RectifiedFlow):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[t.item()])  # a single step to sigma = 0 lands on the clean image
        return scheduler.step(output, scheduler.timesteps[0], x_t).prev_sample
    scheduler = edm_scheduler(schedule)
    _, sigma = schedule(t)
    return scheduler.precondition_outputs(x_t, output, sigma.float())


@pytest.mark.parametrize("t", [1.0, 0.7, 0.25, 0.001])
def test_the_prediction_is_the_schedulers_pred_original_sample(shared, t):
    family, (x_t, _) = shared, states(shared, 2)
    x_t = family.schedule.initial_noise(x_t)
    t = torch.tensor(t, dtype=torch.float64)
    denoiser, cond = denoiser_of(family), family.example_cond(range(2))
    with torch.no_grad():
        output = denoiser.raw(x_t, t.expand(2), cond)
        prediction = denoiser(x_t, t.expand(2), cond)
    expected = original_sample(family, output, t, x_t)
    scale = expected.abs().max().clamp(min=1)  # an epsilon-prediction at t = 1 is divided by a small alpha
    torch.testing.assert_close(prediction.x0 / scale, expected / scale, atol=1e-5, rtol=0)
    again = family.schedule.add_noise(prediction.x0, prediction.eps, t.expand(2))
    torch.testing.assert_close(again, x_t, atol=2e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_our_call_is_the_pipelines_own(family, scale):
    if scale != 1 and not can_be_guided(family):
        pytest.skip("this teacher knows no null condition")
    for ours, theirs in our_steps(family, scale):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def our_steps(family, scale):
    """The states to which both of two steps lead, by our call and by the pipeline's, in units of the larger one."""
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    pipeline, seen = family.pipeline(family.network, sampler, scale), []
    step = pipeline.scheduler.step

    def spy(model_output, t, sample, *args, **kwargs):
        stepped = step(model_output, t, sample, *args, **kwargs)
        seen.append((family.unpack(sample), family.unpack(stepped[0])))
        return stepped

    pipeline.scheduler.step = spy
    options = call_arguments(family, pipeline, sampler, scale)
    pipeline_images(pipeline, family, 3, seed=0, **options)
    denoiser, cond = denoiser_of(family), family.example_cond(range(3))
    assert len(seen) == 2
    for i, (x_t, stepped) in enumerate(seen):
        x_t = x_t[:3]  # DiTPipeline keeps a second copy under guidance
        t, s = (sampler.times[j].expand(3) for j in (i, i + 1))
        with torch.no_grad():
            prediction = denoiser(x_t, t, cond) if scale == 1 else guide(denoiser, x_t, t, cond, scale)
        ours, scale_of = sampler.step(prediction, t, s, torch.randn_like), stepped.abs().max().clamp(min=1)
        yield ours / scale_of, stepped[:3] / scale_of


def can_be_guided(family):
    try:
        family.null_cond(family.example_cond(range(3)))
    except ValueError:
        return False
    return True


def guide(denoiser, x_t, t, cond, scale):
    return denoiser.guided_and_conditional(x_t, t, cond, scale - 1)[0]


def test_chroma_is_not_recomputed_without_its_mask():
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        enable_checkpointing(Chroma.tiny().network, lambda: (contextlib.nullcontext(), contextlib.nullcontext()))


# ---------------------------------------------------------------------------------------------------- files


def test_saved_and_loaded_it_makes_the_same_images(family, tmp_path):
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    save_teacher(family, tmp_path / "teacher")
    loaded = load_teacher(TeacherConfig(**teacher_section(family, tmp_path / "teacher")))
    assert type(loaded) is type(family)
    assert (loaded.sample_shape, loaded.num_classes) == (family.sample_shape, family.num_classes)
    assert loaded.prediction_type == family.prediction_type
    loaded.prompts = family.prompts  # no part of a teacher
    before, after = (
        pipeline_images(
            pipeline := one.pipeline(one.network, sampler, 1.0),
            one,
            2,
            seed=1,
            **call_arguments(one, pipeline, sampler, 1.0),
        )
        for one in (family, loaded)
    )
    torch.testing.assert_close(loaded.network.state_dict(), family.network.state_dict(), rtol=0, atol=0)
    # equal weights at other addresses: with several threads a kernel may split its work elsewhere
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert before.std() > 0


def test_load_pipeline_opens_a_saved_teacher(family, tmp_path):
    pipeline = load_pipeline(save_teacher(family, tmp_path / "teacher"))
    taken = inspect.signature(pipeline.__call__).parameters
    size = {name: value for name, value in family.pipeline_kwargs.items() if name in taken}
    assert pipeline_images(pipeline, family, 2, seed=1, num_inference_steps=2, **size).shape[0] == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["chroma", "flux2", "lumina2", "wan", "zimage"])
def test_features_of_blocks_that_see_the_prompt_are_those_of_the_image(name):
    """They cover it as a map, and a longer prompt in another row moves nothing."""
    family = MINIATURES[name]()
    blocks = BlockFeatures(denoiser_of(family), [middle_block(family.network, family.feature_blocks)])
    cond, (x, _), t = family.embed(["a cat", "two dogs on a sofa"]), states(family, 2), torch.tensor([0.3, 0.6])
    (both,) = blocks(x, t, cond)
    assert len(grid_shape(both.shape[1:], aspect_of(x.shape[1:]))) == 3
    for row in range(2):
        one = slice(row, row + 1)
        (alone,) = blocks(x[one], t[one], {key: value[one] for key, value in cond.items()})
        torch.testing.assert_close(both[one], alone, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- encode and decode


def test_encode_and_decode(family):
    if not family.encodes_images:
        pytest.skip("this teacher encodes no images")
    images = torch.rand((3, *family.image_shape)) * 2 - 1
    labels = None if family.num_classes is None else torch.arange(3) % family.num_classes
    batch = family.encode(RawBatch(images, labels, ("one", "two", "three"), (0, 1, 2)))
    assert batch.size == 3 and batch.x0.shape[1:] == family.sample_shape
    assert all(len(tensor) == 3 for tensor in batch.cond.values())
    decoded = family.decode(batch.x0)
    assert decoded.min() >= 0 and decoded.max() <= 1
    if type(family).__module__.rpartition(".")[2] in LOSSLESS:
        torch.testing.assert_close(decoded, images / 2 + 0.5)


def test_example_conditions_depend_on_the_index_alone(family):
    """Up to the rounding of the text encoders, whose kernels are chosen by the size of the batch."""
    every, some = family.example_cond(range(6)), family.example_cond([4, 2])
    assert every.keys() == some.keys()
    for name, tensor in every.items():
        check_equal_up_to_rounding(some[name], tensor[[4, 2]])
    same = family.example_cond([4, 2])
    assert all(torch.equal(same[name], tensor) for name, tensor in some.items())
    assert not every or any(not torch.equal(tensor[4], tensor[2]) for tensor in every.values())


def test_the_null_condition_is_the_same_for_every_sample(family):
    if not can_be_guided(family):
        pytest.skip("this teacher knows no null condition")
    every = family.example_cond(range(6))
    null, alone = family.null_cond(every), family.null_cond({name: tensor[:1] for name, tensor in every.items()})
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in null.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in every.items()
    }
    for name, tensor in null.items():
        check_equal_up_to_rounding(tensor, tensor[:1].expand_as(tensor))
        check_equal_up_to_rounding(alone[name], tensor[:1])
    assert any((null[name] - every[name]).abs().max() > 0 for name in every)


def check_equal_up_to_rounding(found, expected):
    """Equal to 64 units in the last place of the largest number: some layers' float32 sums, in another order."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not found.is_floating_point():
        assert torch.equal(found, expected)
        return
    bound = 64 * torch.finfo(found.dtype).eps * expected.abs().max()
    torch.testing.assert_close(found, expected, atol=bound.item(), rtol=0)
