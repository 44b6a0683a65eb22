"""LoRAs and words that a user adds to a teacher: what stock diffusers makes of them is what is distilled."""

import json

import numpy as np
import pytest
import torch
from contracts.cases import save_images, save_teacher, sections
from families.original_layout import save_original
from safetensors.torch import load_file, save_file

from stepdistill import load_pipeline
from stepdistill.config import differences
from stepdistill.data.latent_cache import encoders
from stepdistill.export.links import frozen_folders
from stepdistill.families.config import TeacherConfig
from stepdistill.families.dit import DiT
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.sdxl import SDXL
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

LAYERS = {
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
}


def lora(family, file, *parts, seed=0):
    """A LoRA of rank 2 of one layer of every part, in diffusers' layout, with a trigger in its header."""
    torch.manual_seed(seed)
    weights = {}
    for part in parts:
        width = len(family.pipe.text_encoder.get_input_embeddings().weight[0])  # of both layers
        for end, shape in (("A", (2, width)), ("B", (width, 2))):
            weights[f"{part}.{LAYERS[part]}.lora_{end}.weight"] = torch.randn(shape)
    file.parent.mkdir(exist_ok=True)
    save_file(weights, file, metadata={"modelspec.trigger_phrase": "ink style"})
    return str(file)


def product(file, part):
    weights = load_file(file)
    return weights[f"{part}.{LAYERS[part]}.lora_B.weight"] @ weights[f"{part}.{LAYERS[part]}.lora_A.weight"]


def word(family, file, **vectors):
    torch.manual_seed(1)
    width = family.pipe.text_encoder.config.hidden_size
    save_file({name: torch.randn(count, width) for name, count in vectors.items()}, file)
    return str(file)


@pytest.fixture
def folder(tmp_path):
    return save_teacher(SD.tiny(), tmp_path / "teacher")


def test_loras_are_fused_at_their_weights_and_nothing_of_them_is_left(folder, tmp_path):
    family = SD.tiny()
    both = [lora(family, tmp_path / "a.safetensors", "unet", "text_encoder"),
            lora(family, tmp_path / "b/any.safetensors", "unet", "text_encoder", seed=1)]  # fmt: skip
    opened = load_teacher(TeacherConfig(path=str(folder), lora=(both[0], str(tmp_path / "b")), lora_weights=(0.5, -2)))
    for part, name in LAYERS.items():
        expected = getattr(family.pipe, part).state_dict()
        layer = name.removeprefix("text_model.")  # which transformers has since dropped
        key = next(key for key in expected if key.endswith(f"{layer}.weight"))
        expected[key] += 0.5 * product(both[0], part) - 2 * product(both[1], part)
        torch.testing.assert_close(getattr(opened.pipe, part).state_dict(), expected)
    assert not opened.pipe.get_list_adapters()


def test_a_whole_single_file_takes_them_too(folder, tmp_path):
    file = save_original(SD.tiny().pipe, tmp_path / "sd.safetensors")
    added = lora(SD.tiny(), tmp_path / "a.safetensors", "unet")
    opened = load_teacher(TeacherConfig(path=str(file), config=str(folder), lora=added))
    expected = load_teacher(TeacherConfig(path=str(folder), lora=added, lora_weights=1.0))
    torch.testing.assert_close(opened.network.state_dict(), expected.network.state_dict())


def test_a_word_is_its_embeddings_in_training_caches_and_the_teachers_own_pipeline(folder, tmp_path):
    file = word(SD.tiny(), tmp_path / "cat.safetensors", anything=2)
    plain = load_teacher(TeacherConfig(path=str(folder)))
    opened = load_teacher(TeacherConfig(path=str(folder), embeddings={"<cat>": file}))
    stock = SD.tiny().pipe
    stock.load_textual_inversion(file, token="<cat>")
    expected = stock.encode_prompt(["a <cat>"], "cpu", 1, False)[0]
    found = opened.embed(["a <cat>"])["encoder_hidden_states"]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, plain.embed(["a <cat>"])["encoder_hidden_states"])
    torch.testing.assert_close(opened.embed(["a cat"]), plain.embed(["a cat"]))
    changed = {name for name, value in encoders(opened).items() if encoders(plain)[name] != value}
    assert changed == {"text_encoder", "tokenizer"}


def test_sdxl_takes_a_word_in_both_encoders(tmp_path):
    family, folder = SDXL.tiny(), save_teacher(SDXL.tiny(), tmp_path / "sdxl")
    both = word(family, tmp_path / "both.safetensors", clip_l=1, clip_g=1)
    opened = load_teacher(TeacherConfig(path=str(folder), embeddings={"<cat>": both}))
    assert all("<cat>" in tokenizer.get_vocab() for tokenizer in (opened.pipe.tokenizer, opened.pipe.tokenizer_2))
    one = word(family, tmp_path / "one.safetensors", clip_l=1)
    with pytest.raises(ValueError, match=r"^teacher\.embeddings: <cat>: .*expected clip_g and clip_l, got clip_l"):
        load_teacher(TeacherConfig(path=str(folder), embeddings={"<cat>": one}))


def test_the_options_of_a_teacher_are_those_that_were_set():
    config = TeacherConfig(path="x", lora="a.safetensors", lora_weights=0.0, embeddings={})
    assert config.options() == {"lora": "a.safetensors", "lora_weights": 0.0}


