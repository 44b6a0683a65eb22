"""Folders, tars and archives that would be read without end, take all memory, or lead elsewhere."""

from __future__ import annotations

import io
import os
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.image_files import find_images
from stepdistill.evaluation.image_set import ImageSet

WALK = r"folders are not entered; the first is .*loop.* \(a link that leads back to "


def opened(path: Path, classes: int | None = None, **options: Any) -> Any:
    config = DataConfig(name="images", path=str(path), **options)
    return open_data(config, channels=3, size=(8, 8), num_classes=classes)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (50, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())
    return path


def names(folder: Path) -> list[str]:
    return [os.path.relpath(name, folder) for name in find_images(folder).images]


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("target", [".", "..", "../..", "absolute"])
def test_a_link_back_to_its_own_folder_is_not_followed(tmp_path: Path, target: str) -> None:
    """FAULTS 10: one image became 41 samples."""
    picture(tmp_path / "set/cat/a.png")
    link = tmp_path / "set/cat/loop"
    link.symlink_to(tmp_path / "set" if target == "absolute" else target)
    with pytest.warns(UserWarning, match=f"1 {WALK}"):
        assert len(opened(tmp_path / "set")) == 1
    with pytest.warns(UserWarning, match=f"1 {WALK}"):
        assert len(opened(tmp_path / "set", 1)) == 1


def test_folders_that_link_to_each_other(tmp_path: Path) -> None:
    """FAULTS 10: two in a ring, and nine each with links to all, which have a million paths through them."""
    for name, other in (("a", "b"), ("b", "a")):
        picture(tmp_path / f"two/{name}/{name}.png")
        (tmp_path / f"two/{name}/loop").symlink_to(tmp_path / f"two/{other}")
    assert names(tmp_path / "two") == ["a/a.png", "a/loop/b.png", "b/b.png", "b/loop/a.png"]
    start = time.perf_counter()
    for one in range(9):
        picture(tmp_path / f"all/{one}/x.png")
        for other in range(9):
            (tmp_path / f"all/{one}/loop{other}").symlink_to(tmp_path / f"all/{other}")
    assert len(names(tmp_path / "all")) <= 9 + 9 * 8 * 9 and time.perf_counter() - start < 5


def test_honest_links_are_followed_as_ever(tmp_path: Path) -> None:
    picture(tmp_path / "store/red/a.png")
    picture(tmp_path / "store/.hidden/a.png")
    (tmp_path / "set/deep").mkdir(parents=True)
    for name in ("one", "two", "deep/three"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store/red")
    (tmp_path / "set/all").symlink_to(tmp_path / "store")
    assert names(tmp_path / "set") == ["all/red/a.png", "deep/three/a.png", "one/a.png", "two/a.png"]
    assert find_images(tmp_path / "set").skipped == []


# --------------------------------------------------------------------------------------------------- tars


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: Any) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, len(content)
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def tar(path: Path, *members: bytes) -> Path:
    path.write_bytes(b"".join(members) + bytes(1024))
    return path


@pytest.mark.parametrize("name", ["../a.png", "d/../../a.png", "/a.png"])
def test_a_member_that_leads_outside_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """RELIABILITY row 28."""
    path = tar(tmp_path / "a.tar", member("b.png", content=png()), member(name, content=png()))
    with pytest.raises(ValueError, match=rf"a\.tar!{name}: expected a name inside the tar, got one that leads outside"):
        opened(path)


