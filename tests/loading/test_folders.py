"""What a pipeline's folder may name: nothing of it runs, in whatever way diffusers or transformers could be told to.

RELIABILITY row 27. Every refusal names the file and the entry; a sentinel that foreign code would leave never appears.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from contracts.cases import pipeline_images, save_teacher
from diffusers.utils import dynamic_modules_utils

import stepdistill.loading
from stepdistill import load_pipeline
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.loading.classes import part_class
from stepdistill.loading.settings import values_by_key

GENUINE = Path(__file__).parents[2] / "pipelines"
EVIL = """
import pathlib
from diffusers import StableDiffusionPipeline
pathlib.Path({ran!r}).touch()


class Evil(StableDiffusionPipeline):
    pass
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_teacher(SD.tiny(), tmp_path_factory.mktemp("saved") / "teacher")


@pytest.fixture
def folder(saved, tmp_path):
    """A teacher, with a genuine file of ours as decoy, and foreign code outside it."""
    (tmp_path / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    shutil.copytree(saved, tmp_path / "teacher")
    return tmp_path / "teacher"


def change(path, **entries):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entries))


def name_class(*entry):
    def do(folder, outside):
        shutil.copy(GENUINE / "class_conditional.py", folder / "pipeline.py")
        named = [outside.with_suffix("") if word == "OUTSIDE" else word for word in entry]
        change(folder / "model_index.json", _class_name=[str(word) for word in named])

    return do


def name_part(name, *entry):
    def do(folder, outside):
        named = [str(outside.with_suffix("")) if word == "OUTSIDE" else word for word in entry]
        change(folder / "model_index.json", **{name: named})

    return do


def put_code(place):
    def do(folder, outside):
        shutil.copy(outside, folder / place)
        library = Path(place).stem
        if Path(place).parent.name:
            change(folder / "model_index.json", **{Path(place).parent.name: [library, "Evil"]})

    return do


def link_code(folder, outside):
    (folder / "pipeline.py").symlink_to(outside)
    change(folder / "model_index.json", _class_name=["pipeline", "Evil"])


def set_key(file, key, value):
    return lambda folder, outside: change(folder / file, **{key: value})


