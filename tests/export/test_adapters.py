"""The adapter as ComfyUI reads it: stock diffusers makes the same weights of it, and so do its converters."""

import copy

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_lumina2_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors import safe_open

from stepdistill.export.adapters import COMFYUI, header, write_adapter
from stepdistill.export.contract import Contract, Origin
from stepdistill.export.kohya import DOWN, UP, kohya_weights, original_layers
from stepdistill.families.chroma import Chroma
from stepdistill.families.flux import Flux
from stepdistill.families.flux2 import Flux2
from stepdistill.families.lumina2 import Lumina2
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.sana import Sana
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.families.sdxl import SDXL
from stepdistill.families.wan import Wan
from stepdistill.families.zimage import ZImage
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.bank import STUDENT

CONTRACT = Contract(
    steps=4, guidance_scale=1.0, scheduler="LCMScheduler", timesteps=[999, 749, 499, 249],
    origin=Origin(method="lcm", triggers=["<cat>", "ink style"]),
)  # fmt: skip


def trained(family):
    """A bank whose student's adapter is random, around a copy of the teacher's network."""
    bank = AdapterBank(copy.deepcopy(family.network), rank=2, targets=family.lora_targets)
    bank.fork(STUDENT)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bank.params(STUDENT):
            parameter.normal_()
    return bank


def products(adapter):
    """The difference to the weights that an adapter is, by layer."""
    layers = [name.removesuffix(DOWN) for name in adapter if name.endswith(DOWN)]
    return {layer: adapter[layer + UP].flatten(1) @ adapter[layer + DOWN].flatten(1) for layer in layers}


@pytest.mark.parametrize("kind", [SD, SDXL, Flux2, QwenImage, Wan, ZImage])
def test_stock_diffusers_makes_the_students_weights_of_the_file(tmp_path, kind):
    family = kind.tiny()
    bank = trained(family)
    write_adapter(family.pipe, family.component, bank.lora_state(STUDENT), CONTRACT, tmp_path)
    family.pipe.load_lora_weights(tmp_path, weight_name=COMFYUI)
    family.pipe.fuse_lora(components=[family.component])
    family.pipe.unload_lora_weights()
    expected = bank.extract(STUDENT).state_dict()
    torch.testing.assert_close(family.network.state_dict(), expected, rtol=1e-5, atol=1e-5)
    with safe_open(tmp_path / COMFYUI, framework="pt") as file:
        assert file.metadata() == header(CONTRACT, 2)


@pytest.mark.parametrize("kind", [Chroma, Flux, Lumina2, SD3, Sana])
def test_every_layer_that_a_family_adapts_has_an_original_name(kind):
    """Those of the families above are read back; Sana's are not known."""
    network, found = kind.tiny().network, {}
    for name, module in network.named_modules():
        if f".{name}".endswith(tuple(f".{target}" for target in kind.lora_targets)):
            found |= {f"{name}{DOWN}": module.weight[:1], f"{name}{UP}": module.weight[:, :1]}
    assert (kohya_weights(type(network).__name__, found) is None) == (kind is Sana) and found


def full_size_flux():
    """An adapter of one double and one single block of FLUX.1, whose sizes diffusers' converter has built in."""
    single, double, width = "single_transformer_blocks.0.", "transformer_blocks.0.", 3072
    outs = {f"{double}attn.{name}": width for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")}
    outs |= {f"{double}attn.add_{name}_proj": width for name in "qkv"}
    outs |= {f"{double}{name}.net.0.proj": 4 * width for name in ("ff", "ff_context")}
    outs |= {f"{double}{name}.net.2": width for name in ("ff", "ff_context")}
    outs |= {f"{single}attn.to_{name}": width for name in "qkv"}
    outs |= {f"{single}proj_mlp": 4 * width, f"{single}proj_out": width, "proj_out": 64}
    return {f"{name}{end}": torch.randn(shape) for name, out in outs.items()
            for end, shape in ((DOWN, (2, 8)), (UP, (out, 2)))}  # fmt: skip


@pytest.mark.parametrize("network", ["FluxTransformer2DModel", "ChromaTransformer2DModel"])
def test_diffusers_converts_flux_back_to_the_same_tensors(network):
    adapter = full_size_flux()
    back = _convert_kohya_flux_lora_to_diffusers(dict(kohya_weights(network, adapter)))
    expected = {f"transformer.{name}": tensor for name, tensor in adapter.items()}
    for end in (DOWN, UP):  # diffusers 0.42 forgets the prefix of the last layer
        expected[f"proj_out{end}"] = expected.pop(f"transformer.proj_out{end}")
    torch.testing.assert_close(back, expected)


class Lenient(dict):
    """A checkpoint of a few weights, of which a converter may ask for all."""

    def __missing__(self, key):
        return torch.zeros(6)

    def pop(self, key, default=None):
        return super().pop(key, torch.zeros(6))


def changed_weights(network, adapter):
    """The original checkpoint's difference, by ComfyUI's rule for the names of every model."""
    weights, changed = kohya_weights(network, adapter), Lenient()
    for name in original_layers(network, adapter):
        key = f"lora_unet_{name.replace('.', '_')}"
        up, down = (weights.pop(f"{key}.lora_{end}.weight") for end in ("up", "down"))
        changed[f"{name}.weight"] = up @ down * weights.pop(f"{key}.alpha") / len(down)
    assert not weights
    return changed


@pytest.mark.parametrize("dual_attention", [False, True])
def test_sd3_is_changed_where_diffusers_converts_the_original_to(dual_attention):
    adapter = trained(SD3.tiny(dual_attention=dual_attention)).lora_state(STUDENT)
    found = convert_sd3_transformer_checkpoint_to_diffusers(changed_weights("SD3Transformer2DModel", adapter))
    for layer, product in products(adapter).items():
        torch.testing.assert_close(found[f"{layer}.weight"], product)


def test_lumina_is_changed_where_diffusers_converts_the_original_to():
    adapter = {}
    for name, out in {"to_q": 2304, "to_k": 768, "to_v": 768, "to_out.0": 8}.items():  # the sizes of its converter
        adapter[f"noise_refiner.1.attn.{name}{DOWN}"] = torch.randn(2, 8)
        adapter[f"noise_refiner.1.attn.{name}{UP}"] = torch.randn(out, 2)
    found = convert_lumina2_to_diffusers(changed_weights("Lumina2Transformer2DModel", adapter))
    expected = {f"{layer}.weight": product for layer, product in products(adapter).items()}
    torch.testing.assert_close(found, expected)


def test_the_header_says_rank_use_and_triggers():
    facts = header(CONTRACT, 2)
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("2", "2")
    assert facts["modelspec.trigger_phrase"] == "<cat>, ink style"
    assert facts["modelspec.usage_hint"] == "4 steps, guidance scale 1, LCMScheduler at [999, 749, 499, 249]"


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("FluxTransformer2DModel", ("single_transformer_blocks.0.attn.to_q",)),
        ("FluxTransformer2DModel", ("norm_out.linear",)),
    ],
)
def test_layers_without_an_original_name_have_no_such_file(network, layers):
    assert kohya_weights(network, {f"{layer}{DOWN}": torch.zeros(1, 1) for layer in layers}) is None
