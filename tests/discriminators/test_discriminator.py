"""Critics: losses and R1 in closed form, heads, hooks that are the network's own forward, and who may not train."""

import copy
import math

import numpy as np
import pytest
import torch
from contracts.cases import PIXELS
from oracles import SCHEDULES, OracleFamily, PointNet
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from stepdistill.assets import FASHION as ASSETS
from stepdistill.batch import Batch
from stepdistill.discriminators.augmentation import colour, cutout, diff_augment, shift
from stepdistill.discriminators.backbones import Backbone, open_backbone
from stepdistill.discriminators.bottleneck import BottleneckHead
from stepdistill.discriminators.conditioning import check_classes, condition_vector
from stepdistill.discriminators.critics import CleanCritic, RenoisedCritic
from stepdistill.discriminators.feature_sources import TeacherFeatureSource, open_feature_source
from stepdistill.discriminators.heads import Head, Heads, SpectralNorm
from stepdistill.discriminators.pairs import PairCritic
from stepdistill.evaluation.metrics.frechet import Moments
from stepdistill.evaluation.reference import Reference
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.families.pixart import PixArt
from stepdistill.families.pixel import Pixel
from stepdistill.families.wan import Wan
from stepdistill.features.classifier import SmallConvNet
from stepdistill.features.identity import refuse_same_weights
from stepdistill.features.loading import load_features
from stepdistill.features.transformers import TransformersFeatures
from stepdistill.losses.adversarial import approximate_r1, critic_loss, critic_metrics, generator_loss, r1_penalty
from stepdistill.losses.student_inputs import check_first_step, diversity_ratio
from stepdistill.methods.add import ADD
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.networks.hooks import capture_outputs, middle_block, spaced_blocks
from stepdistill.randomness import Draws

SHAPES = {"tokens": (6, 12), "one position": (6, 1), "map": (6, 5, 4), "pixel": (6, 1, 1)}


def same(value):
    """Logits of two heads, of 3 and 5 positions."""
    return [torch.full((4, 3), value), torch.full((4, 5), value)]


# ------------------------------------------------------------------------------------------------ losses


def test_undecided_critics_cost_two_a_head_or_two_ln_two():
    assert critic_loss(same(0.0), same(0.0), "hinge").item() == 4
    assert critic_loss(same(0.0), same(0.0), "softplus").item() == pytest.approx(2 * 2 * math.log(2))
    assert generator_loss(same(0.0), "softplus").item() == pytest.approx(2 * math.log(2))
    assert generator_loss(same(0.3), "hinge").item() == pytest.approx(-0.6)


def test_the_hinge_asks_for_no_more_than_a_margin_of_one():
    assert critic_loss(same(1.0), same(-1.0), "hinge").item() == 0
    assert critic_loss(same(1.5), same(-7.0), "hinge").item() == 0


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_student_and_critic_pull_a_fake_logit_opposite_ways(kind):
    logits = [torch.zeros(4, 3, requires_grad=True)]
    (up,) = torch.autograd.grad(generator_loss(logits, kind), logits)
    (down,) = torch.autograd.grad(critic_loss(same(0.0)[:1], logits, kind), logits)
    assert (up < 0).all() and (down > 0).all()


def test_metrics_are_shares_of_images_named_right():
    real, fake = [torch.tensor([[1.0], [2.0], [-1.0], [3.0]])], [torch.tensor([[-1.0], [1.0], [1.0], [-2.0]])]
    metrics = critic_metrics(real, fake)
    assert (metrics["accuracy_real"].item(), metrics["accuracy_fake"].item()) == (0.75, 0.5)
    assert metrics["logit_real"].item() == pytest.approx(1.25)


def test_r1_of_a_linear_head_is_its_squared_norm():
    weights = [torch.randn(7, dtype=torch.float64), torch.randn(12, dtype=torch.float64)]
    features = [torch.randn(5, 7, 1), torch.randn(5, 3, 2, 2)]

    def heads(leaves):
        return [(leaf.double().flatten(1) @ w)[:, None] for leaf, w in zip(leaves, weights, strict=True)]

    assert r1_penalty(heads, features).item() == pytest.approx(sum(w.square().sum().item() for w in weights), rel=1e-5)


