"""What a teacher's folder may hold: known parts only, any beta schedule, any VAE of the families, damaged settings."""

import json
import threading

import pytest
import torch
from contracts.cases import PIXELS, pipeline_images, reference_images, save_teacher, sections, train_student
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
    VQModel,
)

from stepdistill import load_pipeline
from stepdistill.batch import RawBatch
from stepdistill.diffusion.reading import read_schedule
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import families, load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.methods import find_method
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.training.config import resolve
from stepdistill.training.run import Run


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused(folder, why, **options):
    with pytest.raises(ValueError, match=why) as said:
        load_teacher(TeacherConfig(path=str(folder), **options))
    assert str(said.value).startswith("teacher.")


# ------------------------------------------------------------------------------------------------- parts


def test_a_pixel_unet_with_a_vq_model_is_refused_and_the_part_named(tmp_path):
    """REPORTS 3."""
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vqvae = VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=8,
    )  # fmt: skip
    LDMPipeline(vqvae, unet, DDPMScheduler()).save_pretrained(tmp_path)
    why = r"LDMPipeline has the part 'vqvae' \(VQModel\), which the family 'pixel' would drop"
    refused(tmp_path, why)
    refused(tmp_path, why, family="pixel")


@pytest.mark.parametrize("make", [cls.tiny for cls in families().values()], ids=list(families()))
def test_every_family_knows_its_pipelines_parts_and_refuses_others(tmp_path, make):
    folder = save_teacher(make(), tmp_path)
    change(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    refused(folder, r"has the part 'image_encoder' \(CLIPVisionModelWithProjection\), which the family .* would drop")
    change(folder / "model_index.json", image_encoder=[None, None], safety_checker=[None, None])
    check = make.__self__
    assert {*check.parts, *check.optional_parts}.isdisjoint({"scheduler", check.component, "safety_checker"})


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])
def test_a_pipeline_without_a_part_that_is_needed_is_refused(tmp_path, part):
    folder = save_teacher(SD.tiny(), tmp_path)
    change(folder / "model_index.json", **{part: [None, None]})
    refused(folder, rf"StableDiffusionPipeline has no {part}, which the family 'sd' needs")


@pytest.mark.parametrize(
    ("make", "file", "key"),
    [
        (SD.tiny, "vae/config.json", "layers_per_block"),
        (SD.tiny, "text_encoder/config.json", "num_hidden_layers"),
        (Pixel.tiny, "unet/config.json", "layers_per_block"),
        (Pixel.tiny, "scheduler/scheduler_config.json", "num_train_timesteps"),
    ],
)
def test_settings_that_would_be_built_until_the_memory_is_full_are_refused(tmp_path, make, file, key):
    """Found by mutations: a million layers took 22 GB before the process was killed."""
    folder = save_teacher(make(), tmp_path)
    change(folder / file, **{key: 10**9})
    for opening in (lambda: load_teacher(TeacherConfig(path=str(folder))), lambda: load_pipeline(folder)):
        with pytest.raises(ValueError, match=rf"{folder / file}: {key}: expected at most 1,000(,000)?, got 1,000,000,"):
            opening()


# --------------------------------------------------------------------------------------- SD3's third encoder


def test_a_null_class_is_for_pixel_teachers(tmp_path):
    refused(
        save_teacher(SD.tiny(), tmp_path), "teacher.null_class: expected a pixel teacher, got 3 for SD", null_class=3
    )


def without_t5():
    pipe = SD3.tiny().pipe
    parts = {**pipe.components, "text_encoder_3": None, "tokenizer_3": None}
    return SD3(StableDiffusion3Pipeline(**parts))


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_sd3_without_its_third_text_encoder_is_distilled_as_diffusers_samples_it(tmp_path, bank):
    """REPORTS 22: zeros in place of T5's embedding, in training and in stock diffusers."""
    run = train_student(tmp_path, without_t5(), "lcm", bank)
    family, export = run.distiller.family, run.folder / "pipeline"
    assert family.pipe.text_encoder_3 is None
    assert family.example_cond([0])["encoder_hidden_states"][:, 77:].abs().max() == 0
    images = pipeline_images(load_pipeline(export), family, 2, seed=5)
    assert (images - reference_images(run, 2, seed=5)).abs().max() < 1e-5
    stock = DiffusionPipeline.from_pretrained(export, text_encoder_3=None, tokenizer_3=None)
    call = json.loads((export / "stepdistill.json").read_text())["call"]
    torch.manual_seed(6)  # a step's noise, which SD3's pipeline does not draw from its generators
    images = pipeline_images(stock, family, 2, seed=5, **call)
    assert (images - reference_images(run, 2, seed=5, handed=False)).abs().max() < 1e-5
    shown = 'from_pretrained("path/to/this/folder", text_encoder_3=None, tokenizer_3=None'
    assert shown in (export / "README.md").read_text()


# ---------------------------------------------------------------------------------- SD3.5's second attention


