"""Networks that take a guidance weight or a second time: first the teacher, then reached by adapters and exported."""

import copy
import json
import subprocess

import numpy as np
import pytest
import torch
from contracts.cases import generators
from contracts.stock import job, read_images
from diffusers import DDIMScheduler, StableDiffusionPipeline, TCDScheduler, UNet2DModel
from oracles import OracleFamily

from stepdistill import load_pipeline
from stepdistill.diffusion.samplers import DDIM, DoubleStep, sample
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.base import Inputs
from stepdistill.families.config import TeacherConfig
from stepdistill.families.pixel import Pixel, split_embedding
from stepdistill.loading import is_our_code
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline

BOTH = Inputs(w=(0.0, 3.0), s=True)
LABELS = {"class_labels": torch.tensor([0, 1, 2, 3])}
T = torch.tensor([1.0, 0.7, 0.4, 0.001], dtype=torch.float64)
W = torch.tensor([0.0, 0.5, 2.0, 3.0], dtype=torch.float64)


def states(family, size=4):
    return torch.randn((size, *family.sample_shape), generator=torch.Generator().manual_seed(1))


def extended(inputs=BOTH, **options):
    family = Pixel.tiny(**options)
    family.add_inputs(inputs)
    return family


def bank_of(name, family):
    return (
        CopyBank(family.network) if name == "copy" else AdapterBank(family.network, rank=4, targets=family.lora_targets)
    )


def open_branches(bank, role):
    """Give every weight of ``role`` a push, as training would."""
    generator = torch.Generator().manual_seed(2)
    for tensor in bank.state(role).values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


# ---------------------------------------------------------------------------------------------- at the start


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_an_extended_network_is_the_teacher_bit_for_bit_for_every_w_and_s(kind):
    family = Pixel.tiny(prediction_type=kind)
    before = copy.deepcopy(family.network)
    x, plain = states(family), Pixel.tiny(prediction_type=kind)
    with torch.no_grad():
        expected = plain.call(before, x, T, LABELS)
        family.add_inputs(BOTH)
        for w in (None, W, -W, 100 * W):
            for s in (None, 0.5 * T, 0 * T):
                assert torch.equal(family.call(family.network, x, T, LABELS, w=w, s=s), expected)


def test_a_network_without_classes_takes_a_second_time():
    plain, family = Pixel.tiny(num_classes=None), extended(Inputs(s=True), num_classes=None)
    x = states(family)
    with torch.no_grad():
        expected = plain.call(plain.network, x, T, {})
        assert torch.equal(family.call(family.network, x, T, {}, s=T / 2), expected)
        assert torch.equal(family.call(family.network, x, T, {}), expected)


