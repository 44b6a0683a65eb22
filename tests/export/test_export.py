"""Exports: stock diffusers alone makes of them the images of the trainer's sampler, and nothing foreign is run."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from contracts.cases import FLOW, ZERO_SNR, generators, pipeline_images, save_teacher, scheduler_config, sections
from contracts.stock import job, read_images
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

from stepdistill import load_pipeline
from stepdistill.diffusion.guidance import guide
from stepdistill.diffusion.samplers import DDIM, ConsistencySampler, sample
from stepdistill.export.contract import read_contract
from stepdistill.export.links import frozen_folders
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser, conditional_and_null
from stepdistill.training.config import resolve
from stepdistill.training.run import Run


def uneven(height, width):
    """A teacher of one level, which takes images of odd sizes."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=(height, width), in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    return Pixel(network, DDIMScheduler(prediction_type="v_prediction").config)


TEACHERS = {
    "conditional": lambda: Pixel.tiny(),
    "unconditional": lambda: Pixel.tiny(num_classes=None),
    "unconditional-epsilon": lambda: Pixel.tiny(num_classes=None, prediction_type="epsilon"),
    "zero-snr": lambda: Pixel.tiny(scheduler=scheduler_config(ZERO_SNR)),
    "zero-snr-unconditional": lambda: Pixel.tiny(num_classes=None, scheduler=scheduler_config(ZERO_SNR)),
    "flow": lambda: Pixel.tiny(scheduler=scheduler_config(FLOW)),
    "flow-unconditional": lambda: Pixel.tiny(num_classes=None, scheduler=scheduler_config(FLOW)),
    "28x28x1": lambda: Pixel.tiny(size=28, num_classes=None),
    "20x20x4": lambda: Pixel.tiny(size=20, channels=4),
    "7x5x1": lambda: uneven(7, 5),
    "sd": SD.tiny,
}
SAMPLERS = {
    "ddim-1": (DDIM, 1),
    "ddim-4": (DDIM, 4),
    "renoise-1": (ConsistencySampler, 1),
    "renoise-4": (ConsistencySampler, 4),
}


def make_sampler(family, name):
    cls, steps = SAMPLERS[name]
    return cls(family.schedule, family.schedule.grid(steps))


@torch.no_grad()
def expected_images(family, sampler, count=3, seed=3, *, denoise=None):
    own = generators(count, seed)

    def noise(x):
        return torch.stack([torch.randn(x.shape[1:], generator=one) for one in own])

    start = family.schedule.initial_noise(noise(torch.empty(count, *family.sample_shape)))
    denoise = denoise or denoiser_of(family).conditioned(family.example_cond(range(count)))
    return family.decode(sample(denoise, sampler, start, noise))


def denoiser_of(family):
    return Denoiser(family, CopyBank(family.network), "teacher")


@pytest.fixture(scope="module")
def exports(tmp_path_factory, stock_diffusers):
    """The exports of all teachers and samplers, with the images that an environment without stepdistill made."""
    folder = tmp_path_factory.mktemp("exports")
    jobs = []
    for name, make in TEACHERS.items():
        for how in SAMPLERS:
            family, export = make(), folder / f"{name}_{how}"
            export_pipeline(family, family.network, make_sampler(family, how), export)
            jobs.append(job(export, family, 3, 3))
    stock_diffusers.generate_images(jobs)
    return folder