def test_links_and_devices_are_left_out_by_name(tmp_path: Path) -> None:
    """RELIABILITY row 28: nothing outside a tar is reached through it."""
    path = tar(
        tmp_path / "a.tar", member("a.png", content=png()), member("b.png", tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("c.png", tarfile.LNKTYPE, linkname="a.png"), member("d.png", tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("e.png", tarfile.FIFOTYPE), member("folder", tarfile.DIRTYPE),
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"left out 4 links, devices or sparse files; the first is .*a\.tar!b\.png"):
        assert len(opened(path)) == 1


def test_a_member_that_declares_gigabytes(tmp_path: Path) -> None:
    """RELIABILITY row 28: a bomb; the tar holds a hole of 10 GB, or ends."""
    path = tar(tmp_path / "a.tar", member("a.png", content=png()), member("b.png", size=10 * 2**30))
    with pytest.raises(ValueError, match=r"a\.tar: cannot be read as an uncompressed tar"):
        opened(path)
    with path.open("r+b") as file:
        file.truncate(11 * 2**30)
    data = opened(path)
    tracemalloc.start()
    assert len(data) == 2 and "b.png: ValueError: " in data.load([1]).unreadable[0]
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("kind", [b"x", b"L", b"g", b"0", b"7", b"S"], ids=lambda kind: kind.decode())
@pytest.mark.parametrize("size", [-512, -1024, 2**31, 2**62])
def test_sizes_that_lead_back_or_take_all_memory(tmp_path: Path, kind: bytes, size: int) -> None:
    """FAULTS 10: a negative size is a loop in Python 3.11's tarfile; a long header was read whole."""
    header = bytearray(member("b.png", kind))
    header[124:136] = struct.pack(">I", 0x80000000 if size >= 0 else 0xFFFFFFFF) + struct.pack(">q", size)
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    path = tar(tmp_path / "a.tar", member("a.png", content=png()), bytes(header))
    with path.open("r+b") as file:
        file.truncate(2**32)
    tracemalloc.start()
    try:
        opened(path)  # a size that a hole in the file fills is honest
    except ValueError as error:
        assert str(error).startswith(str(path))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_compressed_tars_and_pipes_are_told(tmp_path: Path) -> None:
    """FAULTS 10: gz, bz2, xz and zst."""
    for suffix in ("tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst", "TAR.GZ"):
        (tmp_path / f"x.{suffix}").write_bytes(b"\x28\xb5\x2f\xfd")
        with pytest.raises(ValueError, match="expected an uncompressed tar, .*; decompress it first"):
            opened(tmp_path / f"x.{suffix}")
    with pytest.raises(ValueError, match=r"no images.*left out: .*\.gz"):
        opened(tmp_path)
    tar(tmp_path / "a.tar", member("a.png", content=png()), member("b.jxl", content=b"x"), member("b.txt"))
    with pytest.warns(UserWarning) as told:
        assert len(opened(tmp_path)) == 1
    assert [str(warning.message).partition("left out")[2] for warning in told] == [
        " 6 compressed tars; the first is x.TAR.GZ", ", because no such files are read: 1 .jxl",
    ]  # fmt: skip
    os.mkfifo(tmp_path / "b.tar")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"b\.tar: expected a file, got a special file"),
    ):
        opened(tmp_path)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_damaged_tars_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """FAULTS 9: nothing but ``ValueError``, which names the tar."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("a.png", png()), ("a.txt", b"red"), ("ü" * 60 + ".png", png()), ("b.json", b"{}")):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1.5
            archive.addfile(entry, io.BytesIO(data))
    whole, refused = content.getvalue(), 0
    for seed in range(150):
        random_, damaged = random.Random(seed), bytearray(whole)
        for _ in range(3):
            block = 512 * random_.randrange(len(whole) // 512)
            damaged[block + random_.randrange(512)] = random_.randrange(256)
            checksum = b"%06o\0 " % (256 + sum(damaged[block : block + 148]) + sum(damaged[block + 156 : block + 512]))
            if whole[block + 257 : block + 262] == b"ustar":
                damaged[block + 148 : block + 156] = checksum
        (tmp_path / "a.tar").write_bytes(damaged)
        try:
            opened(tmp_path / "a.tar")
        except ValueError as error:
            refused += 1
            assert "a.tar" in str(error)
    assert 0 < refused < 150


# --------------------------------------------------------------------------------------------------- .npz


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("shape", ["(784000000000000,)", "(10000000, 8, 8)", f"({10**30}, 8, 8)", "(-1, 8, 8)"])
def test_an_array_that_asks_for_more_than_there_is(tmp_path: Path, shape: str) -> None:
    """FAULTS 10: a header that asks for 713 TiB."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header(shape) + bytes(1000))
    with pytest.raises(ValueError, match=r"^\S*a\.npz: expected an \.npz of plain arrays"):
        opened(tmp_path / "a.npz")


