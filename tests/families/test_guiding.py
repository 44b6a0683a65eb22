"""Guidance that a pipeline changes, and the times that it tells its network: as in the stock pipeline's own loop."""

import re

import pytest
import torch
from contracts.cases import pipeline_images, save_teacher

from stepdistill.diffusion.guidance import GuidanceRule, guide
from stepdistill.diffusion.prediction import to_prediction
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.contract import call_arguments
from stepdistill.families.chroma import Chroma
from stepdistill.families.config import TeacherConfig
from stepdistill.families.dit import DiT
from stepdistill.families.flux import Flux
from stepdistill.families.flux2 import Flux2
from stepdistill.families.guiding import guided_as_asked, guiding_arguments
from stepdistill.families.lumina2 import Lumina2
from stepdistill.families.pixel import Pixel
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.sdxl import SDXL
from stepdistill.families.zimage import ZImage
from stepdistill.files.schema import ConfigError, build
from stepdistill.inference.solvers import teacher_pipeline
from stepdistill.networks.bank import TEACHER
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

SCALE = 6.0


def steps_of(family, steps, arguments):
    """States before and after every step of the stock pipeline's guided call, and its sampler."""
    sampler, seen = DDIM(family.schedule, family.schedule.grid(steps)), []
    pipeline = family.pipeline(family.network, sampler, SCALE)
    step = pipeline.scheduler.step

    def spy(model_output, t, sample, *args, **kwargs):
        stepped = step(model_output, t, sample, *args, **kwargs)
        seen.append((family.unpack(sample), family.unpack(stepped[0])))
        return stepped

    pipeline.scheduler.step = spy
    asked = call_arguments(family, pipeline, sampler, SCALE)
    pipeline_images(pipeline, family, 2, seed=0, **(asked | arguments))
    return sampler, seen


def gaps(family, steps):
    """How far our guided call leads from every step of the pipeline, and how far guidance as in the paper does."""
    sampler, seen = steps_of(family, steps, guiding_arguments(family))
    teacher, cond = Denoiser(family, CopyBank(family.network), TEACHER), family.example_cond(range(2))
    ours, rule = [], family.guidance_rule
    for i, (x_t, stepped) in enumerate(seen):
        t, s = (sampler.times[j].expand(2) for j in (i, i + 1))
        for family.guidance_rule in (rule, GuidanceRule()):
            with torch.no_grad():
                prediction = teacher.guided(cond, SCALE - 1)(x_t, t)
            gap = (sampler.step(prediction, t, s, torch.randn_like) - stepped).abs().max() / stepped.abs().max()
            ours.append(gap.item())
    family.guidance_rule = rule
    return ours[::2], ours[1::2]


