"""Clips where PyAV is not installed."""

import sys

import pytest
from diffusers import LattePipeline, SanaPipeline, WanPipeline

from stepdistill.data.base import DataConfig
from stepdistill.data.clips import nearest_frames
from stepdistill.data.datasets import open_data
from stepdistill.inference.saving import check_outputs


@pytest.fixture(autouse=True)
def no_reader(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)


def test_videos_as_data_are_refused_when_they_are_opened(tmp_path):
    (tmp_path / "one.mp4").write_bytes(b"")
    config = DataConfig(name="images", path=str(tmp_path), fps=8)
    with pytest.raises(ValueError, match=r"data.fps: expected the package av, .* pip install 'stepdistill\[video\]'"):
        open_data(config, channels=3, size=(5, 16, 16), num_classes=None, takes_text=True)


def test_no_frame_behind_a_clip_is_decoded():
    frames = iter([(place / 10, place) for place in range(100)])
    assert list(nearest_frames(frames, 3, fps=5)) == [0, 2, 4]
    assert next(frames) == (0.5, 5)


@pytest.mark.parametrize("kind", [WanPipeline, LattePipeline])
def test_files_of_clips_are_refused_before_they_are_sampled(tmp_path, kind):
    pipeline = kind.__new__(kind)  # a teacher's has no contract, and a call of Latte names its frames otherwise
    check_outputs(pipeline, [tmp_path / "grid.png"])
    check_outputs(SanaPipeline.__new__(SanaPipeline), [tmp_path / "folder"])
    with pytest.raises(ValueError, match=r"clips: expected the package av, .* pip install 'stepdistill\[video\]'"):
        check_outputs(pipeline, [tmp_path / "grid.png", tmp_path / "folder"])
