"""What cannot be measured is refused before the reference is embedded, which may take hours, and before sampling."""

import numpy as np
import pytest

from stepdistill.evaluation.evaluate import run_protocol
from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.reference import Reference, check_size
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.families.sd import SD
from stepdistill.features.loading import load_features


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Return how a protocol of four images is refused: of a text-to-image pipeline unless ``images`` are given."""

    def fail(*args, **kwargs):
        pytest.fail("works before it refuses")

    def refused(images=None, prompts=(), **keys):
        if prompts:
            (tmp_path / "prompts.txt").write_text("\n".join(prompts))
            keys["captions"] = str(tmp_path / "prompts.txt")
        protocol = Protocol(num_samples=4, **{"features": "embedded", "reference": "embedded", **keys})
        pipeline = None if images else SD.tiny().pipe
        with pytest.raises(ValueError) as error:
            run_protocol(protocol, {}, output=tmp_path / "result.json", pipeline=pipeline, images=images, name="it")
        assert not list(tmp_path.glob("result*"))
        return str(error.value)

    monkeypatch.setattr(Reference, "open", fail)
    monkeypatch.setattr("stepdistill.evaluation.sources.sample_images", fail)
    return refused


def test_a_pipeline_without_its_prompts(refused):
    assert refused().startswith("captions: StableDiffusionPipeline: expected a file of prompts")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ("clip",)}, "'clip' needs a CLIP"),
        ({"metrics": ("clip",), "clip": "absent/clip"}, "absent/clip"),
        ({"metrics": ("adherence",)}, "'adherence' needs a network that reads attributes"),
        ({"metrics": ("adherence",), "attributes": "faces"}, "'adherence' needs prompts that ask for an attribute"),
        ({"metrics": ("adherence_unseen",), "attributes": "faces"}, "'adherence_unseen' needs prompts of held-out"),
        ({"metrics": ("accuracy",)}, "'accuracy' needs the class labels"),
    ],
)
def test_what_a_metric_lacks(refused, keys, message):
    assert message in refused(prompts=["hello", "hello", "you", "you"], **keys)


@pytest.mark.parametrize(
    ("metric", "message"), [("accuracy", "'accuracy' needs the class"), ("prompt_spread", "'prompt_spread' needs capt")]
)
def test_images_without_labels_or_captions(refused, tmp_path, metric, message):
    np.savez(tmp_path / "made.npz", images=np.zeros((6, 28, 28), np.uint8))
    assert message in refused(str(tmp_path / "made.npz"), metrics=(metric,))


def test_another_size_than_that_of_a_reference_that_is_not_resized(refused, tmp_path):
    np.savez(tmp_path / "made.npz", images=np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8))
    message = "size: expected none, or that of reference 'embedded', which is 28x28 grey and not resized, got 16"
    assert refused(str(tmp_path / "made.npz"), size=16) == message


def test_sizes_that_a_reference_has_or_takes(tmp_path):
    images, statistics = tmp_path / "made.npz", tmp_path / "statistics.npz"
    np.savez(images, images=np.random.default_rng(0).integers(0, 256, (6, 12, 12), np.uint8))
    network = load_features("embedded")
    MetricSuite(network, Reference.open(network, str(images))).statistics().write(statistics)
    for spec, size in (("embedded", None), ("embedded", 28), (images, 16), (statistics, 12), ("faces", 8)):
        check_size(str(spec), size)
    with pytest.raises(ValueError, match=r"statistics\.npz', which is 12x12 grey and not resized, got 16"):
        check_size(str(statistics), 16)
