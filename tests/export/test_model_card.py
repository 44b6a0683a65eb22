"""The card says what it is told as text, whatever the text; and no secret of the environment reaches an output."""

import dataclasses
import importlib.util
import re

import pytest
import yaml
from contracts.cases import sections
from huggingface_hub import ModelCard

from stepdistill.cli import main
from stepdistill.config import to_yaml
from stepdistill.export.contract import Contract, Origin
from stepdistill.export.model_card import model_card
from stepdistill.families.pixel import Pixel

PAYLOADS = {
    "YAML": "x\n---\nlicense: mit\n---\n",
    "Jinja": "{{ 7 * 7 }}{% for x in y %}",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "ANSI": "\x1b[2J\x1b]0;title\x07\x9b31m",
    "Markdown": "`x` [link](http://x) ![i](x) **b** | cell |",
    "separators": "a\r\nb\u2028c\u0085d\u202ee",
}
PLAIN = Contract(pipeline="P", scheduler="S", steps=4, timesteps=[9.0], conditioning="prompt", linked={"vae": "/x"})


@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_payload_in_any_text_leaves_the_card_as_it_is(kind):
    """RELIABILITY row 30: front matter with our keys alone, the same lines, no markup, no control characters."""
    text = PAYLOADS[kind]
    origin = Origin(method=text, teacher=text, results={text: 1.0, "fd": text})
    call = {"num_inference_steps": 4, "prompt_suffix": text}
    card = model_card(dataclasses.replace(PLAIN, origin=origin, scheduler=text, linked={text: text}, call=call))
    harmless = Origin(method="m", teacher="t", results={"r": 1.0, "fd": 0.5})
    wanted = model_card(dataclasses.replace(PLAIN, origin=harmless, call=call | {"prompt_suffix": "x"}))
    body = card.split("---\n", 2)[2] if kind != "YAML" else card[card.index("# A 4-step") :]
    assert body.strip().count("\n") == wanted.split("---\n", 2)[2].strip().count("\n")
    data = ModelCard(card).data.to_dict()
    assert data.keys() == {"library_name", "tags"} and data["library_name"] == "diffusers"
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", card)
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert not re.search(r"<|\{\{|\{%|\]\(http|!\[i\]", outside)


def test_a_plain_card_is_as_before():
    origin = Origin(method="dmd2", teacher="someone/teacher", results={"fd": 0.25, "images": 1000})
    card = model_card(dataclasses.replace(PLAIN, origin=origin))
    assert "Distilled by **dmd2** with stepdistill from `someone/teacher`." in card
    assert "| fd | 0.25 |\n| images | 1000 |\n" in card and "`vae` are links" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["stepdistill", "distillation", "dmd2"]


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
