"""What a step costs: real sizes, adapters beside copies, and a word where there is no GPU."""

from pathlib import Path

import pytest
import torch

from stepdistill.benchmark.step_cost import TEACHERS, make_family, measure, plan, step_cost_table

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(("name", "millions", "condition"), [("sd", 860, 768), ("sdxl", 2567, 2048)])
def test_full_size_is_that_of_the_released_networks(name, millions, condition):
    family = make_family(name, False, torch.device("meta"))
    assert sum(parameter.numel() for parameter in family.network.parameters()) // 10**6 == pytest.approx(
        millions, abs=1
    )
    assert family.example_cond(range(2))["encoder_hidden_states"].shape == (2, 77, condition)
    assert family.network.config.cross_attention_dim == condition and set(TEACHERS) == {"sd", "sdxl", "flux"}


def test_what_is_held_follows_from_sizes_alone(monkeypatch):
    """The LCM-LoRA of SD 1.5 that its authors gave out is 135 MB in half precision: 67.5 million parameters."""
    monkeypatch.setattr("stepdistill.training.memory.activations", lambda *_: 1.5)
    lines = plan(CONFIGS / "sd_lcm_lora.yaml", []).splitlines()
    assert lines[0] == "sd_lcm_lora, bank adapter"
    (student,) = (line.split() for line in lines if line.split()[:1] == ["student"])
    assert student[1] == "67,459,584" and not any("Autoencoder" in line for line in lines)


def test_a_step_is_timed_under_either_policy():
    overrides = ["data.batch_size=2", "bank.rank=1", "train.precision=fp32"]
    copies, adapters = (
        measure(CONFIGS / "sd_dmd2.yaml", [*overrides, f"bank.name={bank}"], 1, tiny=True)
        for bank in ("copy", "adapter")
    )
    assert copies.held == 3 and 1 < adapters.held < 2  # teacher, student and fake score
    assert copies.parameters == adapters.parameters and min(copies.seconds, adapters.seconds) > 0
    assert copies.cells()[:3] == ("sd_dmd2", "copy", "2")


def test_without_a_gpu_full_size_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="need a GPU.*--tiny"):
        step_cost_table([CONFIGS / "sd_dmd2.yaml"], ["copy"], [], 1, tiny=False)
    with pytest.raises(ValueError, match="got 'dit'; known: flux, sd, sdxl"):
        measure(CONFIGS / "dit_progressive.yaml", [], 1, tiny=True)
