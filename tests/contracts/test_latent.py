"""LatentFamily teachers of the real classes, distilled end to end: what is exported is what stock diffusers samples.

The guidance input, a data-free method on prompts alone, and what is refused; a student of every family under both banks
is in test_stock.py. Every family x method x bank is ``pytest -m product``.
"""

import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from contracts.cases import (
    BANKS,
    PIXELS,
    case,
    pipeline_images,
    refusal,
    save_teacher,
    sections,
    train_student,
)
from contracts.exports import check_export, check_lora
from diffusers import DiffusionPipeline, EDMEulerScheduler

from stepdistill import load_pipeline
from stepdistill.config import read_config
from stepdistill.diffusion.samplers import DDIM
from stepdistill.diffusion.schedule import DiscreteVP
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.base import Inputs
from stepdistill.families.config import TeacherConfig
from stepdistill.families.dit import DiT
from stepdistill.families.flux import Flux
from stepdistill.families.latent import LatentFamily
from stepdistill.families.loading import families, load_teacher
from stepdistill.families.pixart import PixArt
from stepdistill.families.prompts import prompt_reader
from stepdistill.families.sd import SD
from stepdistill.families.sdxl import SDXL
from stepdistill.files.schema import build
from stepdistill.inference.sampling import class_count, sample_images
from stepdistill.losses.student_inputs import begun_at
from stepdistill.methods import find_method, method_names
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

LATENT = {name: cls for name, cls in families().items() if issubclass(cls, LatentFamily)}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_guidance_input_survives_the_export(tmp_path, name):
    options = {"guidance_range": [1.0, 8.0], "guidance_scale": 4.0}
    run = train_student(tmp_path, LATENT[name].tiny(), "lcm", "copy", options=options)
    check_export(run)
    pipeline = load_pipeline(run.folder / "pipeline")
    assert pipeline.unet.config.time_cond_proj_dim == 256
    weak, strong = (pipeline_images(pipeline, run.family, 3, seed=5, guidance_scale=g) for g in (1.5, 7.0))
    assert (weak - strong).abs().max() > 1e-4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_edm_teacher_of_sdxl_has_students_that_stock_diffusers_samples(tmp_path, prediction_type):
    """REPORTS 2: as Playground v2.5. The export's scheduler scales the network's input as the teacher's does."""
    family = SDXL.tiny()
    family.pipe.scheduler = EDMEulerScheduler(sigma_max=40.0, prediction_type=prediction_type)
    run = train_student(tmp_path, SDXL(family.pipe), "tract", "adapter")
    # states are up to 40 times as large as images, and so is their rounding: 1.03e-5 by the kernels of one CPU
    check_lora(run, check_export(run, rounding=4e-5))
    pipeline = load_pipeline(run.folder / "pipeline")
    assert type(pipeline.scheduler) is EDMEulerScheduler
    assert pipeline.scheduler.config.prediction_type == prediction_type


def test_prompts_alone_are_enough_for_a_method_without_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\nein Hündchen\n")
    data = {"name": "prompts", "path": str(tmp_path / "prompts.txt")}
    run = train_student(tmp_path, SD.tiny(), "dmd", "adapter", data=data)
    assert run.dataset.captions == ["a cat", "ein Hündchen"] and len(run.family.prompts) == 2
    check_export(run)


def test_measured_samples_are_asked_for_with_every_caption():
    family = SD.tiny()
    family.use_captions([f"caption {i}" for i in range(100)])
    assert family.example_prompts(range(98, 102)) == ["caption 98", "caption 99", "caption 0", "caption 1"]


def test_a_student_may_begin_below_pure_noise(tmp_path):
    run = train_student(tmp_path, PixArt.tiny(), "dmd2", "adapter", options={"steps": 1, "first_time": 0.4})
    check_export(run)
    call = load_pipeline(run.folder / "pipeline").contract.call
    assert call["timesteps"] == [399] and call["num_inference_steps"] == 1


def test_it_may_not_where_no_pipeline_is_asked_for_timesteps_nor_between_them():
    method = find_method("dmd2")
    with pytest.raises(ValueError, match="passes no timesteps on"):
        method.check(method.Config(steps=1, first_time=0.4), DiT.tiny())
    for name in ("dmd2", "sid"):
        method = find_method(name)
        with pytest.raises(ValueError, match=r"method.first_time: expected whole timesteps, such as 0.4, got 0.4004"):
            method.check(method.Config(steps=1, first_time=0.4004), PIXELS["pixel-epsilon"]())
        with pytest.raises(ValueError, match=r"method.first_time: expected above 0.75, where the second step begins"):
            method.check(method.Config(steps=4, first_time=0.4), PIXELS["pixel"]())


