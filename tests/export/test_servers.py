"""What other programs read in ``model_index.json``: DMD2's keys of flow students, and fields that mark a student."""

import json
import logging

import pytest
import torch
from contracts.cases import FLOW, save_images, scheduler_config, sections
from diffusers import DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin, UNet2DModel

from stepdistill import load_pipeline
from stepdistill.diffusion.native_grids import UnshiftedTimes
from stepdistill.diffusion.samplers import DDIM, ConsistencySampler
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.servers import dmd2_keys, mark_distilled
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd3 import SD3
from stepdistill.methods import find_method, method_names
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

KEYS = {"dmd2_denoising_timesteps", "dmd2_num_inference_steps", "dmd2_guidance_scale", "dmd2_scheduler_shift"}


def flow_family():
    return Pixel.tiny(scheduler=scheduler_config(FLOW))


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize("steps", [1, 4])
def test_a_server_that_reads_the_keys_visits_the_samplers_noise_levels(steps):
    schedule = flow_family().schedule
    sampler = DDIM(schedule, schedule.grid(steps))
    keys = dmd2_keys(sampler, 1.0)
    assert keys.keys() == KEYS and keys["dmd2_num_inference_steps"] == steps and keys["dmd2_guidance_scale"] == 1
    server = FlowMatchEulerDiscreteScheduler(shift=keys["dmd2_scheduler_shift"])
    server.set_timesteps(timesteps=keys["dmd2_denoising_timesteps"])
    torch.testing.assert_close(server.sigmas.double(), sampler.times, atol=1e-6, rtol=0)


def test_a_student_of_another_process_has_no_such_keys():
    for schedule in (Pixel.tiny().schedule, UnshiftedTimes(2.0)):
        assert dmd2_keys(ConsistencySampler(schedule, schedule.grid(4)), 1.0) == {}


def test_students_that_match_distributions_have_them():
    assert {name for name in method_names() if find_method(name).serves_as_dmd2} == {"dmd", "dmd2", "cdm", "tdm"}


@pytest.mark.parametrize(("method", "keys"), [("tdm", KEYS), ("lcm", set())])
def test_an_export_of_a_flow_student_carries_them_beside_what_diffusers_wrote(tmp_path, method, keys):
    mapping = sections(tmp_path, flow_family(), method, steps=1)
    save_images(flow_family(), tmp_path / "images.npz")
    folder = Run(resolve(mapping)).train()
    index = index_of(folder)
    assert {name for name in index if name.startswith("dmd2_")} == keys
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert len(load_pipeline(folder)(class_labels=[0, 1]).images) == 2


def test_stock_diffusers_loads_such_an_export_and_says_no_more_than_that_it_ignores_the_keys(tmp_path, caplog):
    family = SD3.tiny()
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    export_pipeline(family, family.network, sampler, tmp_path / "student", index=dmd2_keys(sampler, 1.0))
    absent = {name: None for name, part in family.pipe.components.items() if part is None}
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", **absent)
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert all("ignored" in record.message for record in caplog.records if "dmd2" in record.message)
    assert index_of(tmp_path / "student").keys() >= KEYS


class Marked(DiffusionPipeline):
    """A pipeline with both fields, as Flux2Klein and Cosmos have one each."""

    def __init__(self, is_distilled: bool = False, distilled_sigmas: list[float] | None = None) -> None:
        super().__init__()
        self.register_to_config(is_distilled=is_distilled, distilled_sigmas=distilled_sigmas)


def test_a_pipeline_with_fields_for_students_has_them_set():
    schedule = flow_family().schedule
    sampler, marked, guided = DDIM(schedule, schedule.grid(2)), Marked(), Marked()
    mark_distilled(marked, sampler, 1.0)
    assert marked.config.is_distilled and marked.config.distilled_sigmas == sampler.times[:-1].tolist()
    mark_distilled(guided, sampler, 3.0)  # it is called with guidance, as no distilled one is
    assert not guided.config.is_distilled


class MarkedDDPM(DDPMPipeline):
    """Such a pipeline with a network and a scheduler, as an export has them."""

    def __init__(
        self, unet: UNet2DModel, scheduler: SchedulerMixin, is_distilled: bool = False,
        distilled_sigmas: list[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(unet, scheduler)
        self.register_to_config(is_distilled=is_distilled, distilled_sigmas=distilled_sigmas)


def test_such_a_field_is_in_the_index_of_an_export(tmp_path, monkeypatch):
    family, pipeline = flow_family(), Pixel.pipeline
    monkeypatch.setattr(
        Pixel, "pipeline",
        lambda self, network, *given: MarkedDDPM(network, pipeline(self, network, *given).scheduler),
    )  # fmt: skip
    sampler = DDIM(family.schedule, family.schedule.grid(2))
    index = index_of(export_pipeline(family, family.network, sampler, tmp_path / "student"))
    assert index["is_distilled"] is True and index["distilled_sigmas"] == sampler.times[:-1].tolist()