def test_r1_works_and_reaches_the_heads_although_gradients_are_off():
    heads = Heads([(6, 12)], 0)
    with torch.no_grad():
        penalty = r1_penalty(lambda f: heads(f, torch.zeros(3, 0)), [torch.randn(3, 6, 12)])
    penalty.backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in heads.parameters() if parameter.grad is not None)


def test_finite_difference_r1_is_r1_in_expectation():
    w, features = torch.randn(40), torch.randn(20_000, 40, 1)
    noise = torch.randn_like(features)

    def heads(inputs):
        return [(x.flatten(1) @ w)[:, None] for x in inputs]

    found = approximate_r1(heads, [features], [features + 0.1 * noise], 0.1)
    assert found.item() == pytest.approx(w.square().sum().item(), rel=0.05)


# ------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("shape", [(1, 9), (8, 3, 3, 3), (32, 16, 9), (5, 1)])
def test_the_spectral_norm_is_one_whatever_the_weight(shape):
    weight = torch.randn(shape) * 7
    normal = SpectralNorm()(weight)
    assert torch.linalg.matrix_norm(normal.flatten(1).double(), 2).item() == pytest.approx(1, rel=1e-3)
    assert torch.allclose(normal / normal.flatten()[0], weight / weight.flatten()[0], rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_head_gives_a_logit_a_position_that_depends_on_its_sample_alone(shape):
    head = Head(shape, 3).train()
    feature, cond = torch.randn(4, *shape), torch.randn(4, 3)
    logits = head(feature, cond)
    assert logits.shape == (4, math.prod(shape[1:])) and logits.std() > 0
    assert torch.allclose(head(feature[1:2], cond[1:2]), logits[1:2], atol=1e-5)
    assert torch.equal(head(feature, cond), logits)


def test_tokens_of_another_number_are_never_divided_among_samples():
    """Of buckets: eight tokens of three samples would fill two samples of a head made for twelve."""
    assert Head((6, 12))(torch.randn(3, 6, 8), torch.zeros(3, 0)).shape == (3, 8)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        Head((6, 3, 4))(torch.randn(3, 6, 8), torch.zeros(3, 0))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_projection_of_no_condition_is_no_logit(shape):
    assert not Head(shape, 3)(torch.randn(2, *shape), torch.zeros(2, 3)).any()
    assert Head(shape, 0)(torch.randn(2, *shape), torch.zeros(2, 0)).any()


@pytest.mark.parametrize("shape", [(6, 7, 7), (64, 32, 32), (6, 1, 1), (6, 16)])
def test_a_bottleneck_head_gives_one_logit_and_a_gradient(shape):
    feature = torch.randn(3, *shape, requires_grad=True)
    logits = BottleneckHead(shape)(feature)
    logits.sum().backward()
    assert logits.shape == (3, 1) and feature.grad.abs().max() > 0


@pytest.mark.parametrize("size", [(1, 16), (2, 3), (40, 8)])
def test_a_bottleneck_head_sees_maps_of_any_size(size):
    head, feature = BottleneckHead((6, 16, 16)), torch.randn(3, 6, *size)
    logits = head(feature)
    assert logits.shape == (3, 1) and logits.std() > 0
    assert torch.allclose(head(feature[1:2]), logits[1:2], atol=1e-5)


def test_a_critic_of_a_fake_score_sees_its_middle_block():
    def blocks(count):
        return nn.ModuleList(nn.Identity() for _ in range(count))

    transformer = nn.ModuleDict({"paired": blocks(2), "single": blocks(5)})
    assert middle_block(transformer, ("paired", "single")) == "single.1"
    unet = nn.ModuleDict({"down_blocks": blocks(3), "mid_block": nn.Identity()})
    assert middle_block(unet, ("down_blocks", "mid_block")) == "mid_block"


def test_tokens_lie_row_by_row_in_a_bottleneck_head():
    """Tokens (C, N) and the map (C, H, W) that they are rows of have the same logit."""
    head, feature = BottleneckHead((32, 32), aspect=0.5), torch.randn(3, 32, 4, 8)
    assert torch.equal(head(feature.flatten(2)), head(feature))


def test_conditions_become_vectors():
    labels = torch.tensor([0, 2, 3])
    vector = condition_vector({"class_labels": labels}, 3, 3)
    assert vector.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]  # 3 is the null class
    text = torch.randn(2, 5, 8) * 100
    assert condition_vector({"text": text, "mask": torch.ones(2, 5, dtype=torch.bool)}, 2, None).shape == (2, 8)
    assert condition_vector({"text": text}, 2, None).std(1, unbiased=False).tolist() == pytest.approx([1, 1], rel=1e-3)
    assert condition_vector({}, 4, None).shape == (4, 0)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