def test_the_time_that_its_error_names_is_taken():
    schedule = DiscreteVP(torch.linspace(0.9999, 0.001, 1024, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"such as 0\.400390625, got 0\.4"):
        begun_at(schedule, schedule.grid(1), 0.4)
    assert begun_at(schedule, schedule.grid(1), 0.400390625)[0] == 0.400390625


@pytest.mark.product
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("name", LATENT)
def test_every_family_with_every_method(tmp_path, name, method, bank):
    if (reason := refused(method, LATENT[name].tiny())) is not None:
        pytest.skip(reason)
    try:
        run = train_student(tmp_path, LATENT[name].tiny(), method, bank)
    except ValueError as reason:
        if name != "observed" or "no blocks of" not in str(reason):
            raise
        pytest.skip(str(reason))  # a critic of blocks, none of which is known
    images = check_export(run)
    if (run.folder / "pipeline/lora").exists():
        check_lora(run, images)
    else:
        own_network = run.family.inputs != Inputs() or run.family.points != 1
        assert bank == "copy" or not LATENT[name].loads_lora or own_network


def refused(method, family):
    """Why a method, or an input that its networks need, is not for this family; None if it is."""
    if (reason := refusal(method, family)) is not None:
        return reason
    distiller = find_method(method)
    try:
        family.add_inputs(distiller.extra_inputs(build(distiller.Config, case(method).options, "method")))
    except ValueError as reason:
        return str(reason)
    return None


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "method", "why"),
    [
        ("dit", "tcd", "DiTPipeline passes no eta"),
        ("dit", "guided", "DiT take no inputs"),
        ("sd3", "guided", "SD3 take no inputs"),
        ("flux", "guided", "teacher.guidance_scale"),
        ("pixart", "guided", "PixArt take no inputs"),
        ("sana", "guided", "Sana take no inputs"),
    ],
)
def test_what_a_family_cannot_do_is_refused_with_a_reason(name, method, why):
    assert why in str(refused(method, LATENT[name].tiny()))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(SD.tiny(), tmp_path_factory.mktemp("sd") / "teacher")


def test_pickles_and_foreign_code_are_refused(teacher, tmp_path):
    (tmp_path / "unet").mkdir()
    index = json.loads((teacher / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet/config.json").write_text((teacher / "unet/config.json").read_text())
    (tmp_path / "unet/diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin is a pickle"):
        load_teacher(TeacherConfig(path=str(tmp_path)))
    (tmp_path / "evil.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="teacher.trust_remote_code"):
        load_teacher(TeacherConfig(path=str(tmp_path)))


def test_missing_weights_of_a_pixel_teacher_are_named(tmp_path):
    folder = save_teacher(PIXELS["pixel"](), tmp_path)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"teacher.path: .*unet: diffusers cannot open it: .*safetensors"):
        load_teacher(TeacherConfig(path=str(folder)))
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin is a pickle"):
        load_teacher(TeacherConfig(path=str(folder)))


def test_an_unknown_pipeline_is_refused_with_what_is_known(teacher, tmp_path):
    index = json.loads((teacher / "model_index.json").read_text()) | {"_class_name": "KandinskyV22Pipeline"}
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet/config.json").write_text((teacher / "unet/config.json").read_text())
    with pytest.raises(ValueError, match=r"KandinskyV22Pipeline.*sdxl.*one file in stepdistill/families"):
        load_teacher(TeacherConfig(path=str(tmp_path)))


def test_half_a_pipeline_is_refused(teacher):
    with pytest.raises(ValueError, match="model_index.json"):
        SD.load(teacher / "unet", TeacherConfig(path=str(teacher)))


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (SD.tiny, {"guidance_scale": 3.5}, "guidance_scale: got 3.5, but SD takes no guidance as an input"),
        (lambda: Flux.tiny(guidance_embeds=False), {"guidance_scale": 3.5}, "guidance_embeds: false"),
        (Flux.tiny, {"resolution": 18}, r"expected multiples of 4, got \[18, 18\]"),
        (SD.tiny, {"resolution": 17}, r"expected multiples of 2, got \[17, 17\]"),
        (DiT.tiny, {"resolution": 32}, r"DiTPipeline samples \(16, 16\) only"),
    ],
)
def test_a_size_or_guidance_that_a_pipeline_cannot_be_asked_for_is_refused(make, options, why):
    family = make()
    with pytest.raises(ValueError, match=why):
        type(family)(family.pipe, **options)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_a_network_saved_under_its_old_class_name_is_recognised(tmp_path, name):
    save_teacher(LATENT[name].tiny(), tmp_path)
    for file in (tmp_path / "model_index.json", tmp_path / "transformer/config.json"):
        file.write_text(re.sub("(DiT|PixArt)Transformer2DModel", "Transformer2DModel", file.read_text()))
    family = load_teacher(TeacherConfig(path=str(tmp_path)))
    assert type(family) is LATENT[name]
    assert type(family.network).__name__ in family.network_classes[0]


