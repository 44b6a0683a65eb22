"""Arrays from outside: what is read is what was written, and nothing larger than the file can stand for."""

import io
import os
import zipfile

import numpy as np
import pytest

from stepdistill.files.arrays import array_headers, read_arrays

ARRAYS = {
    "images": np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4),
    "labels": np.array([1, 2]),
    "captions": np.array(["a cat", "ein Hündchen"]),
    "scalar": np.array(3.5, np.float16),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "swapped": np.arange(3, dtype=">i4"),
    "empty": np.zeros((0, 5), np.float32),
    "flags": np.array([True, False]),
}


def write_member(path, content, name="images.npy", compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, content)
    return path


def header(shape, descr="|u1", fortran=False):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": fortran, "descr": descr})
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_is_read_is_what_numpy_reads(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, **ARRAYS)
    found = read_arrays(path, ARRAYS.keys())
    with np.load(path) as expected:
        for name in ARRAYS:
            assert found[name].dtype == expected[name].dtype and found[name].flags.writeable
            assert np.array_equal(found[name], expected[name]) and found[name].shape == expected[name].shape
    assert {name: (header.shape, header.dtype) for name, header in array_headers(path).items()} == {
        name: (array.shape, array.dtype) for name, array in ARRAYS.items()
    }


def test_only_what_is_asked_for_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    assert set(read_arrays(tmp_path / "a.npz", ["labels", "others"])) == {"labels"}


def test_a_bomb_of_a_few_megabytes_is_refused_before_it_takes_memory(tmp_path):
    """RELIABILITY row 28 (the bomb): 300 kB that ask for 300 MB; FAULTS 10."""
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w") as file,
    ):
        file.write(header((300 * 2**20,)))
        for _ in range(300):
            file.write(bytes(2**20))
    for read in (array_headers, lambda path: read_arrays(path, ["images"])):
        with pytest.raises(ValueError, match=r"bomb\.npz: .*would take 314,\d+,\d+ bytes of memory"):
            read(path)


@pytest.mark.parametrize("shape", [(713 * 2**40,), (2**62, 2**62), (5,), (-1,), (10**30, 0), (True,)])
def test_a_header_that_asks_for_what_is_not_there_is_refused(tmp_path, shape):
    path = write_member(tmp_path / "a.npz", header(shape) + bytes(4))
    with pytest.raises(ValueError, match=r"a\.npz: expected an \.npz of plain arrays"):
        read_arrays(path, ["images"])


def test_pickles_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="'images.npy' holds Python objects"):
        read_arrays(tmp_path / "a.npz", ["images"])


def test_what_is_no_archive_of_arrays_is_named(tmp_path):
    good = tmp_path / "good.npz"
    np.savez_compressed(good, **ARRAYS)
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 255
    for name, content in {
        "text": b"hello",
        "none": b"",
        "cut": whole[:-40],
        "half": whole[:200],
        "bit": bytes(flipped),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: expected an .npz of plain arrays"):
            read_arrays(tmp_path / name, ARRAYS.keys())
    with pytest.raises(ValueError, match=r"goo\.npz: no such file; did you mean 'good\.npz'"):
        read_arrays(tmp_path / "goo.npz", [])
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        read_arrays(tmp_path, [])
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="got a special file"):
        array_headers(tmp_path / "pipe.npz")


def test_strange_members_are_refused(tmp_path):
    content = header((4,)) + bytes(4)
    for problem, change in {
        "neither stored nor deflated": lambda path: write_member(path, content, compression=zipfile.ZIP_BZIP2),
        "magic": lambda path: write_member(path, b"no array", name="readme.txt"),
    }.items():
        with pytest.raises(ValueError, match=problem):
            array_headers(change(tmp_path / "a.npz"))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
        archive.writestr("images.npy", content)
    with pytest.raises(ValueError, match="2 members of 1 names"):
        array_headers(tmp_path / "a.npz")
