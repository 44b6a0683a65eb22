"""Sizes in buckets: batches of one size, an order that is a function of seed and position, nothing left over."""

import collections
import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contracts.cases import sections, train_until, weights
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from stepdistill.config import to_yaml
from stepdistill.data.base import DataConfig
from stepdistill.data.buckets import sort_into
from stepdistill.data.datasets import open_data
from stepdistill.data.latent_cache import CacheConfig, LatentCacheDataset, make_cache
from stepdistill.data.loader import loader
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.features.classifier import SmallConvNet
from stepdistill.randomness import Draws
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

ROOT = Path(__file__).parents[2]
SHAPES = [(16, 16)] * 4 + [(12, 20), (16, 40), (10, 30), (40, 18), (30, 14), (17, 16)]
BUCKETS = [[16, 16], [16, 32], [32, 16]]


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, (height, width) in enumerate(SHAPES):
        Image.new("RGB", (width, height), (index * 20, 100, 200)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(f"picture {index}")
    return pictures


def opened(folder, **keys):
    config = DataConfig(name="images", path=str(folder), buckets=BUCKETS, **keys)
    return open_data(config, channels=3, size=(16, 16), num_classes=None, takes_text=True)


def taken(dataset, count, **place):
    return list(itertools.islice(loader(dataset, batch_size=2, seed=3, **place), count))


def test_a_sample_goes_into_the_bucket_of_the_nearest_proportions(folder):
    buckets = opened(folder).buckets
    assert buckets.sizes == ((16, 16), (16, 32), (32, 16))
    assert [samples.tolist() for samples in buckets.samples] == [[0, 1, 2, 3, 9], [4, 5, 6], [7, 8]]
    assert sort_into([(8, 8), (8, 16)], [(5, 5)]).sizes == ((8, 8),)  # one without samples is left out


def test_a_batch_has_one_size_and_every_sample_comes_equally_often(folder):
    dataset, seen = opened(folder), collections.Counter()
    for batch in taken(dataset, len(SHAPES)):
        assert {dataset.buckets.size_of[index] for index in batch.indices} == {tuple(batch.images.shape[2:])}
        assert batch.captions == tuple(f"picture {index}" for index in batch.indices)
        seen.update(batch.indices)
    assert seen == dict.fromkeys(range(len(SHAPES)), 2)


def test_the_order_is_a_function_of_seed_and_position(folder):
    dataset = opened(folder, flip=True, caption_dropout=0.3)
    whole = taken(dataset, 25)
    assert [batch.indices for batch in whole[:10]] != [batch.indices for batch in whole[10:20]]
    for batch, again in zip(whole[7:], taken(dataset, 18, start=7), strict=True):
        assert batch.indices == again.indices and batch.captions == again.captions
        assert torch.equal(batch.images, again.images)


def test_processes_take_parts_of_one_bucket_at_a_step(folder):
    dataset, seen = opened(folder), collections.Counter()
    ranks = [taken(dataset, len(SHAPES), rank=rank, world=2) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert first.images.shape == second.images.shape
        seen.update(first.indices + second.indices)
    assert seen == dict.fromkeys(range(len(SHAPES)), 4)


def section(folder, tmp_path, method="lcm", steps=6):
    wanted = sections(tmp_path, SD.tiny(), method)
    wanted["data"] = {"name": "images", "path": str(folder), "batch_size": 2, "buckets": BUCKETS}
    wanted["train"]["steps"] = steps
    return wanted


def test_a_run_over_buckets_is_resumed_to_the_bit(folder, tmp_path):
    whole = Run(resolve(section(folder, tmp_path / "whole")))
    whole.train()
    stopped = section(folder, tmp_path / "stopped")
    train_until(Run(resolve(stopped)), 3)
    again = Run(resolve(stopped))
    again.train()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name


@pytest.mark.product
def test_two_processes_train_over_buckets_to_the_weights_of_one(folder, tmp_path):
    """Two of half a batch each take, of the same bucket at every step, what one takes of the whole.

    Latents of two images at a time differ from those of four in their last bits: Adam's eps is large, so that it does
    not make steps of them.
    """
    whole = section(folder, tmp_path / "whole")
    whole["data"]["batch_size"] = 4
    whole["optim"]["student"]["eps"] = 0.1
    teacher = load_file(tmp_path / "whole/teacher/unet/diffusion_pytorch_model.safetensors")
    one = Run(resolve(whole))
    one.train()
    shared = section(folder, tmp_path / "shared")
    shared["optim"]["student"]["eps"] = 0.1
    (tmp_path / "shared.yaml").write_text(to_yaml(shared))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    train = [str(ROOT / "scripts/train.py"), "--config", str(tmp_path / "shared.yaml")]
    done = subprocess.run([*command, *train], env=os.environ | fixed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    exported = load_file(tmp_path / "shared/run/pipeline/unet/diffusion_pytorch_model.safetensors")
    wanted = load_file(one.folder / "pipeline/unet/diffusion_pytorch_model.safetensors")
    moved = max((wanted[name] - teacher[name]).abs().max() for name in wanted)
    assert max((exported[name] - wanted[name]).abs().max() for name in wanted) < 1e-3 * moved


def test_what_has_one_size_only_is_refused(folder, tmp_path):
    wrong = section(folder, tmp_path)
    wrong["data"]["buckets"] = [[16, 16], [16, 17]]
    with pytest.raises(ValueError, match=r"data.buckets\[1\]: expected multiples of 2, got \[16, 17\]"):
        Run(resolve(wrong))
    with pytest.raises(ValueError, match=r"data.buckets\[0\]: expected \[8, 8\], the teacher's only size"):
        Pixel.tiny().check_size((16, 16), "data.buckets[0]")
    for keys, why in (({"name": "pairs"}, "expected none with 'pairs'"), ({"buckets": [[16]]}, r"\[height, width\]")):
        with pytest.raises(ValueError, match=why):
            DataConfig(**{"name": "images", "path": "x", "buckets": BUCKETS, **keys})


def cache_of(family, folder, path, flip=True, **keys):
    config = DataConfig(name="images", path=str(folder), buckets=BUCKETS, batch_size=2, flip=flip, **keys)
    dataset = open_data(config, channels=3, size=(16, 16), num_classes=None, takes_text=True)
    made = make_cache(family, dataset, config, CacheConfig(output_dir=str(path), shard_size=4))
    return dataclasses.replace(config, name="cache", path=str(made))


def test_a_cache_gives_the_latents_of_the_files_in_every_bucket(folder, tmp_path):
    family = SD.tiny()
    section = cache_of(family, folder, tmp_path / "cache", caption_dropout=0.3)
    plain, cache = opened(folder, flip=True, caption_dropout=0.3), LatentCacheDataset(section, family)
    shapes = set()
    for raw, row in zip(taken(plain, 15), taken(cache, 15), strict=True):
        assert raw.indices == row.indices and raw.captions == row.captions
        one, other = family.encode(raw), cache.encode(family, row)
        assert torch.equal(one.x0, other.x0)
        assert torch.equal(one.cond["encoder_hidden_states"], other.cond["encoder_hidden_states"])
        shapes.add(tuple(other.x0.shape[2:]))
    assert shapes == {(8, 8), (8, 16), (16, 8)}
    for buckets in ((), ((16, 16),)):
        with pytest.raises(ValueError, match=r"data\.buckets: expected \[\[16, 16\], .* with which .* was made"):
            LatentCacheDataset(dataclasses.replace(section, buckets=buckets), family)


@pytest.mark.product
def test_a_run_from_a_cache_of_buckets_is_that_from_the_files(folder, tmp_path):
    wanted = section(folder, tmp_path / "plain", steps=4)
    plain = Run(resolve(wanted))
    plain.train()
    config = cache_of(plain.family, folder, tmp_path / "cache", flip=False)
    wanted["data"] |= {"name": "cache", "path": config.path}
    wanted["train"]["output_dir"] = str(tmp_path / "cached")
    cached = Run(resolve(wanted))
    cached.train()
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(cached)[name]), name


@pytest.mark.parametrize("family", [SD, SD3], ids=["maps", "tokens"])
def test_a_critic_of_the_teachers_features_sees_every_size(folder, tmp_path, family):
    wanted = sections(tmp_path, family.tiny(), "ladd")
    wanted["data"] = {"name": "images", "path": str(folder), "batch_size": 2, "buckets": BUCKETS}
    wanted["train"]["steps"] = 4
    run = Run(resolve(wanted))
    critic = run.distiller.critic
    for height, width in ((8, 8), (8, 16), (16, 8)):
        x0 = torch.zeros(1, *run.family.sample_shape[:1], height, width)
        features = critic.blocks.clean(x0, run.family.example_cond([0]))
        assert all(feature.shape[-2] * width == feature.shape[-1] * height for feature in features)
    run.train()


def critics(method, options):
    return pytest.param(method, options, id="-".join([method, *options]))


QUICK = [
    critics("dmd", {}),
    critics("dmd2", {"gan_weight": 1e-3}),
    critics("tcd", {"adversarial_weight": 0.1}),
]
OTHERS = ("cdm", "tdm", "rcm", "imagine_flash", "lightning", "ladd", "sana_sprint", "flowmap", "pi_flow", "lcm")
SLOW = [
    critics("sid", {"gan_weight": 1e-3}),
    critics("add", {"features": "teacher"}),
    *(critics(name, {}) for name in OTHERS),
]


@contextlib.contextmanager
def states_seen():
    """Yields the sizes of the states that networks are called with."""
    sizes = set()

    def note(module, args):
        if isinstance(module, UNet2DConditionModel):
            sizes.add(tuple(args[0].shape[-2:]))

    handle = register_module_forward_pre_hook(note)
    yield sizes
    handle.remove()


@pytest.mark.parametrize(
    ("method", "options"), [*QUICK, *(pytest.param(*one.values, id=one.id, marks=pytest.mark.product) for one in SLOW)]
)
def test_all_roles_of_a_method_see_the_size_of_the_batch(folder, tmp_path, method, options):
    wanted = section(folder, tmp_path, method, steps=2)
    wanted["method"] |= options
    run = Run(resolve(wanted))
    run.distiller.stage = run.distiller.stages(100)[-1]
    batches = {}
    for batch in taken(run.dataset, 12):
        batches.setdefault(batch.images.shape[-2:], batch)
    for (height, width), raw in batches.items():
        for turn in run.distiller.turn_names:
            with states_seen() as sizes:
                losses = run.distiller(turn, run.dataset.encode(run.family, raw), Draws(0, 2))
            assert sizes == {(height // 2, width // 2)}
            assert all(term.isfinite() for term in losses.terms.values())


def test_a_critics_network_that_cannot_see_a_bucket_is_refused_before_training(folder, tmp_path, monkeypatch):
    class OfOneSize(SmallConvNet):
        def maps(self, images):
            if images.shape[-2:] != (16, 16):
                raise ValueError("16 x 16 only")
            return super().maps(images)

    network = OfOneSize(in_channels=3, num_classes=3, width=4, num_features=8)
    monkeypatch.setattr("stepdistill.discriminators.backbones.load_features", lambda spec: network)
    monkeypatch.setattr("stepdistill.discriminators.backbones.refuse_same_weights", lambda *args: None)
    wanted = section(folder, tmp_path, "add")
    wanted["method"]["features"] = "mine"
    with pytest.raises(ValueError, match=r"method.features: .* cannot process images of 3 x 16 x 32: 16 x 16 only"):
        Run(resolve(wanted))
