"""Data at an address: the batches of the same files on this machine, whatever server holds them, and its failures."""

import contextlib
import sys
import tarfile
import uuid

import fsspec
import pytest
from data.remote_files import TABLES, TARS, assert_same_batches, on_disk, opened, table, tar

from stepdistill.data import remote, remote_tables
from stepdistill.data.base import DataConfig
from stepdistill.data.inventory import take_inventory
from stepdistill.data.latent_cache import files as files_hash
from stepdistill.data.listing import sample_name
from stepdistill.data.loader import loader
from stepdistill.data.remote import RemoteError, cache_folder

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@pytest.fixture
def memory():
    """Files in memory, by fsspec; returns what puts some there, and tells their address."""
    system, folder = fsspec.filesystem("memory"), uuid.uuid4().hex

    def put(files):
        for name, content in files.items():
            system.pipe_file(f"/{folder}/{name}", content)
        return f"memory://{folder}"

    yield put
    with contextlib.suppress(FileNotFoundError):
        system.rm(f"/{folder}", recursive=True)


@pytest.mark.parametrize("files", [TARS, TABLES], ids=["tars", "parquet"])
def test_batches_are_those_of_the_files_on_this_machine(tmp_path, memory, files):
    here, there = opened(on_disk(tmp_path / "d", files)), opened(memory(files))
    assert len(there) == len(here) == 7 and list(there.captions) == list(here.captions)
    assert_same_batches(here, there)


@pytest.mark.parametrize("files", [TARS, TABLES], ids=["tars", "parquet"])
def test_copies_are_kept_if_that_is_asked_for(memory, files, monkeypatch):
    folder = memory(files)
    there, copied = opened(folder), opened(folder, download=True)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", None)
    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("memory")), "get_file", None)
        again = opened(folder, download=True)
    assert copied.version == there.version and len(list(cache_folder().glob("files/*/*"))) == 2
    assert_same_batches(copied, again, micro_batches=2)
    with pytest.raises(ValueError, match=r"data\.download: expected an address"):
        opened("pictures", download=True)


def test_an_address_names_a_file_a_range_or_a_pattern(memory):
    hidden = {"._a-000.tar": b"what macOS adds", "._b.parquet": b"what macOS adds"}
    folder = memory({**TARS, **hidden, "b.parquet": table(range(2)), "c.parquet": table(range(3))})
    assert len(opened(folder)) == 7
    assert [len(opened(f"{folder}/{name}")) for name in ("a-001.tar", "a-{000..001}.tar", "a*.tar", "b.parquet")] == [
        3, 7, 7, 2,
    ]  # fmt: skip
    assert len(opened(f"{folder}/*.parquet")) == 5


def test_a_pattern_of_folders_reads_all_of_them_or_says_why_not(memory, monkeypatch):
    folder = memory({f"{name}/a.tar": content for name, content in zip("xy", TARS.values(), strict=True)})
    assert len(opened(f"{folder}/*/a.tar")) == 7
    system = type(fsspec.filesystem("memory"))
    whole = system.ls

    def closed(self, path, **options):
        if path.endswith("/y"):
            raise PermissionError("y is closed")
        return whole(self, path, **options)

    monkeypatch.setattr(system, "ls", closed)
    with pytest.raises(RemoteError, match=r"\*/a\.tar: no permission to read it: y is closed"):
        opened(f"{folder}/*/a.tar")


def test_a_split_is_chosen_as_on_this_machine(memory):
    folder = memory(TABLES)
    assert len(opened(folder, split="test")) == 9
    with pytest.raises(RemoteError, match=r"data\.split: memory:///?\w+ has no 'tset'; did you mean 'test'"):
        opened(folder, split="tset")


def test_headers_are_read_once_and_other_content_is_another_version(memory, monkeypatch):
    folder = memory(TARS)
    first = opened(folder)
    assert len(list(cache_folder().glob("tars/*.jsonl"))) == 2
    with monkeypatch.context() as without:
        without.setattr(tarfile, "open", None)  # a second look at a header would fail
        again = opened(folder)
    assert first.load([3, 0]).captions == again.load([3, 0]).captions
    assert first.version == again.version and not take_inventory(again, folder).parts
    memory({"a-000.tar": tar(range(10, 15))})
    changed = opened(folder)
    assert changed.version != first.version and changed.captions[0] == "text 10"


