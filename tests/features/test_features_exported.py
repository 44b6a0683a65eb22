"""A feature network of one's own as an exported program: what a critic and a metric see, and what is refused."""

import contextlib
import io
import json
import os
import re
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim

from stepdistill.discriminators.backbones import open_backbone
from stepdistill.features.loading import load_features

ANY_BATCH = ({0: Dim.AUTO},)


class Critic(nn.Module):
    """A map and tokens, with everything that an export has to keep: buffers, dropout, a constant on a device."""

    def __init__(self, channels=1):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.second = nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, images):
        shallow = self.first(images)
        tokens = self.second(shallow).float().flatten(2).transpose(1, 2)
        return [shallow, tokens + torch.arange(6, device=images.device).to(images.dtype)]


def export(path, network, images=None, shapes=ANY_BATCH):
    images = torch.zeros(2, 1, 16, 16) if images is None else images
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), path)
    return str(path)


@pytest.fixture(scope="module")
def critic():
    return Critic().eval()


@pytest.fixture(scope="module")
def path(critic, tmp_path_factory):
    return export(tmp_path_factory.mktemp("exported") / "critic.pt2", critic)


def test_a_critic_sees_what_the_network_returns_with_a_gradient_and_its_weights_stay(path, critic):
    backbone = open_backbone(path, 1, (16, 16))
    images = torch.rand(3, 1, 16, 16, requires_grad=True)
    shallow, tokens = backbone(images)
    wanted = critic(images * 2 - 1)
    assert torch.allclose(shallow, wanted[0]) and torch.allclose(tokens, wanted[1].transpose(1, 2))
    assert backbone.shapes == [(4, 8, 8), (6, 16)] and backbone.num_features == 6
    (expected,) = torch.autograd.grad(sum(x.square().sum() for x in wanted), images)
    (shallow.square().sum() + tokens.square().sum()).backward()
    assert torch.allclose(images.grad, expected, rtol=1e-4, atol=1e-5) and expected.abs().sum() > 0
    parameters = list(backbone.network.parameters())
    assert len(parameters) == 6 and not any(parameter.requires_grad for parameter in parameters)


def test_metrics_use_it_too_and_know_its_weights(path, critic, tmp_path):
    network = load_features(path).eval()
    pixels = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    assert torch.allclose(network(pixels), critic(pixels / 127.5 - 1)[1].mean(1), atol=1e-5)
    again = load_features(export(tmp_path / "again.pt2", critic))
    other = load_features(export(tmp_path / "other.pt2", Critic().eval()))
    assert again.sha256 == network.sha256 != other.sha256
    network = load_features("embedded")
    disguised = export(tmp_path / "disguised.pt2", nn.Sequential(network.body, nn.Flatten(2)).eval())
    with pytest.raises(ValueError, match="has the weights of 'embedded'"):
        open_backbone(disguised, 1, (16, 16))


def test_it_moves_to_a_device_with_what_its_graph_makes(path):
    network = load_features(path).to("meta")
    features = network.network(torch.empty(2, 1, 16, 16, device="meta"))  # of the bare graph: no autocast is there
    assert [feature.device.type for feature in features] == ["meta", "meta"]
    assert not any(parameter.requires_grad for parameter in network.parameters())


class Returns(nn.Module):
    """Returns what a call makes of the images."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, images):
        return self.call(images)


def test_under_autocast_it_is_as_it_was_exported(path):
    network, images = load_features(path), torch.randn(2, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        features = network.run(images)
    assert all(map(torch.equal, features, network.run(images)))


SMALLER = "cannot process images of 1 x 16 x 16: .* 32"
REFUSED = {
    "a fixed batch": (Critic().eval(), None, None, r"batches of any size, got one of 2 only: .*dynamic_shapes"),
    "training mode": (Critic(), None, ANY_BATCH, r"expected a program in evaluation mode; call \.eval"),
    "half precision": (Critic().eval().half(), torch.zeros(2, 1, 16, 16).half(), ANY_BATCH, "got one of torch.float16"),
    "no images": (nn.Linear(3, 2), torch.zeros(4, 3), ANY_BATCH, r"images \(B, C, H, W\), got one of \(4, 3\)"),
    "a dict": (Returns(lambda x: {"map": x}), None, ANY_BATCH, "expected a tensor .* got dict"),
    "other channels": (Critic(3).eval(), torch.zeros(2, 3, 16, 16), ANY_BATCH, "images of 3 channels, but .* have 1"),
    "another size": (Critic().eval(), torch.zeros(2, 1, 32, 32), ANY_BATCH, SMALLER),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_program_that_cannot_see_the_teachers_images_is_refused(tmp_path, what):
    network, images, shapes, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        open_backbone(export(tmp_path / "critic.pt2", network, images, shapes), 1, (16, 16))


class Touch:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def altered(path, target, change):
    """A copy of an exported program, each of whose members ``change`` has seen."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, change(name.partition("/")[2], source.read(name)))
    return str(target)


@pytest.mark.parametrize("kind", ["pickle", "size", "guard"])
def test_a_file_that_would_run_python_is_refused_before_it_does(tmp_path, path, kind):
    ran = tmp_path / "ran"
    python = f"__import__('os').mkdir('{ran}')"

    def change(name, data):
        if kind == "pickle" and name == "data/sample_inputs/model.pt":
            buffer = io.BytesIO()
            torch.save((Touch(ran),), buffer)
            return buffer.getvalue()
        if kind == "size" and name == "models/model.json":
            return re.sub(r'(?<="expr_str": )"[^"]*"', lambda _: json.dumps(python), data.decode()).encode()
        if kind == "guard" and name == "models/model.json":
            return json.dumps(json.loads(data) | {"guards_code": [f"{python} is None"]}).encode()
        return data

    bad = altered(path, tmp_path / "bad.pt2", change)
    with pytest.raises(ValueError, match=r"bad\.pt2': .*expected (tensors|plain tensors|arithmetic)"):
        load_features(bad)
    assert not ran.exists()
    with contextlib.suppress(AttributeError, AssertionError, TypeError):  # else the refusal above shows nothing
        torch.export.load(bad).module()(torch.zeros(2, 1, 16, 16))
    assert ran.exists()


def test_sizes_that_are_left_open_are_arithmetic(tmp_path):
    anything = export(tmp_path / "any.pt2", Critic().eval(), shapes=({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},))
    assert open_backbone(anything, 1, (20, 28)).shapes == [(4, 10, 14), (6, 35)]


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.pt2': No such file"):
        load_features(str(tmp_path / "nothing.pt2"))
    (tmp_path / "text.pt2").write_text("no program")
    with pytest.raises(ValueError, match=r"text\.pt2': expected a program of torch\.export\.save"):
        load_features(str(tmp_path / "text.pt2"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt2")
    with pytest.raises(ValueError, match=r"weights\.pt2': expected tensors and a graph.*got weights/data\.pkl"):
        load_features(str(tmp_path / "weights.pt2"))