@pytest.mark.parametrize("name", ["encoder_attention_mask", "attention_mask", "encoder_hidden_states_mask"])
def test_padding_says_nothing_of_a_prompt(name, kind):
    tokens, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]).to(kind)
    found = condition_vector({"encoder_hidden_states": tokens, name: mask}, 2, None)
    torch.testing.assert_close(found, condition_vector({"encoder_hidden_states": tokens[:, :2]}, 2, None))


def test_each_of_two_prompts_has_the_mask_of_its_length():
    tokens, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]])
    masks = {"clip_mask": torch.ones(2, 3), "t5_mask": mask}
    found = condition_vector({"a": tokens[:, :3], "b": tokens, **masks}, 2, None)
    torch.testing.assert_close(found, condition_vector({"a": tokens[:, :3], "b": tokens[:, :2]}, 2, None))


def test_a_batch_of_one_class_is_refused_unless_it_may_be_chance():
    with pytest.raises(ValueError, match=r"all 64 labels of the first batch are 3, .* 10 classes"):
        check_classes({"class_labels": torch.full((64,), 3)}, 10)
    check_classes({"class_labels": torch.full((4,), 3)}, 10)
    check_classes({"class_labels": torch.arange(64) % 10}, 10)
    check_classes({}, None)


# ------------------------------------------------------------------------------------- features of networks


def test_hooks_see_what_the_modules_return_and_leave_nothing_behind():
    network = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"a": nn.Linear(4, 5)})["a"], nn.Linear(5, 6))
    x = torch.randn(2, 3)
    first, second = capture_outputs(network, ["0", "1"], lambda: network(x))
    assert torch.equal(first[..., 0], network[0](x)) and torch.equal(second[..., 0], network[1](network[0](x)))
    assert not any(module._forward_hooks for module in network.modules())


def test_the_forward_ends_at_the_last_feature():
    ran = []
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].register_forward_pre_hook(lambda module, args: ran.append(1))
    capture_outputs(network, ["0"], lambda: network(torch.zeros(1, 2)))
    assert not ran


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_gradients_pass_through_a_teachers_blocks_to_the_image_and_stay_there(bank):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda n: AdapterBank(n, rank=2, targets=family.lora_targets)}
    bank = banks[bank](family.network)
    blocks = BlockFeatures(Denoiser(family, bank, "teacher"))
    shapes = blocks.shapes()
    assert len(shapes) == 3  # two down blocks and the middle
    bank.fork("student")
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    features = blocks(x, torch.tensor([0.3, 0.7]), family.example_cond([0, 1]))
    assert [feature.shape[1:] for feature in features] == shapes
    sum(feature.square().sum() for feature in features).backward()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in bank.parameters())


