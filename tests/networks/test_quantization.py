"""A frozen base in few bits under adapters: same forward within its rounding, gradients, exports and resumption."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from contracts.cases import STEPS, sections, train_until
from safetensors.torch import load_file
from torch import nn

from stepdistill import load_pipeline
from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import DDIM, sample
from stepdistill.families.sd import SD
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.quantization import PACKAGES, check_quantization, nf4
from stepdistill.training.config import resolve
from stepdistill.training.memory import held_bytes
from stepdistill.training.run import Run

FORMS = [
    pytest.param(form, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"))
    for form, package in PACKAGES.items()
]
ROUNDING = {"int8": 0.02, "nf4": 0.2}
"""How far outputs may be from full precision, as a share of their norm."""
with_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
each_form = pytest.mark.parametrize("form", FORMS)


def bank_of(family, form=None):
    torch.manual_seed(0)
    bank = AdapterBank(family.network, rank=2, targets=family.lora_targets)
    bank.fork("student")
    for tensor in bank.state("student").values():
        tensor += 0.02 * torch.randn_like(tensor)
    if form is not None:
        bank.quantize(form)
    return bank


def answer(family, bank, *, backward=False):
    torch.manual_seed(1)
    batch = Batch(torch.randn(2, *family.sample_shape), family.example_cond(range(2)), 2)
    x = batch.x0.requires_grad_()
    output = Denoiser(family, bank, "student").raw(x, torch.full((2,), 0.5), batch.cond)
    if backward:
        output.square().mean().backward()
    gradients = [parameter.grad.flatten() for parameter in bank.params("student") if parameter.grad is not None]
    return output.detach(), x.grad, torch.cat(gradients) if backward else None


@each_form
def test_forward_and_backward_are_those_of_full_precision_within_rounding(form):
    plain, quantised = SD.tiny(), SD.tiny()
    answers = answer(plain, bank_of(plain), backward=True), answer(quantised, bank_of(quantised, form), backward=True)
    for wanted, found in zip(*answers, strict=True):
        assert 0 < (found - wanted).norm() < ROUNDING[form] * wanted.norm()


def linear_weights(bank):
    for layer in bank._layers:
        if layer.lora_A["student"].weight.ndim == 2:
            yield layer.in_features * layer.out_features, layer.get_base_layer().weight


@torch.no_grad()
def samples(family, bank):
    """Samples of the student in four steps, always of the same noise."""
    torch.manual_seed(1)
    start, student = torch.randn(4, *family.sample_shape), Denoiser(family, bank, "student")
    ddim = DDIM(family.schedule, family.schedule.grid(4))
    return sample(student.conditioned(family.example_cond(range(4))), ddim, start)


def put_weights(bank, weights):
    for (_, weight), new in zip(linear_weights(bank), weights, strict=True):
        weight.data.copy_(new)


@with_torchao
def test_samples_over_int8_are_no_farther_than_rounding_their_weights_must_lead():
    """They are those of the rounded weights, each within half a step of its output's 254 steps.

    Rounding up or down at random, right on average, has an error of variance f (1 - f) steps squared for a weight
    that is f steps above the next lower one; the nearest has min(f, 1 - f)^2, never more, on average half of it. A
    network is smooth, so that samples move in proportion.
    """
    family = SD.tiny()
    plain, quantised = bank_of(family), bank_of(SD.tiny(), "int8")
    exact = [weight.detach().clone() for _, weight in linear_weights(plain)]
    rounded = [weight.dequantize() for _, weight in linear_weights(quantised)]
    steps = [weight.abs().amax(1, keepdim=True) / 127 for weight in exact]
    for weight, near, step in zip(exact, rounded, steps, strict=True):
        assert ((near - weight).abs() <= 0.501 * step).all()
    wanted, found = samples(family, plain), samples(family, quantised)

    put_weights(plain, rounded)
    torch.testing.assert_close(samples(family, plain), found, rtol=1e-4, atol=1e-4)

    squares, chance = [], torch.Generator().manual_seed(0)
    for _ in range(16):
        up = [torch.rand(weight.shape, generator=chance) for weight in exact]
        put_weights(plain, [(w / step + u).floor() * step for w, step, u in zip(exact, steps, up, strict=True)])
        squares.append((samples(family, plain) - wanted).square().mean())
    assert 0 < (found - wanted).square().mean() < torch.stack(squares).mean()


@with_torchao
def test_int8_holds_a_byte_and_its_scales():
    for count, weight in linear_weights(bank_of(SD.tiny(), "int8")):
        assert count <= held_bytes(weight) <= count + 8 * weight.shape[0]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_nf4_holds_half_a_byte_and_its_scales_also_where_nothing_is():
    for count, weight in linear_weights(bank_of(SD.tiny(), "nf4")):
        state = weight.quant_state
        assert held_bytes(weight) == pytest.approx(count / 2 + state.absmax.nbytes, abs=2)
        with torch.device("meta"):
            assert held_bytes(nf4(nn.Linear(64, count // 64)).weight) == pytest.approx(held_bytes(weight), abs=32)


@each_form
def test_what_is_extracted_is_merged_into_the_weights_of_before(form):
    plain, quantised = bank_of(SD.tiny()), bank_of(SD.tiny(), form)
    for role in ("teacher", "student"):
        wanted, found = plain.extract(role).state_dict(), quantised.extract(role).state_dict()
        assert wanted.keys() == found.keys()
        assert all(type(found[name]) is torch.Tensor and torch.equal(found[name], wanted[name]) for name in wanted)


@each_form
def test_a_run_exports_and_resumes(tmp_path, form):
    family = SD.tiny()

    def run(place):
        mapping = sections(place, family, "lcm", "adapter", save_every=2)
        mapping["teacher"] |= {"quantization": form}
        return Run(resolve(mapping))

    straight = run(tmp_path / "straight")
    assert f"quantization: {form}" in straight.plan()
    folder = straight.train()
    stopped = run(tmp_path / "stopped")
    train_until(stopped, 2)
    run(tmp_path / "stopped").train()
    files = [
        load_file(tmp_path / place / f"run/checkpoint-{STEPS}/weights.safetensors") for place in ("straight", "stopped")
    ]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert next(folder.rglob("pytorch_lora_weights.safetensors"), None) is not None
    pipeline = load_pipeline(folder)
    assert {type(parameter.data) for parameter in pipeline.unet.parameters()} == {torch.Tensor}


def test_full_copies_are_refused():
    with pytest.raises(ValueError, match=r"teacher\.quantization: expected bank\.name=adapter.*got copy"):
        check_quantization("nf4", "copy")


@pytest.mark.parametrize(("form", "package"), PACKAGES.items())
def test_a_missing_package_is_named(monkeypatch, form, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"expected the package {package}, got none; run: pip install {package}"):
        check_quantization(form, "adapter")


def test_other_forms_are_refused(tmp_path):
    mapping = sections(tmp_path, SD.tiny(), "lcm", "adapter")
    mapping["teacher"] |= {"quantization": "int4"}
    with pytest.raises(ValueError, match=r"teacher\.quantization: expected .*int8.*got 'int4'"):
        resolve(mapping)
