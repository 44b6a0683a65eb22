"""Single-file checkpoints in the original layout (REPORTS 13): the same teacher as the folder, or one sentence."""

import pytest
import torch
from contracts.cases import save_teacher
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from families.original_layout import original, save_original
from safetensors.torch import save_file

from stepdistill.export.links import frozen_folders
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.families.sd import SD
from stepdistill.families.sdxl import SDXL
from stepdistill.families.tiny import tiny_clip, tiny_unet, tiny_vae


def wide_sdxl():
    """SDXL with text encoders of two widths, by which diffusers tells them apart."""
    torch.manual_seed(0)
    (tokenizer, encoder), (tokenizer_2, encoder_2) = tiny_clip(), tiny_clip(projection=True, width=32)
    unet = tiny_unet(
        cross_attention_dim=48, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    vae = tiny_vae(scaling_factor=0.13025)
    return SDXL(StableDiffusionXLPipeline(vae, encoder, encoder_2, tokenizer, tokenizer_2, unet, scheduler))


def settings(family, folder):
    """The folder of a pipeline without its weights."""
    save_teacher(family, folder)
    for file in list(folder.rglob("*.safetensors")):
        file.unlink()
    return str(folder)


@pytest.fixture
def file(tmp_path):
    return save_original(SD.tiny().pipe, tmp_path / "sd.safetensors")


@pytest.mark.parametrize("make", [SD.tiny, wide_sdxl])
def test_a_single_file_is_the_same_teacher_as_the_folder(tmp_path, make):
    family = make()
    file, config = save_original(family.pipe, tmp_path / "one.safetensors"), settings(family, tmp_path / "settings")
    opened = load_teacher(TeacherConfig(path=str(file), config=config, dtype="bfloat16"))
    assert type(opened) is type(family) and opened.scheduler_config == family.scheduler_config
    for name, part in family.pipe.components.items():
        if hasattr(part, "state_dict"):
            expected = {key: value.bfloat16() if name == "unet" else value for key, value in part.state_dict().items()}
            torch.testing.assert_close(getattr(opened.pipe, name).state_dict(), expected, rtol=0, atol=0)
    torch.testing.assert_close(opened.example_cond([0, 1]), family.example_cond([0, 1]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.diffusion_model.out.2.weight", "unet: conv_out.weight"),
        ("first_stage_model.decoder.norm_out.bias", "vae: decoder.conv_norm_out.bias"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder: final_layer_norm.bias"),
    ],
)
def test_a_single_file_that_lacks_weights_is_refused_by_name(tmp_path, name, part):
    weights = original(SD.tiny().pipe)
    del weights[name]
    save_file(weights, tmp_path / "sd.safetensors")
    config = settings(SD.tiny(), tmp_path / "settings")
    with pytest.raises(ValueError, match=rf"sd\.safetensors: lacks weights of the {part}"):
        load_teacher(TeacherConfig(path=str(tmp_path / "sd.safetensors"), config=config))


def test_without_hub_and_settings_the_sentence_says_how_to_convert(file):
    with pytest.raises(ValueError, match=r"teacher\.config.*from_single_file\('.*sd\.safetensors'\)\.save_pretrained"):
        load_teacher(TeacherConfig(path=str(file)))


def test_settings_that_are_not_there_are_named(file, tmp_path):
    (tmp_path / "settings").mkdir()
    with pytest.raises(ValueError, match=r"teacher\.config: .*settings2.*did you mean 'settings'"):
        load_teacher(TeacherConfig(path=str(file), config=str(tmp_path / "settings2")))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("flux.safetensors", "expected a whole checkpoint.*save_pretrained"),
        ("broken.safetensors", "cannot open it: SafetensorError"),
        ("notes.txt", "expected a folder or"),
    ],
)
def test_a_network_alone_and_other_files_are_refused(tmp_path, name, why):
    save_file({"model.diffusion_model.double_blocks.0.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=rf"teacher\.path: .*{name}: .*{why}"):
        load_teacher(TeacherConfig(path=str(tmp_path / name)))


def test_a_pickled_checkpoint_opens_only_with_trust(tmp_path):
    torch.save({"state_dict": original(SD.tiny().pipe)}, tmp_path / "sd.ckpt")
    where = {"path": str(tmp_path / "sd.ckpt"), "config": settings(SD.tiny(), tmp_path / "settings")}
    with pytest.raises(ValueError, match=r"sd\.ckpt is a pickle.*teacher\.trust_pickles=true"):
        load_teacher(TeacherConfig(**where))
    opened = load_teacher(TeacherConfig(**where, trust_pickles=True))
    torch.testing.assert_close(opened.network.state_dict(), SD.tiny().network.state_dict(), rtol=0, atol=0)


def test_no_export_links_into_a_single_file(file):
    with pytest.raises(ValueError, match=r"export\.frozen: expected copy: .*sd\.safetensors is a single file"):
        frozen_folders(file, SD.tiny(), TeacherConfig(path=str(file)))
