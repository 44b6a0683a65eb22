"""Adherence to prompts, and variety within one prompt."""

import pytest
import torch

from stepdistill.evaluation.metrics.bootstrap import mean_interval
from stepdistill.evaluation.metrics.frechet import Moments
from stepdistill.evaluation.metrics.words import adherence_values, prompt_keys, within_prompt_deviations
from stepdistill.evaluation.networks import Networks
from stepdistill.evaluation.protocol import read_protocol
from stepdistill.evaluation.reference import Reference
from stepdistill.evaluation.sources import read_captions
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.features.attributes import AttributeReader
from stepdistill.features.classifier import SmallConvNet
from stepdistill.features.loading import load_reader
from stepdistill.features.vocabulary import UNASKED, Vocabulary
from stepdistill.inference.sampling import Images

WORDS = Vocabulary(
    attributes={"hat": {"none": None, "red": "red hat"}, "mouth": {"smiling": "smile", "frowning": "frown"}},
    unseen=({"hat": "red", "mouth": "smiling"},),
)


def test_adherence_is_the_share_of_asked_attributes():
    asked = torch.tensor([[1, 0], [1, UNASKED], [UNASKED, UNASKED], [UNASKED, 1]])
    shown = torch.tensor([[1, 1], [1, 1], [0, 0], [0, 1]])
    values = adherence_values(shown, asked)
    assert values.shape == (4,) and values.mean().item() == pytest.approx(3 / 4)
    assert values[2] == values.mean()  # a prompt that asks for nothing says nothing
    with pytest.raises(ValueError, match="'adherence' needs prompts that ask"):
        adherence_values(shown, torch.full_like(asked, UNASKED))


def test_the_interval_of_adherence_is_as_wide_as_fresh_samples_spread():
    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        asked = torch.where(torch.rand(400, 5, generator=generator) < 0.4, 1, UNASKED)
        weak = torch.rand(400, 1, generator=generator) < 0.3  # images fail at several attributes at once
        return adherence_values((torch.rand(400, 5, generator=generator) > 0.05 + 0.5 * weak).long(), asked)

    shares = torch.tensor([sample(seed).mean() for seed in range(300)])
    interval = mean_interval(sample(1000))
    assert interval.high - interval.low == pytest.approx(3.92 * shares.std().item(), rel=0.2)


def test_spread_within_prompts_is_the_share_of_the_references_variance():
    reference = Moments.of(torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * 2)
    prompts = torch.arange(500).repeat_interleave(4)
    centres = torch.randn(500, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(4, 0)
    noise = torch.randn(2000, 3, generator=torch.Generator().manual_seed(2))
    values, shared = within_prompt_deviations(centres + noise, prompts, reference)
    assert values.mean().item() == pytest.approx(1 / 4, rel=0.05) and torch.equal(shared.unique(), torch.arange(500))
    alone = torch.cat([prompts, torch.tensor([1000])])  # counts for nothing
    more, _ = within_prompt_deviations(torch.cat([centres + noise, 1e3 * torch.ones(1, 3)]), alone, reference)
    assert more.mean() == values.mean()
    assert within_prompt_deviations(centres, prompts, reference)[0].sum() == 0
    with pytest.raises(ValueError, match="'prompt_spread' needs prompts with two images"):
        within_prompt_deviations(noise[:5], torch.arange(5), reference)


def test_prompts_have_equal_keys_if_they_are_equal():
    first, second, third = prompt_keys(["a face", "a face ", "a face"]).tolist()
    assert first == third != second


@pytest.fixture
def suite():
    torch.manual_seed(0)
    network = AttributeReader(WORDS, in_channels=1, width=4, num_features=6).eval()
    rows = network.extract(pixels(60, seed=1))
    return MetricSuite(network, Reference(Moments.of(rows), rows=rows))


def pixels(count, seed=0):
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_a_suite_measures_what_prompts_ask_for(suite):
    shown = suite.features.read(suite.features.extract(pixels(40)))
    prompts = ["a red hat and a smile", "a frown"] * 20
    names = ["adherence", "adherence_unseen", "prompt_spread"]
    suite.check(names)
    found = suite.score(Images(pixels(40), captions=prompts), names)
    hat, smile, frown = shown[::2, 0] == 1, shown[::2, 1] == 0, shown[1::2, 1] == 1
    assert found["adherence"] == pytest.approx(((hat.sum() + smile.sum() + frown.sum()) / 60).item())
    assert found["adherence_unseen"] == pytest.approx(((hat.sum() + smile.sum()) / 40).item())
    for name in names:
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


def test_attributes_are_read_by_another_network_than_the_features(suite):
    torch.manual_seed(1)
    plain = SmallConvNet(width=4).eval()
    rows = plain.extract(pixels(60, seed=1))
    both = MetricSuite(plain, Reference(Moments.of(rows), rows=rows), attributes=suite.features)
    images = Images(pixels(40), captions=["a red hat and a smile", "a frown"] * 20)
    found = both.score(images, ["fd", "adherence"])
    assert found["adherence"] == suite.score(images, ["adherence"])["adherence"]
    assert found["fd"] == MetricSuite(plain, both.reference).score(images)["fd"]
    assert both.describe()["attributes"]["sha256"] == suite.features.sha256


def test_a_network_that_reads_no_attributes_is_refused():
    with pytest.raises(ValueError, match="attributes: expected 'faces' or the folder of an attribute reader, got 'em"):
        load_reader("embedded")


def test_what_adherence_lacks_is_named(suite):
    torch.manual_seed(0)
    plain = MetricSuite(SmallConvNet(width=4), suite.reference)
    with pytest.raises(ValueError, match="'adherence' needs a network that reads attributes: give --attributes"):
        plain.check(["adherence"])
    for name, captions, message in [
        ("adherence", None, "'adherence' needs captions"),
        ("adherence_unseen", None, "'adherence' needs captions"),
        ("prompt_spread", None, "'prompt_spread' needs captions"),
        ("adherence_unseen", ["a frown", "a smile"], "needs prompts of held-out combinations"),
    ]:
        with pytest.raises(ValueError, match=message):
            suite.score(Images(pixels(2), captions=captions), [name])


def test_the_protocol_of_faces_can_be_computed_and_has_its_prompts():
    protocol, _ = read_protocol("faces", {"reference": "faces-held-out"})
    suite = MetricSuite.of_protocol(protocol, Networks.of_protocol(protocol))
    assert suite.clip is not None and len(read_captions(protocol.captions, 5000)) == 5000
