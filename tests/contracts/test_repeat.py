"""A student's images are a pure function of its seed (REPORTS 1): every family, sampler and bank, 0 levels apart.

Here once for every family, of the teacher as a student. Trained students of every family, method and bank, beside the
trainer's own sampler: ``pytest -m product -k repeats``.
"""

import inspect
import itertools

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from contracts.cases import (
    BANKS,
    PIXELS,
    asked_of,
    case,
    generators,
    pipeline_images,
    reference_images,
    refusal,
    teacher_for,
    train_student,
)
from contracts.repeats import check_repeats, images_of
from diffusers import DiffusionPipeline

from stepdistill import load_pipeline
from stepdistill.diffusion.samplers import ConsistencySampler
from stepdistill.export.generators import handed_on
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.loading import families
from stepdistill.files.schema import build
from stepdistill.inference.rows import fixed_rows, rows_for
from stepdistill.inference.student import student_images
from stepdistill.methods import find_method, method_names

FAMILIES = families()
UNGUIDED = ("flux", "pixel")
"""Guidance is an input of FLUX's network; the pixel pipeline's guidance is one call like DiT's."""


def prompts_of(family):
    return family.example_prompts(range(4)) if family.takes_text else None


@pytest.mark.parametrize("name", FAMILIES)
def test_renoised_images_repeat_in_every_batch(tmp_path, name):
    """Two re-noised calls, guided where the pipeline guides by a doubled batch."""
    pipeline, prompts = renoised(name, tmp_path)
    check_repeats(pipeline, prompts, **({} if name in UNGUIDED else {"guidance_scale": 2.0}))


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
def test_a_bare_call_of_load_pipeline_repeats_and_the_card_says_what_stock_use_must_seed(tmp_path, name):
    family = FAMILIES[name].tiny()
    sampler = ConsistencySampler(family.schedule, family.schedule.grid(2))
    export = export_pipeline(family, family.network, sampler, tmp_path / "student")
    pipeline = load_pipeline(export)
    first, second = (call(pipeline, family) for _ in range(2))
    assert torch.equal(first, second)
    card = (export / "README.md").read_text()
    assert "torch.manual_seed(0)" in card and type(pipeline).__name__ in card
    stock = DiffusionPipeline.from_pretrained(export)
    assert not torch.equal(call(stock, family), call(stock, family))
    seeded = []
    for _ in range(2):
        torch.manual_seed(0)
        seeded.append(call(stock, family))
    assert torch.equal(*seeded)


def call(pipeline, family):
    pipeline.set_progress_bar_config(disable=True)
    taken = inspect.signature(type(pipeline).__call__).parameters
    size = {name: value for name, value in family.pipeline_kwargs.items() if name in {"height", "width"} & taken.keys()}
    options = {**size, "num_inference_steps": 2, "output_type": "np", "guidance_scale": 1.0}
    return torch.from_numpy(pipeline(**asked_of(family, 2), generator=generators(2, 0), **options).images)


def test_a_step_draws_one_noise_an_image_where_a_pipeline_doubles_its_states():
    """As DiTPipeline does for guidance: the unguided half is a copy, and the generators advance once."""
    family = FAMILIES["dit"].tiny()
    scheduler = family.pipeline(family.network, ConsistencySampler(family.schedule, family.schedule.grid(2))).scheduler
    state, output = torch.randn(2, 2, 4, 8, 8)
    stepped = []
    for copies in (1, 2):
        scheduler.set_timesteps(2)
        holder = type("Pipeline", (), {"scheduler": scheduler})
        with handed_on(holder, generators(2, 0)):
            twice = (torch.cat([output] * copies), scheduler.timesteps[0], torch.cat([state] * copies))
            stepped.append(scheduler.step(*twice).prev_sample)
    assert torch.equal(stepped[1], torch.cat([stepped[0]] * 2))
    assert "step" not in vars(scheduler)


