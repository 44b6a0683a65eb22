"""What is checked of an export: stock diffusers draws the images of our sampler, also from its LoRA files."""

import json

import torch
from contracts.cases import pipeline_images, reference_images
from diffusers import DiffusionPipeline

from stepdistill import load_pipeline
from stepdistill.export.adapters import COMFYUI
from stepdistill.export.contract import read_contract
from stepdistill.export.pipeline import apply_contract


def check_export(run, rounding=1e-5):
    family, export = run.distiller.family, run.folder / "pipeline"
    images = pipeline_images(load_pipeline(export), family, 3, seed=5)
    assert (images - reference_images(run, 3, seed=5)).abs().max() < rounding
    assert images.std() > 0.01
    stock = DiffusionPipeline.from_pretrained(export, trust_remote_code=any(export.rglob("*.py")))
    contract = json.loads((export / "stepdistill.json").read_text())
    handed = family.hands_generators_on
    torch.manual_seed(6)  # as the model card says, where the pipeline does not hand its generators on
    by_stock = pipeline_images(stock, family, 3, seed=5, **contract["call"])
    expected = images if handed else reference_images(run, 3, seed=5, handed=False)
    assert (by_stock - expected).abs().max() <= (0 if handed else rounding)
    return images


READ_BACK = ("UNet2DConditionModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel",
             "ZImageTransformer2DModel")  # fmt: skip
"""Networks for which stock diffusers reads the file for ComfyUI; of FLUX.1 it does so at the full size alone."""


def is_read_back(family):
    """Of Wan only if the feed-forward layers are adapted, too: diffusers looks for all layers of a block."""
    kind = type(family.network).__name__
    return kind in READ_BACK and (kind != "WanTransformer3DModel" or "ffn.net.2" in family.lora_targets)


def check_lora(run, images):
    """On a fresh teacher each file gives the export's images."""
    check_lora_file(run, images, "pytorch_lora_weights.safetensors")
    if is_read_back(run.family):
        check_lora_file(run, images, COMFYUI)


def check_lora_file(run, images, name):
    export = run.folder / "pipeline"
    teacher = DiffusionPipeline.from_pretrained(run.config.teacher.path)
    teacher.scheduler = load_pipeline(export).scheduler
    teacher.load_lora_weights(export / "lora", weight_name=name)
    apply_contract(teacher, read_contract(export))
    assert (pipeline_images(teacher, run.family, 3, seed=5) - images).abs().max() < 1e-5
