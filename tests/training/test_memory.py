"""What is held beside the networks, where it is held, and that the plan says so."""

from types import SimpleNamespace

import pytest
import torch
from contracts.cases import make_trainer, sections
from torch import nn

from stepdistill.cli import main
from stepdistill.config import to_yaml
from stepdistill.data.latent_cache import CacheConfig, encoders, make_cache
from stepdistill.diffusion.samplers import DDIM
from stepdistill.families.base import Family
from stepdistill.families.latent import rebuild
from stepdistill.families.sd import SD
from stepdistill.networks.averaging import blend_by_parts, blend_tensors
from stepdistill.training.config import resolve
from stepdistill.training.memory import held_between_steps, memory_plan
from stepdistill.training.offloading import Encoding
from stepdistill.training.run import Run


@pytest.fixture(scope="module")
def mapping(tmp_path_factory):
    return sections(tmp_path_factory.mktemp("memory"), SD.tiny(), "lcm")


@pytest.fixture(autouse=True)
def nothing_is_counted(monkeypatch):
    """A step's activations have tests of their own."""
    monkeypatch.setattr("stepdistill.training.memory.activations", lambda *_: 1.5)


def megabytes(modules):
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters()) / 1e6


def total(plan):
    (line,) = (line for line in plan.splitlines() if line.startswith("total: "))
    return float(line.split()[1])


def test_the_plan_counts_what_encodes_unless_the_data_is_encoded(mapping):
    run = Run(resolve(mapping))
    without = memory_plan(run.distiller, run.config, encoded=True)
    assert "(AutoencoderKL)" in run.plan() and "(CLIPTextModel)" in run.plan()
    assert "on the CPU, except to sample, and not in the total: (A" in without and "on the CPU" not in run.plan()
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


@pytest.fixture
def away(monkeypatch):
    """Another device, of which there is none here: a copy in other memory."""
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.clone())
    return "cuda:3"


def places(tensors):
    return [tensor.data_ptr() for tensor in tensors.values()]


def test_a_visit_ends_where_it_began(away):
    family = SD.tiny()
    family.frozen_modules = (luggage := nn.BatchNorm1d(3),)
    homes = places(luggage.state_dict())
    with pytest.raises(KeyError), family.on_device(away):
        assert not {*homes} & {*places(luggage.state_dict())} and luggage.running_var.sum() == 3
        raise KeyError
    assert places(luggage.state_dict()) == homes


def test_an_average_on_the_host_is_blended_in_the_same_bits():
    torch.manual_seed(0)
    sources = [torch.randn(size) for size in (5, 300, 7, 1)]
    for keep in (0.0, 0.3, 0.999):
        here, there = ([source + 1 for source in sources] for _ in range(2))
        blend_tensors(here, sources, keep)
        blend_by_parts(there, sources, keep, entries=8)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_a_role_on_another_device_is_there_while_it_is_used(mapping, bank, request, monkeypatch):
    run = Run(resolve(mapping | {"bank": {"name": bank, "rank": 2}, "train": mapping["train"] | {"ema": 0.9}}))
    own = run.distiller.bank
    own.hold_on_host("ema")
    before, teacher = own.state("ema"), places(own.state("teacher"))
    there = SimpleNamespace(device=torch.device(request.getfixturevalue("away")))
    monkeypatch.setattr(own, "params", lambda role: [there])
    with own.beside_teacher("ema"):
        assert not {*places(before)} & {*places(own.state("ema"))} and places(own.state("teacher")) == teacher
    assert places(own.state("ema")) == places(before)


def test_offloading_changes_no_bit_of_a_run(mapping, tmp_path, monkeypatch):
    ends, visits = [], []
    on_device = Family.on_device
    monkeypatch.setattr(Family, "on_device", lambda self, device: visits.append(device) or on_device(self, device))
    for wanted in (False, True):
        options = {"ema": 0.9, "offload_encoders": wanted, "offload_ema": wanted, "output_dir": str(tmp_path)}
        trainer = make_trainer(Run(resolve(mapping | {"train": mapping["train"] | options})))
        trainer._step(0, [next(trainer._batches())])
        ends.append(trainer.distiller.bank.state("ema"))
        assert len(visits) == wanted
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_the_plan_tells_what_waits_on_the_host(mapping):
    options = mapping["train"] | {"ema": 0.9}
    plain = Run(resolve(mapping | {"train": options})).plan()
    offloaded = Run(resolve(mapping | {"train": options | {"offload_encoders": True, "offload_ema": True}}))
    hosted = megabytes([*offloaded.family.frozen_modules, offloaded.distiller.bank.networks["ema"]])
    assert total(plain) - total(offloaded.plan()) == pytest.approx(hosted, abs=0.1)
    held = held_between_steps(offloaded.distiller, offloaded.config)
    assert f"about 1.5 MB of activations and gradients, {held + 1.5:.1f} MB in all at its peak" in offloaded.plan()


def test_several_processes_hold_their_averages_themselves(mapping, monkeypatch):
    run = Run(resolve(mapping | {"train": mapping["train"] | {"ema": 0.9, "offload_ema": True}}))
    with pytest.raises(ValueError, match=r"ema: expected above 0 with offload_ema"):
        resolve(mapping | {"train": mapping["train"] | {"offload_ema": True}})
    with pytest.raises(ValueError, match=r"train\.offload_ema: expected false for 2 processes"):
        Encoding(run.dataset, run.distiller, run.config.train, torch.device("cpu"), 2)