def test_the_branches_are_the_same_in_every_process_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    family = Pixel.tiny()
    after_loading = torch.get_rng_state()
    family.add_inputs(BOTH)
    assert torch.equal(torch.get_rng_state(), after_loading) and not torch.equal(state, after_loading)
    torch.manual_seed(5)
    other = extended()
    for a, b in zip(family.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_changed_when_nothing_is_asked_for():
    family = Pixel.tiny()
    family.add_inputs(Inputs())
    assert family.network.config.class_embed_type is None and "condition_embedding" not in family.network._modules


def test_the_weight_is_embedded_as_diffusers_does():
    family, w = extended(), torch.tensor([0.0, 0.3, 2.7])
    embedding = family.network.condition_embedding
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    expected = embedding.w_embedding(expected) + embedding.class_embedding(torch.zeros(3, dtype=torch.long))
    assert torch.allclose(embedding(torch.zeros(3, dtype=torch.long), w), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------- both banks


@pytest.mark.parametrize("bank", ["copy", "adapter"])
@pytest.mark.parametrize("name", ["w", "s"])
def test_training_reaches_the_branches_and_leaves_the_teacher(bank, name):
    family = extended()
    networks, x = bank_of(bank, family), states(family)
    teacher, before = Denoiser(family, networks, "teacher"), states(family)
    with torch.no_grad():
        before = teacher.raw(x, T, LABELS)
    networks.fork("student")
    student = Denoiser(family, networks, "student")
    value = {"w": W, "s": T / 2}[name]
    optimizer = torch.optim.SGD(networks.params("student"), lr=0.1)
    student.raw(x, T, LABELS, **{name: value}).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        changed, unchanged = (student.raw(x, T, LABELS, **{name: v}) for v in (value + 0.25, value))
        assert not torch.equal(changed, unchanged)  # the student now looks at its input
        assert torch.equal(teacher.raw(x, T, LABELS), before)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_a_role_is_extracted_with_its_branches(bank):
    family = extended()
    networks, x = bank_of(bank, family), states(family)
    networks.fork("student")
    open_branches(networks, "student")
    alone = networks.extract("student").eval()
    with torch.no_grad():
        expected = Denoiser(family, networks, "student").raw(x, T, LABELS, w=W, s=T / 2)
        assert (family.call(alone, x, T, LABELS, w=W, s=T / 2) - expected).abs().max() < 1e-5


def test_a_denoiser_has_a_weight_of_its_own_for_calls_that_name_none():
    family = extended()
    networks, x = CopyBank(family.network), states(family)
    networks.fork("student")
    open_branches(networks, "student")
    named, unnamed = Denoiser(family, networks, "student"), Denoiser(family, networks, "student", w=1.5)
    with torch.no_grad():
        expected = named.raw(x, T, LABELS, w=torch.full((4,), 1.5))
        assert torch.equal(unnamed.raw(x, T, LABELS), expected)
        assert not torch.equal(named.raw(x, T, LABELS), expected)
        assert torch.equal(unnamed.raw(x, T, LABELS, w=W), named.raw(x, T, LABELS, w=W))


# ------------------------------------------------------------------------------------------------------ exports

SAMPLERS = {"ddim": DDIM, "double": DoubleStep}
KINDS = ("v_prediction", "epsilon", "sample")


def student_of(kind, inputs):
    family = extended(inputs, prediction_type=kind)
    bank = CopyBank(family.network)
    bank.fork("student")
    open_branches(bank, "student")
    return family, bank


class Aimed(DDIM):
    """DDIM for a network that is told where it goes."""

    def target_time(self, s):
        return s


CASES = [
    *((f"{kind}_{name}", kind, make, Inputs(w=(0.0, 3.0))) for kind in KINDS for name, make in SAMPLERS.items()),
    ("v_prediction_aimed", "v_prediction", Aimed, BOTH),
]


@torch.no_grad()
def expected_images(kind, make, inputs, g):
    family, bank = student_of(kind, inputs)
    own = generators(3, seed=3)

    def noise(x):
        return torch.stack([torch.randn(x.shape[1:], generator=one) for one in own])

    denoiser = Denoiser(family, bank, "student", w=g - 1)
    sampler = make(family.schedule, family.schedule.grid(4))
    start = noise(torch.empty(3, *family.sample_shape))
    return family.decode(sample(denoiser.conditioned(family.example_cond(range(3))), sampler, start, noise))


@pytest.fixture(scope="module")
def exports(tmp_path_factory, stock_diffusers):
    folder = tmp_path_factory.mktemp("exports")
    jobs = []
    for name, kind, make, inputs in CASES:
        family, bank = student_of(kind, inputs)
        sampler = make(family.schedule, family.schedule.grid(4))
        export_pipeline(family, bank.extract("student"), sampler, folder / name, guidance_scale=2.5)
        for g in (1.0, 2.5):
            asked = job(folder / name, family, 3, 3, output=f"images-{g}")
            jobs.append(asked | {"call": {"class_labels": [0, 1, 2], "guidance_scale": g}})  # the steps are its own
    stock_diffusers.generate_images(jobs)
    return folder


@pytest.mark.parametrize("g", [1.0, 2.5])
@pytest.mark.parametrize(("name", "kind", "make", "inputs"), CASES, ids=[case[0] for case in CASES])
def test_stock_diffusers_steers_the_student_as_training_does(exports, name, kind, make, inputs, g):
    expected = expected_images(kind, make, inputs, g)
    found = read_images(exports / name, f"images-{g}")
    assert found.shape == expected.shape and expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5
    assert (expected_images(kind, make, inputs, 3.5 - g) - expected).abs().max() > 1e-3  # the scale matters


def test_the_network_of_an_export_is_stock_and_what_embeds_lies_beside(exports):
    folder = exports / "v_prediction_double"
    network = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    assert network.config.class_embed_type == "identity" and "condition_embedding" not in network._modules
    index = json.loads((folder / "model_index.json").read_text())
    assert index["condition_embedding"] == ["condition_embedding", "ConditionEmbedding"]
    assert index["scheduler"] == ["double_step", "DoubleStepScheduler"]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
        ".py",
        ".md",
        ".npy",
    }


def test_a_loaded_export_takes_one_call_a_step_and_keeps_to_its_range(exports):
    pipeline = load_pipeline(exports / "v_prediction_ddim")
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    bare = pipeline(class_labels=[0, 1, 2], generator=generators(3, seed=3), output_type="np").images
    assert rows == [3, 3, 3, 3]
    assert np.abs(bare - np.load(exports / "v_prediction_ddim" / "images-2.5.npy")).max() < 1e-5
    for scale in (0.5, 4.5):
        with pytest.raises(ValueError, match=f"guidance_scale: found {scale}.* trained for 1 to 4"):
            pipeline(class_labels=[0], guidance_scale=scale)


@pytest.mark.parametrize("file", ["pipeline.py", "condition_embedding/condition_embedding.py", "other/module.py"])
def test_every_foreign_file_is_refused_by_name(exports, tmp_path, file):
    folder = tmp_path / "export"
    subprocess.run(["cp", "-r", str(exports / "v_prediction_double"), str(folder)], check=True)
    assert is_our_code(folder)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("print('mine')\n")
    with pytest.raises(ValueError, match=file):
        load_pipeline(folder)


def test_taking_a_network_apart_leaves_it_whole():
    family = extended()
    stock, embedding = split_embedding(family.network)
    assert embedding is family.network.condition_embedding and "condition_embedding" not in stock._modules
    assert split_embedding(Pixel.tiny().network)[1] is None


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_pipeline_tells_a_two_time_network_where_tcds_jump_lands(eta):
    family = extended(Inputs(s=True))
    stock, embedding = split_embedding(family.network)
    pipeline = ClassConditionalPipeline(stock, TCDScheduler(), eta=eta, condition_embedding=embedding)
    pipeline.scheduler.set_timesteps(4)
    t = pipeline.scheduler.timesteps
    ends = torch.tensor([*t[1:], 0])
    found = torch.stack([pipeline._target(time, eta) for time in t])
    assert torch.equal(found, torch.floor((1 - eta) * ends))


# ---------------------------------------------------------------------------------------------------- bad input


def test_a_family_that_cannot_take_inputs_says_so():
    with pytest.raises(ValueError, match="OracleFamily take no inputs"):
        OracleFamily.tiny().add_inputs(BOTH)


def test_an_unextended_network_takes_no_w():
    family = Pixel.tiny()
    with pytest.raises(AssertionError, match="takes neither"):
        family.call(family.network, states(family), T, LABELS, w=W)


def test_a_network_is_not_asked_for_an_input_it_lacks():
    family = extended(Inputs(s=True))
    with pytest.raises(AssertionError, match="not extended"):
        family.call(family.network, states(family), T, LABELS, w=W)


def test_a_student_with_inputs_is_no_teacher(exports):
    with pytest.raises(ValueError, match="class_embed_type: expected null, got 'identity'"):
        Pixel.load(exports / "v_prediction_ddim", TeacherConfig(path="x"))


def test_a_guided_call_of_a_network_without_null_class_is_an_error():
    family = Pixel(Pixel.tiny().network, DDIMScheduler(prediction_type="v_prediction").config)
    pipeline = family.pipeline(family.network, DDIM(family.schedule, family.schedule.grid(1)))
    with pytest.raises(ValueError, match="knows no null class"):
        pipeline(class_labels=[0], guidance_scale=2.0)
