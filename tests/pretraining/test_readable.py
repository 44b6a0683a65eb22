"""Latents that tell attributes through noise."""

import math

import torch

from stepdistill.features.loading import load_reader
from stepdistill.features.vocabulary import Vocabulary
from stepdistill.pretraining.readable import LatentReader, named_values

SIZES = [2, 5]


def reader_and_latents():
    torch.manual_seed(0)
    return LatentReader(4 * 2 * 2, SIZES), torch.randn(64, 4, 2, 2), torch.randint(2, (64, 2))


def test_a_reader_that_knows_nothing_has_the_entropy_of_uniform_guesses():
    reader, z, values = reader_and_latents()
    torch.nn.init.zeros_(reader.layers[-1].weight)
    torch.nn.init.zeros_(reader.layers[-1].bias)
    torch.testing.assert_close(reader.loss(z, values).item(), sum(map(math.log, SIZES)) / 2, atol=1e-5, rtol=0)


def test_an_encoder_gains_nothing_by_scale():
    reader, z, values = reader_and_latents()
    scale, shift = 3 * torch.rand(1, 4, 1, 1) + 0.1, torch.randn(1, 4, 1, 1)
    losses = []
    for latents in (z, scale * z + shift):
        torch.manual_seed(1)
        losses.append(reader.loss(latents, values))
    torch.testing.assert_close(*losses)


def test_an_encoder_gains_by_giving_an_attribute_more_of_its_latents():
    """The same bit in one number of sixteen, and in all of them: noise hides the first sooner."""
    losses = []
    for numbers in (1, 16):
        torch.manual_seed(0)
        reader, bits = LatentReader(16, [2]), torch.randint(2, (512,))
        z = torch.randn(512, 16)
        z[:, :numbers] = (2.0 * bits - 1)[:, None]
        optimizer = torch.optim.Adam(reader.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss = reader.loss(z.view(512, 4, 2, 2), bits[:, None])
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 0.5 * losses[0]


def test_captions_together_name_an_images_attributes():
    words = load_reader("faces").vocabulary
    captions = [("a face with a smile", "a face", "a face with red glasses and long green hair"), ("a face",)]
    values, sizes = named_values(words, captions)
    found = dict(zip(words.attributes, values[0].tolist(), strict=True))
    for name, value in {"mouth": "smiling", "glasses": "red", "hair_length": "long", "hair_colour": "green"}.items():
        assert list(words.attributes[name])[found[name]] == value
    unnamed = [len(known) for known in words.attributes.values()]
    assert found["hat"] == len(words.attributes["hat"]) and values[1].tolist() == unnamed
    assert sizes == [number + 1 for number in unnamed]


def test_without_attributes_there_is_nothing_to_tell():
    values, sizes = named_values(Vocabulary(attributes={}), [("a",), ("b",)])
    assert values.shape == (2, 0) and sizes == []
