"""The card says what it is told as text, whatever the text; and no secret of the environment reaches an output."""

import dataclasses
import importlib.util
import re

import pytest
import torch
from contracts.cases import sections
from huggingface_hub import ModelCard
from PIL import Image

from stepdistill.assets import FASHION
from stepdistill.cli import main
from stepdistill.config import to_yaml
from stepdistill.export.contract import Contract, Origin
from stepdistill.export.model_card import SampleSheet, model_card
from stepdistill.export.provenance import teacher_license
from stepdistill.families.pixel import Pixel
from stepdistill.inference.grids import make_grid
from stepdistill.inference.student import student_images
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

PAYLOADS = {
    "YAML": "x\n---\nlicense: mit\n---\n",
    "Jinja": "{{ 7 * 7 }}{% for x in y %}",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "ANSI": "\x1b[2J\x1b]0;title\x07\x9b31m",
    "Markdown": "`x` [link](http://x) ![i](x) **b** | cell |",
    "separators": "a\r\nb\u2028c\u0085d\u202ee",
}
PLAIN = Contract(pipeline="P", scheduler="S", steps=4, timesteps=[9.0], conditioning="prompt", linked={"vae": "/x"})
COST = {"steps": 2000, "images": 128_000, "teacher_forwards": 640_000, "cpu_minutes": 3.5}
SHEET = SampleSheet(Image.new("L", (2, 2)), 50, ["a cat", ""])


@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_payload_in_any_text_leaves_the_card_as_it_is(kind):
    """RELIABILITY row 30: front matter with our keys alone, the same lines, no markup, no control characters."""
    text = PAYLOADS[kind]

    def card_of(text, name):
        origin = Origin(
            method=text, teacher=text, results={name: 1.0, "fd": text},
            measured_on={"features": text, "reference": {"images": text}}, data=text,
            license={"license": "other", "license_name": text, "license_link": text},
            start={"path": text}, training=COST,
        )  # fmt: skip
        call = {"num_inference_steps": 4, "prompt_suffix": text}
        changed = {"origin": origin, "scheduler": text, "linked": {name: text}, "call": call}
        sheet = SampleSheet(Image.new("L", (2, 2)), 50, [text, ""])
        return model_card(dataclasses.replace(PLAIN, **changed), sheet)

    card, wanted = card_of(text, text), card_of("x", "r")
    body = card.split("---\n", 2)[2] if kind != "YAML" else card[card.index("# A 4-step") :]
    assert body.strip().count("\n") == wanted.split("---\n", 2)[2].strip().count("\n")
    data = ModelCard(card).data.to_dict()
    assert data.keys() == {"library_name", "tags", "pipeline_tag", "license", "license_name", "license_link"}
    assert data["library_name"] == "diffusers" and data["license"] == "other"
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", card)
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert not re.search(r"<|\{\{|\{%|\]\(http|!\[i\]", outside)


def test_a_whole_card_says_where_the_student_is_from_and_what_it_was_measured_at():
    origin = Origin(
        method="dmd2", teacher="someone/teacher", data="faces", guidance_distilled=2.0, training=COST,
        license={"license": "openrail++"}, start={"path": "/data/anna/runs/first"},
        results={"fd": 0.25, "fd_low": 0.2, "fd_high": 0.3, "num_samples": 1000},
        measured_on={"features": "embedded", "seed": 1, "features_sha256": "f" * 64, "reference": {"images": 9}},
        selected={"step": 2},
    )  # fmt: skip
    card = model_card(dataclasses.replace(PLAIN, origin=origin, guidance_scale=1.0), SHEET)
    data = ModelCard(card).data
    assert (data.license, data.base_model, data.pipeline_tag) == ("openrail++", "someone/teacher", "text-to-image")
    assert data.tags == ["stepdistill", "distillation", "dmd2"] and data.library_name == "diffusers"
    for said in (
        "Distilled by **dmd2** with stepdistill from `someone/teacher`.", "![samples](samples.png)",
        "Below: its teacher in 50", "From left to right: a cat; (empty).", "DiffusionPipeline.from_pretrained",
        "stepdistill.load_pipeline", "manual_seed", "| fd | 0.25 | 0.2 to 0.3 |\n| num_samples | 1000 |  |\n",
        "On features embedded, seed 1, reference of 9 images.", "biased in its favour",
        "| images | 128,000, 64 per step |", "| data | `faces` |",
        "guidance scale of 2 is built in", "ignores a negative prompt", "The teacher's: openrail++.", "`vae` are links",
    ):  # fmt: skip
        assert said in card, said
    assert "anna" not in card and "ffff" not in card


