"""Latents and embeddings computed once: the same training from them, and no other teacher's."""

import dataclasses
import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from contracts.cases import save_images, sections
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.latent_cache import CacheConfig, LatentCacheDataset, files, make_cache
from stepdistill.data.loader import loader
from stepdistill.data.opening import open_dataset
from stepdistill.data.shards import shard_path
from stepdistill.families.config import TeacherConfig
from stepdistill.families.dit import DiT
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sd3 import SD3
from stepdistill.files.schema import build
from stepdistill.training.config import resolve
from stepdistill.training.run import Run


def cached(family, folder, data, **options):
    """A cache of a ``data`` section, and the section that reads it."""
    config = build(DataConfig, data)
    channels, *size = family.image_shape
    dataset = open_data(
        config, channels=channels, size=tuple(size), num_classes=family.num_classes, takes_text=family.takes_text
    )
    made = make_cache(family, dataset, config, CacheConfig(output_dir=str(folder), shard_size=6), **options)
    return {**data, "name": "cache", "path": str(made)}


def trained(wanted, folder):
    wanted["train"]["output_dir"] = str(folder)
    run = Run(resolve(wanted))
    return load_file(run.train() / f"{run.family.component}/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("cls", [SD, SD3, DiT])
def test_training_from_a_cache_is_training_from_the_files_bit_for_bit(tmp_path, cls):
    wanted = sections(tmp_path, cls.tiny(), "lcm" if cls.takes_text else "progressive", steps=4)
    wanted["data"] |= {"flip": True, "caption_dropout": 0.5 if cls.takes_text else 0.0}
    plain = trained(wanted, tmp_path / "plain")
    family = load_teacher(TeacherConfig(path=wanted["teacher"]["path"]))
    wanted["data"] = cached(family, tmp_path / "cache", wanted["data"])
    (tmp_path / "images.npz").unlink()
    other = trained(wanted, tmp_path / "other")
    start = load_file(tmp_path / f"teacher/{cls.component}/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert any(not torch.equal(plain[name], start[name]) for name in plain)


def test_mirrors_and_dropped_captions_are_those_of_the_files(tmp_path):
    family = SD.tiny()
    data = {"name": "images", "path": str(save_images(family, tmp_path / "i.npz")), "batch_size": 4, "flip": True,
            "caption_dropout": 0.4}  # fmt: skip
    cache = LatentCacheDataset(build(DataConfig, cached(family, tmp_path / "cache", data)), family)
    plain = open_data(build(DataConfig, data), channels=3, size=(16, 16), num_classes=None, takes_text=True)
    pairs = zip(loader(plain, batch_size=4, seed=1), loader(cache, batch_size=4, seed=1), strict=False)
    dropped = turned = 0
    for _, (raw, row) in zip(range(6), pairs, strict=False):
        assert raw.captions == row.captions and raw.indices == row.indices
        one, other = family.encode(raw), cache.encode(family, row)
        assert torch.equal(one.x0, other.x0)
        assert torch.equal(one.cond["encoder_hidden_states"], other.cond["encoder_hidden_states"])
        dropped, turned = dropped + row.captions.count(""), turned + int(row.mirrored.sum())
    assert 0 < dropped < 24 and 0 < turned < 24


def test_a_stopped_cache_goes_on_where_it_was(tmp_path):
    family = SD.tiny()
    data = {"name": "images", "path": str(save_images(family, tmp_path / "i.npz")), "batch_size": 4}
    cached(family, tmp_path / "a", data)
    whole = [shard_path(tmp_path / "a", number).read_bytes() for number in range(3)]  # 16 samples and the empty caption
    shard_path(tmp_path / "a", 1).unlink()
    kept = shard_path(tmp_path / "a", 0).stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing; run scripts/cache\.py again"):
        LatentCacheDataset(build(DataConfig, {**data, "name": "cache", "path": str(tmp_path / "a")}), family)
    told = []
    cached(family, tmp_path / "a", data, progress=told.append)
    assert [shard_path(tmp_path / "a", number).read_bytes() for number in range(3)] == whole and told == [6, 12, 17]
    assert shard_path(tmp_path / "a", 0).stat().st_mtime_ns == kept


def test_what_does_not_fit_is_refused(tmp_path):
    """RELIABILITY row 31: another VAE, text encoder, scale, fit, data."""
    family = SD.tiny()
    data = {"name": "images", "path": str(save_images(family, tmp_path / "i.npz")), "batch_size": 4}
    section = build(DataConfig, cached(family, tmp_path / "a", data))
    with pytest.raises(ValueError, match="was made by another text_encoder, vae than this teacher's"):
        LatentCacheDataset(section, SD.tiny(1))
    other = SD.tiny()
    other.pipe.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(ValueError, match="was made by another latent scale than"):
        LatentCacheDataset(section, other)
    with pytest.raises(ValueError, match=r"data\.fit: expected 'crop', with which .* was made, got 'pad'"):
        LatentCacheDataset(dataclasses.replace(section, fit="pad"), family)
    with pytest.raises(ValueError, match=r"fit: was 'crop', is 'pad'"):
        cached(family, tmp_path / "a", {**data, "fit": "pad"})
    with pytest.raises(ValueError, match=r"data\.flip: .* holds no mirrored images"):
        LatentCacheDataset(dataclasses.replace(section, flip=True), family)
    save_images(family, tmp_path / "i.npz", count=12)
    with pytest.raises(ValueError, match=r"was made for other samples(.|\n)*count: was 17, is 13(.|\n)*files: was"):
        cached(family, tmp_path / "a", data)
    with pytest.raises(ValueError, match=r"data\.max_samples: expected 16, all samples of .*, got 4; make a cache of"):
        LatentCacheDataset(dataclasses.replace(section, max_samples=4), family)
    pixels = {"name": "noise", "max_samples": 4}
    with pytest.raises(ValueError, match="there is nothing to cache"):
        cached(Pixel.tiny(), tmp_path / "b", pixels)


def test_keys_that_contradict_the_teacher_are_refused_as_for_files(tmp_path):
    family = DiT.tiny()
    data = {"name": "images", "path": str(save_images(family, tmp_path / "i.npz")), "batch_size": 4}
    section = build(DataConfig, cached(family, tmp_path / "a", data))
    for key, value in (("caption_dropout", 0.5), ("resolution", 999), ("channels", 7)):
        with pytest.raises(ValueError, match=rf"data\.{key}: .*got {value}"):
            open_dataset(dataclasses.replace(section, **{key: value}), family, needs_images=True)


def test_other_images_of_one_shape_are_other_samples(tmp_path):
    family = SD.tiny()
    path = save_images(family, tmp_path / "i.npz")
    data = {"name": "images", "path": str(path), "batch_size": 4}
    cached(family, tmp_path / "a", data)
    arrays = dict(np.load(path))
    size = path.stat().st_size
    np.savez(path, **arrays | {"images": 255 - arrays["images"]})
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match=r"was made for other samples(.|\n)*files: was"):
        cached(family, tmp_path / "a", data)


def test_another_column_of_images_makes_another_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "converted")
    rows = []
    for shade in range(3):
        row = {"text": f"shade {shade}"}
        for column, red in (("image", 0), ("photo", 9)):
            file = io.BytesIO()
            Image.new("RGB", (16, 16), (red, shade, 0)).save(file, "BMP")
            row[column] = file.getvalue()
        rows.append(row)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    family = SD.tiny()
    data = {"name": "images", "path": str(tmp_path / "a.parquet"), "batch_size": 3, "image_column": "photo"}
    section = build(DataConfig, cached(family, tmp_path / "a", data))
    assert len(LatentCacheDataset(section, family)) == 3
    with pytest.raises(ValueError, match=r"data\.image_column: expected 'photo', with which .* was made, got 'image'"):
        LatentCacheDataset(dataclasses.replace(section, image_column="image"), family)
    with pytest.raises(ValueError, match="image_column: was 'photo', is None"):
        cached(family, tmp_path / "a", {**data, "image_column": "image"})


