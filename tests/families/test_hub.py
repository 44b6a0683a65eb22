"""Paths and hub ids told apart, hub errors as sentences (REPORTS 13), and what is fetched (REPORTS 16). No network."""

from pathlib import Path

import huggingface_hub
import pytest
from contracts.cases import save_teacher
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from stepdistill import load_pipeline
from stepdistill.families.additions import only_file
from stepdistill.families.config import TeacherConfig
from stepdistill.families.hub import fetch, locate, unreachable, wanted_files
from stepdistill.families.loading import load_teacher
from stepdistill.families.network_file import companion
from stepdistill.families.pixel import Pixel

SDXL = {
    "model_index.json": 0.001, "README.md": 0.01, "sd_xl_base_1.0.safetensors": 6.94,
    "sd_xl_base_1.0_0.9vae.safetensors": 6.94, "01.png": 1.0,
    "sd_xl_offset_example-lora_1.0.safetensors": 0.05, "scheduler/scheduler_config.json": 0.0,
    "text_encoder/config.json": 0.0, "text_encoder/model.safetensors": 0.49, "text_encoder/pytorch_model.bin": 0.49,
    "text_encoder/model.fp16.safetensors": 0.25, "text_encoder/model.onnx": 0.49,
    "text_encoder/flax_model.msgpack": 0.49,
    "text_encoder_2/config.json": 0.0, "text_encoder_2/model.safetensors": 2.78,
    "text_encoder_2/model.fp16.safetensors": 1.39, "text_encoder_2/openvino_model.bin": 2.78,
    "tokenizer/merges.txt": 0.0, "tokenizer/vocab.json": 0.0, "tokenizer_2/merges.txt": 0.0,
    "tokenizer_2/vocab.json": 0.0, "unet/config.json": 0.0, "unet/diffusion_pytorch_model.safetensors": 10.3,
    "unet/diffusion_pytorch_model.fp16.safetensors": 5.14, "unet/model.onnx_data": 10.3,
    "vae/config.json": 0.0, "vae/diffusion_pytorch_model.safetensors": 0.33,
    "vae/diffusion_pytorch_model.fp16.safetensors": 0.17, "vae_1_0/diffusion_pytorch_model.safetensors": 0.33,
    "vae_1_0/config.json": 0.0, "vae_decoder/model.onnx": 0.2,
}  # fmt: skip
"""Files of a repository laid out as SDXL's, with GB."""
SDXL_PARTS = ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"]
FLUX = {
    "model_index.json": 0.0, "ae.safetensors": 0.34, "flux1-dev.safetensors": 23.8,
    "scheduler/scheduler_config.json": 0.0,
    "text_encoder/config.json": 0.0, "text_encoder/model.safetensors": 0.25, "text_encoder_2/config.json": 0.0,
    "text_encoder_2/model-00001-of-00002.safetensors": 5.0, "text_encoder_2/model-00002-of-00002.safetensors": 4.5,
    "text_encoder_2/model.safetensors.index.json": 0.0, "tokenizer/vocab.json": 0.0, "tokenizer_2/spiece.model": 0.0,
    "transformer/config.json": 0.0, "transformer/diffusion_pytorch_model.safetensors.index.json": 0.0,
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": 9.98,
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors": 9.95,
    "transformer/diffusion_pytorch_model-00003-of-00003.safetensors": 3.87, "vae/config.json": 0.0,
    "vae/diffusion_pytorch_model.safetensors": 0.17,
}  # fmt: skip
FLUX_PARTS = ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"]


@pytest.mark.parametrize(("files", "parts", "size"), [(SDXL, SDXL_PARTS, 13.9), (FLUX, FLUX_PARTS, 33.7)])
def test_a_repository_is_fetched_without_its_duplicates(files, parts, size):
    wanted = wanted_files(files, parts, pickles=True, code=True)
    assert sum(files[name] for name in wanted) == pytest.approx(size, abs=0.05)
    needed = {name for name in files if name.endswith((".json", ".txt", ".model")) and name[:7] != "vae_1_0"}
    assert needed <= set(wanted) and len(wanted) == len(set(wanted))


def test_variants_and_pickles_are_fetched_only_where_there_is_nothing_else():
    names = ["README.md", "vae/README.md", "unet/m.py",
             "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin",
             "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"]  # fmt: skip
    plain, trusting = (wanted_files(names, ["unet", "vae"], pickles=trust, code=trust) for trust in (False, True))
    assert plain == ["README.md", "vae/diffusion_pytorch_model.fp16.safetensors"]
    assert trusting == ["README.md", "unet/m.py", "unet/diffusion_pytorch_model.bin", plain[1]]


