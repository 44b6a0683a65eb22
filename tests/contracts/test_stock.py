"""Every family's students where there is no stepdistill: whole and as a LoRA file, the images of our sampler."""

import pytest
from contracts.cases import BANKS, pipeline_images, reference_images, train_student
from contracts.stock import job, read_images

from stepdistill import load_pipeline
from stepdistill.families.loading import families

FAMILIES = families()
METHODS = {"dit": "progressive"}  # by default lcm
UNGUIDED = {"flux"}  # families whose unconditional prediction no method may ask for
OPTIONS = {"wan": {"solver_steps": 48}}  # whose fourth parts are a grid of one shift, which its scheduler is fitted to
COPIED = ("pixel", "sd", "flux")  # one of each kind; the others' copies: ``test_every_family_with_every_method``
EVERY = [(name, bank) for name in FAMILIES for bank in BANKS if bank != "copy" or name in COPIED]
every_student = pytest.mark.parametrize(("name", "bank"), EVERY)


@pytest.fixture(scope="module")
def students(tmp_path_factory, stock_diffusers):
    """The run of every student, by family and bank; beside their exports lie the images that stock diffusers made."""
    runs = {}
    for name, bank in EVERY:
        options = {"guidance_scale": 1.0 if name in UNGUIDED else 3.0, **OPTIONS.get(name, {})}
        folder, method = tmp_path_factory.mktemp(f"{name}-{bank}"), METHODS.get(name, "lcm")
        runs[name, bank] = train_student(folder, FAMILIES[name].tiny(), method, bank, options=options)
    jobs = [
        job(run.folder / "pipeline", run.family, 3, 5, teacher=run.config.teacher.path if has_lora(run) else None)
        for run in runs.values()
    ]
    stock_diffusers.generate_images(jobs)
    return runs


def has_lora(run):
    return (run.folder / "pipeline/lora/pytorch_lora_weights.safetensors").is_file()


@every_student
def test_stock_diffusers_alone_makes_the_images_of_our_sampler(students, name, bank):
    run = students[name, bank]
    images, handed = read_images(run.folder / "pipeline"), run.family.hands_generators_on
    assert (images - reference_images(run, 3, seed=5, handed=handed)).abs().max() < 1e-5
    assert images.std() > 0.01


@every_student
def test_load_pipeline_samples_so_by_itself(students, name, bank):
    run = students[name, bank]
    bare = pipeline_images(load_pipeline(run.folder / "pipeline"), run.family, 3, seed=5)
    assert (bare - reference_images(run, 3, seed=5)).abs().max() < 1e-5


@every_student
def test_the_lora_file_makes_the_student_of_a_fresh_teacher(students, name, bank):
    run = students[name, bank]
    assert has_lora(run) == (bank == "adapter" and run.family.loads_lora)
    if not has_lora(run):
        return
    export = run.folder / "pipeline"
    images, lora, without = (read_images(export, f"images{end}") for end in ("", "-lora", "-without-lora"))
    assert (lora - images).abs().max() < 1e-5
    assert (without - images).abs().max() > 1e-3