CASES = {
    "sd": (SD.tiny, {"guidance_rescale": 0.7}),
    "sd-v": (lambda: SD.tiny(prediction_type="v_prediction"), {"guidance_rescale": 1.0}),
    "sdxl": (SDXL.tiny, {"guidance_rescale": 0.7}),
    "zimage": (ZImage.tiny, {"guidance_rescale": 1.1, "guidance_interval": (0.6, 1.0)}),
    "zimage-tie": (ZImage.tiny, {"guidance_interval": (0.75, 1.0)}),  # a time of the grid, which is left out
    "lumina2": (Lumina2.tiny, {"guidance_rescale": 1.0, "guidance_interval": (6 / 7, 1.0)}),  # shift 6 of 0.5
    "qwen_image": (QwenImage.tiny, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_rescaled_and_truncated_guidance_are_the_pipelines_own(name):
    make, options = CASES[name]
    family = guided_as_asked(make(), TeacherConfig(path="teacher", **options))
    ours, plain = gaps(family, 4)
    assert len(ours) == 4 and max(ours) < 2e-5
    assert max(plain) > 20 * max(max(ours), 1e-6)  # so the rule is seen
    if "guidance_interval" in options:
        guided = [family.guidance_rule.guides(t[None]).item() for t in family.schedule.grid(4)[:-1]]
        assert True in guided and False in guided


def test_no_guidance_is_left_alone_by_every_rule():
    t, x_t = torch.tensor([0.9, 0.4]), torch.randn(2, 4, 6, 6)
    schedule = SD3.tiny().schedule
    given, free = (to_prediction(torch.randn(2, 4, 6, 6), x_t, t, schedule, "flow") for _ in range(2))
    for kind in ("deviation", "row", "global", "token"):
        seen = guide(given, free, 0.0, x_t, t, schedule, GuidanceRule(kind, 0.5))
        assert torch.equal(seen.x0, given.x0) and torch.equal(seen.eps, given.eps)
    within = guide(given, free, 3.0, x_t, t, schedule, GuidanceRule(interval=(0.5, 0.95)))
    everywhere = guide(given, free, 3.0, x_t, t, schedule)
    assert torch.equal(within.x0[0], everywhere.x0[0]) and torch.equal(within.x0[1], given.x0[1])


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (DiT.tiny, {"guidance_rescale": 0.7}, "guidance_rescale: expected none, because a teacher of DiT"),
        (QwenImage.tiny, {"guidance_rescale": 1.0}, "guidance_rescale: expected none, because"),
        (SD.tiny, {"guidance_rescale": 1.5}, "guidance_rescale: expected between 0 and 1, a share, got 1.5"),
        (Lumina2.tiny, {"guidance_rescale": 0.5}, "guidance_rescale: expected 0 or 1, got 0.5"),
        (Flux.tiny, {"guidance_interval": (0.2, 1.0)}, "FLUX.1 takes its guidance as an input"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(make, options, why):
    with pytest.raises(ValueError, match=why):
        guided_as_asked(make(), TeacherConfig(path="teacher", **options))


def test_an_interval_has_two_ends_and_a_pipeline_that_knows_none_is_not_sampled(tmp_path):
    for wrong in ([0.5, 0.5], [0.5], [0.1, 0.2, 0.3]):
        sentence = re.escape(f"teacher: guidance_interval: expected [low, high], got {wrong}")
        with pytest.raises(ConfigError, match=sentence):
            build(TeacherConfig, {"path": "x", "guidance_interval": wrong}, "teacher")
    config = TeacherConfig(path=str(save_teacher(Pixel.tiny(), tmp_path / "t")), null_class=0)
    for interval in ((0.2, 1.0), (0.0, 0.8)):
        family = guided_as_asked(ZImage.tiny() if interval[0] == 0 else SD.tiny(),
                                 TeacherConfig(path="t", guidance_interval=interval))  # fmt: skip
        with pytest.raises(ValueError, match=r"guidance_interval: expected \[0, 1\] to sample the teacher by its own"):
            guiding_arguments(family)
    assert teacher_pipeline(config, "DDIM") is not None


def test_the_teachers_pipeline_is_called_as_the_teacher_is_guided(tmp_path):
    folder = save_teacher(SD.tiny(), tmp_path / "teacher")
    pipeline = teacher_pipeline(TeacherConfig(path=str(folder), guidance_rescale=0.7), "DDIM")
    assert pipeline.contract.call["guidance_rescale"] == 0.7
    student = SD.tiny()
    guided_as_asked(student, TeacherConfig(path="teacher", guidance_rescale=0.7))
    sampler = DDIM(student.schedule, student.schedule.grid(2))
    assert "guidance_rescale" not in call_arguments(student, student.pipe, sampler, 1.0)


# ------------------------------------------------------------------------------------------- times in bfloat16


ROUNDED = {"flux": Flux.tiny, "flux2": Flux2.tiny, "chroma": Chroma.tiny, "qwen_image": QwenImage.tiny}
"""Pipelines that round the time to their precision before they divide it."""
EXACT = {"sd3": SD3.tiny, "zimage": ZImage.tiny, "lumina2": Lumina2.tiny}
"""Those that do not."""


@pytest.mark.parametrize("name", [*ROUNDED, *EXACT])
def test_a_network_in_bfloat16_is_told_the_times_of_its_pipeline(name):
    family = {**ROUNDED, **EXACT}[name]()
    family.pipe.to(torch.bfloat16)
    sampler, told, states = DDIM(family.schedule, family.schedule.grid(7)), [], []
    pipeline, cond = family.pipeline(family.network, sampler, 1.0), family.example_cond([0])
    step = pipeline.scheduler.step

    def spy(model_output, t, sample, *args, **kwargs):
        states.append((family.unpack(sample), family.unpack(model_output)))
        return step(model_output, t, sample, *args, **kwargs)

    def listen(module, args, kwargs):
        told.append(kwargs["timestep"] if "timestep" in kwargs else args[1])

    pipeline.scheduler.step = spy
    pipeline.set_progress_bar_config(disable=True)
    family.network.register_forward_pre_hook(listen, with_kwargs=True)
    asked = call_arguments(family, pipeline, sampler, 1.0)
    pipeline(prompt=family.example_prompts([0]), output_type="latent", **asked)
    assert len(told) == 7
    for i, (x_t, expected) in enumerate(states):
        with torch.no_grad():
            ours = family.call(family.network, x_t, sampler.times[i].expand(1), cond)
        # of exact times, a scheduler's own arithmetic in float32 is seen
        torch.testing.assert_close(told[-1], told[i], rtol=0 if name in ROUNDED else 1e-5, atol=0)
        assert told[i].dtype == (torch.bfloat16 if name in ROUNDED else torch.float32)
        atol = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        torch.testing.assert_close(ours.float(), expected.float(), atol=atol, rtol=0)
