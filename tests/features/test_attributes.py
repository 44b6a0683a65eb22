"""Attributes: from words to values, and from images to values."""

import numpy as np
import pytest
import torch

from stepdistill.assets import FACES
from stepdistill.features.attributes import WORDS, AttributeReader
from stepdistill.features.loading import load_features, load_reader
from stepdistill.features.vocabulary import UNASKED, Vocabulary
from stepdistill.pretraining.reader import accuracies, disturbed, read_attributes


@pytest.fixture(scope="module")
def faces():
    return Vocabulary.read(FACES / "reader" / WORDS)


def asked(vocabulary, prompt):
    """What a prompt asks for, in words."""
    values = zip(vocabulary.attributes.items(), vocabulary.asked([prompt])[0].tolist(), strict=True)
    return {name: list(known)[index] for (name, known), index in values if index != UNASKED}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a face", {}),
        ("", {}),
        ("A Smiling man with LONG red hair", {"hair_length": "long", "hair_colour": "red", "mouth": "smiling"}),
        ("light brown hair", {"hair_colour": "light brown"}),
        ("brown skin, short dark blond hair", {"skin": "brown", "hair_length": "short", "hair_colour": "dark blond"}),
        ("a blonde girl with blonde hair and a sky blue shirt", {"hair_colour": "blond", "shirt": "sky blue"}),
        ("auburn hair, a blue shirt and a blue hat", {"hair_colour": "brown", "shirt": "blue", "hat": "blue"}),
        ("a dark red shirt, black glasses", {"shirt": "dark red", "glasses": "dark"}),
        ("an earring", {"earrings": "earrings"}),
        ("sunglasses and a beard, frowning", {"glasses": "sunglasses", "beard": "beard", "mouth": "frowning"}),
        ("a gray hat and no smiley", {"hat": "grey"}),
    ],
)  # fmt: skip
def test_words_of_a_hand_are_read(faces, prompt, expected):
    assert asked(faces, prompt) == expected


def test_held_out_combinations_are_found(faces):
    prompts = [
        "black hair and an amber shirt",
        "an amber shirt",
        "black hair, a navy shirt",
        "red hair and a mint shirt",
    ]
    assert faces.is_unseen(faces.asked(prompts)).tolist() == [True, False, False, True]
    assert faces.asked([]).shape == (0, len(faces.attributes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("attributes: {hat: {red: '('}}", r"attributes\.hat\.red: expected a pattern, got '\('"),
        ("attributes: {hat: {red: r}}\nunseen: [{hat: blue}]", "unseen: expected values of attributes, got hat: blue"),
        ("attributes: [hat]", "attributes: expected"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_used_are_named(tmp_path, content, message):
    file = tmp_path / "words.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Vocabulary.read(file)


@pytest.fixture
def small():
    torch.manual_seed(0)
    words = Vocabulary(attributes={"hat": {"none": None, "red": "red hat"}, "mouth": {"a": "a", "b": "b", "c": "c"}})
    return AttributeReader(words, in_channels=3, width=4, num_features=6).requires_grad_(False).eval()


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (33, 20)])
def test_a_reader_takes_any_size_and_has_a_head_for_each_attribute(small, size):
    pixels = torch.randint(256, (5, 3, *size), dtype=torch.uint8)
    features = small(pixels)
    assert features.shape == (5, 6) and features.abs().max() < 1
    assert [tuple(scores.shape) for scores in small.attribute_logits(features)] == [(5, 2), (5, 3)]
    assert small.read(features).shape == (5, 2) and len(small.maps(pixels / 255)) == 3


def test_a_reader_comes_back_with_its_words(small, tmp_path):
    small.save_pretrained(tmp_path)
    (tmp_path / WORDS).write_text("attributes: {hat: {none: null, red: red hat}, mouth: {a: a, b: b, c: c}}")
    read = load_features(str(tmp_path))
    pixels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(read(pixels), small(pixels), atol=2e-3, rtol=0)
    assert read.vocabulary == small.vocabulary and read.preprocessing() == small.preprocessing()
    (tmp_path / WORDS).write_text("attributes: {hat: {none: null, red: cap}, mouth: {a: a, b: b, c: c}}")
    assert load_features(str(tmp_path)).describe() != read.describe()  # another meaning of the same weights


@pytest.fixture(scope="module")
def held_out():
    return read_attributes(FACES / "held_out.npz")


def decoded(pixels):
    """Images as a decoder leaves them: a little blurred, tinted and noisy, in 256 levels."""
    return disturbed(pixels / 255, torch.Generator().manual_seed(0)).mul(255).round().to(torch.uint8)


def in_32_levels(pixels):
    return pixels // 8 * 8 + 4


@pytest.mark.parametrize("change", [torch.clone, decoded, in_32_levels])
def test_the_embedded_reader_reads_faces_that_it_has_not_seen(held_out, change):
    pixels, values = held_out
    found = accuracies(load_reader("faces"), change(pixels), values)
    assert min(found[name] for name in ("skin", "hair_colour", "shirt", "glasses", "hat")) > 0.97, found
    assert min(found.values()) > 0.95, found


def test_the_embedded_reader_reads_combinations_that_it_has_not_seen(held_out, faces):
    unseen = faces.is_unseen(held_out[1])
    found = accuracies(load_reader("faces"), held_out[0][unseen], held_out[1][unseen])
    assert unseen.sum() > 50 and found["hair_colour"] > 0.9 and found["shirt"] > 0.95


def test_the_embedded_reader_is_small():
    assert sum(file.stat().st_size for file in (FACES / "reader").iterdir()) < 1e6
    with np.load(FACES / "held_out.npz") as archive:
        assert archive["attributes"].max() < 16


def test_a_damaged_reader_is_named(small, tmp_path):
    small.save_pretrained(tmp_path)
    (tmp_path / WORDS).write_text("attributes: {hat: {none: null, red: red hat}}", encoding="utf-8")
    with pytest.raises(ValueError, match="model.safetensors: expected the weights of this network"):
        load_features(str(tmp_path))
    (tmp_path / WORDS).unlink()
    with pytest.raises(ValueError, match="attributes.yaml: no such file"):
        load_features(str(tmp_path))