@pytest.mark.parametrize("how", SAMPLERS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_stock_diffusers_makes_the_images_of_our_sampler(exports, teacher, how):
    family = TEACHERS[teacher]()
    expected = expected_images(family, make_sampler(family, how))
    found = read_images(exports / f"{teacher}_{how}")
    assert found.shape == expected.shape and expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("teacher", ["unconditional", "zero-snr-unconditional", "28x28x1", "7x5x1", "sd"])
@pytest.mark.parametrize("how", SAMPLERS)
def test_what_a_stock_pipeline_can_sample_brings_no_code(exports, teacher, how):
    folder = exports / f"{teacher}_{how}"
    assert not list(folder.rglob("*.py"))
    assert isinstance(json.loads((folder / "model_index.json").read_text())["_class_name"], str)


def test_an_export_holds_no_pickle_and_no_partial_folder(exports):
    suffixes = {path.suffix for path in exports.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".py", ".md", ".npy"}
    assert not list(exports.glob("*.partial"))


# ---------------------------------------------------------------------------------------------- load_pipeline


@pytest.mark.parametrize("teacher", ["conditional", "unconditional", "flow"])
@pytest.mark.parametrize("how", ["ddim-4", "renoise-1"])
def test_a_bare_call_samples_as_trained(exports, teacher, how):
    family = TEACHERS[teacher]()
    pipeline = load_pipeline(exports / f"{teacher}_{how}")
    images = pipeline_images(pipeline, family, 3, seed=3)
    assert (images - expected_images(family, make_sampler(family, how))).abs().max() < 1e-5


def test_the_callers_arguments_win_over_the_contract(exports):
    family = TEACHERS["unconditional"]()
    pipeline = load_pipeline(exports / "unconditional_ddim-4")
    images = pipeline_images(pipeline, family, 3, seed=3, num_inference_steps=1)
    assert (images - expected_images(family, make_sampler(family, "ddim-1"))).abs().max() < 1e-5


def test_a_negative_prompt_counts_where_guidance_is_asked_for(exports):
    family, pipeline = SD.tiny(), load_pipeline(exports / "sd_ddim-4")
    plain, unguided, steered = (
        pipeline_images(pipeline, family, 3, seed=3, **options)
        for options in ({}, {"negative_prompt": ["mud"] * 3}, {"negative_prompt": ["mud"] * 3, "guidance_scale": 3.0})
    )
    assert torch.equal(plain, unguided)  # a bare call has a guidance of 1
    denoiser, cond, mud = denoiser_of(family), family.example_cond(range(3)), family.embed(["mud"] * 3)

    def denoise(x, t, s=None):
        return guide(*conditional_and_null(denoiser, x, t, cond, mud), 2.0, x, t, family.schedule)

    expected = expected_images(family, make_sampler(family, "ddim-4"), denoise=denoise)
    assert (steered - expected).abs().max() < 1e-5 and (steered - plain).abs().max() > 1e-3


@pytest.mark.parametrize("teacher", ["unconditional", "conditional", "flow"])
def test_a_loaded_student_is_saved_again_with_its_contract_and_its_code(tmp_path, teacher):
    """A student in half precision, say, is called as before; a copy by stock diffusers would forget the steps."""
    family = TEACHERS[teacher]()
    first = export_pipeline(family, family.network, make_sampler(family, "renoise-4"), tmp_path / "first")
    pipeline = load_pipeline(first)
    pipeline.save_pretrained(tmp_path / "again")
    again = load_pipeline(tmp_path / "again")
    assert type(again).__name__ == type(pipeline).__name__ and read_contract(tmp_path / "again") == read_contract(first)
    assert torch.equal(pipeline_images(pipeline, family, 3, seed=3), pipeline_images(again, family, 3, seed=3))
    with pytest.raises(ValueError, match="push_to_hub: expected False.*stepdistill push --pipeline"):
        pipeline.save_pretrained(tmp_path / "third", push_to_hub=True)
    assert not (tmp_path / "third").exists()


def test_foreign_code_is_refused_and_not_run(exports, tmp_path):
    family = TEACHERS["conditional"]()
    folder = export_pipeline(family, family.network, make_sampler(family, "ddim-1"), tmp_path / "student")
    sentinel = tmp_path / "it-ran"
    code = folder / "pipeline.py"
    code.write_text(f"open({str(sentinel)!r}, 'w').close()\n" + code.read_text())
    with pytest.raises(ValueError, match=r"pipeline\.py.*trust_remote_code"):
        load_pipeline(folder)
    assert not sentinel.exists()


def test_code_beside_a_component_is_refused(tmp_path):
    family = TEACHERS["unconditional"]()
    folder = export_pipeline(family, family.network, make_sampler(family, "ddim-1"), tmp_path / "student")
    (folder / "unet" / "modeling.py").write_text("")
    with pytest.raises(ValueError, match="brings its own code"):
        load_pipeline(folder)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    (tmp_path / "student").mkdir()
    with pytest.raises(ValueError, match=r"student: no model_index\.json"):
        load_pipeline(tmp_path / "student")
    with pytest.raises(ValueError, match="studnt: no such folder; did you mean 'student'"):
        load_pipeline(tmp_path / "studnt")


# ------------------------------------------------------------------------------------------------ the contract


def test_the_contract_says_how_to_sample(exports):
    contract = read_contract(exports / "conditional_ddim-4")
    assert contract.format == 1
    assert (contract.pipeline, contract.scheduler) == ("ClassConditionalPipeline", "DDIMScheduler")
    assert (contract.sampler, contract.steps, contract.timesteps) == ("DDIM", 4, [999.0, 749.0, 499.0, 249.0])
    assert (contract.conditioning, contract.num_classes) == ("class_labels", 3)
    assert contract.sample_shape == [1, 8, 8] and contract.prediction_type == "v_prediction"
    assert contract.guidance_scale == 1 and contract.call == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert read_contract(exports / "unconditional_ddim-4").call == {"num_inference_steps": 4}


def test_the_card_shows_a_call_that_works(exports):
    card = (exports / "conditional_renoise-4" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "num_inference_steps=4" in card
    assert "trust_remote_code" not in (exports / "unconditional_ddim-1" / "README.md").read_text()


def test_a_grid_that_no_scheduler_has_is_refused_before_anything_is_written(tmp_path):
    family = TEACHERS["unconditional"]()
    sampler = DDIM(family.schedule, torch.tensor([1.0, 0.3, 0.0]))
    with pytest.raises(ValueError, match="no stock scheduler"):
        export_pipeline(family, family.network, sampler, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_an_older_export_is_replaced(tmp_path):
    family = TEACHERS["unconditional"]()
    for how in ("ddim-1", "ddim-4"):
        export_pipeline(family, family.network, make_sampler(family, how), tmp_path / "student")
    assert read_contract(tmp_path / "student").steps == 4
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


# ------------------------------------------------------------------------- parts that are linked, not copied


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(SD.tiny(), tmp_path / "teacher")


def export_linked(teacher, folder):
    family = SD.tiny()
    links = frozen_folders(teacher, family, TeacherConfig(path=str(teacher)))
    return export_pipeline(family, family.network, make_sampler(family, "ddim-4"), folder, links=links)


def test_a_linked_export_is_the_copied_one_to_stock_diffusers(teacher, tmp_path):
    family = SD.tiny()
    copied = export_pipeline(family, family.network, make_sampler(family, "ddim-4"), tmp_path / "copied")
    moved = tmp_path / "elsewhere"
    export_linked(teacher, tmp_path / "linked").rename(moved)
    assert {path.name for path in moved.iterdir() if path.is_symlink()} == {"vae", "text_encoder", "tokenizer"}
    assert (moved / "vae").samefile(teacher / "vae") and not (moved / "unet").is_symlink()
    assert (moved / "model_index.json").read_text() == (copied / "model_index.json").read_text()
    assert "`cp -rL` makes a complete copy" in (moved / "README.md").read_text()
    images = [
        pipeline_images(DiffusionPipeline.from_pretrained(folder), family, 2, seed=3, num_inference_steps=4)
        for folder in (copied, moved)
    ]
    assert torch.equal(*images)


def test_a_linked_export_that_is_replaced_leaves_the_teacher_whole(teacher, tmp_path):
    before = {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
    for _ in range(2):
        export_linked(teacher, tmp_path / "student")
    assert {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()} == before


def test_a_linked_export_is_not_saved_in_its_own_place(teacher, tmp_path):
    before = {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
    folder = export_linked(teacher, tmp_path / "student")
    with pytest.raises(ValueError, match=r"save_directory: expected another folder, got .*, where .* is a link"):
        load_pipeline(folder, dtype=torch.float16).save_pretrained(folder)
    assert {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()} == before
    load_pipeline(folder).save_pretrained(tmp_path / "whole")
    assert not any(path.is_symlink() for path in (tmp_path / "whole").iterdir())


def test_without_its_teacher_only_a_copy_loads(teacher, tmp_path):
    whole = shutil.copytree(export_linked(teacher, tmp_path / "student"), tmp_path / "whole")  # follows links: cp -rL
    shutil.rmtree(teacher)
    load_pipeline(whole)
    with pytest.raises(ValueError, match=r"text_encoder: broken link to .*teacher/text_encoder"):
        load_pipeline(tmp_path / "student")


def test_code_behind_a_link_is_refused(teacher, tmp_path):
    (teacher / "vae/modeling.py").write_text("")
    with pytest.raises(ValueError, match=r"brings its own code \(vae/modeling.py\)"):
        load_pipeline(export_linked(teacher, tmp_path / "student"))


def test_where_no_links_can_be_made_nothing_half_written_is_left(tmp_path, monkeypatch):
    wanted = linked_sections(tmp_path)

    def refuse(self, target, target_is_directory=False):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(ValueError, match=r"export.frozen: expected copy: .*vae.*Operation not permitted"):
        export_linked(tmp_path / "teacher", tmp_path / "student")
    with pytest.raises(ValueError, match=r"export.frozen: .*Operation not permitted"):  # before the first step
        Run(resolve(wanted)).train()
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "images.npz", "run"}
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def linked_sections(folder):
    return sections(folder, SD.tiny(), "lcm", "adapter", steps=1) | {"export": {"frozen": "link"}}


def test_a_run_links_and_its_checkpoint_can_be_exported_whole(tmp_path):
    wanted = linked_sections(tmp_path)
    folder = Run(resolve(wanted)).train()
    assert (folder / "vae").is_symlink() and (folder / "lora/pytorch_lora_weights.safetensors").is_file()
    assert set(read_contract(folder).linked) == {"vae", "text_encoder", "tokenizer"}
    whole = Run(resolve(wanted | {"export": {"frozen": "copy"}})).export_checkpoint(tmp_path / "whole")
    assert not any(path.is_symlink() for path in whole.rglob("*")) and not read_contract(whole).linked
    family = SD.tiny()
    assert torch.equal(*(pipeline_images(load_pipeline(path), family, 2, seed=3) for path in (folder, whole)))


def test_a_teacher_that_has_nothing_to_link_to_is_refused(teacher, tmp_path):
    wanted = sections(tmp_path / "pixel", Pixel.tiny(), "lcm", "copy", steps=1) | {"export": {"frozen": "link"}}
    with pytest.raises(ValueError, match=r"export.frozen: expected copy: .*nothing but its network"):
        Run(resolve(wanted))
    shutil.rmtree(teacher / "vae")
    with pytest.raises(ValueError, match=r"no folder .*vae to link to"):
        frozen_folders(teacher, SD.tiny(), TeacherConfig(path=str(teacher)))
