"""Image files as they come: every format, odd EXIF, damage, pipes and sizes that no file holds."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import damaged
import numpy as np
import pytest
import torch
from PIL import Image, features

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import _scaled, open_data
from stepdistill.data.decoding import FORMATS, UnreadableImageError, read_pixels, read_shape
from stepdistill.data.image_files import IMAGE_SUFFIXES
from stepdistill.data.tars import TarMember
from stepdistill.evaluation.image_set import ImageSet


def in_memory(content: bytes) -> dict[str, Any]:
    """An image as a Hugging Face dataset holds it undecoded."""
    return {"bytes": content, "path": None}


def opened(path: Path, **options: Any) -> Any:
    config = DataConfig(name="images", path=str(path), **options)
    return open_data(config, channels=3, size=(8, 8), num_classes=None)


# ------------------------------------------------------------------------------------------------ formats


def test_every_format_has_all_its_endings_and_no_other() -> None:
    Image.init()
    wanted = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
    assert set(IMAGE_SUFFIXES) == wanted and list(IMAGE_SUFFIXES) == sorted(IMAGE_SUFFIXES)


@pytest.mark.parametrize("suffix", ["avif", "jfif", "jpe", "jp2", "tif", "bmp", "gif", "webp", "png", "JPG", "ppm"])
def test_images_of_every_format_are_listed(tmp_path: Path, suffix: str) -> None:
    """REPORTS 20."""
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / f"b.{suffix}")
    data = opened(tmp_path)
    assert len(data) == 2 and data.load([1]).unreadable == ()
    np.testing.assert_allclose(data.load([1]).images, 90 / 127.5 - 1, atol=0.03)


def test_a_decoder_that_is_not_named_is_never_reached(tmp_path: Path) -> None:
    """FAULTS, low: an Encapsulated PostScript file, which Pillow would hand to an interpreter, and others."""
    for name in ("TGA", "PCX", "SGI", "ICO", "EPS", "DDS", "XBM"):
        mode = "1" if name == "XBM" else "RGB"
        Image.new(mode, (8, 8)).save(tmp_path / "a.png", name)
        with pytest.raises(UnreadableImageError, match="cannot identify image file"):
            read_pixels(str(tmp_path / "a.png"), 3, (8, 8))
        with pytest.raises(UnreadableImageError, match="cannot identify image file$"):  # the same on every visit
            read_shape(in_memory((tmp_path / "a.png").read_bytes()))


def test_what_is_left_out_is_counted_once_by_ending(tmp_path: Path) -> None:
    """REPORTS 20."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a.heic", "b.HEIC", "c.psd", "a.txt", "LICENSE", "readme.md", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"left out, because no such files are read: 2 \.heic, 1 \.psd$") as told:
        opened(tmp_path).load([0])
    assert len(told) == 1


