"""Tensors that carry a tangent: torch's own derivatives, one graph of the value, and no product with zeros."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.benchmark.floor import count_flops
from stepdistill.families.loading import families
from stepdistill.families.pixel import Pixel
from stepdistill.losses.self_consistency import check_forward_mode
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.tangents import Dual, dual, tangent_of, value_of

SHAPE = (2, 8, 4, 4)
WEIGHT, NARROW = torch.randn(8, 8, 3, 3, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
OTHER = torch.randn(SHAPE, dtype=torch.float64)
HEADS = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)


def heads(x):
    return x.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)


def written(x):
    y = torch.zeros_like(x)
    y[:, :3] = x[:, :3].sin()
    y[:, 5] = 2.0
    y += x * x
    y[:, 6:].add_(x[:, 6:])
    return y


FUNCTIONS = {
    "convolution": lambda x: F.conv2d(x, WEIGHT, NARROW, padding=1),
    "convolution by a bias' name": lambda x: F.conv2d(x, WEIGHT, bias=NARROW),
    "transposed convolution": lambda x: F.conv_transpose2d(x, WEIGHT, NARROW),
    "linear": lambda x: F.linear(x.movedim(1, -1), WEIGHT[:, :, 0, 0], NARROW),
    "linear by names": lambda x: F.linear(x.movedim(1, -1), weight=WEIGHT[:, :, 0, 0], bias=NARROW),
    "linear of its own": lambda x: F.linear(x, x[0, 0], x[0, 0, 0]),
    "group norm": lambda x: F.group_norm(x, 2, NARROW, NARROW, eps=1e-2),
    "group norm without weights": lambda x: F.group_norm(x, 4),
    "layer norm": lambda x: F.layer_norm(x, (4, 4), WEIGHT[:4, :4, 0, 0], eps=1e-2),
    "norms by position": lambda x: torch.group_norm(
        torch.layer_norm(x, (4, 4), None, None, 1e-2), 2, NARROW, None, 1e-2
    ),
    "rms norm": lambda x: F.rms_norm(x, (4,), OTHER[0, 0, 0]),
    "activations": lambda x: F.silu(F.gelu(x, approximate="tanh")) + x.sigmoid().tanh(),
    "activation in place": lambda x: F.silu(x + x, inplace=True) * x,
    "attention": lambda x: F.scaled_dot_product_attention(heads(x), heads(x).sin(), heads(x).cos()),
    "cross attention": lambda x: F.scaled_dot_product_attention(heads(x), heads(OTHER), heads(OTHER)),
    "attention in a function": lambda x: HEADS(*3 * [x.flatten(2).mT], need_weights=False)[0],
    "operands by names": lambda x: (
        torch.add(x, other=x.sin(), alpha=2) + torch.cat(tensors=[x, torch.tanh(input=x)])[:2]
    ),
    "sums": lambda x: (x + x * x) + OTHER - x.sum((2, 3), keepdim=True) + 1.0 - x,
    "products": lambda x: x * OTHER + OTHER * x + x / OTHER + 1 / (x * x + 1) + x @ x + x @ OTHER + 2 * x,
    "views": lambda x: torch.cat([x[:, :2].permute(0, 1, 3, 2), OTHER.chunk(4, 1)[0], x.chunk(4, 1)[1]], 1).mT,
    "parts": lambda x: torch.stack([x, x.cos()]).unbind(0)[1],
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(3, (2, 2))) * (1 + 2j)),
    "resizing": lambda x: F.interpolate(F.pad(x, (1, 1)), scale_factor=2.0, mode="bilinear"),
    "types": lambda x: x.float().to(torch.float64).type_as(OTHER),
    "writing": written,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tangent_is_torchs_and_has_no_graph(name):
    function = FUNCTIONS[name]
    x, dx = torch.randn(2, *SHAPE, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected, derivative = torch.func.jvp(function, (x,), (dx,))
    leaf = x.clone().requires_grad_()
    found = function(dual(leaf, dx))
    torch.testing.assert_close(value_of(found), expected)
    torch.testing.assert_close(tangent_of(found), derivative, atol=1e-6, rtol=1e-5)
    assert type(value_of(found)) is torch.Tensor and not tangent_of(found).requires_grad
    (gradient,) = torch.autograd.grad(value_of(found).square().sum(), leaf)
    (wanted,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
    torch.testing.assert_close(gradient, wanted)


def test_what_does_not_depend_on_the_direction_has_no_tangent():
    x = dual(torch.randn(2, 3), torch.ones(2, 3))
    assert x.shape == (2, 3) and x.ndim == 2 and x.dtype == torch.float32 and not x.requires_grad
    for plain in (x.long(), x > 0, x.shape, torch.zeros_like(x)):
        assert not isinstance(plain, Dual)
    assert torch.equal(tangent_of(torch.ones(2)), torch.zeros(2))


def test_a_derivative_has_the_dropout_of_its_value():
    x = dual(torch.ones(1000), torch.full((1000,), 3.0))
    dropped = F.dropout(x, 0.5)
    assert torch.equal(3 * value_of(dropped), tangent_of(dropped)) and 0 < value_of(dropped).count_nonzero() < 1000


@pytest.mark.parametrize("write", [lambda x: x.mul_(2), lambda x: x[0].__itruediv__(2), lambda x: x.exp_()])
def test_what_is_written_by_other_functions_is_refused(write):
    with pytest.raises(NotImplementedError, match="which writes into a tensor"):
        write(dual(torch.ones(2, 2), torch.ones(2, 2)))
    with pytest.raises(NotImplementedError, match="__setitem__"):
        torch.ones(2, 2)[0][:1] = dual(torch.ones(1), torch.ones(1))


def a_denoiser(dtype=torch.float64):
    family = Pixel.tiny()
    family.network.to(dtype)
    bank = CopyBank(family.network)
    bank.fork("student")
    return Denoiser(family, bank, "student")


def states(count=2, dtype=torch.float64):
    x, dx = torch.randn(2, count, 1, 8, 8, dtype=dtype)
    return (
        x,
        torch.linspace(0.2, 0.8, count).double(),
        {"class_labels": torch.arange(count)},
        dx,
        torch.ones(count).double(),
    )


def test_one_pass_has_the_prediction_its_gradient_and_torchs_derivative():
    denoiser, place = a_denoiser(), states()
    weights = denoiser.bank.params("student")
    prediction, here, derivative = denoiser.with_derivative(*place)
    for found, wanted in zip(derivative, denoiser.jvp_by_torch(*place)[1], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    assert not here.x0.requires_grad and torch.equal(here.x0, prediction.x0)
    gradients = []
    for x0 in (prediction.x0, denoiser(*place[:3]).x0):
        gradients.append(torch.autograd.grad(x0.square().sum(), weights))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_pass_for_the_derivative_alone_has_the_dropout_of_the_pass_it_belongs_to():
    """The masks are drawn in the order of the memory, so it is the same in both."""
    denoiser, place = a_denoiser(), states()
    for module in denoiser.bank.networks["student"].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    denoiser.bank.train()
    found = []
    for predict in (lambda: denoiser.jvp(*place)[0].x0, lambda: denoiser(*place[:3]).x0):
        torch.manual_seed(0)
        found.append(predict().detach())
    torch.testing.assert_close(*found)
    assert not torch.equal(found[1], denoiser(*place[:3]).x0)


def test_a_pass_with_a_derivative_costs_one_forward_more():
    """And the plain attention of the tangent, here 3 %."""
    denoiser, place = a_denoiser(torch.float32), states(dtype=torch.float32)
    with torch.no_grad():
        forward = count_flops(lambda: denoiser(*place[:3]))
    plain = count_flops(lambda: denoiser(*place[:3]).x0.sum().backward())
    assert count_flops(lambda: denoiser.jvp(*place)) == pytest.approx(2 * forward, rel=0.04)
    both = count_flops(lambda: denoiser.with_derivative(*place)[0].x0.sum().backward())
    assert both == pytest.approx(plain + forward, rel=0.02)


@pytest.mark.parametrize("reason", ["autocast", "checkpointing", "compilation"])
def test_where_the_networks_own_pass_is_another_there_are_two(reason):
    denoiser, place = a_denoiser(torch.float32), states(dtype=torch.float32)
    expected = denoiser.with_derivative(*place)
    if reason == "checkpointing":
        denoiser.bank.enable_checkpointing()
    if reason == "compilation":
        denoiser.bank.enable_compilation("eager")
    calls = []
    denoiser.watch = lambda x_t, output: calls.append(type(x_t))
    with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        found = denoiser.with_derivative(*place)
    assert calls == [Dual, torch.Tensor]
    torch.testing.assert_close(found[2].x0, expected[2].x0)
    torch.testing.assert_close(found[0].x0, expected[0].x0, atol=1e-1 if reason == "autocast" else 1e-5, rtol=1e-4)


@pytest.mark.product
@pytest.mark.parametrize("name", families())
def test_every_familys_derivative_is_torchs(name):
    family = families()[name].tiny()
    for parameter in family.network.parameters():  # many begin with zeros
        parameter.data += 0.05 * torch.randn_like(parameter)
    check_forward_mode(family)


class Foreign(torch.autograd.Function):
    """A function whose kernel torch does not see, and which has a forward derivative."""

    @staticmethod
    def forward(x):
        return torch.from_numpy(x.detach().numpy().copy())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()


class Foreigner(nn.Module):
    def forward(self, x):
        return Foreign.apply(x)


class Undefined(nn.Module):
    """A module whose derivative is no number."""

    def forward(self, x):
        return x + (0 * x).sqrt()


@pytest.mark.parametrize("module", [Foreigner, Undefined])
def test_a_network_whose_tangents_are_lost_is_refused(module):
    family = Pixel.tiny()
    check_forward_mode(family)
    family.network.conv_act = module()
    with pytest.raises(ValueError, match="^method.tangent: 'jvp' needs a UNet2DModel"):
        check_forward_mode(family)