def test_a_card_of_which_little_is_known_says_so():
    card = model_card(dataclasses.replace(PLAIN, conditioning="none", origin=Origin(teacher="/data/anna/faces")))
    data = ModelCard(card).data
    assert (data.license, data.pipeline_tag, data.base_model) == ("unknown", "unconditional-image-generation", None)
    assert "Unknown: the teacher's folder names none" in card and "Nothing was measured" in card
    assert "from `faces`" in card and "anna" not in card and "samples.png" not in card


def test_a_card_of_clips_calls_for_frames():
    card = model_card(dataclasses.replace(PLAIN, sample_shape=[4, 3, 8, 8]))
    assert ModelCard(card).data.pipeline_tag == "text-to-video"
    assert card.count("clips = pipe(") == card.count(").frames") == 2 and ".images" not in card


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x", {"license": "mit"}),
        ("---\r\nlicense: other\r\nlicense_name: x\r\n---\r\n", {"license": "other", "license_name": "x"}),
        ("# no front matter", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\nlicense: 'a <b>'\n---\n", {}),
        ("---\n: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
    ],
)
def test_the_licence_of_a_teacher_is_what_its_card_says(tmp_path, readme, expected):
    assert teacher_license(tmp_path) == {}
    (tmp_path / "README.md").write_text(readme, newline="")
    assert teacher_license(tmp_path) == expected


def test_the_embedded_teacher_has_a_licence():
    assert teacher_license(FASHION / "teacher") == {"license": "apache-2.0"}


def test_an_export_shows_the_student_above_its_teacher_and_no_path_of_the_machine(tmp_path):
    family = Pixel.tiny()
    run = Run(resolve(sections(tmp_path, family, "lcm", steps=1)))
    folder = run.train()
    card = (folder / "README.md").read_text()
    ModelCard(card)
    assert str(tmp_path) not in card and "from `teacher`" in card and "| data | `images.npz` |" in card
    assert "class 0; class 1; class 2; class 0" in card
    student = student_images(run.distiller, 8).pixels / 255
    shown, expected = Image.open(folder / "samples.png"), make_grid(student, columns=8)
    assert shown.size[0] == expected.size[0] and shown.size[1] > 2 * expected.size[1]
    assert shown.crop((0, 0, *expected.size)).tobytes() == expected.tobytes()


def test_the_teachers_samples_are_made_once_for_all_exports_of_a_run(tmp_path, monkeypatch):
    run = Run(resolve(sections(tmp_path, Pixel.tiny(), "progressive", steps=2)))
    guidances, make = [], run.sheets.teacher_images

    def counted(guidance, device):
        guidances.append(guidance)
        return make(guidance, device)

    monkeypatch.setattr(run.sheets, "teacher_images", counted)
    before = run.sheets.make().picture
    with torch.no_grad():
        for weight in run.distiller.bank.params(run.distiller.result_role):
            weight.mul_(1.5)
    after = run.sheets.make().picture
    half = (0, before.size[1] // 2 + 1, *before.size)
    assert before.tobytes() != after.tobytes() and before.crop(half).tobytes() == after.crop(half).tobytes()
    assert guidances == [0.0]


CANARY = "canary-7f3a9d51"
TRACKER = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")


def test_no_token_of_the_environment_reaches_an_output_file_or_a_log(tmp_path, monkeypatch, capfd):
    """RELIABILITY row 29: train with a tracker and export, then look at every byte of what was written and said."""
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    wanted = sections(tmp_path, Pixel.tiny(), "lcm", steps=1, tracker=TRACKER, save_every=1)
    (tmp_path / "config.yaml").write_text(to_yaml(wanted))
    main(["train", "--config", str(tmp_path / "config.yaml")])
    main(["export", "--config", str(tmp_path / "run/config.yaml"), "--output", str(tmp_path / "student")])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {"README.md", "metrics.jsonl"} | ({"events.out.tfevents"} if TRACKER == "tensorboard" else set())
    assert names <= {path.name[:19] for path in written}
    assert [str(path) for path in written if CANARY.encode() in path.read_bytes()] == []
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err and "student" in said.out


def test_no_token_can_be_given_in_a_configuration(tmp_path, capsys):
    """RELIABILITY row 29: there is no key for one, and the refusal does not repeat it."""
    (tmp_path / "config.yaml").write_text(to_yaml(sections(tmp_path, Pixel.tiny(), "lcm", steps=1)))
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", str(tmp_path / "config.yaml"), f"train.hub_token={CANARY}"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "hub_token" in said and CANARY not in said
