"""Sizes that are not square, clips, and the grids that go with a size: as every family's own pipeline has them."""

import pytest
import torch
from contracts.cases import pipeline_images
from contracts.test_families import our_steps

from stepdistill.families.latent import LatentFamily
from stepdistill.families.loading import families

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
@pytest.mark.parametrize("steps", [2, 7])
def test_the_grid_is_the_one_that_the_teachers_pipeline_makes_at_this_size(name, steps):
    family = wide(name)
    size = {
        key: family.pipeline_kwargs[key]
        for key in ("height", "width", "max_sequence_length")
        if key in family.pipeline_kwargs
    }
    pipeline_images(family.pipe, family, 1, seed=0, num_inference_steps=steps, **size)
    torch.testing.assert_close(family.pipe.scheduler.sigmas.double(), family.schedule.grid(steps), atol=1e-6, rtol=0)
