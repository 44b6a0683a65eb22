"""Weights that did not arrive are refused by name wherever a network is read (FAULTS 4); variants are found."""

import json
import logging

import pytest
import torch
from contracts.cases import save_teacher
from safetensors.torch import load_file, save_file

from stepdistill import load_pipeline
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.links import frozen_folders
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.files.weights import chosen_weights
from stepdistill.training.students import read_student


def rewrite(file, change):
    weights = load_file(file)
    name = sorted(weights)[3]
    change(weights, name)
    save_file(weights, file, metadata={"format": "pt"})
    return name


def lack(weights, name):
    del weights[name]


def add(weights, name):
    weights["further.weight"] = torch.zeros(2)


def reshape(weights, name):
    weights[name] = torch.zeros(3, 5, 7)


CHANGES = {lack: "needs weights that the file lacks, they would be random: {}", add: "would drop: further.weight",
           reshape: r"{}.*expected.*shape.*\(?\[?3, 5, 7"}  # fmt: skip
PARTS = {
    "unet-pixel": (Pixel.tiny, "unet/diffusion_pytorch_model.safetensors"),
    "unet": (SD.tiny, "unet/diffusion_pytorch_model.safetensors"),
    "vae": (SD.tiny, "vae/diffusion_pytorch_model.safetensors"),
    "clip": (SD.tiny, "text_encoder/model.safetensors"),
    "t5": (SD3.tiny, "text_encoder_3/model.safetensors"),
    "transformer": (SD3.tiny, "transformer/diffusion_pytorch_model.safetensors"),
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {make: save_teacher(make(), folder / make.__self__.__name__) for make in (Pixel.tiny, SD.tiny, SD3.tiny)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", PARTS)
def test_missing_left_over_and_mismatched_weights_are_refused_by_name(teachers, part, change):
    """RELIABILITY row 26: a file of another architecture; and every loader, not only checkpoints (its row 10)."""
    make, place = PARTS[part]
    file = teachers[make] / place
    before = file.read_bytes()
    name = rewrite(file, change)
    try:
        why = rf"{file.parent}: .*{CHANGES[change].format(name)}"
        with pytest.raises(ValueError, match=why):
            load_teacher(TeacherConfig(path=str(teachers[make])))
        if change is lack:
            with pytest.raises(ValueError, match=why):
                load_pipeline(teachers[make])
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_student_to_start_from_is_read_whole(tmp_path, change):
    family = Pixel.tiny()
    student = export_pipeline(family, family.network, DDIM(family.schedule, family.schedule.grid(1)), tmp_path / "it")
    name = rewrite(student / "unet/diffusion_pytorch_model.safetensors", change)
    with pytest.raises(ValueError, match=rf"^bank\.init_from: .*{CHANGES[change].format(name)}"):
        read_student(str(student), TeacherConfig(path="embedded"), family)


@pytest.mark.parametrize(("part", "change"), [("transformer", lack), ("text_encoder_3", lack), ("transformer", None)])
def test_shards_that_lack_what_their_index_promises_are_refused(tmp_path, part, change):
    family = SD3.tiny()
    folder = save_teacher(family, tmp_path)
    getattr(family.pipe, part).save_pretrained(folder / part, max_shard_size="5KB")
    for plain in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        (folder / part / plain).unlink(missing_ok=True)
    opened = load_teacher(TeacherConfig(path=str(folder)))
    expected = getattr(family.pipe, part).state_dict()
    torch.testing.assert_close(getattr(opened.pipe, part).state_dict(), expected, rtol=0, atol=0)
    shard = sorted((folder / part).glob("*-of-*"))[0]
    weights = load_file(shard)
    name = sorted(weights)[0]
    if change is None:
        shard.unlink()
        name = shard.name
    else:
        del weights[name]
        save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder / part}.*{name}"):
        load_teacher(TeacherConfig(path=str(folder)))


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (10**12).to_bytes(8, "little") + b"{}"])
def test_a_damaged_file_of_weights_is_a_sentence(tmp_path, content):
    folder = save_teacher(SD.tiny(), tmp_path)
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"teacher\.path: {folder}/vae: diffusers cannot open it"):
        load_teacher(TeacherConfig(path=str(folder)))


# ------------------------------------------------------------------------------------------------- variants