@pytest.mark.parametrize(("teacher", "time"), [("pixel", 0.02), ("pixel-edm", (0.002 / 20) ** (1 / 7))])
def test_the_time_of_clean_images_is_one_that_the_teacher_knows(teacher, time, monkeypatch):
    """At EDM's 0.02, the noise would be 1e-11."""
    family, seen = PIXELS[teacher](), []
    blocks, timestep = BlockFeatures(Denoiser(family, CopyBank(family.network), "teacher")), family.schedule.timestep
    monkeypatch.setattr(family.schedule, "timestep", lambda t: seen.append(t) or timestep(t))
    blocks.clean(torch.zeros(2, *family.sample_shape), family.example_cond([0, 1]))
    assert seen[0].tolist() == pytest.approx([time, time])


@pytest.mark.parametrize("teacher", ["pixel", "pixel-edm"])
def test_a_critic_of_steps_sees_the_cleanest_states_as_clean_images(teacher):
    family, low = PIXELS[teacher](), torch.zeros(2, dtype=torch.float64)
    critic = PairCritic(Denoiser(family, CopyBank(family.network), "teacher"))
    level = critic.level(critic.alone(low, low, family.example_cond([0, 1])))
    assert level.tolist() == [max(0.02, family.schedule.lowest_time)] * 2


def test_adapters_of_other_roles_do_not_change_what_the_teacher_sees():
    family = Pixel.tiny()
    bank = AdapterBank(family.network, rank=2, targets=family.lora_targets)
    blocks = BlockFeatures(Denoiser(family, bank, "teacher"))
    x, t, cond = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5), family.example_cond([0, 1])
    before = blocks(x, t, cond)
    bank.fork("student")
    for parameter in bank.params("student"):
        nn.init.normal_(parameter)
    assert all(torch.equal(a, b) for a, b in zip(before, blocks(x, t, cond), strict=True))


# ----------------------------------------------------------------------------------------- feature networks


@pytest.fixture
def small(tmp_path):
    """The folder of a small classifier of grey images that is not the embedded one."""
    SmallConvNet(width=4, num_features=6).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


PROCESSOR = {"size": {"shortest_edge": 28}, "resample": 3, "crop": [28, 28], "scale": 1 / 255,
             "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}  # fmt: skip


SIZES = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}


def vision_models():
    dino = Dinov2Model(Dinov2Config(**SIZES))
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, intermediate_size=16, projection_dim=8))
    return {
        "dino": TransformersFeatures(dino, PROCESSOR, "dino"),
        "clip": TransformersFeatures(clip, PROCESSOR, "clip"),
    }


@pytest.mark.parametrize("name", ["dino", "clip"])
@pytest.mark.parametrize("channels", [1, 3])
def test_vision_models_give_four_layers_of_tokens_and_a_gradient(name, channels):
    backbone = Backbone(vision_models()[name], channels, (32, 32))
    images = torch.rand(2, channels, 32, 32, requires_grad=True)
    features = backbone(images)
    assert len(features) == 4 and all(feature.shape == (2, 16, 17) for feature in features)
    sum(feature.square().sum() for feature in features).backward()
    assert images.grad.flatten(1).abs().max(1).values.min() > 0
    assert all(parameter.grad is None for parameter in backbone.network.parameters())


def test_the_smooth_resize_is_the_metrics_but_for_rounding():
    features = vision_models()["dino"]
    features.settings["size"] = {"height": 28, "width": 28}  # as the whole frame is seen, and nothing is cropped
    pixels = torch.randint(90, 166, (3, 3, 40, 36), dtype=torch.uint8)  # bicubic overshoots stay in range
    difference = (features.smooth_pixels(pixels / 255) - features.pixels(pixels)).abs().max()
    assert difference < 2.0 / 255 / 0.2


def test_a_small_network_sees_images_as_it_was_trained_to(small):
    backbone = open_backbone(str(small), 1, (16, 16))
    pixels = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    features = backbone(pixels / 255)
    network = load_features(str(small))
    assert torch.allclose(network.embedding(features[-1].mean((2, 3))), network(pixels), atol=1e-5)
    assert torch.allclose(backbone.embed(pixels / 255), network(pixels), atol=1e-5)


