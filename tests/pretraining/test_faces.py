"""Faces: their captions, their files, and the reader's training."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from stepdistill.assets import CLIPS, EMBEDDED, FACES, TEACHERS
from stepdistill.features.attributes import WORDS, AttributeReader
from stepdistill.features.clip import Clip
from stepdistill.features.loading import load_reader
from stepdistill.features.vocabulary import UNASKED, Vocabulary
from stepdistill.pretraining.clip import CaptionTokens, train_tokenizer
from stepdistill.pretraining.faces import NUMBER_NAMED, caption, is_held_out, read_faces, values_of, visible
from stepdistill.pretraining.fit import FitConfig
from stepdistill.pretraining.reader import accuracies, train_reader

ROWS = [
    {"skin": "light", "hair": "long auburn hair", "clothing": "amber shirt", "mouth": "smiling", "hat": "grey hat"},
    {"skin": "dark", "hair": "short light brown hair", "clothing": "sky blue shirt", "mouth": "frowning",
     "glasses": "black glasses", "beard": "beard", "earrings": "earrings"},
    {"skin": "tan", "hair": "short black hair", "clothing": "amber shirt", "mouth": "smiling", "glasses": "sunglasses"},
]  # fmt: skip


@pytest.fixture
def faces(tmp_path):
    file = tmp_path / "faces.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return read_faces(file)


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.read(FACES / "reader" / WORDS)


def test_captions_name_a_few_attributes_that_are_there(faces, vocabulary):
    rng = np.random.default_rng(0)
    for face in faces:
        truth = torch.tensor(vocabulary.encode(values_of(face)))
        captions = [caption(face, rng) for _ in range(300)]
        asked = vocabulary.asked(captions)
        assert ((asked == truth) | (asked == UNASKED)).all()
        named = (asked != UNASKED).sum(1)
        assert named.max() < len(NUMBER_NAMED) and captions.count("a face") == (named == 0).sum()
        expected = sum(count * share for count, share in enumerate(NUMBER_NAMED))
        assert named.double().mean().item() == pytest.approx(expected, abs=0.25)


def test_captions_can_be_made_to_name_a_pair(faces, vocabulary):
    rng = np.random.default_rng(0)
    captions = [caption(faces[2], rng, ("hair_colour", "shirt")) for _ in range(20)]
    assert vocabulary.is_unseen(vocabulary.asked(captions)).all()
    assert is_held_out(faces[2]) and not is_held_out(faces[1])
    assert {"an amber shirt"} < {part for text in captions for part in text.replace(" and ", ", ").split(", ")}


def test_what_nobody_sees_is_not_said(vocabulary):
    """A hat hides hair, and a beard may be drawn too faintly to be seen."""
    images = np.full((40, 4, 4, 3), 200, np.uint8)  # skin
    base = {"skin": "tan", "hair_length": "long", "shirt": "navy", "mouth": "smiling", "glasses": "none",
            "hat": "none", "earrings": "none"}  # fmt: skip
    drawn = []
    for index, image in enumerate(images):
        colour = ["red", "green"][index % 2]
        image[0] = [[190, 20, 0], [140, 200, 20]][index % 2]
        drawn.append({**base, "hair_colour": colour, "beard": "beard" if index < 8 else "none"})
    images[:4, 3] = 195  # faint
    images[4:8, 3] = 100
    images[20:24, 0] = 50  # a hat
    found = visible(drawn, images)
    assert [face["beard"] for face in found] == ["none"] * 4 + ["beard"] * 4 + ["none"] * 32
    hidden = [index for index, face in enumerate(found) if face["hair_colour"] == "hidden"]
    assert hidden == [20, 21, 22, 23] and drawn[20]["hair_colour"] == "red"
    rng = np.random.default_rng(0)
    assert not any("red hair" in caption(found[20], rng) for _ in range(100))
    assert vocabulary.encode(values_of(found[20])) != vocabulary.encode(values_of(drawn[20]))


def test_a_damaged_row_names_its_line(tmp_path):
    file = tmp_path / "faces.jsonl"
    file.write_text('{"skin": "light"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"faces\.jsonl:1: (?s:.*)hair: missing"):
        read_faces(file)
    file.write_text('{"skin": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"faces\.jsonl:1: (?s:.*)skin: expected"):
        read_faces(file)


def test_no_training_face_has_a_held_out_pair(vocabulary):
    train, held_out = np.load(EMBEDDED["faces"]), np.load(EMBEDDED["faces-held-out"])
    assert train["images"].shape[1:] == held_out["images"].shape[1:] == (16, 16, 3)
    assert not vocabulary.is_unseen(torch.from_numpy(train["attributes"])).any()
    unseen = vocabulary.is_unseen(torch.from_numpy(held_out["attributes"]))
    assert 0.04 < unseen.double().mean() < 0.15
    for first in held_out["captions"][unseen.numpy(), 0]:  # they ask for it, too
        assert vocabulary.is_unseen(vocabulary.asked([str(first)])).all(), first
    seen = {image.tobytes() for image in train["images"]}
    assert sum(image.tobytes() in seen for image in held_out["images"]) < 0.01 * len(held_out["images"])


def test_captions_of_the_files_are_true(vocabulary):
    for name in ("faces", "faces-held-out"):
        archive = np.load(EMBEDDED[name])
        asked, truth = vocabulary.asked(archive["captions"][:500, 1].tolist()), archive["attributes"][:500]
        assert ((asked.numpy() == truth) | (asked.numpy() == UNASKED)).all()
    prompts = EMBEDDED["faces-prompts"].read_text(encoding="utf-8").splitlines()
    assert len(prompts) == 5000 and 200 < vocabulary.is_unseen(vocabulary.asked(prompts)).sum() < 500


def test_faces_are_small():
    files = [file for file in FACES.rglob("*") if file.is_file() and "teacher" not in file.parts]
    assert sum(file.stat().st_size for file in files) < 3e6


def test_every_visit_draws_one_of_an_images_captions():
    captions = [("a", "a b", "c"), ("b",), ("c", "a")]
    tokenizer = train_tokenizer(["a b c"], 600, 8)
    tokens = CaptionTokens(tokenizer, captions)
    drawn = tokens.draw(torch.arange(3).repeat(60), torch.Generator().manual_seed(0))
    texts = [text.strip() for text in tokenizer.batch_decode(drawn, skip_special_tokens=True)]
    for image, known in enumerate(captions):
        counts = [texts[image::3].count(text) for text in known]
        assert sum(counts) == 60 and min(counts) > 8
    assert tokens.mask(tokens.encode(["a b"])).sum() == 4  # with start and end


def test_a_reader_learns_colour_and_place(tmp_path):
    words = Vocabulary(
        attributes={"colour": {"red": "red", "blue": "blue"}, "place": {"top": "top", "bottom": "bottom"}}
    )
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(2, (400, 2), generator=generator)
    images = torch.full((400, 3, 8, 8), 255, dtype=torch.uint8)
    for image, (colour, place) in zip(images, values.tolist(), strict=True):
        image[:, 4 * place : 4 * place + 4] = torch.tensor([[40], [40], [60]] if colour else [[60], [40], [40]])[
            ..., None
        ]
    torch.manual_seed(0)
    network = AttributeReader(words, width=8, num_features=8)
    config = FitConfig(model={}, steps=60, batch_size=64, lr=1e-2, ema=0.9)
    network = train_reader(network, images, values, config, Accelerator(cpu=True), tmp_path / "log.jsonl")
    assert min(accuracies(network, images, values).values()) > 0.95


def test_the_embedded_judge_is_small_and_knows_the_words():
    clip = Clip.open("faces")
    held_out = np.load(EMBEDDED["faces-held-out"])
    pixels = torch.from_numpy(held_out["images"][:500]).movedim(-1, 1)
    pictures = torch.nn.functional.normalize(clip.images.extract(pixels), dim=1)
    prompts = ["a face with green hair", "a face with black hair"]
    texts = torch.nn.functional.normalize(clip.embed_captions(prompts)[0], dim=1)
    hair = list(Vocabulary.read(FACES / "reader" / WORDS).attributes["hair_colour"])
    colour = held_out["attributes"][:500, 2]
    scores = (pictures @ texts.T).numpy()
    for column, name in enumerate(["green", "black"]):
        asked, other = scores[colour == hair.index(name)][:, [column, 1 - column]].T
        assert (asked > other).mean() > 0.95
    assert sum(file.stat().st_size for file in CLIPS["faces"].iterdir()) < 1.5e6


def test_the_embedded_teacher_is_small_and_follows_colours_and_small_things():
    folder = TEACHERS["faces"]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 8e6
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a face with green hair, a yellow shirt and a smile", "a face with red glasses, a beard and a frown"] * 6
    seeded = torch.Generator().manual_seed(0)
    found = pipeline(prompts, num_inference_steps=10, guidance_scale=2.0, generator=seeded, output_type="pt").images
    reader = load_reader("faces")
    shown, asked = reader.read(reader.extract((found * 255).round().byte())), reader.vocabulary.asked(prompts)
    wanted = asked != UNASKED
    assert (shown == asked)[wanted].float().mean() > 0.85  # about one in four by chance
