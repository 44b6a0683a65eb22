"""What the launcher asks of sharding. That it trains to the same weights is in tests/contracts/test_methods.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from stepdistill.families.pixel import Pixel
from stepdistill.networks import sharding
from stepdistill.training import fsdp

CONFIG = Path(__file__).parents[2] / "configs/accelerate/fsdp2.yaml"


def accelerator(processes=2, kind=DistributedType.MULTI_CPU):
    return SimpleNamespace(distributed_type=kind, num_processes=processes)


@pytest.fixture
def launched(monkeypatch):
    """The environment that ``accelerate launch`` makes of the shipped file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIG), "scripts/train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_shipped_file_asks_for_sharding(launched):
    assert fsdp.is_wanted(accelerator())
    assert not fsdp.is_wanted(accelerator(processes=1))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True


def test_nothing_is_sharded_unasked(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not fsdp.is_wanted(accelerator())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: expected 2, got 1"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: expected false, got true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: expected false, got true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: expected false, got true"),
    ],
)
def test_settings_that_we_do_not_train_with_are_refused(launched, name, value, message):
    launched.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        fsdp.is_wanted(accelerator())


def test_deepspeed_is_refused():
    with pytest.raises(ValueError, match="DEEPSPEED is not supported"):
        fsdp.is_wanted(accelerator(kind=DistributedType.DEEPSPEED))


def test_clipping_is_torchs_own():
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))]
    for weight, grad in zip(weights, (3.0, 4.0, None), strict=True):
        weight.grad = None if grad is None else torch.full_like(weight, grad)
    expected = [None if w.grad is None else w.grad * 0.5 / (3 * 9 + 2 * 16) ** 0.5 for w in weights]
    norm = fsdp.clip_gradients(weights, 0.5)
    torch.testing.assert_close(norm, torch.tensor(59.0).sqrt())
    for weight, wanted in zip(weights, expected, strict=True):
        assert (weight.grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(weight.grad, wanted, atol=1e-6, rtol=1e-5)


def test_a_copy_put_together_again_shares_no_memory():
    """What was never sharded is there whole: adapters are merged into the copy, not into it."""
    network = Pixel.tiny().network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plain = sharding.blueprint(network, {})
    assert {tensor.device.type for tensor in plain.state_dict().values()} == {"meta"}
    copied = sharding.assembled(plain, network, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())
    for parameter in copied.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