def test_the_network_that_measures_is_refused_under_whatever_name(tmp_path):
    with pytest.raises(ValueError, match="has the weights of 'embedded'"):
        open_backbone("embedded", 1, (28, 28))
    load_features("embedded").save_pretrained(tmp_path / "another_name")
    with pytest.raises(ValueError, match=r"method.features: .* has the weights of .*expected 'teacher'"):
        open_backbone(str(tmp_path / "another_name"), 1, (28, 28))
    (tmp_path / "link").symlink_to(ASSETS / "features")
    with pytest.raises(ValueError, match="has the weights of 'embedded'"):
        open_backbone(str(tmp_path / "link"), 1, (28, 28))


def test_a_copy_in_other_precision_or_a_part_has_the_same_weights(small):
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, intermediate_size=16, projection_dim=8))
    half = copy.deepcopy(vision).bfloat16()
    part = copy.deepcopy(vision.vision_model)  # other names, and no projection
    other = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, intermediate_size=16, projection_dim=8))
    metric = TransformersFeatures(vision, PROCESSOR, "clip")
    for network in (half, part):
        with pytest.raises(ValueError, match=r"method\.features: this network has the weights of 'clip'"):
            refuse_same_weights({"method.features": network}, metric)
    refuse_same_weights({"method.features": other, "another": load_features(str(small))}, metric)


def test_a_critics_network_may_not_measure_afterwards(small):
    network = load_features(str(small))
    suite = MetricSuite(network, Reference(Moments.of(torch.randn(20, 6))))
    suite.refuse_critic({})
    with pytest.raises(ValueError, match="'small' is the feature network of the critic that trained"):
        suite.refuse_critic({"method.features": network.sha256})


def test_the_network_of_the_runs_metrics_is_refused_too(small):
    backbone = open_backbone(str(small), 1, (16, 16))
    with pytest.raises(ValueError, match="has the weights of 'small'"):
        refuse_same_weights({"method.features": backbone.network}, load_features(str(small)))
    refuse_same_weights({"method.features": backbone.network}, load_features("embedded"))


def test_wrong_channels_and_sizes_are_named(small):
    with pytest.raises(ValueError, match="expects images of 1 channels, but the teacher's have 3"):
        open_backbone(str(small), 3, (16, 16))
    unresized = PROCESSOR | {"size": {}, "crop": []}
    broken = vision_models()["clip"]
    broken.settings = unresized
    with pytest.raises(ValueError, match="cannot process images of 3 x 20 x 20"):
        Backbone(broken, 3, (20, 20))


@pytest.mark.parametrize(
    ("wrong", "found"),
    [({"scale": 1.0}, "-2.5 to 127"), ({"scale": 1 / 255**2}, "-2.5 to -0.74"), ({"std": [0.0, 0.3, 0.4]}, "inf")],
)
def test_pixels_in_a_range_that_no_network_knows_are_named(wrong, found):
    network = vision_models()["dino"]
    network.settings = PROCESSOR | wrong
    with pytest.raises(ValueError, match=rf"image processor of 'dino' maps .*{found}.*preprocessor_config\.json"):
        Backbone(network, 3, (32, 32))


def test_a_missing_feature_network_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing_here"):
        open_backbone(str(tmp_path / "nothing_here"), 1, (16, 16))


# ---------------------------------------------------------------------------------------------- augmentation


def test_a_feature_network_of_images_is_refused_for_a_teacher_of_clips():
    family = Wan.tiny()
    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    with pytest.raises(ValueError, match=r"method\.features: expected 'teacher' for a teacher of clips, got 'faces'"):
        open_feature_source("faces", family, teacher, augment=True)


