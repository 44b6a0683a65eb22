"""A second time for latent networks: first the teacher, then learned by both banks, differentiated, and exported."""

import pytest
import torch
from contracts.cases import generators, pipeline_images

from stepdistill import load_pipeline
from stepdistill.diffusion.samplers import DDIM, StrategicStochasticSampler, sample
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.base import Inputs
from stepdistill.families.dit import DiT
from stepdistill.families.flux import Flux
from stepdistill.families.pixart import PixArt
from stepdistill.families.sana import Sana
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.sdxl import SDXL
from stepdistill.losses.consistency import skip_grid
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

FAMILIES = {"sd": SD, "sdxl": SDXL, "dit": DiT, "pixart": PixArt, "sd3": SD3, "flux": Flux, "sana": Sana}
T = torch.tensor([0.9, 0.4], dtype=torch.float64)
every_family = pytest.mark.parametrize("name", FAMILIES)


def states(family):
    return torch.randn((2, *family.sample_shape), generator=torch.Generator().manual_seed(1))


def bank_of(name, family):
    if name == "copy":
        return CopyBank(family.network)
    return AdapterBank(family.network, rank=4, targets=family.lora_targets)


def opened(family, bank):
    """A student whose branch has been trained."""
    bank.fork("student")
    generator = torch.Generator().manual_seed(2)
    for name, tensor in bank.state("student").items():
        if ".second." in name:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return Denoiser(family, bank, "student")


@every_family
def test_an_extended_network_is_the_teacher_bit_for_bit_for_every_s(name):
    family = FAMILIES[name].tiny()
    x, cond = states(family), family.example_cond(range(2))
    with torch.no_grad():
        expected = family.call(family.network, x, T, cond)
        family.add_inputs(Inputs(s=True))
        for s in (None, 0.5 * T, 0 * T, T):
            assert torch.equal(family.call(family.network, x, T, cond, s=s), expected)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
@every_family
def test_training_reaches_the_branch_and_leaves_the_teacher(name, bank):
    family = FAMILIES[name].tiny()
    family.add_inputs(Inputs(s=True))
    networks, x, cond = bank_of(bank, family), states(family), family.example_cond(range(2))
    teacher = Denoiser(family, networks, "teacher")
    with torch.no_grad():
        before = teacher.raw(x, T, cond)
    student = opened(family, networks)
    first, second = (student.raw(x, T, cond, s=share * T) for share in (0.0, 0.5))
    assert not torch.equal(first, second)
    second.square().mean().backward()
    touched = [name for name, p in networks.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(".second." in name for name in touched)
    with torch.no_grad():
        assert torch.equal(teacher.raw(x, T, cond), before)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_derivative_by_the_first_time_is_at_a_fixed_second_one(name):
    family = FAMILIES[name].tiny()
    family.add_inputs(Inputs(s=True))
    student = opened(family, CopyBank(family.network))
    x, cond = states(family), family.example_cond(range(2))
    dx, dt, s, h = torch.randn_like(x), 1e-3 * torch.ones_like(T), 0.3 * T, 0.1
    with torch.no_grad():
        prediction, derivative = student.jvp(x, T, cond, dx, dt, s=s)
        torch.testing.assert_close(prediction.x0, student(x, T, cond, s=s).x0, rtol=1e-4, atol=1e-4)
        ahead, behind = (student(x + k * h * dx, T + k * h * dt, cond, s=s).x0 for k in (1, -1))
        numeric = (ahead - behind) / (2 * h)
        assert (derivative.x0 - numeric).norm() < 0.05 * numeric.norm()


def test_a_block_that_is_recomputed_is_told_both_times_again():
    gradients = []
    for checkpointed in (False, True):
        family = DiT.tiny()
        family.add_inputs(Inputs(s=True))
        bank = CopyBank(family.network)
        student = opened(family, bank)
        if checkpointed:
            bank.enable_checkpointing()
        bank.train()
        student.raw(states(family), T, family.example_cond(range(2)), s=T / 2).square().mean().backward()
        gradients.append([p.grad for p in bank.params("student") if p.grad is not None])
    torch.testing.assert_close(*gradients)


class Aimed(DDIM):
    """DDIM for a network that is told where it goes."""

    def target_time(self, s):
        return s


def aimed(family):
    return Aimed(family.schedule, family.schedule.grid(2))


def strategic(family):
    times = skip_grid(family.schedule, 2, 50)
    return StrategicStochasticSampler(family.schedule, times, 0.5, two_time=True)


@pytest.mark.parametrize(
    ("name", "make"),
    [("sd", strategic), ("sdxl", aimed), ("dit", aimed), ("pixart", aimed), ("sd3", aimed), ("flux", aimed),
     ("sana", aimed)],
)  # fmt: skip
def test_an_export_tells_its_network_both_times(tmp_path, name, make):
    family = FAMILIES[name].tiny()
    family.add_inputs(Inputs(s=True))
    bank = CopyBank(family.network)
    student, sampler = opened(family, bank), make(family)
    export_pipeline(family, bank.extract("student"), sampler, tmp_path / "export")
    pipeline = load_pipeline(tmp_path / "export")
    assert type(pipeline).__name__ == f"TwoTime{type(family.pipe).__name__}"
    found = pipeline_images(pipeline, family, 2, seed=5)
    with torch.no_grad():
        own = generators(2, 5)

        def noise(x):
            seen = family.pack(x)
            return family.unpack(torch.stack([torch.randn(seen.shape[1:], generator=one) for one in own]))

        start = family.schedule.initial_noise(first_noise(family, own))
        denoise = student.conditioned(family.example_cond(range(2)))
        expected = family.decode(sample(denoise, sampler, start, noise))
    assert (found - expected).abs().max() < 1e-4


def first_noise(family, own):
    """What every stock pipeline draws: noise in the latents' own layout."""
    return torch.stack([torch.randn(family.sample_shape, generator=one) for one in own])


def test_a_guidance_weight_is_refused_where_the_network_takes_none():
    with pytest.raises(ValueError, match="SD3 take no inputs"):
        SD3.tiny().add_inputs(Inputs(w=(0.0, 1.0)))
