"""Data: pixels by known values, forms of a data set against each other, order by position, errors."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.batch import RawBatch
from stepdistill.data import loader as order
from stepdistill.data.base import DataConfig, Dataset
from stepdistill.data.datasets import open_data
from stepdistill.data.decoding import UnreadableImageError, read_pixels
from stepdistill.data.loader import loader, sample_indices
from stepdistill.files.schema import ConfigError, build

SIZE = (4, 4)


def open_images(
    path: Path, *, channels: int = 1, size: tuple[int, int] = SIZE, num_classes: int | None = None,
    takes_text: bool = False, **options: Any,
) -> Dataset:  # fmt: skip
    config = DataConfig(name="images", path=str(path), **options)
    return open_data(config, channels=channels, size=size, num_classes=num_classes, takes_text=takes_text)


def save(path: Path, value: int = 0, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save(path)
    return path


def numbered_folder(folder: Path, count: int) -> Path:
    """Image i has the grey value i."""
    for i in range(count):
        save(folder / f"{i:03d}.png", i)
    return folder


def greys(batch: RawBatch) -> list[int]:
    assert batch.images is not None
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def numbered_archive(path: Path, count: int, **arrays: np.ndarray) -> Path:
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(SIZE[0], 1).repeat(SIZE[1], 2)
    np.savez(path, **{"images": images, **arrays})
    return path


# ------------------------------------------------------------------------------------------------ pixels

RED, HALF_RED_ON_WHITE = (255, 0, 0), (255, 127, 127)
LUMA_OF_RED = 76  # 0.299 * 255


def _image(mode: str, color: Any, **info: Any) -> Image.Image:
    image = Image.new(mode, SIZE, color)
    image.info.update(info)
    return image


def _palette(**info: Any) -> Image.Image:
    image = _image("P", 1, **info)
    image.putpalette([0, 0, 0, *RED])
    return image


def _sixteen(value: int) -> Image.Image:
    return Image.fromarray(np.full(SIZE, value, dtype=np.uint16))


CASES = {
    "L": (_image("L", 100), "png", (100, 100, 100)),
    "1": (_image("1", 1), "png", (255, 255, 255)),
    "LA": (_image("LA", (100, 0)), "png", (255, 255, 255)),
    "L-tRNS": (_image("L", 100), "png", (255, 255, 255)),
    "RGB": (_image("RGB", RED), "png", RED),
    "RGBA": (_image("RGBA", (*RED, 128)), "png", HALF_RED_ON_WHITE),
    "P": (_palette(), "png", RED),
    "P-tRNS": (_palette(), "png", (255, 255, 255)),
    "GIF": (_palette(), "gif", RED),
    "CMYK": (_image("CMYK", (0, 255, 255, 0)), "tif", RED),
    "16-bit": (_sixteen(30000), "png", (117, 117, 117)),  # 30000 / 257 = 116.7
    "16-bit white": (_sixteen(65535), "png", (255, 255, 255)),
    "16-bit tRNS": (_sixteen(30000), "png", (255, 255, 255)),
    "16-bit pgm": (_sixteen(30000), "pgm", (117, 117, 117)),
    "16-bit tif": (_sixteen(30000), "tif", (117, 117, 117)),
    "32-bit tif": (_image("I", 30000), "tif", (117, 117, 117)),
}
TRANSPARENCY = {
    "L-tRNS": {"transparency": 100}, "P-tRNS": {"transparency": 1}, "16-bit tRNS": {"transparency": 30000},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_teachers_channels(tmp_path: Path, case: str, channels: int) -> None:
    """RELIABILITY row 19."""
    image, suffix, rgb = CASES[case]
    file = tmp_path / f"image.{suffix}"
    image.save(file, **TRANSPARENCY.get(case, {}))
    red, green, blue = rgb
    wanted = np.array(rgb if channels == 3 else [0.299 * red + 0.587 * green + 0.114 * blue])
    pixels = read_pixels(str(file), channels, SIZE)
    assert pixels.shape == (channels, *SIZE) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, np.broadcast_to(wanted[:, None, None], pixels.shape), atol=1)


def test_cmyk_jpeg_and_a_grey_that_must_not_change(tmp_path: Path) -> None:
    _image("CMYK", (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    np.testing.assert_allclose(read_pixels(str(tmp_path / "c.jpg"), 3, SIZE)[:, 0, 0], RED, atol=3)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for mode in ("L", "LA", "RGB", "RGBA"):
        Image.fromarray(ramp).convert(mode).save(tmp_path / "ramp.png")
        np.testing.assert_array_equal(read_pixels(str(tmp_path / "ramp.png"), 1, (16, 16))[0], ramp)


def test_sixteen_bits_are_scaled_to_the_nearest_value(tmp_path: Path) -> None:
    """RELIABILITY row 19: scaled, never clipped."""
    values = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    Image.fromarray(values).save(tmp_path / "v.png")
    pixels = read_pixels(str(tmp_path / "v.png"), 1, (16, 16))[0]
    np.testing.assert_array_equal(pixels, np.rint(values / 257))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    """RELIABILITY row 19."""
    upright = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    stored = {  # what a camera stores so that the viewer's orientation shows `upright`
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "e.png", exif=exif)
    np.testing.assert_array_equal(read_pixels(str(tmp_path / "e.png"), 1, (4, 4))[0], upright)


def test_the_centre_of_the_long_side_is_kept(tmp_path: Path) -> None:
    image = np.zeros((8, 24), dtype=np.uint8)
    image[:, 8:16] = np.arange(8, dtype=np.uint8) * 30
    Image.fromarray(image).save(tmp_path / "wide.png")
    Image.fromarray(np.ascontiguousarray(image.T)).save(tmp_path / "tall.png")
    np.testing.assert_array_equal(read_pixels(str(tmp_path / "wide.png"), 1, (8, 8))[0], image[:, 8:16])
    np.testing.assert_array_equal(read_pixels(str(tmp_path / "tall.png"), 1, (8, 8))[0], image[:, 8:16].T)


def test_resizing_is_antialiased_and_fits_any_shape(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = read_pixels(str(tmp_path / "stripes.png"), 1, (8, 8)).astype(int)
    assert abs(small - 127.5).max() < 10  # without antialiasing it would pick 0 or 255
    for size in [(1, 50), (50, 1), (1, 1), (3, 200)]:
        assert read_pixels(str(save(tmp_path / "odd.png", 50, size)), 3, (6, 10)).shape == (3, 6, 10)
    assert (read_pixels(str(save(tmp_path / "odd.png", 50, (2, 2))), 1, (6, 6)) == 50).all()


def _damaged(kind: str, file: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"<html>404</html>"}[kind])
    return file


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
@pytest.mark.parametrize("kind", ["empty", "truncated", "text"])
def test_damaged_files_are_unreadable(tmp_path: Path, kind: str, suffix: str) -> None:
    """RELIABILITY row 18."""
    with pytest.raises(UnreadableImageError):
        read_pixels(str(_damaged(kind, tmp_path / f"x.{suffix}")), 3, SIZE)


def test_pixels_without_a_defined_range_are_unreadable(tmp_path: Path) -> None:
    Image.new("F", SIZE, 0.5).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImageError, match="no defined range"):
        read_pixels(str(tmp_path / "float.tif"), 1, SIZE)
    Image.new("I", SIZE, 70000).save(tmp_path / "int.tif")
    with pytest.raises(UnreadableImageError, match="expected 16 bits, got 70000"):
        read_pixels(str(tmp_path / "int.tif"), 1, SIZE)


@pytest.mark.parametrize("times_limit", [1.5, 3])
def test_decompression_bombs_are_rejected_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times_limit: float
) -> None:
    """RELIABILITY row 20."""
    file = save(tmp_path / "bomb.png", size=(30, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(30 * 40 / times_limit))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnreadableImageError, match="DecompressionBomb"):
        read_pixels(str(file), 1, SIZE)


# ------------------------------------------------------------------------------------- forms of a data set


def _as_folders(path: Path) -> Path:
    for i in range(6):
        save(path / ["cat", "cow", "elk"][i // 2] / "nested" / f"{i}.PNG", i)
    save(path / ".hidden" / "x.png", 99)
    (path / "README.txt").write_text("not an image")
    return path


def _as_metadata(path: Path) -> Path:
    numbered_folder(path / "files", 6)
    rows = [{"file_name": f"files/{i:03d}.png", "label": i // 2, "text": f"number {i}"} for i in range(6)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


def _as_archive(path: Path) -> Path:
    path.mkdir()
    captions = np.array([f"number {i}" for i in range(6)])
    return numbered_archive(path / "six.npz", 6, labels=np.arange(6, dtype=np.uint8) // 2, captions=captions)


def _as_saved_dataset(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    numbered_folder(path / "files", 6)
    table = datasets.Dataset.from_dict(
        {
            "image": [str(file) for file in sorted((path / "files").iterdir())],
            "label": [i // 2 for i in range(6)],
            "text": [f"number {i}" for i in range(6)],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["cat", "cow", "elk"]),
                "text": datasets.Value("string"),
            }
        ),
    )
    table.save_to_disk(str(path / "saved"))
    return path / "saved"


FORMS = {"folders": _as_folders, "metadata": _as_metadata, "archive": _as_archive, "saved": _as_saved_dataset}


@pytest.fixture(params=FORMS)
def six(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Six images of value 0 ... 5 in three classes, in each form."""
    return FORMS[request.param](tmp_path / request.param)