def test_adapters_reach_the_second_attention_of_sd3_5_medium(tmp_path):
    """REPORTS 23."""
    pipe = SD3.tiny().pipe
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**{**pipe.transformer.config, "dual_attention_layers": (0, 1)})
    family = SD3(StableDiffusion3Pipeline(**{**pipe.components, "transformer": transformer}))
    bank = AdapterBank(family.network, rank=2, targets=family.lora_targets)
    bank.fork("student")
    adapted = {name.partition(".lora_")[0] for name in bank.state("student")}
    expected = {f"transformer_blocks.{i}.attn2.{end}" for i in (0, 1) for end in ("to_q", "to_k", "to_v", "to_out.0")}
    assert expected == {name for name in adapted if ".attn2." in name}
    sampler = DDIM(family.schedule, family.schedule.grid(1))
    network = bank.extract("student")
    folder = export_pipeline(family, network, sampler, tmp_path / "it", lora=bank.lora_state("student"))
    plain = save_teacher(
        SD3(StableDiffusion3Pipeline(**{**pipe.components, "transformer": network})), tmp_path / "plain"
    )
    stock = DiffusionPipeline.from_pretrained(plain)
    stock.load_lora_weights(folder / "lora")
    assert any(".attn2." in name and "lora_A" in name for name, _ in stock.transformer.named_parameters())


# ---------------------------------------------------------------------------------------------- tiny VAE


def test_a_tiny_autoencoder_may_take_the_vaes_place(tmp_path):
    """REPORTS 7: its latents are the network's own, without a scale or a shift."""
    torch.manual_seed(0)
    widths = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    family = SD(rebuilt(SD.tiny().pipe, vae=AutoencoderTiny(**widths, **counts)))
    opened = load_teacher(TeacherConfig(path=str(save_teacher(family, tmp_path))))
    images = torch.rand(2, *opened.image_shape) * 2 - 1
    batch = opened.encode(RawBatch(images, None, ("one", "two"), (0, 1)))
    assert torch.equal(batch.x0, opened.pipe.vae.encode(images).latents) and batch.x0.shape[1:] == opened.sample_shape
    decoded = opened.pipe.image_processor.postprocess(opened.pipe.vae.decode(batch.x0).sample, output_type="pt")
    torch.testing.assert_close(opened.decode(batch.x0), decoded)


def rebuilt(pipe, **parts):
    return type(pipe)(**{**pipe.components, **parts}, requires_safety_checker=False)


# ------------------------------------------------------------------------------------------- beta schedules


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_betas_of_any_schedule_are_the_schedulers_own(tmp_path, schedule):
    """REPORTS 8: also in the student's scheduler, whose class does not know the schedule."""
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type="v_prediction")
    config = json.loads(scheduler.to_json_string())
    process, _ = read_schedule(config)
    alpha, sigma = process((torch.arange(1000).double() + 1) / 1000)
    torch.testing.assert_close((alpha**2).float(), scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    family = Pixel.tiny(scheduler=config)
    for method in ("lcm", "tcd", "progressive"):
        find_method(method).check(find_method(method).Config(), family)
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    student = load_pipeline(export_pipeline(family, family.network, sampler, tmp_path / "it"))
    assert torch.equal(student.scheduler.alphas_cumprod, scheduler.alphas_cumprod)


def test_a_beta_schedule_that_its_scheduler_does_not_know_is_named(tmp_path):
    folder = save_teacher(PIXELS["pixel"](), tmp_path)
    change(folder / "scheduler/scheduler_config.json", beta_schedule="cosin")
    refused(folder, r"DDPMScheduler knows no beta_schedule 'cosin'")


# ------------------------------------------------------------------------------------- loads at the same time


def test_exports_with_a_class_of_ours_are_loaded_by_many_threads_at_once(tmp_path, monkeypatch):
    """FAULTS 13: diffusers rewrites the file in its cache of modules, which another load is reading.

    And while accelerate makes networks without weights it patches ``nn.Module``: of two threads at once the second puts
    the patch back for good, and every later network of the process is on the meta device.
    """
    family = PIXELS["pixel-flow"]()
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    folder = export_pipeline(family, family.network, sampler, tmp_path / "it")
    loaded, failed = [], []

    def load():
        try:
            loaded.append(type(load_pipeline(folder)).__name__)
        except Exception as error:  # any failure is what this looks for
            failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.nn.Linear(1, 1).weight.is_meta
    assert failed == [] and loaded == ["ClassConditionalPipeline"] * 8
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.get_cached_module_file", None)
    load_pipeline(folder)  # not by way of the cache
    run = sections(tmp_path / "run", family, "lcm", steps=1)
    Run(resolve(run | {"bank": {"name": "copy", "init_from": str(folder)}}))


def test_the_null_condition_is_copied_once_for_every_type_that_is_asked_for():
    """On a GPU, a copy in every call would make the host wait for it."""
    family = SD.tiny()
    for kind in (torch.float32, torch.float64):
        cond = {name: tensor.to(kind) for name, tensor in family.example_cond([0, 1]).items()}
        first, second = family.null_cond(cond), family.null_cond(cond)
        for name, tensor in cond.items():
            assert first[name].dtype == kind and first[name].shape == tensor.shape
            assert first[name].data_ptr() == second[name].data_ptr()
            assert torch.equal(first[name], family.null[name].to(kind).expand_as(tensor))


@pytest.mark.parametrize("name", ["flux", "chroma", "zimage", "lumina2", "sd3"])
def test_a_grid_is_shifted_as_by_the_pipelines_own_call(name):
    cls = families()[name]
    pipe = cls.tiny().pipe
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    family, size = cls(pipe, resolution=16), {"height": 16, "width": 16}
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", sigmas=[1.0, 0.75, 0.5, 0.25], output_type="latent", **size, **family.guidance_arguments(1.0))
    torch.testing.assert_close(family.schedule.grid(4).float(), pipe.scheduler.sigmas, atol=1e-5, rtol=0)