SHARDS = "unet/diffusion_pytorch_model.safetensors.index.json"
CLASS, PART = r"model_index\.json: _class_name: expected", r"model_index\.json: {}: expected"
WAYS = {
    "class outside": (name_class("../evil", "Evil"), CLASS),
    "class, absolute": (name_class("OUTSIDE", "Evil"), CLASS),
    "class, dots": (name_class("a.b", "Evil"), CLASS),
    "class, backslash": (name_class("..\\evil", "Evil"), CLASS),
    "class, three words": (name_class("pipeline", "ClassConditionalPipeline", "x"), CLASS),
    "class that the file only imports": (name_class("pipeline", "DiffusionPipeline"), CLASS),
    "class whose file is missing": (name_class("other", "Evil"), CLASS),
    "class of no pipeline": (set_key("model_index.json", "_class_name", "ModularPipeline"), CLASS),
    "class, a module": (set_key("model_index.json", "_class_name", "utils"), CLASS),
    "pipeline that opens others": (set_key("model_index.json", "_class_name", "KandinskyCombinedPipeline"), CLASS),
    "None.py, which diffusers takes for a custom pipeline": (put_code("None.py"), r"own code \(None\.py\)"),
    "foreign pipeline": (put_code("pipeline.py"), r"own code \(pipeline\.py\)"),
    "link to foreign pipeline": (link_code, r"own code \(pipeline\.py\)"),
    "foreign scheduler": (put_code("scheduler/evil.py"), r"own code \(scheduler/evil\.py\)"),
    "named as a library": (put_code("vae/diffusers.py"), r"own code \(vae/diffusers\.py\)"),
    "part outside": (name_part("unet", "../../evil", "Evil"), PART.format("unet")),
    "part, absolute": (name_part("scheduler", "OUTSIDE", "Evil"), PART.format("scheduler")),
    "os.system": (name_part("unet", "os", "system"), PART.format("unet")),
    "subprocess.Popen": (name_part("vae", "subprocess", "Popen"), PART.format("vae")),
    "dotted library": (name_part("vae", "stepdistill.cli", "main"), PART.format("vae")),
    "loader": (name_part("vae", "__spec__", "loader"), PART.format("vae")),
    "module of diffusers' pipelines": (name_part("vae", "pipeline_utils", "PushToHubMixin"), PART.format("vae")),
    "auto pipeline": (name_part("vae", "auto_pipeline", "AutoPipelineForText2Image"), PART.format("vae")),
    "auto class": (name_part("text_encoder", "transformers", "AutoModel"), PART.format("text_encoder")),
    "nested pipeline": (name_part("vae", "diffusers", "StableDiffusionPipeline"), PART.format("vae")),
    "part elsewhere": (name_part("../evil", "diffusers", "UNet2DConditionModel"), r"model_index\.json: \.\./evil: exp"),
    "auto_map": (
        set_key("text_encoder/config.json", "auto_map", {"AutoModel": "evil.Evil"}),
        r"text_encoder/config\.json: auto_map: names code",
    ),
    "auto_map of another repository": (
        set_key("tokenizer/tokenizer_config.json", "auto_map", {"AutoTokenizer": ["someone/else--evil.Evil", None]}),
        r"tokenizer_config\.json: auto_map: names code",
    ),
    "auto_map inside": (
        set_key("tokenizer/processor_config.json", "image_processor", {"auto_map": {"AutoImageProcessor": "evil.E"}}),
        r"processor_config\.json: auto_map: names code",
    ),
    "a permission that the folder gives itself": (
        set_key("text_encoder/config.json", "keypoint_detector_config", {"trust_remote_code": True}),
        r"text_encoder/config\.json: trust_remote_code: names code",
    ),
    "endless layers": (set_key("unet/config.json", "layers_per_block", 2**70), r"layers_per_block: expected at most"),
    "kernel": (
        set_key("text_encoder/config.json", "_attn_implementation_internal", "someone/kernel"),
        r"text_encoder/config\.json: _attn_implementation_internal: names code",
    ),
    "adapter": (
        set_key("text_encoder/adapter_config.json", "base_model_name_or_path", "../evil"),
        r"adapter_config\.json: expected a whole model",
    ),
    "weights elsewhere": (
        set_key("text_encoder/config.json", "transformers_weights", "adapter_model.bin"),
        r"config\.json: transformers_weights: expected a \.safetensors",
    ),
    "shards elsewhere": (
        set_key(SHARDS, "weight_map", {"a": "../../evil.safetensors"}), r"index\.json: weight_map: expected .*evil"
    ),
    "shards that are pickles": (
        set_key(SHARDS, "weight_map", {"a": "evil.bin"}), r"index\.json: weight_map: expected .*evil\.bin"
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_folder_names_nothing_of_it_runs(folder, tmp_path, way):
    """RELIABILITY row 27."""
    do, message = WAYS[way]
    do(folder, tmp_path / "evil.py")
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)
    with pytest.raises(ValueError, match=r"model_index|own code|json: |no family|would drop"):
        load_teacher(TeacherConfig(path=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_with_permission_the_code_runs_so_the_sentinel_can_appear(folder, tmp_path):
    put_code("pipeline.py")(folder, tmp_path / "evil.py")
    change(folder / "model_index.json", _class_name=["pipeline", "Evil"])
    assert type(load_pipeline(folder, trust_remote_code=True)).__name__ == "Evil"
    assert (tmp_path / "ran").exists()


def test_a_custom_pipeline_needs_the_same_permission(folder, tmp_path):
    with pytest.raises(ValueError, match=r"custom_pipeline: is code .*trust_remote_code=True"):
        load_pipeline(folder, custom_pipeline=str(tmp_path / "evil.py"))
    assert not (tmp_path / "ran").exists()


def test_an_index_that_is_no_index_is_named(folder):
    for content in ("[1]", "{", '{"_class_name": []}', '{"unet": ["diffusers"]}', '{"_class_name": {"a": 1}}'):
        (folder / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=r"model_index\.json"):
            load_pipeline(folder)


# -------------------------------------------------------------------------------------------------- our own code


@pytest.fixture
def student(tmp_path):
    """An export whose pipeline is a file of this package."""
    family = Pixel.tiny()
    return export_pipeline(family, family.network, DDIM(family.schedule, family.schedule.grid(2)), tmp_path / "student")


def test_our_own_files_are_not_run_but_found_in_the_package(student, tmp_path, monkeypatch):
    """Neither a file that changes after the check nor diffusers' cache of modules, which several processes rewrite."""
    before = pipeline_images(load_pipeline(student), Pixel.tiny(), 2, seed=1)
    check = stepdistill.loading.refuse_foreign_classes

    def check_then_change(folder):
        check(folder)
        (student / "late.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))

    def fail(*args, **kwargs):
        raise AssertionError("a file of the folder would run")

    monkeypatch.setattr(stepdistill.loading, "refuse_foreign_classes", check_then_change)
    monkeypatch.setattr(dynamic_modules_utils, "get_class_from_dynamic_module", fail)
    monkeypatch.setattr("diffusers.pipelines.pipeline_loading_utils.get_class_from_dynamic_module", fail)
    pipeline = load_pipeline(student)
    assert type(pipeline).__module__ == "stepdistill.pipelines.class_conditional"
    assert torch.equal(pipeline_images(pipeline, Pixel.tiny(), 2, seed=1), before)
    assert not (tmp_path / "ran").exists()


def test_a_link_to_one_of_our_files_is_as_good_as_the_file(student):
    """The hub's cache holds links to files with other names."""
    (student / "blob").write_bytes((student / "pipeline.py").read_bytes())
    (student / "pipeline.py").unlink()
    (student / "pipeline.py").symlink_to("blob")
    load_pipeline(student)


def test_values_are_found_at_any_depth():
    found = [key for key, _ in values_by_key([{"a": [[{"b": 2}]]}])]
    assert found == ["a", "b"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", b"x" * 50),
        ("text_encoder/model.safetensors", b""),
        ("vae/config.json", b'{"block_out_channels": 5}'),
        ("scheduler/scheduler_config.json", b"[]"),
        ("text_encoder/config.json", b'{"hidden_size": "a"}'),
    ],
)
def test_a_damaged_folder_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"/teacher"):
        load_pipeline(folder)
    with pytest.raises(ValueError, match=r"/teacher"):
        load_teacher(TeacherConfig(path=str(folder), family="sd"))


REAL = """
scheduler diffusers PNDMScheduler
unet diffusers UNet2DConditionModel
safety_checker stable_diffusion StableDiffusionSafetyChecker
feature_extractor transformers CLIPImageProcessor
feature_extractor_2 transformers CLIPFeatureExtractor
text_encoder transformers CLIPTextModelWithProjection
text_encoder_2 transformers T5EncoderModel
text_encoder_3 transformers Gemma2Model
tokenizer transformers CLIPTokenizer
tokenizer_2 transformers T5TokenizerFast
tokenizer_3 transformers GemmaTokenizerFast
vae diffusers AutoencoderDC
transformer diffusers FluxTransformer2DModel
"""


@pytest.mark.parametrize("words", REAL.strip().splitlines())
def test_what_published_pipelines_name_is_accepted(tmp_path, words):
    name, *entry = words.split()
    assert part_class(tmp_path, name, entry) is None