def test_every_form_gives_the_same_samples(six: Path) -> None:
    dataset = open_images(six, num_classes=3)
    batch = dataset.load([4, 0, 3])
    assert (len(dataset), dataset.size, dataset.num_classes) == (6, (1, 4, 4), 3)
    assert batch.images is not None and batch.images.shape == (3, 1, 4, 4) and batch.images.dtype == torch.float32
    assert greys(batch) == [4, 0, 3] and batch.indices == (4, 0, 3) and batch.unreadable == ()
    assert batch.labels is not None and batch.labels.dtype == torch.int64 and batch.labels.tolist() == [2, 0, 1]
    assert batch.captions in (None, ("number 4", "number 0", "number 3"))
    assert (batch.captions is None) == (six.name == "folders")
    assert re.search("4", dataset.name(4)) and six.name in dataset.name(4)


def test_labels_stay_away_from_a_teacher_without_classes(six: Path) -> None:
    dataset = open_images(six, num_classes=None)
    assert dataset.load([0]).labels is None and dataset.num_classes is None


def test_a_label_beyond_the_teachers_classes_names_the_sample(six: Path) -> None:
    """RELIABILITY row 23."""
    message = (
        "3 class folders hold images, the teacher has 2"
        if six.name == "folders"
        else r"4.*label: expected 0 to 1, .* got 2"
    )
    with pytest.raises(ValueError, match=message):
        open_images(six, num_classes=2)


