"""The sampling contract: what is written is read again, and exports of older versions still open."""

import json

import pytest

from stepdistill.export.contract import CONTRACT, Contract, Origin, read_contract, write_contract
from stepdistill.export.model_card import model_card

FULL = Contract(
    pipeline="ClassConditionalPipeline",
    scheduler="TCDScheduler",
    own_code=True,
    sampler="TCD",
    steps=2,
    timesteps=[999.0, 499.0],
    gamma=0.3,
    guidance_scale=1.0,
    guidance_convention="1 is none",
    prediction_type="epsilon",
    conditioning="class_labels",
    num_classes=3,
    sample_shape=[1, 8, 8],
    call={"num_inference_steps": 2, "eta": 0.3},
    versions={"torch": "2.0"},
    origin=Origin(
        method="tcd",
        teacher="a/teacher",
        teacher_sha256="abc",
        guidance_distilled=7.5,
        config_hash="def",
        training={"steps": 20},
        critic={"method.features": "123"},
        start={"path": "earlier", "training": {}},
        method_facts={"guidance_range": []},
        selected={"step": 10, "fd": 1.5},
        results={"fd": 1.5, "num_samples": 100},
    ),
    linked={"vae": "/a/teacher/vae"},
)

FORMAT_1 = json.loads("""{
  "format": 1,
  "pipeline": "ClassConditionalPipeline",
  "scheduler": "LCMScheduler",
  "own_code": true,
  "sampler": "Renoise",
  "steps": 4,
  "timesteps": [999.0, 759.0, 499.0, 259.0],
  "guidance_scale": 1.0,
  "guidance_convention": "diffusers: unconditional + guidance_scale * (conditional - unconditional); 1 is none",
  "prediction_type": "v_prediction",
  "conditioning": "class_labels",
  "num_classes": 3,
  "sample_shape": [1, 8, 8],
  "call": {"num_inference_steps": 4, "guidance_scale": 1.0},
  "versions": {"diffusers": "0.42.1", "torch": "2.13.0+cpu"},
  "method": "lcm",
  "teacher": "runs/teacher",
  "teacher_sha256": "aaa742ea2932",
  "guidance_distilled": 1.0,
  "config_hash": "a513f223898d",
  "training": {
    "steps": 20, "images": 80, "teacher_forwards": 400, "cpu_minutes": 0.0071, "wall_minutes": 0.0071
  },
  "guidance_baked_in": 1.0,
  "guidance_range": []
}""")


@pytest.mark.parametrize("contract", [FULL, Contract(), Contract(steps=1, num_classes=None)])
def test_what_is_written_is_read_again(contract, tmp_path):
    write_contract(contract, tmp_path)
    assert read_contract(tmp_path) == contract


def test_a_folder_without_a_contract_has_an_empty_one(tmp_path):
    assert read_contract(tmp_path) == Contract()


def test_an_export_of_format_1_is_read_and_written_as_it_was(tmp_path):
    (tmp_path / CONTRACT).write_text(json.dumps(FORMAT_1, indent=2) + "\n")
    contract = read_contract(tmp_path)
    assert (contract.sampler, contract.steps, contract.num_classes) == ("Renoise", 4, 3)
    assert contract.call == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert (contract.origin.method, contract.origin.training["teacher_forwards"]) == ("lcm", 400)
    assert contract.origin.method_facts == {"guidance_range": []}
    expected = {key: value for key, value in FORMAT_1.items() if key != "guidance_baked_in"}
    assert json.dumps(contract.to_json(), indent=2) == json.dumps(expected, indent=2)
    assert "A 4-step student" in model_card(contract)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, 1.0),
        ({"guidance_scale": 2.0}, 2.0),
        ({"guidance_distilled": 1.0, "guidance_scale": 2.0}, 2.0),
        ({"guidance_distilled": 3.0, "guidance_scale": 1.0}, 3.0),
        ({"guidance_baked_in": 3.0, "guidance_scale": 1.0}, 3.0),
    ],
)
def test_the_guidance_that_a_student_reproduces(facts, expected):
    assert Contract.from_json(facts).reproduced_guidance == expected


# ------------------------------------------------------------------------------------------- a contract from outside


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": "4"}, "steps: expected whole number, got '4'"),
        ({"timesteps": [1, None]}, r"timesteps\[1\]: expected whole number or number, got None"),
        ({"method": 3}, "method: expected text"),
        ({"call": 3}, "call: expected a section of keys, got 3"),
        ({"call": {"num_inference_steps": 2**40}}, "call.num_inference_steps: expected at least 1 and at most 1000"),
        ({"call": {"guidance_scale": "x"}}, "call.guidance_scale: expected"),
        ({"format": 2}, "format: expected at least 1 and at most 1, got 2"),
        ({"critic": {"a": 1}}, "critic.a: expected text, got 1"),
        ({"versions": []}, r"versions: expected a section of keys, got \[\]"),
    ],
)
def test_a_contract_of_odd_content_is_named(tmp_path, changed, message):
    """FAULTS 9: 37 of 266 damaged contracts were tracebacks."""
    (tmp_path / CONTRACT).write_text(
        json.dumps({"format": 1, "steps": 4, "call": {"num_inference_steps": 4}} | changed)
    )
    with pytest.raises(ValueError, match=rf"{CONTRACT}: {message}"):
        read_contract(tmp_path)


def test_keys_of_another_version_are_kept(tmp_path):
    (tmp_path / CONTRACT).write_text(json.dumps({"steps": 4, "timesteps": [999, 1.5], "new": {"a": 1}}))
    contract = read_contract(tmp_path)
    assert contract.origin.method_facts == {"new": {"a": 1}} and contract.timesteps == [999, 1.5]
    assert type(contract.timesteps[0]) is int
