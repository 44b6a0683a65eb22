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
EVERY = [(name, bank) for name in FAMILIES for bank in BANKS]
QUICK = ("pixel-copy", "pixel-adapter", "sd-copy", "sd-adapter", "flux-copy", "flux-adapter", "wan-adapter")
"""Students of ``make test``: of a UNet of pixels and of latents, a transformer, clips. The others are product tests."""
every_student = pytest.mark.parametrize(
    ("name", "bank"),
    [pytest.param(*each, marks=() if "-".join(each) in QUICK else pytest.mark.product) for each in EVERY],
)


@pytest.fixture(scope="module")
def student(tmp_path_factory, stock_diffusers):
    """The run of a student, by family and bank; beside its export lie the images that stock diffusers made."""
    runs = {}

    def train(name, bank):
        if (name, bank) not in runs:
            options = {"guidance_scale": 1.0 if name in UNGUIDED else 3.0, **OPTIONS.get(name, {})}
            folder, method = tmp_path_factory.mktemp(f"{name}-{bank}"), METHODS.get(name, "lcm")
            run = runs[name, bank] = train_student(folder, FAMILIES[name].tiny(), method, bank, options=options)
            teacher = run.config.teacher.path if has_lora(run) else None
            stock_diffusers.generate_images([job(run.folder / "pipeline", run.family, 3, 5, teacher=teacher)])
        return runs[name, bank]

    return train


def has_lora(run):
    return (run.folder / "pipeline/lora/pytorch_lora_weights.safetensors").is_file()


@every_student
def test_stock_diffusers_alone_makes_the_images_of_our_sampler(student, name, bank):
    run = student(name, bank)
    images, handed = read_images(run.folder / "pipeline"), run.family.hands_generators_on
    assert (images - reference_images(run, 3, seed=5, handed=handed)).abs().max() < 1e-5
    assert images.std() > 0.01


@every_student
def test_load_pipeline_samples_so_by_itself(student, name, bank):
    run = student(name, bank)
    bare = pipeline_images(load_pipeline(run.folder / "pipeline"), run.family, 3, seed=5)
    assert (bare - reference_images(run, 3, seed=5)).abs().max() < 1e-5


@every_student
def test_the_lora_file_makes_the_student_of_a_fresh_teacher(student, name, bank):
    run = student(name, bank)
    assert has_lora(run) == (bank == "adapter" and run.family.loads_lora)
    if not has_lora(run):
        return
    export = run.folder / "pipeline"
    images, lora, without = (read_images(export, f"images{end}") for end in ("", "-lora", "-without-lora"))
    assert (lora - images).abs().max() < 1e-5
    assert (without - images).abs().max() > 1e-3