def test_nothing_but_other_files_is_an_error_with_their_count(tmp_path: Path) -> None:
    """RELIABILITY row 21: all samples filtered, with counts per filter."""
    for name in ("a.heic", "b.heic", "c.jxl"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no images \(looked for .*\); left out: 2 \.heic, 1 \.jxl"):
        opened(tmp_path)


# --------------------------------------------------------------------------------------------------- EXIF


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_shape_and_pixels_agree_on_what_is_upright(name: str) -> None:
    """RELIABILITY row 19: turned by EXIF. Pillow turns a TIFF itself, which was undone in the shape."""
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    for orientation in range(1, 9):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        image = np.zeros((4, 8, 3), np.uint8)
        image[:, 4:] = 255  # dark left, bright right
        Image.fromarray(image).save(buffer, name, exif=exif)
        turned = orientation >= 5
        shape = (3, 8, 4) if turned else (3, 4, 8)
        assert read_shape(in_memory(buffer.getvalue())) == shape
        pixels = read_pixels(in_memory(buffer.getvalue()), 3, shape[1:]).astype(int)
        first, last = (pixels[:, 0], pixels[:, -1]) if turned else (pixels[..., 0], pixels[..., -1])
        bright_is_last = orientation in (1, 4, 5, 6)
        assert (last.mean() - first.mean() > 200) == bright_is_last


@pytest.mark.parametrize("name", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_is_ignored_and_the_picture_kept(name: str) -> None:
    """REPORTS 6."""
    for seed in range(150):
        content = in_memory(damaged.with_damaged_exif(name, seed))
        try:
            assert read_shape(content) in ((3, 16, 24), (3, 24, 16))
            np.testing.assert_allclose(read_pixels(content, 3, (8, 8)), 90, atol=2)
        except UnreadableImageError:
            assert name == "JPEG"  # Pillow reads the EXIF of a JPEG when it opens it, and may give up


@pytest.mark.parametrize("value", ["six", b"\x06", (6, 6), 2.5, 0, 9, 2**31, float("nan")])
def test_an_orientation_that_is_none_turns_nothing(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    """REPORTS 6."""
    monkeypatch.setattr(Image.Image, "getexif", lambda self: {0x0112: value})
    assert read_shape(in_memory(damaged.whole("JPEG"))) == (3, 16, 24)
    assert read_pixels(in_memory(damaged.whole("JPEG")), 3, (16, 24)).shape == (3, 16, 24)


# ------------------------------------------------------------------------------------------------- damage


def fuzz(name: str, seeds: range) -> int:
    """Read damaged files; return how many were readable all the same."""
    readable = 0
    for seed in seeds:
        content = in_memory(damaged.mutated(damaged.whole(name), seed))
        try:
            channels, height, width = read_shape(content)
            assert channels in (1, 3) and height >= 1 and width >= 1
            assert read_pixels(content, 3, (8, 8)).shape == (3, 8, 8)
            readable += 1
        except UnreadableImageError as error:
            assert "\n" not in str(error)
    return readable


@pytest.mark.parametrize("name", damaged.FORMATS)
def test_damaged_images_are_read_or_refused(name: str) -> None:
    """REPORTS 6, RELIABILITY row 18: nothing but ``UnreadableImageError``, whatever the damage."""
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    assert 0 < fuzz(name, range(60)) < 60


@pytest.mark.product
@pytest.mark.parametrize("name", damaged.FORMATS)
def test_many_damaged_images_are_read_or_refused(name: str) -> None:
    """REPORTS 6."""
    assert 0 < fuzz(name, range(60, 560)) < 500


def test_damaged_images_are_skipped_by_name_and_counted(tmp_path: Path) -> None:
    """REPORTS 6, RELIABILITY row 18: training goes on, evaluation names them."""
    for seed in range(150):
        (tmp_path / f"{seed:03d}.png").write_bytes(damaged.with_damaged_exif("PNG", seed))
    (tmp_path / "050.png").write_bytes(damaged.whole("PNG")[:300])
    (tmp_path / "051.png").write_bytes(b"")
    (tmp_path / "052.png").write_bytes(b"<html>404</html>")
    raw = opened(tmp_path).load(range(150))
    assert [problem.split(": ")[0][-7:] for problem in raw.unreadable[:3]] == ["050.png", "051.png", "052.png"]
    assert raw.indices[49:54] == (49, 53, 53, 53, 53)
    with pytest.raises(ValueError, match=r"2 images cannot be read: .*05[12]\.png"):  # a cut one has its header
        ImageSet(tmp_path, size=8)


# -------------------------------------------------------------------------------------- sizes, odd files


def test_sides_of_one_pixel_and_of_a_hundred_thousand(tmp_path: Path) -> None:
    """RELIABILITY row 20: resized by rule, or rejected by the header."""
    Image.new("L", (1, 3000), 77).save(tmp_path / "thin.png")
    for fit in ("crop", "stretch"):
        assert (read_pixels(str(tmp_path / "thin.png"), 3, (8, 8), fit) == 77).all()
    with pytest.raises(UnreadableImageError, match="1x3000 pixels are too long and thin to pad"):  # it was all white
        read_pixels(str(tmp_path / "thin.png"), 3, (8, 8), "pad")
    Image.new("L", (1, 12), 77).save(tmp_path / "thin.png")
    assert (read_pixels(str(tmp_path / "thin.png"), 1, (8, 8), "pad")[0, 0] == [255] * 4 + [77] + [255] * 3).all()
    header = b"P6 100000 100000 255\n" + bytes(100)
    start = time.perf_counter()
    for read in (read_shape, lambda source: read_pixels(source, 3, (8, 8))):
        with pytest.raises(UnreadableImageError, match="DecompressionBombError: .*10000000000 pixels"):
            read(in_memory(header))
    assert time.perf_counter() - start < 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_links_and_folders_named_like_images(tmp_path: Path) -> None:
    """FAULTS 10: a pipe would be waited for without end."""
    for name in ("a.png", "z.png"):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("nowhere.png")
    (tmp_path / "d.png").symlink_to("/dev/zero")
    (tmp_path / "e.png").mkdir()
    raw = opened(tmp_path).load([1])
    assert [problem.split(": ", 1)[0][-5:] for problem in raw.unreadable] == ["b.png", "c.png", "d.png"]
    assert "not a plain file" in raw.unreadable[0] and raw.indices == (4,)
    with pytest.raises(UnreadableImageError, match="not a plain file"):
        read_pixels({"bytes": None, "path": str(tmp_path / "b.png")}, 3, (8, 8))


def test_files_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**30 + 1)
    for source in (str(tmp_path / "a.png"), TarMember(str(tmp_path / "a.png"), "x.png", 0, 10 * 2**30)):
        with pytest.raises(UnreadableImageError, match=r"expected at most 1,073,741,824 bytes, got 1[0,]"):
            read_pixels(source, 3, (8, 8))


def test_batches_lie_in_memory_as_their_pixels_do():
    """Which decides the kernels of an encoder, and so the last bits of a training."""
    pixels = list(np.moveaxis(np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8), -1, 1))
    for images in (pixels, [np.ascontiguousarray(image) for image in pixels]):
        expected = torch.from_numpy(np.stack(images)).float().div(127.5).sub(1)
        found = _scaled(images)
        assert torch.equal(found, expected) and found.stride() == expected.stride()
