"""A frozen base of int8 under adapters: same forward within its rounding, gradients, exports and resumption."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from contracts.cases import STEPS, sections, train_until
from safetensors.torch import load_file

from stepdistill import load_pipeline
from stepdistill.batch import Batch
from stepdistill.families.sd import SD
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.quantization import check_quantization
from stepdistill.training.config import resolve
from stepdistill.training.memory import held_bytes
from stepdistill.training.run import Run

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao, the extra 'quantization', is not installed"
)


def bank_of(family, quantised):
    torch.manual_seed(0)
    bank = AdapterBank(family.network, rank=2, targets=family.lora_targets)
    bank.fork("student")
    for tensor in bank.state("student").values():
        tensor += 0.02 * torch.randn_like(tensor)
    if quantised:
        bank.quantize()
    return bank


def answer(family, bank, *, backward=False):
    torch.manual_seed(1)
    batch = Batch(torch.randn(2, *family.sample_shape), family.example_cond(range(2)), 2)
    x = batch.x0.requires_grad_()
    output = Denoiser(family, bank, "student").raw(x, torch.full((2,), 0.5), batch.cond)
    if backward:
        output.square().mean().backward()
    return output.detach(), x.grad, [parameter.grad for parameter in bank.params("student")]


@needs_torchao
def test_forward_and_backward_are_those_of_full_precision_within_rounding():
    plain, quantised = SD.tiny(), SD.tiny()
    for wanted, found in zip(
        answer(plain, bank_of(plain, False), backward=True)[:2],
        answer(quantised, bank_of(quantised, True), backward=True)[:2],
        strict=True,
    ):
        assert (found - wanted).norm() < 0.02 * wanted.norm()
    gradients = answer(quantised, bank_of(SD.tiny(), True), backward=True)[2]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@needs_torchao
def test_a_quantised_weight_holds_a_quarter_and_its_scales():
    bank = bank_of(SD.tiny(), True)
    for layer in bank._layers:
        weight = layer.get_base_layer().weight
        rows = weight.shape[0]
        if weight.ndim == 2:
            assert weight.numel() <= held_bytes(weight) <= weight.numel() + 8 * rows


@needs_torchao
def test_what_is_extracted_is_merged_into_the_weights_of_before():
    plain, quantised = bank_of(SD.tiny(), False), bank_of(SD.tiny(), True)
    for role in ("teacher", "student"):
        wanted, found = plain.extract(role).state_dict(), quantised.extract(role).state_dict()
        assert wanted.keys() == found.keys()
        assert all(type(found[name]) is torch.Tensor and torch.equal(found[name], wanted[name]) for name in wanted)


@needs_torchao
def test_a_run_exports_and_resumes(tmp_path):
    family = SD.tiny()

    def run(place):
        mapping = sections(place, family, "lcm", "adapter", save_every=2)
        mapping["teacher"] |= {"quantization": "int8"}
        return Run(resolve(mapping))

    straight = run(tmp_path / "straight")
    assert "int8" in straight.plan()
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
        check_quantization("copy")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="expected the package torchao, got none; run: pip install torchao"):
        check_quantization("adapter")


def test_other_forms_are_refused(tmp_path):
    mapping = sections(tmp_path, SD.tiny(), "lcm", "adapter")
    mapping["teacher"] |= {"quantization": "nf4"}
    with pytest.raises(ValueError, match=r"teacher\.quantization: expected .*int8.*got 'nf4'"):
        resolve(mapping)