def test_augmentation_is_differentiable_and_each_images_own():
    images = torch.rand(6, 3, 16, 16, requires_grad=True)
    augmented = diff_augment(images, Draws(0, 6))
    augmented.sum().backward()
    assert images.grad.flatten(1).abs().max(1).values.min() > 0
    assert not torch.allclose(augmented[0] - images[0], augmented[1] - images[1], atol=1e-3)
    assert torch.equal(augmented, diff_augment(images, Draws(0, 6)))
    assert not torch.equal(augmented, diff_augment(images, Draws(1, 6)))


def test_colours_keep_what_they_do_not_change():
    """Brightness moves an image as a whole; saturation and contrast, which come after it, keep that mean."""
    images = torch.rand(200, 3, 4, 4)
    changed = colour(images, Draws(0, 200))
    moved = changed.mean((1, 2, 3)) - images.mean((1, 2, 3))
    assert 0.4 < moved.max() <= 0.5 and -0.5 <= moved.min() < -0.4
    ratio = changed.mean(1).flatten(1).std(1) / images.mean(1).flatten(1).std(1)  # of the greys: contrast
    assert 0.5 <= ratio.min() < 0.6 and 1.4 < ratio.max() <= 1.5
    spread = (changed - changed.mean(1, keepdim=True)).flatten(1).std(1)
    before = (images - images.mean(1, keepdim=True)).flatten(1).std(1)
    saturation = spread / before / ratio
    assert saturation.min() < 0.1 and 1.9 < saturation.max() <= 2


def test_shifts_move_whole_pixels_and_bring_in_zeros():
    images = torch.arange(1, 65.0).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1)
    moved = shift(images, Draws(0, 50), 0.25)
    offsets = set()
    for image in moved[:, 0]:
        y, x = np.argwhere(image.numpy() > 0)[0]
        value = int(image[y, x]) - 1
        dy, dx = int(y) - value // 8, int(x) - value % 8
        expected = torch.zeros(8, 8)
        source = images[0, 0][max(0, -dy) : 8 - max(0, dy), max(0, -dx) : 8 - max(0, dx)]
        expected[max(0, dy) : 8 + min(0, dy), max(0, dx) : 8 + min(0, dx)] = source
        assert torch.equal(image, expected)
        offsets.add((dy, dx))
    assert {abs(d) for pair in offsets for d in pair} == {0, 1, 2} and len(offsets) > 10


def test_cutout_removes_one_rectangle():
    cut = cutout(torch.ones(40, 2, 10, 20), Draws(0, 40), 0.2)
    missing = (cut == 0).sum((2, 3))
    assert (missing[:, 0] == missing[:, 1]).all() and missing.max() == 2 * 4 and missing.min() >= 1


# --------------------------------------------------------------------------------------------- whole critics


def test_eyes_are_the_teachers_or_those_of_a_network(small):
    family = Pixel.tiny(size=16)
    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    assert isinstance(open_feature_source("teacher", family, teacher, augment=True), TeacherFeatureSource)
    eyes = open_feature_source(str(small), family, teacher, augment=True)
    assert [network.name for network in eyes.networks().values()] == ["small"]
    assert eyes.num_embedded == 6
    x0 = torch.randn(3, 1, 16, 16, requires_grad=True)
    images = family.decode(x0)
    plain = open_feature_source(str(small), family, teacher, augment=False)
    for found, seen_images in (
        (eyes.extract(eyes.see(x0), {}, Draws(0, 3)), diff_augment(images, Draws(0, 3))),
        (plain.extract(plain.see(x0), {}, Draws(0, 3)), images),
    ):
        assert all(map(torch.equal, found, eyes.backbone(seen_images)))
        (gradient,) = torch.autograd.grad(found[-1].sum(), x0, retain_graph=True)
        assert gradient.flatten(1).abs().max(1).values.min() > 0


