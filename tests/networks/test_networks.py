"""Network banks: roles are independent, gradients are right whatever happens in between, the teacher never changes."""

import copy
import warnings

import pytest
import torch
from torch import nn

from stepdistill.families.pixel import Pixel
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.bank import NetworkBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.modes import in_mode


def tiny() -> Pixel:
    return Pixel.tiny(size=8, num_classes=None)


def make_bank(kind: str) -> NetworkBank:
    family = tiny()
    if kind == "copies":
        return CopyBank(family.network)
    return AdapterBank(family.network, rank=2, targets=family.lora_targets)


@pytest.fixture(params=["copies", "adapters"])
def bank(request) -> NetworkBank:
    return make_bank(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 1, 8, 8)


def output(bank, role, x):
    with bank.using(role) as network:
        return network(x, 500).sample


def stir(bank, role, seed=1):
    """Give a role weights of its own."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in bank.state(role).values():
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))


def gradients(bank, role):
    return [parameter.grad.clone() for parameter in bank.params(role)]


# -------------------------------------------------------------------------------------------------- roles


def test_a_fork_starts_as_what_it_was_forked_from(bank, x):
    bank.fork("student")
    torch.testing.assert_close(output(bank, "student", x), output(bank, "teacher", x))
    stir(bank, "student")
    bank.fork("mentor", "student", trainable=False)
    assert all(map(torch.equal, bank.state("mentor").values(), bank.state("student").values()))
    # the last bit of a product may depend on where its factors lie in memory
    torch.testing.assert_close(output(bank, "mentor", x), output(bank, "student", x))
    assert not torch.allclose(output(bank, "student", x), output(bank, "teacher", x))
    assert bank.roles == ("teacher", "student", "mentor")


def test_only_trainable_roles_ask_for_gradients(bank):
    bank.fork("student")
    bank.fork("ema", "student", trainable=False)
    bank.fork("fake")
    asked = {role: {p.requires_grad for p in bank.params(role)} for role in ("student", "ema", "fake")}
    assert asked == {"student": {True}, "ema": {False}, "fake": {True}}
    mine = {id(p) for role in ("student", "fake") for p in bank.params(role)}
    assert {id(p) for p in bank.parameters() if p.requires_grad} == mine


def test_roles_share_no_parameter(bank):
    for role in ("student", "ema", "fake"):
        bank.fork(role)
    ids = [id(p) for role in ("student", "ema", "fake") for p in bank.params(role)]
    assert len(ids) == len(set(ids)) > 0


def adapted_student():
    """A network that was the teacher with an adapter of rank 2."""
    other = make_bank("adapters")
    other.fork("student")
    stir(other, "student")
    return other.extract("student")


def test_a_role_imitates_a_student_that_its_bank_can_hold(bank, x):
    student = adapted_student()
    bank.fork("student")
    with warnings.catch_warnings(action="error"):
        bank.load_or_project("student", student.state_dict())
    torch.testing.assert_close(output(bank, "student", x), student(x, 500).sample, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(output(bank, "student", x), output(bank, "teacher", x), atol=1e-2)


def test_adapters_imitate_the_best_that_their_rank_can_hold(x):
    family, student = tiny(), adapted_student()
    bank = AdapterBank(family.network, rank=1, targets=family.lora_targets)
    bank.fork("student")
    with pytest.warns(UserWarning, match=r"adapters of rank 1 represent [5-9]\d% of the"):
        bank.load_or_project("student", student.state_dict())
    teacher, found = tiny().network.state_dict(), bank.extract("student").state_dict()
    name = "mid_block.resnets.0.conv1.weight"
    missed = (student.state_dict()[name] - found[name]).flatten(1)
    singular = torch.linalg.svdvals((student.state_dict()[name] - teacher[name]).flatten(1))
    assert missed.norm().item() == pytest.approx(singular[1:].norm().item(), rel=1e-3) and singular[1] > 0.1


def test_adapters_of_a_network_of_16_bits_imitate_a_student_finer_than_its_rounding():
    banks = [AdapterBank(tiny().network.bfloat16(), rank=2, targets=tiny().lora_targets) for _ in range(2)]
    for bank in banks:
        bank.fork("student")
    for tensor in banks[0].state("student").values():
        tensor.normal_(std=0.02)
    student = banks[0].extract("student").state_dict()
    with warnings.catch_warnings(action="error"):
        banks[1].load_or_project("student", student)
    teacher, found = (banks[1].extract(role).state_dict() for role in ("teacher", "student"))
    name = "mid_block.resnets.0.conv1.weight"
    missed, all_of_it = (student[name] - other[name] for other in (found, teacher))
    assert missed.norm() < 0.02 * all_of_it.norm()


def test_changing_one_role_changes_no_other(bank, x):
    for role in ("student", "fake"):
        bank.fork(role)
        stir(bank, role, seed=len(role))
    before = {role: output(bank, role, x) for role in bank.roles}
    stir(bank, "student", seed=9)
    assert torch.equal(output(bank, "fake", x), before["fake"])
    assert torch.equal(output(bank, "teacher", x), before["teacher"])
    assert not torch.allclose(output(bank, "student", x), before["student"])


def test_contexts_nest_and_give_back_what_was(bank, x):
    bank.fork("student")
    stir(bank, "student")
    student, teacher = output(bank, "student", x), output(bank, "teacher", x)
    with bank.using("student") as network:
        with bank.using("teacher") as inner:
            assert torch.equal(inner(x, 500).sample, teacher)
        assert torch.equal(network(x, 500).sample, student)
        with pytest.raises(ZeroDivisionError), bank.using("teacher"):
            raise ZeroDivisionError
        assert torch.equal(network(x, 500).sample, student)


def test_blend_copies_and_averages(bank):
    for role in ("student", "ema"):
        bank.fork(role)
        stir(bank, role, seed=len(role))
    student, ema = copy.deepcopy(bank.state("student")), copy.deepcopy(bank.state("ema"))
    bank.blend("ema", "student", keep=0.75)
    for (name, found), a, b in zip(bank.state("ema").items(), ema.values(), student.values(), strict=True):
        torch.testing.assert_close(found, 0.75 * a + 0.25 * b, msg=name)
    bank.blend("ema", "student", keep=0)
    assert all(torch.equal(found, b) for found, b in zip(bank.state("ema").values(), student.values(), strict=True))
    assert all(torch.equal(found, b) for found, b in zip(bank.state("student").values(), student.values(), strict=True))


def test_blend_from_the_teacher_brings_the_teacher_back(bank, x):
    bank.fork("student")
    stir(bank, "student")
    bank.blend("student", "teacher", keep=0)
    assert torch.equal(output(bank, "student", x), output(bank, "teacher", x))


def test_nothing_blends_into_the_teacher(bank):
    bank.fork("student")
    with pytest.raises(AssertionError, match="never changes"):
        bank.blend("teacher", "student", keep=0)


def test_integer_buffers_are_copied_not_averaged():
    bank = CopyBank(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    bank.fork("student")
    bank.fork("ema", "student", trainable=False)
    bank.state("student")["1.num_batches_tracked"].fill_(7)
    bank.blend("ema", "student", keep=0.9)
    assert bank.state("ema")["1.num_batches_tracked"].item() == 7


def test_the_tensors_of_a_copy_are_those_of_its_network_also_when_they_were_replaced():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    network[2].weight = network[0].weight  # tied: one tensor, which an average moves once
    bank = CopyBank(network)
    bank.fork("student")
    network = bank.networks["student"]
    for _ in range(2):
        found = bank.state("student")
        expected = dict([*network.named_parameters(), *network.named_buffers()])
        assert list(found) == list(expected) and len(found) == 8
        assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in expected.items())
        network[0].weight = network[2].weight = nn.Parameter(torch.zeros(2, 2))
        network.double()


def test_a_mode_that_a_network_is_in_is_not_set_again(monkeypatch):
    bank, asked = make_bank("copies"), []
    bank.fork("student")
    bank.train()
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: asked.append(mode))
    bank.train()
    with in_mode(bank, "student", training=True):
        assert not asked


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_extracted_network_stands_alone(bank, x, checkpointing, tmp_path):
    for role in ("student", "fake"):
        bank.fork(role)
        stir(bank, role, seed=len(role))
    if checkpointing:
        bank.enable_checkpointing()
    inside = {role: output(bank, role, x) for role in ("teacher", "student")}
    for role, expected in inside.items():
        network = bank.extract(role)
        assert not any("lora" in name for name in network.state_dict())
        torch.testing.assert_close(network(x, 500).sample, expected, atol=1e-5, rtol=1e-5)
        network.save_pretrained(tmp_path / role)
        again = type(network).from_pretrained(tmp_path / role)
        assert torch.equal(again(x, 500).sample, network(x, 500).sample)
        for parameter in network.parameters():  # and nothing of the bank hangs on it
            parameter.data.add_(1)
    assert torch.equal(output(bank, "student", x), inside["student"])
    assert torch.equal(output(bank, "teacher", x), inside["teacher"])


def test_extracting_copies_one_network_not_the_bank(bank):
    """A checkpointed network knows its bank; a copy of the network must not bring a copy of every role."""
    bank.fork("student")
    bank.enable_checkpointing()
    network = bank.extract("student")
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in network.modules()]
    assert not any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    assert all(function is None for function in functions)


def test_adapter_files_name_no_role():
    bank = make_bank("adapters")
    bank.fork("student")
    names = bank.lora_state("student")
    assert len(names) == len(bank.params("student"))
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


# ------------------------------------------------------------------------------------- hazards 1 and 2


def busy_gradients(bank, x, between):
    """The student's gradient, with other roles played between its forward and its backward."""
    bank.zero_grad(set_to_none=True)
    loss = output(bank, "student", x).square().mean()
    between()
    loss.backward()
    return gradients(bank, "student")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_roles_played_before_backward(bank, x, checkpointing):
    for role in ("student", "fake"):
        bank.fork(role)
        stir(bank, role, seed=len(role))
    expected = busy_gradients(bank, x, between=lambda: None)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    if checkpointing:
        bank.enable_checkpointing()

    def between():
        with torch.no_grad():
            output(bank, "teacher", x)
        output(bank, "fake", x)

    for found, wanted in zip(busy_gradients(bank, x, between), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert all(parameter.grad is None for parameter in bank.params("fake"))


@pytest.mark.parametrize("active", ["teacher", "fake"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_inside_another_role_is_the_same(bank, x, checkpointing, active):
    for role in ("student", "fake"):
        bank.fork(role)
        stir(bank, role, seed=len(role))
    expected = busy_gradients(bank, x, between=lambda: None)
    if checkpointing:
        bank.enable_checkpointing()
    bank.zero_grad(set_to_none=True)
    loss = output(bank, "student", x).square().mean()
    with bank.using(active):
        loss.backward()
    for found, wanted in zip(gradients(bank, "student"), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_roles_in_one_loss_each_get_their_own_gradient(bank, x, checkpointing):
    """As where a student's sample passes through a fake score: a sum of parts is the sum of gradients."""
    for role in ("student", "fake"):
        bank.fork(role)
        stir(bank, role, seed=len(role))
    expected = {}
    for role in ("student", "fake"):
        bank.zero_grad(set_to_none=True)
        output(bank, role, x).square().mean().backward()
        expected[role] = gradients(bank, role)
    if checkpointing:
        bank.enable_checkpointing()
    bank.zero_grad(set_to_none=True)
    (output(bank, "student", x).square().mean() + output(bank, "fake", x).square().mean()).backward()
    for role, wanted in expected.items():
        for a, b in zip(gradients(bank, role), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_gradients_pass_through_a_frozen_role(bank, x):
    """A loss of the teacher's view of the student's image reaches the student alone."""
    bank.fork("student")
    output(bank, "teacher", output(bank, "student", x)).square().mean().backward()
    assert any(gradient.abs().max() > 0 for gradient in gradients(bank, "student"))
    mine = {id(parameter) for parameter in bank.params("student")}
    assert all(parameter.grad is None for parameter in bank.parameters() if id(parameter) not in mine)


def test_a_network_that_cannot_checkpoint_is_named():
    with pytest.raises(ValueError, match="Linear does not support gradient checkpointing"):
        CopyBank(nn.Linear(2, 2)).enable_checkpointing()


# --------------------------------------------------------------------------------------- the teacher


def test_the_teacher_is_untouched_to_the_last_bit(bank, x):
    untouched = tiny().network.eval()
    with torch.no_grad():
        expected = untouched(x, 500).sample
    bank.fork("student")
    assert torch.equal(output(bank, "teacher", x), expected)
    optimizer = torch.optim.AdamW(bank.params("student"), lr=1e-2)
    bank.train()
    for _ in range(3):
        output(bank, "student", x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    bank.fork("mentor", "student", trainable=False)
    bank.blend("mentor", "student", keep=0.5)
    assert torch.equal(output(bank, "teacher", x), expected)
    found = bank.extract("teacher").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in untouched.state_dict().items())
    assert not torch.allclose(output(bank, "student", x), expected)


def test_only_trainable_copies_train():
    bank = CopyBank(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    bank.fork("student")
    bank.fork("ema", "student", trainable=False)
    bank.train()
    assert {role: network.training for role, network in bank.networks.items()} == {
        "teacher": False,
        "student": True,
        "ema": False,
    }
    assert not any(network.training for network in bank.eval().networks.values())


def test_adapters_never_bring_dropout_to_the_teacher():
    bank = make_bank("adapters")
    bank.fork("student")
    bank.train()
    assert not any(module.training for module in bank.network.modules())


def test_a_role_that_rested_in_its_forward_pass_rests_in_its_recomputation_too():
    """The trainer's backward pass begins after every role is in training mode again."""

    def gradient(checkpointing):
        network = Pixel.tiny().network
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        bank = CopyBank(network)
        bank.fork("fake")
        bank.train()
        if checkpointing:
            bank.enable_checkpointing()
        x = torch.ones(1, 1, 8, 8, requires_grad=True)
        with in_mode(bank, "fake", training=False), bank.using("fake") as fake:
            loss = fake(x, 3, class_labels=torch.tensor([0])).sample.square().sum()
        assert fake.training
        loss.backward()
        return x.grad

    torch.testing.assert_close(gradient(True), gradient(False))
