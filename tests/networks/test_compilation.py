"""Compiled blocks: the same numbers, hooks that still see them, one graph for every role, none after the third step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.cases import BANKS, case, teacher_for
from torch import nn

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import DDIM
from stepdistill.evaluation.sources import PipelineSource
from stepdistill.families.base import Family
from stepdistill.families.dit import DiT
from stepdistill.families.flux import Flux
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.files.schema import build
from stepdistill.inference.sampling import sample_images
from stepdistill.methods import find_method, method_names
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.bank import NetworkBank
from stepdistill.networks.compilation import compile_blocks, is_compiled
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.hooks import capture_outputs
from stepdistill.randomness import Draws


class Counter:
    """A backend that runs a graph as it is, and counts the graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        del inputs
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bank_of(family: Family, name: str) -> NetworkBank:
    if name == "copy":
        return CopyBank(family.network)
    return AdapterBank(family.network, rank=2, targets=family.lora_targets)


def batch_of(family: Family) -> Batch:
    return Batch(torch.randn(2, *family.sample_shape), family.example_cond(range(2)), 2)


def step(distiller: Any, family: Family, number: int) -> dict[str, torch.Tensor]:
    """Losses of all turns at a step, their gradients added to the parameters, as the trainer asks for them."""
    distiller.bank.train()
    losses = {}
    for turn in distiller.turns.values():
        for other in distiller.turns.values():
            for parameter in other.params:
                parameter.requires_grad_(other is turn)
        torch.manual_seed(number)
        terms = distiller(turn.name, batch_of(family), Draws(number, 2)).terms
        sum(terms.values()).backward()
        losses |= {f"{turn.name}/{name}": value.detach() for name, value in terms.items()}
    distiller.after_step()
    return losses


def distiller_of(method: str, bank: str, family: Family, **options: Any) -> Any:
    cls = find_method(method)
    config = build(cls.Config, case(method).options | options, "method")
    torch.manual_seed(0)
    family.add_inputs(cls.extra_inputs(config))
    family.widen(cls.head_points(config))
    distiller = cls(family, bank_of(family, bank), config, ema=True)
    distiller.stage = distiller.stages(12)[-1]
    return distiller


def check_no_late_graph(method: str, bank: str) -> None:
    family = teacher_for(method)
    distiller, counter = distiller_of(method, bank, family), Counter()
    distiller.bank.enable_checkpointing()
    distiller.bank.enable_compilation(counter)
    counts = []
    for number in range(6):
        step(distiller, family, number)
        counts.append(counter.graphs)
    assert counts[0] > 0 and counts[2] == counts[-1], counts


@pytest.mark.parametrize("bank", ["copy", "adapter"])
@pytest.mark.product
def test_switching_roles_makes_no_graph_after_the_third_step(bank):
    check_no_late_graph("dmd2", bank)


@pytest.mark.product
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("method", method_names())
def test_no_method_makes_a_graph_after_the_third_step(method, bank):
    check_no_late_graph(method, bank)


@pytest.mark.parametrize("bank", BANKS)
def test_all_copies_of_a_block_share_their_graphs(bank):
    """As many as gradients and batch sizes need, however many blocks and networks there are; losses stay the same."""
    counter, losses = Counter(), {}
    for compiled in (False, True):
        family = SD.tiny()
        distiller = distiller_of("lcm", bank, family)
        if compiled:
            distiller.bank.enable_compilation(counter)
        losses[compiled] = [step(distiller, family, number)["student/loss"] for number in range(3)]
    assert 0 < counter.graphs <= 8
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [SD.tiny, Flux.tiny])
def test_captured_features_are_those_of_an_uncompiled_network(make):
    family, counter = make(), Counter()
    bank, batch = bank_of(family, "adapter"), batch_of(family)
    bank.fork("student")

    def features(role: str) -> list[torch.Tensor]:
        with torch.no_grad(), bank.using(role) as network:
            call = lambda: family.call(network, batch.x0, torch.full((2,), 0.5), batch.cond)  # noqa: E731
            return capture_outputs(network, family.feature_blocks, call)

    expected = features("teacher")
    bank.enable_compilation(counter)
    for role in ("student", "teacher", "student"):  # a new adapter changes nothing
        for found, wanted in zip(features(role), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    assert counter.graphs


@pytest.mark.parametrize("bank", BANKS)
def test_an_extracted_network_is_not_compiled(bank):
    family = Pixel.tiny()
    networks = bank_of(family, bank)
    networks.fork("student")
    networks.enable_compilation(Counter())
    assert {module._compiled_call_impl for module in networks.extract("student").modules()} == {None}


def test_a_compiled_pipeline_samples_what_an_uncompiled_one_does():
    family, counter = SD.tiny(), Counter()
    pipeline = family.pipeline(family.network, DDIM(family.schedule, family.schedule.grid(2)), 1.0)
    asked = {"num_classes": None, "captions": ["a", "b"], "call": {"num_inference_steps": 2, "guidance_scale": 1.0}}
    expected = sample_images(pipeline, 2, **asked)
    assert not is_compiled(pipeline.unet)
    compile_blocks(pipeline.unet, "--compile", counter)
    assert is_compiled(pipeline.unet)
    source = PipelineSource(pipeline=pipeline, count=2, captions=asked["captions"], call=asked["call"])  # evaluation's
    assert source.timing()["compiled"]
    for found in (sample_images(pipeline, 2, **asked), source.take(range(2))):
        assert (found.pixels.int() - expected.pixels.int()).abs().max() <= 1 and counter.graphs


def test_forward_derivatives_do_not_see_the_compiler():
    family, counter = Pixel.tiny(), Counter()
    bank, batch = bank_of(family, "copy"), batch_of(family)
    teacher, t = Denoiser(family, bank, "teacher"), torch.full((2,), 0.5)
    dx, dt = torch.randn_like(batch.x0), torch.ones(2)
    expected = teacher.jvp(batch.x0, t, batch.cond, dx, dt)
    bank.enable_compilation(counter)
    for found, wanted in zip(teacher.jvp(batch.x0, t, batch.cond, dx, dt), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert counter.graphs == 0


def test_a_network_without_repeated_blocks_is_named():
    with pytest.raises(ValueError, match=r"^train\.compile: expected false, because Linear has no blocks"):
        compile_blocks(nn.Linear(1, 1), "train.compile")


@torch.no_grad()
def lead_away(distiller: Any) -> None:
    """Add noise to what trains: some losses vanish where the student is the teacher, and would be rounding alone."""
    for turn in distiller.turns.values():
        for parameter in turn.params:
            parameter += 0.05 * torch.randn_like(parameter)


STEPS = [(method, None) for method in method_names()] + [("lcm", SD), ("ladd", DiT)]
"""Methods, each with a pixel teacher, and some with families of latents."""


@pytest.mark.product
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize(("method", "family"), STEPS)
def test_a_compiled_step_has_the_losses_and_gradients_of_an_eager_one(method, family, bank):
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        teacher = teacher_for(method) if family is None else family.tiny()
        distiller = distiller_of(method, bank, teacher)
        lead_away(distiller)
        distiller.bank.enable_checkpointing()
        if compiled:
            distiller.bank.enable_compilation()
        torch.manual_seed(2)
        losses = step(distiller, teacher, 0)
        norms = {
            f"{turn.name}/norm": nn.utils.get_total_norm([p.grad for p in turn.params if p.grad is not None])
            for turn in distiller.turns.values()
        }
        found.append(losses | norms)
    for name, eager in found[0].items():
        torch.testing.assert_close(found[1][name], eager, rtol=1e-4, atol=1e-5, msg=name)