def test_max_samples_is_a_fixed_subset_of_all_classes(tmp_path: Path) -> None:
    path = numbered_archive(tmp_path / "a.npz", 200, labels=np.arange(200) // 100)
    dataset = open_images(path, num_classes=2, max_samples=40)
    batch = dataset.load(range(40))
    assert len(dataset) == 40 and len(set(greys(batch))) == 40
    assert batch.labels is not None and 10 < int(batch.labels.sum()) < 30
    assert greys(batch) == greys(open_images(path, num_classes=2, max_samples=40).load(range(40)))
    assert dataset.name(3) == f"{path}[{greys(batch)[3]}]"


def test_images_fill_minus_one_to_one_exactly(tmp_path: Path) -> None:
    images = np.array([0, 51, 255], dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 5), dtype=np.uint8)
    np.savez(tmp_path / "five.npz", images=images)
    batch = open_images(tmp_path / "five.npz", channels=5).load([0, 1, 2])
    assert batch.images is not None and batch.images.shape == (3, 5, 4, 4)
    torch.testing.assert_close(batch.images[:, 4, 1, 2], torch.tensor([-1.0, -0.6, 1.0]))


def test_an_archive_of_another_shape_is_converted_when_asked(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=grey)
    Image.fromarray(grey[1]).save(tmp_path / "1.png")
    dataset = open_data(
        DataConfig(name="images", path=str(tmp_path / "a.npz"), resolution=4, channels=3),
        channels=3,
        size=(4, 4),
        num_classes=None,
    )
    as_file = torch.from_numpy(read_pixels(str(tmp_path / "1.png"), 3, (4, 4)).copy()).float() / 127.5 - 1
    torch.testing.assert_close(dataset.load([1]).images, as_file[None])