@pytest.mark.parametrize("bank", BANKS)
def test_a_teacher_in_half_precision_has_a_student_in_single(tmp_path, bank):
    wanted = sections(tmp_path, SD.tiny(), "lcm", bank, steps=1)
    wanted["teacher"]["dtype"] = "bfloat16"
    run = Run(resolve(wanted))
    banks = run.distiller.bank
    assert {p.dtype for p in banks.params("teacher")} == {torch.bfloat16}
    assert {p.dtype for role in banks.roles[1:] for p in banks.params(role)} == {torch.float32}
    assert run.family.pipe.text_encoder.dtype == run.family.pipe.vae.dtype == torch.float32
    run.train()
    pipeline = DiffusionPipeline.from_pretrained(run.folder / "pipeline")
    assert pipeline.unet.dtype == torch.float32
    assert pipeline_images(pipeline, run.family, 2, seed=1, num_inference_steps=1, guidance_scale=1.0).isfinite().all()


def test_images_without_captions_are_refused(teacher, tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="no captions, but the teacher takes text"):
        Run(resolve(config(teacher, tmp_path, {"name": "images", "path": str(tmp_path / "images.npz")})))


def test_long_captions_are_counted(teacher, tmp_path):
    captions = np.array(["short", "long " * 40])
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 16, 16, 3), np.uint8), captions=captions)
    with pytest.warns(UserWarning, match="1 of 2 captions are longer than the text encoder's 77 tokens"):
        Run(resolve(config(teacher, tmp_path, {"name": "images", "path": str(tmp_path / "images.npz")})))


@pytest.mark.parametrize(
    ("name", "tokens"), [("sd", 77), ("sdxl", 77), ("pixart", 120), ("sana", 300), ("sd3", 256), ("flux", 512)]
)
def test_tokens_are_counted_where_most_of_a_prompt_is_read(name, tokens):
    """What the pipelines' documentation says they read; CLIP's 77 do not bound what T5 reads beside it."""
    family = LATENT[name].tiny()
    assert prompt_reader(family.pipe, family.pipeline_kwargs)[1] == prompt_reader(family.pipe, {})[1] == tokens


def config(teacher, folder, data):
    return {
        "teacher": {"path": str(teacher)},
        "method": {"name": "lcm"},
        "data": data,
        "train": {"steps": 1, "output_dir": str(folder / "run")},
    }


@pytest.mark.parametrize("name", [name for name in LATENT if LATENT[name].pipeline_names])
def test_a_family_gives_a_lora_file_where_its_pipelines_load_one(name):
    pipelines = [getattr(diffusers, pipeline) for pipeline in LATENT[name].pipeline_names]
    assert {hasattr(pipeline, "load_lora_weights") for pipeline in pipelines} == {LATENT[name].loads_lora}


def test_a_student_of_dit_is_measured(tmp_path):
    family = DiT.tiny()
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    pipeline = load_pipeline(export_pipeline(family, family.network, sampler, tmp_path / "student"))
    assert (count := class_count(pipeline)) == 1000
    whole, parts = (sample_images(pipeline, 5, num_classes=count, batch_size=n, rows=4) for n in (5, 2))
    assert whole.labels.tolist() == parts.labels.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(whole.pixels, parts.pixels)
    assert whole.calls == 2 and whole.pixels.float().std() > 1


def test_dit_guides_only_with_the_null_class_of_its_pipeline():
    family = DiT.tiny()
    family.num_classes = 10
    with pytest.raises(ValueError, match="the teacher has 10 classes"):
        family.null_cond(family.example_cond([0]))


# ------------------------------------------------------------------------------------- configs that are shipped

CONFIGS = Path(__file__).parents[2] / "configs"
NAMED = {**{name: name for name in LATENT}, "faces": "sd"}  # a config's first word -> its family
SHIPPED = sorted(path for path in CONFIGS.glob("*.yaml") if path.name.split("_")[0] in NAMED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_resolves_and_its_method_takes_the_family(path):
    resolved = resolve(read_config(path))
    find_method(resolved.method_name).check(resolved.method, LATENT[NAMED[path.name.split("_")[0]]].tiny())