def test_other_labels_and_another_tar_are_other_samples(tmp_path):
    def hash_of(path, classes):
        section = DataConfig(name="images", path=str(path))
        data = open_data(section, channels=3, size=(16, 16), num_classes=classes, takes_text=classes is None)
        return files(data, str(path))

    (tmp_path / "d").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    (tmp_path / "d/a.png").write_bytes(buffer.getvalue())
    found = set()
    for label in (0, 1):
        (tmp_path / "d/metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "label": label}))
        found.add(hash_of(tmp_path / "d", 2))
    for padding in (0, tarfile.RECORDSIZE):  # the image grows, by bytes that no decoder reads
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, content in (("a.png", buffer.getvalue() + b"0" * padding), ("a.txt", b"one")):
                (entry := tarfile.TarInfo(name)).size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        (tmp_path / "t").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "a.tar", tmp_path / "t/a.tar")
        found |= {hash_of(tmp_path / "a.tar", None), hash_of(tmp_path / "t", None)}
    assert len(found) == 6


def test_prompts_alone_serve_methods_without_images(tmp_path):
    family = SD.tiny()
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    section = build(DataConfig, cached(family, tmp_path / "a", {"name": "prompts", "path": str(tmp_path / "p.txt")}))
    with pytest.raises(ValueError, match="was made of prompts; the method trains on images"):
        LatentCacheDataset(section, family)
    cache = LatentCacheDataset(section, family, needs_images=False)
    batch = cache.encode(family, cache.load([1]))
    assert batch.images is None and cache.name(1).endswith("p.txt[1]")
    torch.testing.assert_close(batch.cond, family.embed(["two"]))


def test_an_unreadable_image_stops_the_cache(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"d/{name}.png")
    rows = [{"file_name": f"{name}.png", "text": name} for name in ("a", "b")]
    (tmp_path / "d/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d/b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"unreadable image .*b\.png"):
        cached(SD.tiny(), tmp_path / "a", {"name": "images", "path": str(tmp_path / "d")})