def test_noise_has_every_class_equally_often() -> None:
    dataset = open_data(DataConfig(name="noise"), channels=3, size=(8, 8), num_classes=7)
    batch = dataset.load(range(len(dataset)))
    assert batch.images is None and batch.captions is None and dataset.size == (3, 8, 8)
    assert batch.labels is not None and batch.labels.bincount().unique().numel() == 1
    assert len(open_data(DataConfig(name="noise", max_samples=12), channels=1, size=SIZE, num_classes=None)) == 12
    assert open_data(DataConfig(name="noise"), channels=1, size=SIZE, num_classes=None).load([1, 2]).labels is None
    (batch,) = itertools.islice(loader(dataset, batch_size=4, seed=0), 1)
    assert batch.images is None and torch.equal(batch.labels, dataset.load(batch.indices).labels)


# -------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("length", [1, 5, 64])
def test_an_epoch_holds_every_sample_once(length: int) -> None:
    epochs = [sample_indices(epoch * length, length, length, seed=0) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length == 64:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sample_indices(0, length, length, seed=1)


def test_order_is_a_function_of_position() -> None:
    whole = sample_indices(0, 100, 7, seed=3)
    assert whole == [sample_indices(position, 1, 7, seed=3)[0] for position in range(100)]
    assert sample_indices(10**9, 5, 7, seed=3) == sample_indices(10**9, 5, 7, seed=3)


def _take(dataset: Dataset, count: int, **options: Any) -> list[RawBatch]:
    return list(itertools.islice(loader(dataset, seed=5, **options), count))


def test_ranks_and_resume_share_one_order(tmp_path: Path) -> None:
    dataset = open_images(numbered_folder(tmp_path, 10))
    one = [index for batch in _take(dataset, 12, batch_size=2) for index in batch.indices]
    assert one == sample_indices(0, 24, 10, seed=5)
    ranks = [_take(dataset, 4, batch_size=2, rank=rank, world=3) for rank in range(3)]
    assert one == [index for step in zip(*ranks, strict=True) for batch in step for index in batch.indices]
    resumed = _take(dataset, 2, batch_size=2, rank=1, world=3, start=2)
    assert [batch.indices for batch in resumed] == [batch.indices for batch in ranks[1][2:]]
    other_world = _take(dataset, 3, batch_size=2, start=9)  # 3 steps of 3 ranks, then alone
    assert [index for batch in other_world for index in batch.indices] == one[18:24]


def test_a_batch_may_be_longer_than_the_data(tmp_path: Path) -> None:
    batch = _take(open_images(numbered_folder(tmp_path, 3)), 1, batch_size=9)[0]
    assert sorted(batch.indices) == sorted([0, 1, 2] * 3)


def test_workers_change_nothing_nor_does_the_global_generator(tmp_path: Path) -> None:
    folder = numbered_folder(tmp_path, 8)
    _damaged("truncated", folder / "003.png")
    dataset = open_images(folder, flip=True)
    with pytest.warns(UserWarning, match="003.png"):
        here = _take(dataset, 6, batch_size=3)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="003.png"):
        elsewhere = _take(dataset, 6, batch_size=3, num_workers=2)
    assert torch.equal(state, torch.get_rng_state())
    for mine, theirs in zip(here, elsewhere, strict=True):
        assert mine.indices == theirs.indices and mine.unreadable == theirs.unreadable
        assert torch.equal(mine.images, theirs.images)