def test_a_lost_connection_is_tried_again_and_then_a_sentence(memory, monkeypatch):
    folder, failures = memory(TARS), iter([True, False, True, False])
    data = opened(folder)
    system = type(fsspec.filesystem("memory"))
    whole = system.cat_file

    def flaky(self, path, **options):
        if next(failures, False):
            raise ConnectionResetError("reset by peer")
        return whole(self, path, **options)

    monkeypatch.setattr(system, "cat_file", flaky)
    assert data.load([0, 1]).captions == ("text 0", "text 1")
    failures = iter([True] * 50)
    with pytest.raises(RemoteError, match=r"^memory:///?\w+/a-000\.tar: cannot be read, 3 tries failed: reset"):
        data.load([0])
    with pytest.raises(ValueError, match="3 tries failed"):  # the loader does not skip it as unreadable
        next(loader(data, batch_size=2, seed=0))


def test_what_cannot_be_read_is_one_sentence(memory, tmp_path):
    folder = memory({"broken.tar": b"no tar at all" * 100, "broken.parquet": b"PAR1", "empty/README.md": b""})
    for path, sentence in {
        f"{folder}/none.tar": r"memory:///?\w+/none\.tar: no such file$",
        f"{folder}/broken.tar": r"memory:///?\w+/broken\.tar: cannot be read as an uncompressed tar",
        f"{folder}/broken.parquet": r"memory:///?\w+/broken\.parquet: cannot be read: ",
        f"{folder}/nowhere": r"memory:///?\w+/nowhere: no \.tar and no \.parquet files are listed there",
        f"{folder}/empty": r"memory:///?\w+/empty: no \.tar and no \.parquet files are listed there",
        f"{folder}/**/*.tar": r"memory:///?\w+/\*\*/\*\.tar: expected '\*' for names in one folder, got '\*\*'",
        "nothing://x/y.tar": "nothing://x/y.tar: Protocol not known: nothing",
    }.items():
        with pytest.raises(RemoteError if "uncompressed" not in sentence else ValueError, match=sentence):
            opened(path)
    for options, key in (({"revision": "0" * 40}, "revision"), ({"buckets": [[8, 8]]}, "buckets")):
        with pytest.raises(ValueError, match=rf"data\.{key}: "):
            opened(folder, **options)


def test_a_name_is_told_without_reading_the_image_and_without_a_signature(memory, monkeypatch):
    address = memory(TABLES)
    data = opened(address)
    monkeypatch.setattr(remote_tables, "_read", None)
    assert data.name(5) == f"{address}[5]"
    assert sample_name((), 5, "https://host/a.parquet?signature=1") == "https://host/a.parquet[5]"


def test_copies_of_files_at_an_address_are_the_same_samples_for_a_cache(memory, monkeypatch, tmp_path):
    address = memory(TARS)
    here = files_hash(opened(address), address)
    monkeypatch.chdir(tmp_path)
    assert files_hash(opened(address, download=True), address) == here


@pytest.mark.parametrize("name", ["noise", "prompts"])
def test_a_download_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"^download: expected false, because '{name}' reads no files"):
        DataConfig(name=name, path="p.txt" if name == "prompts" else None, download=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(known, "s3", raising=False)  # another test has read from there
    with pytest.raises(RemoteError, match=r"s3://b/a\.tar: Install s3fs .*pip install 'stepdistill\[streaming\]'"):
        opened("s3://b/a.tar")


class _Refused(Exception):
    """An error of HTTP, as aiohttp and the hub have them."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


def _missing_because_of(cause):
    error = FileNotFoundError("x")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "tries", "sentence"),
    [
        (FileNotFoundError("x"), 1, "no such file"),
        (_missing_because_of(KeyError("s3's own")), 1, "no such file"),
        (_missing_because_of(ConnectionRefusedError("refused")), 3, "cannot be read, 3 tries failed: refused"),
        (TimeoutError(), 3, "cannot be read, 3 tries failed: TimeoutError"),
        (PermissionError("denied"), 1, "no permission to read it: denied"),
        (_Refused(404), 1, "no such file"),
        (_Refused(403), 1, "no permission to read it: status 403"),
        (_Refused(429), 3, "cannot be read, 3 tries failed: status 429"),
        (_Refused(503), 3, "cannot be read, 3 tries failed: status 503"),
        (NotImplementedError("ls"), 1, "cannot be read: ls"),
    ],
)
def test_what_may_pass_is_tried_again(error, tries, sentence):
    tried = []

    def read():
        tried.append(1)
        raise error

    with pytest.raises(RemoteError, match=f"^s3://b/a: {sentence}$"):
        remote.persistently("s3://b/a", read)
    assert len(tried) == tries


def test_signed_addresses_keep_their_secret():
    assert remote.shown("https://me:key@host/a.tar?signature=1") == "https://host/a.tar"