def test_the_variant_of_the_configuration_is_fetched():
    wanted = wanted_files(SDXL, SDXL_PARTS, pickles=False, code=False, variant="fp16")
    weights = [name for name in wanted if name.endswith(".safetensors")]
    assert weights and all(name.endswith(".fp16.safetensors") for name in weights)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository; returns the patterns that were asked of it."""
    asked, folder = [], save_teacher(Pixel.tiny(), tmp_path / "snapshot")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] + ["other.safetensors"]

    def snapshot(name, *, revision, allow_patterns):
        asked.append((revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: names)
    return asked


def test_the_weights_of_a_network_that_a_file_has_are_not_fetched(hub):
    fetch(TeacherConfig(path="someone/teacher"), without=("unet",))
    assert "unet/config.json" in hub[-1][1] and not any(name.endswith(".safetensors") for name in hub[-1][1])


def test_what_the_hub_refuses_is_said_of_the_key_that_names_it(monkeypatch):
    asked = []

    def snapshot(name, **options):
        asked.append(options)
        return missing()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, *args, **kwargs: missing())
    with pytest.raises(ValueError, match=r"^teacher\.lora: there is no local folder 'someone/ink'"):
        only_file("someone/ink", "teacher.lora")
    assert asked == [{"revision": None, "allow_patterns": ["*.safetensors"], "ignore_patterns": ["*/*"]}]
    with pytest.raises(ValueError, match=r"^teacher\.config: there is no local folder 'someone/base'"):
        companion(Path("x.safetensors"), TeacherConfig(path="x.safetensors", config="someone/base"))


def test_a_hub_id_is_opened_from_what_was_fetched(hub):
    assert type(load_teacher(TeacherConfig(path="someone/teacher", revision="v2"))) is Pixel
    assert hub == [
        ("v2", ["model_index.json"]),
        ("v2", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors"]),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- paths and hub ids


PATHS = (
    "./teachr", "~/teachr", "runs/teachr", "/a/b/teachr", "a/b/teachr", "teachr.safetensors", "owner/teachr.ckpt",
    "teachr", "~nobody-of-this-name/teachr",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_what_looks_like_a_path_is_one_and_its_absence_is_said(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("runs/teacher", "teacher"):
        Path(folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"teacher\.path: no folder or file .*teachr") as said:
        locate(TeacherConfig(path=path))
    assert ("did you mean 'teacher'" in str(said.value)) == (path in ("./teachr", "~/teachr", "runs/teachr", "teachr"))


def test_a_folder_in_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_teacher(Pixel.tiny(), tmp_path / "teacher")
    assert type(load_teacher(TeacherConfig(path="~/teacher"))) is Pixel
    assert load_pipeline("~/teacher").unet is not None


def test_a_hub_id_that_is_not_cached_is_one_sentence_offline():
    with pytest.raises(ValueError, match=r"no local folder 'someone/nothing', so .* hub id; it is not in the local"):
        locate(TeacherConfig(path="someone/nothing"))


def test_a_name_that_no_repository_can_have_is_said_of_its_key():
    with pytest.raises(ValueError, match=r"^teacher\.path: there is no local folder 'a--b/c', so .*; Cannot have --"):
        locate(TeacherConfig(path="a--b/c"))
    with pytest.raises(ValueError, match=r"^teacher\.lora: there is no local folder 'a--b/c', so .*; Cannot have --"):
        only_file("a--b/c", "teacher.lora")


def hub_error(kind, text="text of the hub"):
    error = kind.__new__(kind)
    OSError.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (hub_error(RepositoryNotFoundError), "the hub has none of this name, or it is private"),
        (hub_error(GatedRepoError), "its owner gives access on request"),
        (OSError("no space left on device"), "no space left"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch, error, why):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(ValueError, match=rf"teacher\.path: there is no local folder 'someone/it', .*{why}"):
        locate(TeacherConfig(path="someone/it"))


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("offline"), ConnectionError("reset"), TimeoutError("slow"), "http"]
)
def test_without_a_connection_the_cache_is_enough(monkeypatch, tmp_path, error):
    if error == "http":  # whatever the hub's client raises where no server answers
        error = next(kind for kind in unreachable() if kind.__name__ == "TransportError")("no route")

    def fail(*args, **kwargs):
        raise error

    def cached(name, *, revision, allow_patterns, local_files_only):
        assert local_files_only
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert locate(TeacherConfig(path="someone/it")) == tmp_path
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: missing())
    with pytest.raises(ValueError, match="it is not in the local cache, and the hub cannot be reached"):
        locate(TeacherConfig(path="someone/it"))


def missing():
    raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\n for the specified revision")