def test_flips_follow_the_position(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(4, dtype=np.uint8) * 60, (50, 4, 1))
    np.savez(tmp_path / "ramp.npz", images=ramp)
    dataset = open_images(tmp_path / "ramp.npz", flip=True)

    def flips(**options: Any) -> list[bool]:
        batches = _take(dataset, **options)
        images = torch.cat([batch.images for batch in batches])
        unchanged, flipped = dataset.load([0]).images, dataset.load([0]).images.flip(3)
        assert all(torch.equal(image, unchanged[0]) or torch.equal(image, flipped[0]) for image in images)
        return [torch.equal(image, flipped[0]) for image in images]

    whole = flips(count=20, batch_size=20)
    assert 150 < sum(whole) < 250 and whole[:50] != whole[50:100]
    assert flips(count=4, batch_size=5, start=3) == whole[15:35]
    ranks = [flips(count=2, batch_size=5, rank=rank, world=2) for rank in range(2)]
    assert ranks[0][:5] + ranks[1][:5] + ranks[0][5:] + ranks[1][5:] == whole[:20]


# ---------------------------------------------------------------------------------------------- bad files


def test_a_bad_file_gives_way_to_the_next_readable_one(tmp_path: Path) -> None:
    """RELIABILITY row 18: deterministic order after the skip."""
    path = _as_metadata(tmp_path / "six")
    _damaged("truncated", path / "files" / "002.png")
    _damaged("empty", path / "files" / "003.png")
    _damaged("text", path / "files" / "005.png")
    batch = open_images(path, num_classes=3).load([2, 1, 5])
    assert batch.indices == (4, 1, 0) and greys(batch) == [4, 1, 0]
    assert batch.labels is not None and batch.labels.tolist() == [2, 0, 0]
    assert batch.captions == ("number 4", "number 1", "number 0")
    assert [re.search(r"00\d.png", problem)[0] for problem in batch.unreadable] == ["002.png", "003.png", "005.png"]


def test_each_bad_file_is_warned_of_once(tmp_path: Path) -> None:
    folder = numbered_folder(tmp_path, 5)
    _damaged("empty", folder / "002.png")
    dataset = open_images(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _take(dataset, 20, batch_size=5)
    assert ["002.png" in str(warning.message) for warning in caught] == [True]


def test_ten_bad_files_stop_the_run_only_if_they_are_many(tmp_path: Path) -> None:
    """RELIABILITY row 18: an error when there are more than 1%."""
    folder = numbered_folder(tmp_path / "few", 100)
    for i in range(50, 60):
        (folder / f"{i:03d}.png").write_bytes(b"")
    dataset = open_images(folder)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"10 of \d+ images read are unreadable, more than 1%"),
    ):
        _take(dataset, 10, batch_size=20)
    (folder / "050.png").unlink()
    with pytest.warns(UserWarning) as caught:  # nine are never too many, however often they come by
        _take(open_images(folder), 30, batch_size=20)
    assert len(caught) == 9 and "(9 so far)" in str(caught[-1].message)


def test_bad_files_can_be_errors(tmp_path: Path) -> None:
    folder = numbered_folder(tmp_path, 3)
    _damaged("truncated", folder / "001.png")
    dataset = open_images(folder, bad_files="error")
    with pytest.raises(ValueError, match="001.png: OSError"):
        dataset.load([0, 1])
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match="^unreadable image .*001.png"):
            _take(dataset, 5, batch_size=3, num_workers=num_workers)
    _damaged("truncated", folder / "000.png")
    with pytest.raises(ValueError, match="000.png"):
        open_images(folder, bad_files="error")