def as_variants(folder, parts, variant="fp16"):
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    return folder


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("unet",), ("text_encoder",)])
def test_a_teacher_of_variants_is_opened_and_the_log_says_so(tmp_path, parts, caplog):
    family = SD.tiny()
    folder = as_variants(save_teacher(family, tmp_path), parts)
    with caplog.at_level(logging.WARNING):
        opened = load_teacher(TeacherConfig(path=str(folder)))
    said = [record.message for record in caplog.records if "variant 'fp16'" in record.message]
    assert len(said) == len(parts) and all(any(f"/{part}:" in line for line in said) for part in parts)
    assert type(load_pipeline(folder)).__name__ == "StableDiffusionPipeline"
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(opened.pipe, name)
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.state_dict(), getattr(family.pipe, name).state_dict(), rtol=0, atol=0)


def test_a_pixel_teacher_may_have_a_variant_only_and_a_half_precision_one_is_read_in_single(tmp_path):
    family = Pixel.tiny()
    folder = save_teacher(family, tmp_path)
    family.network.half().save_pretrained(folder / "unet", variant="fp16")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    opened = load_teacher(TeacherConfig(path=str(folder)))
    assert opened.network.dtype == torch.float32
    expected = {name: tensor.float() for name, tensor in family.network.state_dict().items()}
    torch.testing.assert_close(opened.network.state_dict(), expected, rtol=0, atol=0)


def test_a_variant_that_is_asked_for_is_read(tmp_path):
    family = SD.tiny()
    folder = save_teacher(family, tmp_path)
    network = type(family.network).from_config(family.network.config)
    network.half().save_pretrained(folder / "unet", variant="fp16")
    plain, asked = load_pipeline(folder).unet, load_pipeline(folder, variant="fp16").unet
    torch.testing.assert_close(plain.state_dict(), family.network.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(asked.half().state_dict(), network.state_dict(), rtol=0, atol=0)


def test_no_export_links_to_a_folder_that_stock_diffusers_would_not_read(tmp_path):
    folder = as_variants(save_teacher(SD.tiny(), tmp_path), ("vae",))
    with pytest.raises(ValueError, match=r"export\.frozen: expected copy: .*vae is read in the variant 'fp16'"):
        frozen_folders(folder, SD.tiny(), TeacherConfig(path=str(folder)))


def test_the_variant_of_the_configuration_is_read_where_a_part_has_it(tmp_path):
    family, folder = SD.tiny(), save_teacher(SD.tiny(), tmp_path)
    other = SD.tiny(seed=1).network
    other.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="50KB")  # in shards, with an index
    assert len(list((folder / "unet").glob("*fp16-*"))) > 1
    opened = load_teacher(TeacherConfig(path=str(folder), variant="fp16"))
    assert opened.network.dtype == torch.float32
    torch.testing.assert_close(opened.network.half().state_dict(), other.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(opened.pipe.vae.state_dict(), family.pipe.vae.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^teacher\.variant: expected a variant that .* has \(fp16\), got 'bf16'"):
        load_teacher(TeacherConfig(path=str(folder), variant="bf16"))


def test_a_run_starts_from_a_student_in_shards_of_a_variant(tmp_path):
    student = SD.tiny(seed=1)
    folder = save_teacher(student, tmp_path)
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    student.network.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="50KB")
    weights = read_student(str(folder), TeacherConfig(path="teacher"), SD.tiny())
    expected = {name: tensor.float() for name, tensor in student.network.state_dict().items()}
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_no_export_links_to_plain_files_beside_the_variant_that_is_read(tmp_path):
    folder = save_teacher(SD.tiny(), tmp_path)
    SD.tiny().pipe.vae.half().save_pretrained(folder / "vae", variant="fp16")
    assert "vae" in frozen_folders(folder, SD.tiny(), TeacherConfig(path=str(folder)))
    with pytest.raises(ValueError, match=r"vae is read in the variant 'fp16'"):
        frozen_folders(folder, SD.tiny(), TeacherConfig(path=str(folder), variant="fp16"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.fp16.safetensors", "model.safetensors"], (None, ["model.safetensors"])),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], ("fp16", ["model.fp16.safetensors"])),
        (["model.bf16.safetensors"], ("bf16", ["model.bf16.safetensors"])),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], ("fp16", 2)),
        (["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"], ("fp16", 2)),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], (None, 2)),
        (["pytorch_model.bin", "flax_model.msgpack", "model.onnx"], (None, [])),
    ],
)
def test_which_files_are_read(names, expected):
    variant, files = chosen_weights(reversed(names), pickles=False)
    assert (variant, len(files) if isinstance(expected[1], int) else files) == expected


# --------------------------------------------------------------------------------------- quantised


def test_a_quantised_teacher_is_refused_and_the_quantisation_named(tmp_path):
    folder = save_teacher(SD3.tiny(), tmp_path)
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"transformer/config\.json: quantization_config: .*\(bitsandbytes\)"):
        load_teacher(TeacherConfig(path=str(folder)))
