"""EfficientNet-Lite0 as a judge: the package's weights without its code, in fewer operations."""

import importlib.util
import types

import pytest
import torch
from torch import nn

from stepdistill.features import efficientnet
from stepdistill.features.efficientnet import NORMALISED, PACKAGE, EfficientNetFeatures, SameConv2d, folded
from stepdistill.features.loading import load_features

installed = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the extra judge")


@pytest.mark.parametrize(("kernel", "stride", "before", "after"), [(1, 1, 0, 0), (3, 1, 1, 1), (5, 1, 2, 2),
                                                                   (3, 2, 0, 1), (5, 2, 1, 2)])  # fmt: skip
def test_even_sides_are_padded_as_tensorflow_does(kernel, stride, before, after):
    convolution, x = SameConv2d(2, 3, kernel, stride), torch.randn(1, 2, 8, 8)
    padded = nn.functional.pad(x, (before, after, before, after))
    expected = nn.functional.conv2d(padded, convolution.weight, convolution.bias, stride)
    assert expected.shape[-1] == 8 // stride and torch.equal(convolution(x), expected)


def packaged(convolution, norm, name):
    """The tensors of a convolution and its normalisation, by the package's names."""
    body, dot, last = name.rpartition(".")
    tensors = {f"{name}.weight": convolution.weight}
    for key, tensor in norm.state_dict().items():
        tensors[f"{body}{dot}{NORMALISED[last]}.{key}"] = tensor
    return tensors


@pytest.mark.parametrize("name", ["_conv_stem", "_blocks.3._depthwise_conv", "_blocks.12._project_conv"])
def test_folding_a_normalisation_changes_no_output(name):
    convolution, norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    own = name.replace("._", ".").removeprefix("_")
    found = folded({**packaged(convolution, norm, name), "_fc.weight": torch.ones(1), "_fc.bias": torch.ones(1)})
    assert set(found) == {"fc.weight", "fc.bias", f"{own}.weight", f"{own}.bias"}
    x = torch.randn(3, 2, 6, 6)
    once = nn.functional.conv2d(x, found[f"{own}.weight"], found[f"{own}.bias"])
    torch.testing.assert_close(once, norm.eval()(convolution(x)), rtol=1e-5, atol=1e-5)


def test_a_missing_extra_says_what_to_do(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"'efficientnet': expected the package .*stepdistill\[judge\]"):
        load_features("efficientnet")


def test_another_file_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    file = tmp_path / efficientnet.FILE
    file.parent.mkdir()
    file.write_bytes(b"anything")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("opened"))
    with pytest.raises(ValueError, match="expected the weights of SHA-256 579344248a93"):
        load_features("efficientnet")


def test_small_and_grey_images_of_any_size_are_taken_and_gradients_reach_them():
    network = EfficientNetFeatures()
    grey = torch.randint(0, 256, (2, 1, 12, 12), dtype=torch.uint8)
    features = network.extract(grey)
    assert features.shape == (2, 1280) and network.logits(features).shape == (2, 1000)
    assert torch.equal(features, network.extract(grey.repeat(1, 3, 1, 1)))
    images = torch.rand(1, 3, 12, 12, requires_grad=True)
    sum(one.square().mean() for one in network.maps(images)).backward()
    assert images.grad.abs().max() > 0


@installed
def test_it_knows_a_grey_field_from_a_chessboard():
    """Real weights: features of one image are the same in any batch, and differ between images."""
    network = load_features("efficientnet")
    assert all(not parameter.requires_grad for parameter in network.parameters())
    board = (torch.arange(28)[:, None] // 4 + torch.arange(28) // 4) % 2 * 255
    images = torch.stack([torch.full((28, 28), 127), board]).to(torch.uint8)[:, None]
    features = network.extract(images)
    torch.testing.assert_close(features[1:], network.extract(images[1:]), rtol=1e-3, atol=1e-4)
    classes = network.logits(features).argmax(1)
    assert classes[0] != classes[1]