def test_rows_follow_the_size_of_the_images_and_a_modules_own_method_comes_back():
    network = torch.nn.Linear(1, 1)
    for size, (pixel, latent) in {8: (16, 16), 16: (16, 16), 32: (4, 4), 64: (1, 1), 128: (1, 1)}.items():
        network.config = {"sample_size": size}
        assert rows_for(type("Pixel", (), {"unet": network})) == pixel
        assert rows_for(type("Latent", (), {"unet": network, "vae": network})) == latent
    network.config = {"sample_size": 16}  # a deep autoencoder's latent of 512 x 512 pixels
    assert rows_for(type("Sana", (), {"transformer": network, "vae": network, "vae_scale_factor": 32})) == 1
    network.forward = own = lambda x: x  # as offloading hooks do
    with fixed_rows(network, 4):
        assert network.forward is not own and inspect.signature(network.forward) == inspect.signature(own)
    assert network.forward is own


def renoised(name, folder):
    """A family's teacher as a student of two re-noised calls, opened by :func:`load_pipeline`."""
    family = FAMILIES[name].tiny()
    sampler = ConsistencySampler(family.schedule, family.schedule.grid(2))
    export = folder / name
    if not export.is_dir():
        export_pipeline(family, family.network, sampler, export)
    return load_pipeline(export), prompts_of(family)


def its_half(folder):
    """What one of two processes generates of every family's four images."""
    rank = PartialState(cpu=True).process_index
    torch.set_num_threads(1)  # accelerate has just set another number
    torch.manual_seed(rank)
    for name in FAMILIES:
        pipeline, prompts = renoised(name, folder)
        half = images_of(pipeline, prompts, first=2 * rank, count=2)
        np.save(folder / f"{name}-{rank}.npy", half.numpy())


@pytest.mark.product
def test_two_processes_generate_the_images_of_one(tmp_path):
    whole = {}
    for name in FAMILIES:
        pipeline, prompts = renoised(name, tmp_path)
        whole[name] = images_of(pipeline, prompts, batch_size=4).numpy()
    PartialState._reset_state()
    debug_launcher(its_half, (tmp_path,), num_processes=2)
    for name, images in whole.items():
        halves = [np.load(tmp_path / f"{name}-{rank}.npy") for rank in range(2)]
        assert np.array_equal(np.concatenate(halves), images), name


@pytest.mark.product
@pytest.mark.parametrize(("name", "method", "bank"), [*itertools.product(FAMILIES, method_names(), BANKS)])
def test_every_student_repeats(tmp_path, name, method, bank):
    makes = PIXELS.values() if name == "pixel" else [FAMILIES[name].tiny]
    make = next((make for make in makes if takes(method, make())), None)
    if make is None:
        pytest.skip(f"{method} refuses {name}")
    run = train_student(tmp_path, make(), method, bank)
    pipeline = load_pipeline(run.folder / "pipeline")
    check_repeats(pipeline, prompts_of(run.family))
    check_trainers_own(run, pipeline)


def takes(method, family):
    distiller = find_method(method)
    if refusal(method, family) is not None:
        return False
    try:
        family.add_inputs(distiller.extra_inputs(build(distiller.Config, case(method).options, "method")))
    except ValueError:
        return False
    return True


def check_trainers_own(run, pipeline):
    """The trainer's sampler makes the export's images of the same seeds, but for rounding: one level here and there."""
    own = student_images(run.distiller, 4, seed=3).pixels.int()
    apart = (own - images_of(pipeline, prompts_of(run.family)).int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 1e-2


@pytest.mark.parametrize("method", ["dmd2", "add", "ladd"])
def test_a_student_of_three_steps_is_sampled_as_it_was_trained(tmp_path, method):
    """REPORTS 21: LCMScheduler picks the timesteps 999, 666 and 333 of 1000."""
    run = train_student(tmp_path, teacher_for(method), method, "copy", options={"steps": 3})
    pipeline = load_pipeline(run.folder / "pipeline")
    assert pipeline.contract.timesteps == pytest.approx([999, 666, 333])
    images = pipeline_images(pipeline, run.family, 3, seed=5)
    assert pipeline.scheduler.timesteps.tolist() == [999, 666, 333]
    assert (images - reference_images(run, 3, seed=5)).abs().max() < 1e-5
    check_repeats(pipeline, None)
