"""Sizes that are not square, clips, and the grids that go with a size: as every family's own pipeline has them."""

import json

import pytest
import torch
from browser import PLAYED, needs_browser, said_by
from contracts.cases import pipeline_images, save_teacher, train_student
from contracts.test_families import our_steps
from diffusers import WanPipeline

from stepdistill import load_pipeline
from stepdistill.export.contract import read_contract
from stepdistill.families.config import TeacherConfig
from stepdistill.families.latent import LatentFamily
from stepdistill.families.loading import families, load_teacher
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.wan import Wan
from stepdistill.inference.clips import FPS, write_clip
from stepdistill.inference.sampling import sample_images

RESIZED = [name for name, cls in families().items() if issubclass(cls, LatentFamily) and name not in ("dit", "wan")]
"""DiT has one size, and Wan's miniature is not square anyway."""


def wide(name):
    """A miniature whose images are twice as wide as high."""
    family = families()[name].tiny()
    height = family.image_shape[1]
    return type(family)(family.pipe, resolution=(height, 2 * height))


@pytest.mark.parametrize("name", RESIZED)
def test_our_call_is_the_pipelines_own_off_the_square(name):
    family = wide(name)
    assert family.image_shape[2] == 2 * family.image_shape[1]
    assert family.sample_shape[2] == 2 * family.sample_shape[1]
    for ours, theirs in our_steps(family, 1.0):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["flux", "zimage", "flux2", "chroma", "lumina2"])
@pytest.mark.parametrize("steps", [7, pytest.param(2, marks=pytest.mark.product)])
def test_the_grid_is_the_one_that_the_teachers_pipeline_makes_at_this_size(name, steps):
    family = wide(name)
    size = {
        key: family.pipeline_kwargs[key]
        for key in ("height", "width", "max_sequence_length")
        if key in family.pipeline_kwargs
    }
    pipeline_images(family.pipe, family, 1, seed=0, num_inference_steps=steps, **size)
    torch.testing.assert_close(family.pipe.scheduler.sigmas.double(), family.schedule.grid(steps), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (Wan.tiny, {"frames": 6}, "teacher.frames: expected 1 more than a multiple of 4, got 6"),
        (Wan.tiny, {"resolution": (16, 24)}, r"teacher.resolution: expected multiples of 16, got \[16, 24\]"),
        (SD3.tiny, {"resolution": (16, 64)}, r"teacher.resolution: expected at most 32 a side"),
    ],
)
def test_a_shape_that_a_pipeline_does_not_make_is_refused(make, options, why):
    family = make()
    with pytest.raises(ValueError, match=why):
        type(family)(family.pipe, **options)


def test_images_have_no_frames(tmp_path):
    folder = save_teacher(SD.tiny(), tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher.frames: got 5, but SD makes images"):
        load_teacher(TeacherConfig(path=str(folder), frames=5))


def test_the_two_experts_of_wan_are_refused(tmp_path):
    folder = save_teacher(Wan.tiny(), tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has the part 'transformer_2', one of two experts .* of one network"):
        load_teacher(TeacherConfig(path=str(folder)))
    (folder / "model_index.json").write_text(json.dumps(index | {"transformer_2": [None, None]}))
    with pytest.raises(
        ValueError, match=r"boundary_ratio: got 0.875, one of two experts .* expected a teacher of one network"
    ):
        load_teacher(TeacherConfig(path=str(folder)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """What a stock pipeline makes of a student's export, as a file. Wan's clips have one frame more than 4 k."""
    pytest.importorskip("av")
    folder, family = tmp_path_factory.mktemp("clip"), Wan(Wan.tiny().pipe, resolution=(16, 32), frames=25)
    run = train_student(folder, family, "lcm", "copy", options={"solver_steps": 48})
    images = sample_images(load_pipeline(run.folder / "pipeline"), 2, captions=["one", "two"])
    assert images.pixels.shape == (2, 3, 25, 16, 32) and images.calls == 4
    stock, call = WanPipeline.from_pretrained(run.folder / "pipeline"), read_contract(run.folder / "pipeline").call
    (frames,) = pipeline_images(stock, run.family, 1, seed=0, **call)
    write_clip((frames * 255).round().to(torch.uint8), folder / "clip.mp4")
    return folder / "clip.mp4"


@pytest.mark.product
def test_a_student_of_clips_is_trained_sampled_and_written(clip):
    av = pytest.importorskip("av")
    with av.open(str(clip)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert len(list(container.decode(video=0))) == 25


@pytest.mark.product
@needs_browser
def test_a_browser_plays_the_clip_to_its_end(clip):
    played = said_by(PLAYED, clip)
    assert (played["why"], played["error"], played["width"], played["height"]) == ("ended", None, 32, 16)
    assert played["seconds"] == pytest.approx(25 / FPS) and played["frames"] > 12  # a busy machine drops some