def test_a_student_of_such_a_teacher_is_exported_with_what_it_needs(folder, tmp_path):
    added = lora(SD.tiny(), tmp_path / "a.safetensors", "unet", "text_encoder")
    cat = word(SD.tiny(), tmp_path / "cat.safetensors", anything=1)
    images = dict(np.load(save_images(SD.tiny(), tmp_path / "images.npz", 4)))
    np.savez(tmp_path / "images.npz", **images | {"captions": np.array(["a <cat>", "a dog"] * 2)})
    config = sections(tmp_path, SD.tiny(), "lcm", "adapter", steps=1)
    config["teacher"] |= {"lora": added, "lora_weights": 0.5, "embeddings": {"<cat>": cat}}
    run = Run(resolve(config))
    export = run.train()
    facts = json.loads((export / "stepdistill.json").read_text())
    assert facts["teacher_options"] == {"lora": added, "lora_weights": 0.5, "embeddings": {"<cat>": cat}}
    assert facts["triggers"] == ["<cat>", "ink style"]
    card = (export / "README.md").read_text()
    assert "the LoRA `a.safetensors` at the weight 0.5" in card and "the word `<cat>`" in card
    student = load_pipeline(export)
    fused = load_teacher(resolve(config).teacher).pipe
    torch.testing.assert_close(student.text_encoder.state_dict(), fused.text_encoder.state_dict())
    assert student.tokenizer.get_vocab() == fused.tokenizer.get_vocab()
    before = run.identity.values
    word(SD.tiny(), tmp_path / "cat.safetensors", anything=2)  # another file under the same name
    assert differences(before, Run(resolve(config)).identity.values)[0].startswith("teacher (encoders): was ")
    fused.load_lora_weights(export / "lora", weight_name="comfyui.safetensors")
    fused.fuse_lora(components=["unet"])
    fused.unload_lora_weights()
    torch.testing.assert_close(fused.unet.state_dict(), student.unet.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": "none.safetensors"}, r"teacher\.lora: no folder or file 'none\.safetensors'"),
        ({"lora": "{0}"}, r"teacher\.lora: .*: expected a folder with one \.safetensors file, or a file, got .*, "),
        ({"lora": "{0}/broken.safetensors"}, r"teacher\.lora: .*broken\.safetensors: .*cannot open it"),
        ({"lora": "{0}/notes.txt"}, r"teacher\.lora: .*notes\.txt: expected a \.safetensors file, got \.txt"),
        ({"lora": "{0}/other.safetensors"}, r"teacher\.lora: .*expected a LoRA for a StableDiffusionPipeline, got "),
        ({"lora": "{0}/wide.safetensors"}, r"teacher\.lora: .*expected a LoRA for a StableDiffusionPipeline, got "),
        ({"embeddings": {"<cat>": "{0}/wide.safetensors"}}, r"teacher\.embeddings: <cat>: .*expected one tensor, got "),
        ({"embeddings": {"<cat>": "{0}/other.safetensors"}}, r"teacher\.embeddings: <cat>: .*expected embeddings for"),
    ],
)
def test_what_cannot_be_added_is_refused_by_its_key(folder, tmp_path, options, said):
    place = tmp_path / "files"
    place.mkdir()
    (place / "notes.txt").write_text("hello")
    (place / "broken.safetensors").write_text("hello")
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 3)}, place / "other.safetensors")
    names = [f"unet.{LAYERS['unet']}.lora_{end}.weight" for end in "AB"]
    save_file({name: torch.zeros(2, 2) for name in names}, place / "wide.safetensors")
    text = json.dumps(options).replace("{0}", str(place))
    with pytest.raises(ValueError, match=f"^{said}"):
        load_teacher(TeacherConfig(path=str(folder), **json.loads(text)))


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        (Pixel, {"lora": "x"}, "teacher.lora: got x, but a pixel teacher takes none"),
        (Pixel, {"frames": 8}, "teacher.frames: got 8, but a pixel teacher takes none"),
        (Pixel, {"config": "x"}, "teacher.config: expected none, because .* is no single file, got 'x'"),
        (Pixel, {"revision": "v2"}, "teacher.revision: expected none, because .* is on this machine, got 'v2'"),
        (DiT, {"lora": "{0}"}, "teacher.lora: expected none, because diffusers loads no LoRA into a DiTPipeline"),
        (SD3, {"embeddings": {"<cat>": "{0}"}}, "teacher.embeddings: <cat>: expected none, because words are added to"),
    ],
)
def test_a_teacher_that_takes_none_says_so(tmp_path, family, options, said):
    folder = save_teacher(family.tiny(), tmp_path / "teacher")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    options = json.loads(json.dumps(options).replace("{0}", str(tmp_path / "x.safetensors")))
    with pytest.raises(ValueError, match=f"^{said}"):
        load_teacher(TeacherConfig(path=str(folder), **options))


def test_a_lora_whose_settings_name_code_is_refused(folder, tmp_path):
    settings = {"unet.r": 2, "unet.megatron_config": {"x": 1}, "unet.megatron_core": "antigravity"}
    header = {"lora_adapter_metadata": json.dumps(settings)}
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(ValueError, match=r"expected settings that name no code, got unet\.megatron_config"):
        load_teacher(TeacherConfig(path=str(folder), lora=str(tmp_path / "x.safetensors")))


def test_weights_are_as_many_as_loras():
    with pytest.raises(ValueError, match=r"lora_weights: expected one for each of teacher\.lora, got \[1\]"):
        TeacherConfig(path="x", lora=("a", "b"), lora_weights=(1,))


def test_no_export_links_to_an_encoder_that_was_changed(folder, tmp_path):
    network = TeacherConfig(path=str(folder), lora=lora(SD.tiny(), tmp_path / "a.safetensors", "unet"))
    encoder = TeacherConfig(path=str(folder), lora=lora(SD.tiny(), tmp_path / "b.safetensors", "text_encoder"))
    assert "text_encoder" in frozen_folders(folder, SD.tiny(), network)
    with pytest.raises(ValueError, match=r"export\.frozen: expected copy: teacher\.lora or teacher\.embeddings"):
        frozen_folders(folder, SD.tiny(), encoder)