def test_nothing_readable_is_found_out_at_once(tmp_path: Path) -> None:
    """RELIABILITY row 21."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3 images in a row are unreadable; the last is .*2.png"):
        open_images(tmp_path)


# ------------------------------------------------------------------------------------------------- errors


def _raises(message: str, path: Path, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(path, **options)


def test_paths_that_hold_no_data(tmp_path: Path) -> None:
    """RELIABILITY row 21."""
    numbered_archive(tmp_path / "train.npz", 2)
    _raises("no such file or folder; did you mean 'train.npz'", tmp_path / "trian.npz")
    _raises("no such file or folder$", tmp_path / "elsewhere" / "x")
    (tmp_path / "a.zip").write_bytes(b"x")
    _raises("expected a folder, an .npz, a .tar or a .parquet", tmp_path / "a.zip")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("")
    _raises("no images", tmp_path / "none")
    np.savez(tmp_path / "zero.npz", images=np.zeros((0, 4, 4), dtype=np.uint8))
    _raises("no images", tmp_path / "zero.npz")


def test_archives_that_break_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    eight = np.zeros((3, 8, 8), dtype=np.uint8)

    def refuses(message: str, options: dict[str, Any] | None = None, **arrays: np.ndarray) -> None:
        np.savez(path, **arrays)
        _raises(message, path, **(options or {}))

    refuses("no array 'images'; did you mean 'image'", image=eight)
    refuses("expected uint8.*got float32", images=eight.astype(np.float32))
    refuses(r"expected uint8 .*, got uint8 \(8, 8\)", images=eight[0])
    refuses(r"expected uint8 .*, got uint8 \(3, 0, 8\)", {"resolution": 4}, images=eight[:, :0])
    classes, text = {"size": (8, 8), "num_classes": 3}, {"size": (8, 8), "takes_text": True}
    refuses(r"labels: expected int \(3,\), got float64 \(3,\)", classes, images=eight, labels=np.zeros(3))
    refuses(r"labels: expected int \(3,\), got int64 \(2,\)", classes, images=eight, labels=np.zeros(2, dtype=np.int64))
    refuses("captions: expected str .* got int64", text, images=eight, captions=np.zeros(3, dtype=np.int64))
    assert len(open_images(path, size=(8, 8), num_classes=None)) == 3  # which wants neither
    refuses(r"\(8, 8, 1\), the teacher's are \(4, 4, 1\); give data.resolution=4", images=eight)
    refuses(r"\(8, 8, 1\), .* \(8, 8, 3\); give data.channels=3", {"size": (8, 8), "channels": 3}, images=eight)
    clips = np.zeros((3, 5, 4, 4, 1), dtype=np.uint8)
    refuses(r"are clips \(5, 4, 4, 1\), the teacher's are \(4, 4, 1\)$", {"resolution": 4}, images=clips)
    refuses("only images of 1 or 3", {"resolution": 4, "channels": 5}, images=np.zeros((3, 8, 8, 5), dtype=np.uint8))
    refuses("no labels, but the teacher has 3 classes; expected a folder for each.*_column$", classes, images=eight)
    for label in (-1, 3):
        labels = np.array([0, label, 0])
        refuses(
            rf"a.npz\[1\]: label: expected 0 to 2, .* got {label}",
            {"size": (8, 8), "num_classes": 3},
            images=eight,
            labels=labels,
        )
    path.write_bytes(path.read_bytes()[:200])
    _raises("a.npz: expected an .npz", path)


def test_archives_are_never_unpickled(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"

    class Malicious:
        def __reduce__(self) -> tuple:
            return Path.touch, (sentinel,)

    np.savez(tmp_path / "a.npz", images=np.array([Malicious()], dtype=object))
    _raises("a.npz.*which only a pickle could store", tmp_path / "a.npz")
    assert not sentinel.exists()


def test_metadata_that_breaks_the_rules(tmp_path: Path) -> None:
    numbered_folder(tmp_path, 2)
    good = {"file_name": "000.png", "label": 0, "text": "zero"}

    def refuses(message: str, second: str, **options: Any) -> None:
        (tmp_path / "metadata.jsonl").write_text(f"{json.dumps(good)}\n{second}\n", encoding="utf-8")
        _raises(message, tmp_path, **options)

    refuses("metadata.jsonl:2: expected JSON", "{'file_name'}")
    refuses("metadata.jsonl:2: .*expected a section of keys", "[1]")
    refuses("metadata.jsonl:2: no key 'file_name'; did you mean 'filename'", '{"filename": "001.png"}')
    refuses("metadata.jsonl:2: no key 'label'", '{"file_name": "001.png", "text": "one"}', num_classes=2)
    refuses(
        "metadata.jsonl:2: 'label': expected a whole number, got True",
        '{"file_name": "001.png", "text": "one", "label": true}',
        num_classes=2,
    )
    refuses("1 of 2 images have no caption", '{"file_name": "001.png", "text": null, "label": 1}', takes_text=True)
    refuses("no column 'lable'; did you mean 'label'", json.dumps(good), label_column="lable")
    refuses("label: expected 0 to 1, .* got 7", json.dumps(good | {"file_name": "001.png", "label": 7}), num_classes=2)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')
    _raises("metadata.jsonl:1: not UTF-8", tmp_path)


def test_folders_that_break_the_rules(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png")
    save(tmp_path / "b" / "1.png")
    assert len(open_images(tmp_path, num_classes=2)) == 2
    save(tmp_path / "stray.png")
    _raises("stray.png lies beside", tmp_path, num_classes=2)
    _raises("the teacher's images have 4 channels, files have 1 or 3", tmp_path, channels=4)
    _raises("no labels", tmp_path / "a", num_classes=2)


@pytest.mark.parametrize("key", ["label_column", "caption_column"])
def test_a_column_of_what_has_no_table_is_refused(tmp_path: Path, key: str) -> None:
    save(tmp_path / "folder/0.png")
    _raises(rf"data\.{key}: got 'x', but .* has no metadata\.jsonl", tmp_path / "folder", **{key: "x"})
    archive = numbered_archive(tmp_path / "images.npz", 2)
    _raises(rf"data\.{key}: got 'x', but .* is an \.npz", archive, **{key: "x"})


def test_captions_of_no_use_are_not_dropped(tmp_path: Path) -> None:
    numbered_folder(tmp_path, 1)
    _raises("data.caption_dropout: expected 0, because the teacher takes no text", tmp_path, caption_dropout=0.1)


def test_saved_datasets_that_break_the_rules(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    text, number = datasets.Value("string"), datasets.Value("float32")
    file = str(save(tmp_path / "files" / "0.png"))
    table = datasets.Dataset.from_dict(
        {"image": [file, None], "label": [0.0, 1.0], "text": ["a", None]},
        features=datasets.Features({"image": datasets.Image(), "label": number, "text": text}),
    )
    datasets.DatasetDict(train=table).save_to_disk(str(tmp_path / "splits"))
    path = tmp_path / "splits" / "train"
    _raises("no column 'img'", path, image_column="img")
    _raises("'label'.*expected whole numbers", path, num_classes=2)
    table.remove_columns("label").save_to_disk(str(tmp_path / "unlabelled"))
    dataset = open_images(tmp_path / "unlabelled")
    assert dataset.load([0]).captions is None  # one is missing, and this teacher takes none
    assert dataset.load([1]).indices == (0,)  # row 1 has no image
    _raises("column 'text': expected a datasets.Image", path, image_column="text")
    captions = table.remove_columns(["label", "image"]).add_column("image", [file, file])
    captions.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "uncaptioned"))
    _raises(
        r"1 of 2 images have no caption; the first is .*uncaptioned\[1\]", tmp_path / "uncaptioned", takes_text=True
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "images"}, "data: path: missing"),
        ({"name": "noise", "path": "x"}, "reads no data"),
        ({"name": "images", "path": "x", "batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"name": "images", "path": "x", "num_workers": -1}, "num_workers: expected at least 0, got -1"),
        ({"name": "image", "path": "x"}, "did you mean 'images'"),
        ({"name": "images", "path": "x", "bad_files": "ignore"}, "data.bad_files"),
    ],
)
def test_sections_that_break_the_rules(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, section, "data")


def test_a_stated_shape_must_be_the_teachers(tmp_path: Path) -> None:
    numbered_folder(tmp_path, 1)
    _raises("data.resolution: got 8, but the teacher's images are 4x4", tmp_path, resolution=8)
    with pytest.raises(ValueError, match="data.channels: got 3, but the teacher's images have 1"):
        open_data(DataConfig(name="images", path=str(tmp_path), channels=3), channels=1, size=SIZE, num_classes=None)


# ----------------------------------------------------------------------------------------- captions and prompts


def _prompts(path: Path, content: bytes, **options: Any) -> Any:
    path.write_bytes(content)
    config = DataConfig(name="prompts", path=str(path), **options)
    return open_data(config, channels=3, size=(8, 8), num_classes=None, takes_text=True)


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    lines = _prompts(tmp_path / "a.txt", "\ufeffone\r\n\n  two, zwei \u00fc\n".encode())
    assert lines.load([1, 0]).captions == ("two, zwei \u00fc", "one") and lines.load([0]).images is None
    objects = _prompts(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": ""}\n')
    assert objects.load([0, 1]).captions == ("one", "")
    with pytest.raises(ValueError, match=r"b.txt:2: not UTF-8 \(byte 0xff\)"):
        _prompts(tmp_path / "b.txt", b"one\ntw\xffo\n")
    with pytest.raises(ValueError, match=r"c.txt: no prompts in it"):
        _prompts(tmp_path / "c.txt", b"\n\n")
    with pytest.raises(ValueError, match=r"c.jsonl:2: expected a column text, prompt or caption, got txt"):
        _prompts(tmp_path / "c.jsonl", b'{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(ValueError, match="expected 'images', got 'prompts', but the teacher takes no text"):
        open_data(DataConfig(name="prompts", path=str(tmp_path / "a.txt")), channels=3, size=(8, 8), num_classes=None)


def test_captions_beside_the_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    config = DataConfig(name="images", path=str(tmp_path), batch_size=2)
    wanted: Any = {"channels": 3, "size": (8, 8), "num_classes": None, "takes_text": True}
    (tmp_path / "a.txt").write_text("an a,\nfirst line")
    with pytest.raises(ValueError, match=r"1 of 2 images have no caption; the first is .*b.png"):
        open_data(config, **wanted)
    (tmp_path / "b.txt").write_text("")
    assert open_data(config, **wanted).load([0, 1]).captions == ("an a, first line", "")


def test_captions_are_dropped_by_their_position_and_mirrors_stay(tmp_path: Path) -> None:
    text = "\n".join(f"prompt {i}" for i in range(50)).encode()

    def captions(share: float, start: int = 0) -> list[str]:
        data = _prompts(tmp_path / "a.txt", text, caption_dropout=share)
        batches = loader(data, batch_size=25, seed=3, start=start)
        return [caption for _ in range(4) for caption in next(batches).captions or ()]

    every, some = captions(0.0), captions(0.2)
    kept = [caption for caption in some if caption]
    assert 60 < len(kept) < 95 and all(a in (b, "") for a, b in zip(some, every, strict=True))
    assert captions(0.2, start=2)[:50] == some[50:] and set(captions(1.0)) == {""}


def test_two_epochs_of_an_order_are_kept_and_no_more(monkeypatch) -> None:
    """A million samples take 25 MB an epoch, in every process."""
    made = []
    monkeypatch.setattr(order, "_epoch", lambda seed, epoch, length: (made.append(epoch), np.arange(length))[1:])
    order._epochs.cache_clear()
    sample_indices(0, 50, 10, seed=9)
    sample_indices(30, 20, 10, seed=9)
    sample_indices(0, 5, 10, seed=9)
    assert made == [0, 1, 2, 3, 4, 0]
    order._epochs.cache_clear()