def test_a_small_archive_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    """FAULTS 10, RELIABILITY row 28: a zip bomb."""
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        file.write(header(f"({5 * 2**20}, 8, 8)"))
        for _ in range(5):
            file.write(bytes(2**26))
    assert (tmp_path / "a.npz").stat().st_size < 2**21
    with pytest.raises(ValueError, match=r"a\.npz: .*it would take 335,544,448 bytes of memory"):
        opened(tmp_path / "a.npz")


def test_damaged_archives_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """FAULTS 9."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.arange(64 * 3, dtype=np.uint8).reshape(3, 8, 8), labels=np.arange(3))
    whole, refused = path.read_bytes(), 0
    for seed in range(200):
        random_, damaged = random.Random(seed), bytearray(whole)
        for _ in range(random_.choice((1, 2, 8))):
            damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        path.write_bytes(damaged[: len(damaged) - random_.choice((0, 0, 0, random_.randrange(len(damaged))))])
        try:
            opened(path, 3, channels=3)
        except ValueError as error:
            refused += 1
            assert "a.npz" in str(error)
    assert 0 < refused <= 200


@pytest.mark.parametrize("suffix", [".npz", ".tar", ""])
def test_special_files_are_no_data(tmp_path: Path, suffix: str) -> None:
    """FAULTS 10."""
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match=r"expected a folder, an \.npz, a \.tar or a \.parquet, got another file"):
        opened(tmp_path / f"a{suffix}")


# ----------------------------------------------------------------------------------- ADM's sample files


def test_samples_of_guided_diffusion_are_images(tmp_path: Path) -> None:
    """REPORTS 19: ``arr_0`` and ``arr_1`` are ``images`` and ``labels``."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(6) % 3
    np.savez(tmp_path / "adm.npz", images, labels)
    np.savez(tmp_path / "ours.npz", images=images, labels=labels)
    adm, ours = opened(tmp_path / "adm.npz", 3).load(range(6)), opened(tmp_path / "ours.npz", 3).load(range(6))
    assert (adm.images == ours.images).all() and (adm.labels == ours.labels).all()
    first, second = (ImageSet(tmp_path / f"{name}.npz").read(range(6)) for name in ("adm", "ours"))
    assert (first.pixels == second.pixels).all() and (first.labels == second.labels).all()
    np.savez(tmp_path / "bare.npz", images)
    assert len(opened(tmp_path / "bare.npz")) == 6
    np.savez(tmp_path / "wrong.npz", images, labels.astype(np.float32))
    with pytest.raises(ValueError, match=r"wrong\.npz: arr_1: expected int \(6,\), got float32"):
        opened(tmp_path / "wrong.npz", 3)
    np.savez(tmp_path / "wrong.npz", images.astype(np.float32))
    with pytest.raises(ValueError, match=r"wrong\.npz: arr_0: expected uint8"):
        opened(tmp_path / "wrong.npz")


@pytest.mark.parametrize("label", [-1, 3, 2**63, 10**30])
def test_labels_that_are_no_class(tmp_path: Path, label: int) -> None:
    """RELIABILITY row 23: out of range, negative, or more than any integer type holds."""
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    row = '{{"file_name": "{}.png", "label": {}}}\n'
    (tmp_path / "metadata.jsonl").write_text(row.format("a", 0) + row.format("b", label))
    with pytest.raises(ValueError, match=rf"(b\.png: label|jsonl:2: 'label'): expected .*, got {label}"):
        opened(tmp_path, 3)
    picture_tar = [member("a.png", content=png()), member("a.cls", content=str(label).encode())]
    with pytest.raises(ValueError, match=r"a\.tar!a\.(png|cls): label: expected .*, got "):
        opened(tar(tmp_path / "a.tar", *picture_tar), 3)
