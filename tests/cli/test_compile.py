"""``--compile`` of ``generate`` and ``evaluate``: the images of before to a level, and a result that says so."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.cli import main
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.pixel import Pixel
from stepdistill.networks import compilation

compiled_by = pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.product)])


@pytest.fixture
def student(tmp_path):
    family = Pixel.tiny(size=28)
    return export_pipeline(family, family.network, DDIM(family.schedule, family.schedule.grid(2)), tmp_path / "student")


@pytest.fixture
def graphs(monkeypatch, backend):
    """The graphs that the flag's compiler was given."""
    given = []
    compiler = torch._dynamo.lookup_backend(backend)

    def compile_noting(graph, inputs):
        given.append(graph)
        return compiler(graph, inputs)

    noting = functools.partial(compilation.compile_blocks, backend=compile_noting)
    monkeypatch.setattr(compilation, "compile_blocks", noting)
    torch._dynamo.reset()
    yield given
    torch._dynamo.reset()


@compiled_by
def test_generated_images_are_those_of_before(student, tmp_path, graphs):
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        assert not graphs
        output = str(tmp_path / f"{name}.png")
        main(["generate", "--pipeline", str(student), "--num_images", "3", *flags, "--output", output])
    assert graphs
    eager, compiled = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("eager", "compiled"))
    assert eager.std() > 1 and abs(eager - compiled).max() <= 1


@compiled_by
def test_an_evaluation_has_the_numbers_of_before_and_says_that_it_was_compiled(student, tmp_path, graphs):
    common = ["--protocol", "embedded", "--pipeline", str(student), "--num_samples", "8", "--metrics", "kd"]
    results = []
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        output = tmp_path / f"{name}.json"
        main(["evaluate", *common, *flags, "--output", str(output)])
        results.append(json.loads(output.read_text()))
    assert graphs
    assert [result["timing"]["compiled"] for result in results] == [False, True]
    assert results[1]["kd"] == pytest.approx(results[0]["kd"], rel=1e-3)
