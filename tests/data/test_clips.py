"""Clips from videos: written by us, read again; frames nearest in time; what cannot be read."""

import dataclasses
import io
import itertools
import tarfile

import numpy as np
import pytest
import torch

from stepdistill.data.base import DataConfig
from stepdistill.data.clips import nearest_frames, read_clip
from stepdistill.data.datasets import open_data
from stepdistill.data.decoding import UnreadableImageError
from stepdistill.data.latent_cache import CacheConfig, LatentCacheDataset, make_cache
from stepdistill.data.loader import loader
from stepdistill.families.wan import Wan
from stepdistill.inference.clips import write_clip

pytest.importorskip("av")


@pytest.fixture
def video(tmp_path):
    """24 frames at 16 a second, of grey that rises by 10 levels a frame."""
    clip = (torch.arange(24) * 10).to(torch.uint8).view(1, 24, 1, 1).expand(3, 24, 32, 48)
    write_clip(clip, tmp_path / "a.mp4", fps=16)
    (tmp_path / "a.txt").write_text("it gets lighter")
    return tmp_path / "a.mp4"


def test_frames_are_those_nearest_in_time(video):
    for fps, stride in ((16, 1), (8, 2), (4, 4)):
        clip = read_clip(str(video), (5, 32, 48), fps)
        assert clip.shape == (3, 5, 32, 48) and clip.dtype == np.uint8
        assert np.abs(clip.mean((0, 2, 3)) - 10 * stride * np.arange(5)).max() < 3  # of a lossy code


def test_a_clip_that_is_too_short_or_damaged_is_unreadable(video):
    with pytest.raises(UnreadableImageError, match="expected 25 frames at 16 a second, got 24"):
        read_clip(str(video), (25, 32, 48), 16)
    video.write_bytes(video.read_bytes()[:200])
    with pytest.raises(UnreadableImageError):
        read_clip(str(video), (5, 32, 48), 16)


def data(path, **keys):
    config = DataConfig(name="images", path=str(path), batch_size=1, **keys)
    return open_data(config, channels=3, size=(5, 16, 16), num_classes=None, takes_text=True)


def test_folders_and_tars_of_videos_are_data(video):
    from_folder = data(video.parent, fps=16).load([0])
    assert from_folder.images.shape == (1, 3, 5, 16, 16) and from_folder.captions == ("it gets lighter",)
    with tarfile.open(video.parent.parent / "b.tar", "w") as tar:
        for file in (video, video.with_suffix(".txt")):
            content = file.read_bytes()
            about = tarfile.TarInfo(file.name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    from_tar = data(video.parent.parent / "b.tar", fps=16).load([0])
    assert torch.equal(from_tar.images, from_folder.images)


def test_clips_of_several_sizes_are_sorted_into_buckets_and_cached(tmp_path, video):
    upright = (torch.arange(24) * 10).to(torch.uint8).view(1, 24, 1, 1).expand(3, 24, 48, 32)
    write_clip(upright, video.with_name("b.mp4"), fps=16)
    video.with_name("b.txt").write_text("upright")
    family = Wan.tiny()
    section = DataConfig(name="images", path=str(video.parent), batch_size=2, fps=16, buckets=((16, 32), (32, 16)))
    dataset = open_data(section, channels=3, size=family.image_shape[1:], num_classes=None, takes_text=True)
    make_cache(family, dataset, section, CacheConfig(output_dir=str(tmp_path / "cache")))
    cached = LatentCacheDataset(dataclasses.replace(section, name="cache", path=str(tmp_path / "cache")), family)
    found, batches = set(), [loader(one, batch_size=2, seed=0) for one in (dataset, cached)]
    for raw, row in itertools.islice(zip(*batches, strict=True), 4):
        latents = family.encode(raw).x0
        assert raw.indices == row.indices and torch.equal(latents, cached.encode(family, row).x0)
        found.add((raw.captions[0], tuple(raw.images.shape[2:]), tuple(latents.shape[2:])))
    assert found == {("it gets lighter", (5, 16, 32), (2, 4, 8)), ("upright", (5, 32, 16), (2, 8, 4))}


def test_images_are_no_clips(tmp_path, video):
    with pytest.raises(ValueError, match=r"data.path: .*no images"):
        data(tmp_path)
    np.savez(tmp_path / "clips.npz", images=np.zeros((2, 5, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"data.fps: expected none: .*clips\.npz holds frames, and no videos"):
        data(tmp_path / "clips.npz", fps=16)
    with pytest.raises(ValueError, match=r"data.fps: got 16, but the teacher makes images"):
        open_data(DataConfig(name="images", path=str(tmp_path), fps=16), channels=3, size=(16, 16), num_classes=None)


def test_a_file_that_ends_between_two_frames_gives_its_last():
    frames = [(0.0, "a"), (0.1, "b"), (0.21, "c")]
    assert list(nearest_frames(iter(frames), 9, fps=5)) == ["a", "c"]
    assert list(nearest_frames(iter(frames), 9, fps=4)) == ["a", "c"]