@pytest.mark.parametrize(("conditioning", "extra"), [("none", 0), ("condition", 4), ("both", 10)])
def test_what_a_critic_is_told(small, conditioning, extra):
    family = Pixel.tiny(size=16)
    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    critic = CleanCritic(family, open_feature_source(str(small), family, teacher, augment=True), conditioning)
    x0, cond, t = torch.randn(3, 1, 16, 16), family.example_cond([0, 1, 2]), torch.tensor([1.0, 0.5, 1.0])
    vector = critic.condition(cond, lambda: critic.see(x0), t)
    assert vector.shape == (3, extra)
    if conditioning == "both":  # at pure noise the student has seen nothing of the image
        assert vector[:, 4:].abs().sum(1).gt(0).tolist() == [False, True, False]
    assert all(logits.shape[0] == 3 for logits in critic(critic.see(x0), cond, vector, Draws(0, 3)))


def test_a_critic_without_conditions_has_a_say_at_pure_noise(small):
    """There the embedding is zero, and the projection of zeros would be no logit: the student would learn nothing."""
    family = Pixel.tiny(size=16, num_classes=None)
    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    critic = CleanCritic(family, open_feature_source(str(small), family, teacher, augment=False), "both")
    x0 = torch.randn(3, 1, 16, 16)
    logits = critic(critic.see(x0), {}, critic.condition({}, lambda: critic.see(x0), torch.ones(3)), Draws(0, 3))
    assert all(head.abs().min() > 0 for head in logits)


def test_no_checkpoint_holds_a_critics_eyes(small):
    family = Pixel.tiny(size=16)
    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    for critic in (
        CleanCritic(family, open_feature_source(str(small), family, teacher, augment=True), "both"),
        RenoisedCritic(teacher, 0.0, 1.0),
    ):
        assert all(name.startswith("heads.") for name in critic.state_dict())


@pytest.mark.parametrize(("name", "kind"), [("cosine", "v_prediction"), ("flow", "flow"), ("karras", "edm")])
def test_noise_levels_are_logit_normal_in_a_flows_time(name, kind):
    family = OracleFamily(PointNet(SCHEDULES[name]), SCHEDULES[name], kind)
    critic = RenoisedCritic(Denoiser(family, CopyBank(family.network), "teacher"), 1.0, 0.5)
    t = critic.sample_times(Draws(0, 20_000))
    logit = -family.schedule.log_snr(t) / 2  # log(t / (1 - t)) of the flow with the same ratio of noise to signal
    assert logit.mean().item() == pytest.approx(1.0, abs=0.02)
    assert logit.std().item() == pytest.approx(0.5, abs=0.02)
    critic.location = -30.0
    assert (critic.sample_times(Draws(0, 4)) == family.schedule.lowest_time).all()  # a network knows no less noise


def test_a_renoised_critics_r1_is_that_of_its_logit_in_the_image(monkeypatch):
    """Of a logit <w, x_t> it is alpha_t^2 ||w||^2: the image moves by a distance, x_t by alpha_t times that."""
    schedule = SCHEDULES["cosine"]
    family = OracleFamily(PointNet(schedule), schedule, "v_prediction")
    critic = RenoisedCritic(Denoiser(family, CopyBank(family.network), "teacher"), 0.0, 1.0)
    w, size = torch.tensor([1.5, -0.5]), 40_000
    critic.blocks = lambda x_t, t, cond: [x_t.flatten(2)]
    critic.heads.forward = lambda features, vector: [(features[0].squeeze(2) @ w)[:, None]]
    t = torch.full((size,), 0.5, dtype=torch.float64)
    alpha = schedule(t[:1])[0].item()
    for distance in (0.1, 2.0):
        critic.r1_distance = distance
        found = critic.r1(torch.randn(size, 2, 1, 1), [], {}, t, Draws(0, size)).item()
        assert found == pytest.approx(alpha**2 * w.square().sum().item(), rel=0.03)


def test_spread_is_one_for_real_images_and_zero_for_a_collapse():
    real = torch.randn(16, 1, 4, 4)
    assert diversity_ratio(real, real).item() == pytest.approx(1)
    assert diversity_ratio(real[:1].expand(16, -1, -1, -1), real).item() == 0
    assert diversity_ratio(real[:1], real[1:2]).item() == 1  # one image differs from nothing: no sign of a collapse


