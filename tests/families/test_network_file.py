"""Files of a network alone: the same teacher as the folder, or one sentence that says what was found."""

import pytest
import torch
from contracts.cases import save_teacher
from families.original_layout import unet_name
from safetensors.torch import save_file

from stepdistill.families.config import TeacherConfig
from stepdistill.families.flux import Flux
from stepdistill.families.loading import load_teacher
from stepdistill.families.observed import Observed
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.wan import Wan
from stepdistill.families.zimage import ZImage


def network_file(family, place, name=lambda key: key, **more):
    weights = {name(key): tensor.contiguous() for key, tensor in family.network.state_dict().items()}
    save_file(weights | more, place)
    return str(place)


def companion(family, folder):
    """The teacher's folder without the weights of its network."""
    save_teacher(family, folder)
    for file in list((folder / family.component).glob("*.safetensors")):
        file.unlink()
    return str(folder)


WAN = {
    "condition_embedder.": "", "time_embedder.linear_1": "time_embedding.0", "time_proj": "time_projection.1",
    "time_embedder.linear_2": "time_embedding.2", "text_embedder.linear_1": "text_embedding.0", "to_q": "q",
    "text_embedder.linear_2": "text_embedding.2", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm2": "norm3",
    "attn1": "self_attn", "attn2": "cross_attn",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_out": "head.head",
}  # fmt: skip


def wan_original(key):
    key = "head.modulation" if key == "scale_shift_table" else key.replace("scale_shift_table", "modulation")
    for new, old in WAN.items():
        key = key.replace(new, old)
    return f"model.diffusion_model.{key}"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (SD, lambda key: f"model.diffusion_model.{unet_name(key)}"),
        (Flux, lambda key: f"model.diffusion_model.{key}"),
        (Wan, wan_original),
        (Observed, lambda key: key),
    ],
)
def test_a_file_of_the_network_alone_is_the_same_teacher(tmp_path, family, name):
    made = family.tiny(seed=1)
    file = network_file(made, tmp_path / "network.safetensors", name)
    folder = str(save_teacher(made, tmp_path / "whole"))
    options = {"resolution": 16} if family is Observed else {"dtype": "bfloat16"}
    opened = load_teacher(TeacherConfig(path=file, config=companion(made, tmp_path / "folder"), **options))
    expected = load_teacher(TeacherConfig(path=folder, **options))
    assert type(opened) is family
    torch.testing.assert_close(opened.network.state_dict(), expected.network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda place: network_file(ZImage.tiny(), place), "got .* kind 'z-image-turbo'"),
        (lambda place: network_file(SD.tiny(), place, lambda key: f"model.diffusion_model.{unet_name(key)}"), "'v1'"),
        (lambda place: network_file(SD3.tiny(), place, later=torch.zeros(1)), "with also later"),
        (lambda place: network_file(SD3.tiny(dual_attention=True), place), "with also transformer_blocks.0.attn"),
        (lambda place: network_file(SD3.tiny(), place, lambda key: f"x.{key}"), "got .* weights such as x"),
        (lambda place: save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, place), "teacher.lora"),
        (
            lambda place: save_file({"a": torch.zeros(1, dtype=torch.float8_e4m3fn)}, place),
            "half precision, got .*e4m3",
        ),
        (lambda place: save_file({"vae.a": torch.zeros(1)}, place), r"weights of other parts \(vae.a\)"),
    ],
)
def test_another_file_is_refused_by_what_it_holds(tmp_path, make, said):
    file = tmp_path / "other.safetensors"
    make(file)
    with pytest.raises(ValueError, match=rf"^teacher\.path: .*other\.safetensors: .*{said}"):
        load_teacher(TeacherConfig(path=str(file), config=companion(SD3.tiny(), tmp_path / "folder")))


def test_a_network_alone_needs_the_rest_of_its_pipeline(tmp_path):
    file = network_file(SD3.tiny(), tmp_path / "sd3.safetensors")
    with pytest.raises(ValueError, match=r"for a network alone, set teacher\.config"):
        load_teacher(TeacherConfig(path=file))
    with pytest.raises(ValueError, match=r"teacher\.config: .*folder2: expected the folder of a complete pipeline"):
        load_teacher(TeacherConfig(path=file, config=str(tmp_path / "folder2")))


def test_a_network_that_diffusers_reads_from_no_file_is_refused(tmp_path):
    file = network_file(Pixel.tiny(), tmp_path / "pixel.safetensors")
    with pytest.raises(ValueError, match=r"diffusers reads no single file of UNet2DModel"):
        load_teacher(TeacherConfig(path=file, config=companion(Pixel.tiny(), tmp_path / "folder")))
