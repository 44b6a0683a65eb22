"""What is held beside the networks, where it is held, and that the plan says so."""

import pytest
from contracts.cases import sections
from torch import nn

from stepdistill.cli import main
from stepdistill.config import to_yaml
from stepdistill.data.latent_cache import CacheConfig, encoders, make_cache
from stepdistill.diffusion.samplers import DDIM
from stepdistill.families.base import Family
from stepdistill.families.latent import rebuild
from stepdistill.families.sd import SD
from stepdistill.training.config import resolve
from stepdistill.training.memory import memory_plan
from stepdistill.training.run import Run


@pytest.fixture(scope="module")
def mapping(tmp_path_factory):
    return sections(tmp_path_factory.mktemp("memory"), SD.tiny(), "lcm")


def megabytes(modules):
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters()) / 1e6


def total(plan):
    (line,) = (line for line in plan.splitlines() if line.startswith("total: "))
    return float(line.split()[1])


def test_the_plan_counts_what_encodes_unless_the_data_is_encoded(mapping):
    run = Run(resolve(mapping))
    without = memory_plan(run.distiller, encoded=True)
    assert "(AutoencoderKL)" in run.plan() and "(CLIPTextModel)" in run.plan()
    assert "the last 2 stay on the CPU" in without and "stay on the CPU" not in run.plan()
    assert total(run.plan()) - total(without) == pytest.approx(megabytes(run.family.frozen_modules), abs=0.1)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(mapping, tmp_path, capsys):
    wanted = mapping | {"train": mapping["train"] | {"output_dir": str(tmp_path / "run")}}
    (tmp_path / "config.yaml").write_text(to_yaml(wanted))
    main(["train", "--config", str(tmp_path / "config.yaml"), "--dry_run"])
    assert capsys.readouterr().out.strip() == Run(resolve(wanted)).plan()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_safety_checker_is_exported_but_not_held_for_training():
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=small, projection_dim=8))
    plain = SD.tiny()
    family = SD(rebuild(plain.pipe, safety_checker=checker, feature_extractor=CLIPImageProcessor()))
    assert {type(part) for part in family.frozen_modules} == {type(part) for part in plain.frozen_modules}
    assert encoders(family) == encoders(plain)
    student = family.pipeline(family.network, DDIM(family.schedule, family.schedule.grid(1)))
    assert student.safety_checker is checker


@pytest.mark.parametrize("encoded", [False, True])
def test_what_encodes_goes_to_the_device_unless_the_data_is_encoded(mapping, tmp_path, monkeypatch, encoded):
    run = Run(resolve(mapping))
    if encoded:
        folder = make_cache(run.family, run.dataset, run.config.data, CacheConfig(output_dir=str(tmp_path / "cache")))
        run = Run(resolve({**mapping, "data": {**mapping["data"], "name": "cache", "path": str(folder)}}))
    moved = []
    monkeypatch.setattr(Family, "to", lambda self, device: moved.append(device))
    trainer = run.trainer()
    assert moved == ([] if encoded else [trainer.device])
    trainer._sample(2)  # what samples brings it, and takes it back
    assert moved[-1] == trainer.device


class Luggage(nn.Linear):
    """A module that notes where it is sent."""

    def to(self, *args, **kwargs):
        self.sent = [*getattr(self, "sent", []), str(args[0])]
        return self


def test_a_visit_ends_where_it_began():
    family = SD.tiny()
    family.frozen_modules = (luggage := Luggage(1, 1),)
    with pytest.raises(KeyError), family.on_device("cuda:3"):
        assert luggage.sent == ["cuda:3"]
        raise KeyError
    assert luggage.sent == ["cuda:3", "cpu"]
