"""A feature network of one's own as an exported program: what a critic and a metric see, and what is refused.

RELIABILITY row 27.
"""

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
from stepdistill.features.program import CONFIGS

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


class NoGradient(nn.Module):
    """Holds an operator of a higher order, whose argument is a graph with a name."""

    def forward(self, images):
        with torch.no_grad():
            mean = images.mean((2, 3), keepdim=True)
        return images - mean


class Fills(nn.Module):
    """Makes a tensor and writes to it."""

    def forward(self, images):
        made = torch.zeros(4)
        made.fill_(0.5)
        return images.mean((2, 3)) + made.sum()


def graph_with(change):
    """A change of the archive's members that changes every object in the JSON of its graph."""

    def rewrite(name, data):
        if name != "models/model.json":
            return data
        return json.dumps(json.loads(data, object_hook=lambda found: change(found) or found)).encode()

    return rewrite


def named(ran):
    """A name of a graph that is text of Python where torch pastes it between quotes."""
    text = f'training"), getattr(__import__("os"), "mkdir")("{ran}"), ("'
    return NoGradient(), graph_with(lambda found: found.update(name=text) if "graph" in found else None)


def maps_a_file(ran):
    """An operator that maps a file into memory, shared, which the next operator fills."""
    inputs = [("filename", {"as_string": str(ran)}), ("shared", {"as_bool": True}), ("size", {"as_int": 4})]
    arguments = [{"name": name, "arg": arg, "kind": 1} for name, arg in inputs]

    def change(found):
        if found.get("target") == "torch.ops.aten.zeros.default":
            found.update(target="torch.ops.aten.from_file.default", inputs=arguments)

    return Fills(), graph_with(change)


def imports_a_module(ran):
    """A structure of outputs whose reading imports a module by name."""
    (ran.parent / "module_that_touches.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    context = {"default_factory_module": "module_that_touches", "default_factory_name": "x", "dict_context": "[]"}
    spec = json.dumps([1, {"type": "collections.defaultdict", "context": context, "children_spec": []}])
    return Critic().eval(), graph_with(lambda found: found.update(out_spec=spec) if found.get("out_spec") else None)


ATTACKS = {
    "text in a name": (named, r"expected operators of aten .*, got 'torch\.ops\.higher_order\."),
    "a file mapped and filled": (maps_a_file, r"expected operators of aten .*, got 'torch\.ops\.aten\.from_file\."),
    "a module imported": (imports_a_module, r"out_spec: expected tuples, lists and dicts, got 'collections\."),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_that_would_run_commands_or_write_files_is_refused_before_torch_opens_it(
    tmp_path, attack, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    make, message = ATTACKS[attack]
    network, rewrite = make(tmp_path / "ran")
    bad = altered(export(tmp_path / "good.pt2", network), tmp_path / "bad.pt2", rewrite)
    with pytest.raises(ValueError, match=r"bad\.pt2': models/model\.json: " + message):
        load_features(bad)
    assert not (tmp_path / "ran").exists()
    with torch.enable_grad(), contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
        torch.export.load(bad).module()(torch.zeros(2, 1, 16, 16))
    assert (tmp_path / "ran").exists(), "the program is harmless: the test cannot fail"


def replaced(key, value, by):
    """A change of every object in which ``key`` has the value, or any value for None."""
    return lambda found: found.update({key: by}) if key in found and value in (None, found[key]) else None


RELU = "torch.ops.aten.relu.default"
REWRITTEN = {
    "a callable of torch": (replaced("target", RELU, "torch.hub.load"), r"got 'torch\.hub"),
    "a callable of operator": (replaced("target", RELU, "_operator.attrgetter"), r"got '_operator"),
    "text as a name": (replaced("name", "relu", "x\n__import__('os')"), "name: expected a name"),
    "text as an argument": (replaced("forward_arg_names", None, ["x): pass #"]), "forward_arg_names: expected a name"),
    "an object": (lambda f: {"as_custom_obj": "a"} if "as_bool" in f else None, "as_custom_obj: expected tensors"),
}


@pytest.mark.parametrize("what", REWRITTEN)
def test_every_operator_and_name_of_a_graph_is_checked(tmp_path, path, what):
    change, message = REWRITTEN[what]
    with pytest.raises(ValueError, match=rf"models/model\.json: .*{message}"):
        load_features(altered(path, tmp_path / "bad.pt2", graph_with(change)))


def test_an_archive_is_of_the_size_that_its_tensors_need(tmp_path, path):
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "packed.pt2", "w", zipfile.ZIP_DEFLATED) as copy:
        for name in source.namelist():
            copy.writestr(name, source.read(name))
    with pytest.raises(ValueError, match=r"packed\.pt2': .*: expected an uncompressed member"):
        load_features(str(tmp_path / "packed.pt2"))

    def enlarge(name, data):
        return data.replace(b'"as_int": 4}', b'"as_int": 40000}') if "weights_config" in name else data

    with pytest.raises(ValueError, match=r"weights_config\.json: expected tensors that fit into .* bytes"):
        load_features(altered(path, tmp_path / "large.pt2", enlarge))


@pytest.mark.parametrize("name", ["models/model.json", *CONFIGS[:1], "data/weights/weight_0"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"{}", lambda data: b"[1]"])
def test_a_damaged_program_is_named(tmp_path, path, name, damage):
    bad = altered(path, tmp_path / "bad.pt2", lambda member, data: damage(data) if member == name else data)
    with pytest.raises(ValueError, match=r"bad\.pt2': "):
        load_features(bad)


class Block(nn.Module):
    """The block of an EfficientNet: depthwise convolution, squeeze and excitation, activations in place, a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.SiLU(inplace=True))
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding="same", groups=2 * width)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * width, 2 * width, 1), nn.Sigmoid())
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        wide = self.depthwise(self.expand(x))
        x += self.project(wide * self.squeeze(wide))
        return x


@pytest.mark.parametrize("kind", ["convolutions", "efficient", "transformer"])
def test_genuine_networks_still_load_and_return_the_same(tmp_path, kind):
    network: nn.Module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(inplace=True), nn.MaxPool2d(2), nn.Flatten())
    if kind == "efficient":
        network = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Hardswish(), Block(4), nn.Dropout(0.2))
    if kind == "transformer":
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        network = nn.Sequential(nn.Conv2d(1, 8, 4, 4), nn.Flatten(2), nn.LayerNorm(16), Transposed(), layer)
    network.eval()
    images = torch.randn(3, 1, 16, 16)
    found = load_features(export(tmp_path / "net.pt2", network)).network(images)
    torch.testing.assert_close(found, network(images), rtol=1e-5, atol=1e-6)


class Transposed(nn.Module):
    """Channels last."""

    def forward(self, x):
        return x.transpose(1, 2)


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
