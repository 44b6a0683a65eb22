"""WebDataset tars, read where they lie, and images of other proportions."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.decoding import read_pixels
from stepdistill.evaluation.image_set import ImageSet


def png(shade, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def opened(path, classes=None, text=True, **options):
    config = DataConfig(name="images", path=str(path), **options)
    return open_data(config, channels=3, size=(8, 8), num_classes=classes, takes_text=text)


def test_samples_come_in_any_order_and_nothing_is_unpacked(tmp_path):
    pack(tmp_path / "a.tar", {
        "d/0.txt": b"zero,\nred", "d/0.png": png(0), "d/1.v2.PNG": png(1), "d/1.PNG": png(10), "d/1.txt": "ü".encode(),
        "README": b"", ".hidden.png": png(9),
    })  # fmt: skip
    pack(tmp_path / "b.tar", {"2.png": png(20), "2.json": b'{"caption": "two", "width": 8}', "note.txt": b"no image"})
    before = sorted(os.listdir(tmp_path))
    data = opened(tmp_path)
    assert data.captions == ["zero, red", "ü", "two"] and data.name(1) == f"{tmp_path}/a.tar!d/1.PNG"
    batch = data.load([2, 0, 1])
    assert ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [20, 0, 10]
    assert batch.captions == ("two", "zero, red", "ü") and sorted(os.listdir(tmp_path)) == before
    assert len(opened(tmp_path / "b.tar")) == 1
    assert len(ImageSet(tmp_path)) == 3  # what evaluation compares with


def test_labels_and_captions_by_another_name(tmp_path):
    row = json.dumps({"alt": "three", "kind": 2}).encode()
    data = opened(
        pack(tmp_path / "a.tar", {"3.png": png(3), "3.json": row}), 4, caption_column="alt", label_column="kind"
    )
    assert data.captions == ["three"] and data.load([0]).labels.tolist() == [2]
    both = {"3.cls": b"1\n", "3.png": png(3), "3.json": row}
    data = opened(pack(tmp_path / "c.tar", both), 4, text=False, label_column="kind")
    assert data.load([0]).labels.tolist() == [2]
    with pytest.raises(ValueError, match=r"3\.json: no key 'kin'; did you mean 'kind'"):
        opened(tmp_path / "c.tar", 4, text=False, label_column="kin")
    data = opened(pack(tmp_path / "b.tar", {"0.cls": b"1\n", "0.png": png(3)}), 4, text=False)
    assert data.load([0]).labels.tolist() == [1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": png(0), "0.txt": b"yes", "1.png": png(1)}, r"1 of 2 images have no caption; the first is .*!1\.png"),
        ({"0.png": png(0)}, r"no captions, but the teacher takes text"),
        ({"0.png": png(0), "0.txt": b"na\xefve"}, r"a\.tar!0\.txt:1: not UTF-8 \(byte 0xef\)"),
        ({"0.png": png(0), "0.json": b"{"}, r"a\.tar!0\.json: expected JSON"),
        (
            {"0.png": png(0), "0.json": b'{"text": 3}'},
            r"a\.tar!0\.json: 'text': expected text, or a list of texts, got 3",
        ),
        ({"0.txt": b"only text"}, r"no images"),
    ],
)
def test_what_is_wrong_inside_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        opened(pack(tmp_path / "a.tar", files))


def test_hidden_files_and_folders_are_no_tars(tmp_path):
    pack(tmp_path / "a.tar", {"0.png": png(0), "0.txt": b"zero"})
    (tmp_path / "._a.tar").write_bytes(b"what macOS adds")
    (tmp_path / "old.tar").mkdir()
    assert len(opened(tmp_path)) == 1
    (tmp_path / "gone.tar").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"gone\.tar: no such file"):
        opened(tmp_path)


def test_tars_that_are_none(tmp_path):
    files = {"0.png": png(0), "0.txt": b"zero", "1.png": png(1), "1.txt": b"one"}
    with pytest.raises(ValueError, match=r"z\.tar: cannot be read as an uncompressed tar"):
        opened(pack(tmp_path / "z.tar", files, "w:gz"))
    whole = pack(tmp_path / "a.tar", files)
    data = opened(whole)
    os.truncate(whole, 520)
    with pytest.raises(ValueError, match=r"the last is .*a\.tar!\d\.png: OSError: .*the tar is cut short"):
        data.load([0])
    with pytest.raises(ValueError, match=r"a\.tar: cannot be read as an uncompressed tar"):
        opened(whole)
    with pytest.raises(ValueError, match=r"b\.tar!1\.png: no label, but others have one"):
        opened(pack(tmp_path / "b.tar", {"0.cls": b"0", **files}), 2)


def test_proportions_are_cut_padded_or_given_up():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, :2], wide[:, 6:] = (255, 0, 0), (0, 0, 255)  # red and blue ends
    cut, padded, stretched = (read_pixels(wide, 3, (8, 8), fit) for fit in ("crop", "pad", "stretch"))
    assert cut[:, :, 1:-1].max() == 0  # only the black middle, but for the resampling at its edges
    assert (padded[:, :2] == 255).all() and (padded[:, -2:] == 255).all() and padded[2, 4, 0] == 0
    assert padded[0, 4, 0] == 255 and padded[2, 4, 7] == 255  # both ends are there
    assert stretched[0, 0, 0] == stretched[0, 7, 0] == 255 and stretched[2, 4, 7] == 255
    assert (read_pixels(wide, 1, (8, 8), "pad")[:, 0] == 255).all()


def test_an_image_with_a_second_dot_in_its_name_is_counted_as_left_out(tmp_path):
    pack(tmp_path / "a.tar", {"a.png": png(1), "a.txt": b"one", "b.v2.png": png(2), "c.v2.png": png(3)})
    with pytest.warns(UserWarning, match=r"left out, because no such files are read: 2 \.v2\.png$"):
        assert len(opened(tmp_path / "a.tar")) == 1