def test_a_noise_predicting_teacher_that_sees_no_signal_at_the_end_is_refused():
    with pytest.raises(ValueError, match=r"'epsilon' with alpha_T = 4.9e-05"):
        check_first_step(Pixel.tiny(prediction_type="epsilon"))
    check_first_step(Pixel.tiny())


@pytest.mark.parametrize(("conditioning", "real"), [("both", 1), ("condition", 0)])
def test_an_image_is_decoded_once_a_turn_however_many_terms_see_it(small, monkeypatch, conditioning, real):
    family = Pixel.tiny(size=16)
    config = ADD.Config(features=str(small), conditioning=conditioning, decoded=True, r1=0.1)
    distiller, batch = ADD(family, CopyBank(family.network), config), ten_images(family)
    decoded, looks = [], []
    decode, maps = Pixel.decode, type(distiller.features.backbone).__call__
    monkeypatch.setattr(Pixel, "decode", lambda self, x0: decoded.append(x0) or decode(self, x0))
    monkeypatch.setattr(
        type(distiller.features.backbone), "__call__", lambda self, images: looks.append(images) or maps(self, images)
    )
    distiller("student", batch, Draws(0, batch.size))
    assert len(decoded) == 2 + real and len(looks) == 1  # the student's image and its target, and the real image
    decoded.clear(), looks.clear()
    distiller("critic", batch, Draws(0, batch.size))
    assert len(decoded) == 2 and len(looks) == 2  # the real image and the student's; R1 uses the same features


def ten_images(family):
    return Batch(torch.randn(10, *family.sample_shape), family.example_cond(range(10)), 10)


def test_heads_see_the_tokens_of_a_teacher_as_a_map_and_at_most_so_many_blocks():
    family = PixArt.tiny()
    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    critic = RenoisedCritic(teacher, 0.0, 1.0, max_blocks=1)
    count = len(family.network.transformer_blocks)
    assert critic.blocks.blocks.names == (f"transformer_blocks.{count - 1}",)
    (head,) = critic.heads.heads
    assert len(head.shape) == 3 and head.shape[1] * head.shape[2] == teacher_tokens(teacher)
    assert isinstance(head.last, nn.Conv2d)
    x0, cond = torch.randn(2, *family.sample_shape), family.example_cond([0, 1])
    (logits,) = critic(x0, cond, torch.full((2,), 0.5), Draws(0, 2))
    assert logits.shape == (2, head.shape[1] * head.shape[2]) and logits.isfinite().all()
    assert len(RenoisedCritic(teacher, 0.0, 1.0).heads.heads) == min(5, count)


def teacher_tokens(teacher):
    return BlockFeatures(teacher).shapes()[-1][1]


def test_blocks_are_evenly_spaced_and_the_last_is_one_of_them():
    network = nn.ModuleDict({"down": nn.ModuleList(nn.Identity() for _ in range(10)), "middle": nn.Identity()})
    names = ("down", "middle")
    assert spaced_blocks(network, names, 3) == ["down.2", "down.6", "middle"]
    assert spaced_blocks(network, names, 99) == [*(f"down.{i}" for i in range(10)), "middle"]


def test_a_critic_sees_an_image_to_its_corners():
    """DINOv2 resizes to 256 and crops 224: beyond that, six per cent a side would be no concern of a critic."""
    config = Dinov2Config(image_size=28, patch_size=14, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    features = TransformersFeatures(Dinov2Model(config), PROCESSOR | {"size": {"shortest_edge": 32}}, "dino")
    images = torch.rand(1, 3, 40, 40, requires_grad=True)
    maps = features.maps(images)
    (gradient,) = torch.autograd.grad(sum(feature.square().sum() for feature in maps), images)
    corners = gradient[0, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.abs().min() > 0
    assert features.smooth_pixels(images).shape[-2:] == (28, 28)
