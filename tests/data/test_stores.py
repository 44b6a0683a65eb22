"""Data at an address of a server: HTTP, S3 and the hub, each by its own client against a stand-in on this machine.

``moto`` is S3's second stand-in, where it is installed: it is not ours, so it shares no mistake with the first.
"""

import contextlib
import functools
import http.server
import os
import re
import uuid

import datasets
import huggingface_hub
import local_server
import pytest
from data import s3_stand_in
from data.remote_files import TABLES, TARS, assert_same_batches, on_disk, opened, tar
from export import hub_stand_in

from stepdistill.data import remote
from stepdistill.data.remote import RemoteError

BOTH = pytest.mark.parametrize("files", [TARS, TABLES], ids=["tars", "parquet"])


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


# ------------------------------------------------------------------------------------------------- HTTP


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves files, and the ranges of them that are asked for."""

    asked: list = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        file = self.translate_path(self.path)
        if found is None or not os.path.isfile(file):
            super().do_GET()
            return
        with open(file, "rb") as content:
            content.seek(int(found[1]))
            part = content.read(int(found[2]) - int(found[1]) + 1)
        self.asked.append(len(part))
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {found[1]}-{found[2]}/{os.path.getsize(file)}")
        self.end_headers()
        self.wfile.write(part)


class _WholeFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def serving(folder, handler):
    return local_server.serving(functools.partial(handler, directory=folder))


@BOTH
def test_a_server_of_ranges(tmp_path, files):
    pytest.importorskip("aiohttp")
    folder = on_disk(tmp_path / "d", files)
    with serving(folder, _Ranges) as address:
        assert_same_batches(opened(folder), opened(address))


def test_a_server_of_whole_files_asks_for_a_download(tmp_path):
    pytest.importorskip("aiohttp")
    folder = on_disk(tmp_path / "d", {"a.tar": tar(range(400))})
    with serving(folder, _WholeFiles) as address:
        with pytest.raises(RemoteError, match="sends whole files only, and no ranges; data.download=true keeps a copy"):
            opened(f"{address}/a.tar")
        assert_same_batches(opened(folder), opened(f"{address}/a.tar", download=True))
        with pytest.raises(RemoteError, match=r"127\.0\.0\.1:\d+/b\.tar: no such file"):
            opened(f"{address}/b.tar")


# --------------------------------------------------------------------------------------------------- S3


@contextlib.contextmanager
def client_of(address):
    """Tells clients of S3 where a store is, as their users do."""
    system = pytest.importorskip("s3fs").S3FileSystem
    told = {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1", "MAX_ATTEMPTS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (told | {"ENDPOINT_URL": address}).items():
            patch.setenv(f"AWS_{name}", value)
        patch.setattr(system, "retries", 1)  # ours are enough
        system.clear_instance_cache()  # of another store
        yield system
        system.clear_instance_cache()


@pytest.fixture(scope="module")
def store():
    with s3_stand_in.serving() as (store, address), client_of(address):
        yield store


@pytest.fixture
def bucket():
    return f"b{uuid.uuid4().hex}"


def assert_same_as_on_disk(folder, files, address):
    here, first = opened(on_disk(folder, files)), min(files)
    assert_same_batches(here, opened(address))
    assert_same_batches(here, opened(address, download=True))
    assert len(opened(f"{address}/{first}")) == len(opened(str(folder / first)))


@BOTH
def test_a_bucket_gives_the_batches_of_the_files(tmp_path, store, bucket, files):
    store.objects.update({f"{bucket}/d/{name}": content for name, content in files.items()})
    assert_same_as_on_disk(tmp_path / "d", files, f"s3://{bucket}/d")


def test_a_bucket_is_read_by_ranges(store, bucket):
    content = store.objects[f"{bucket}/a.tar"] = tar(range(400))
    opened(f"s3://{bucket}/a.tar")
    store.parts.clear()
    opened(f"s3://{bucket}/a.tar").load([300])  # the headers are noted
    assert 0 < sum(store.parts) < 1000 < len(content)


@pytest.mark.parametrize(
    ("code", "sentence"), [(403, "no permission to read it: Forbidden"), (503, "cannot be read, 3 tries failed")]
)
def test_what_a_store_refuses_is_one_sentence(store, bucket, monkeypatch, code, sentence):
    with pytest.raises(RemoteError, match=rf"^s3://{bucket}/a\.tar: no such file$"):
        opened(f"s3://{bucket}/a.tar")
    monkeypatch.setattr(store, "refuses", code)
    for name in ("other.tar", "e"):  # and of a folder not that it holds no files
        with pytest.raises(RemoteError, match=rf"^s3://{bucket}/{name}: {sentence}"):
            opened(f"s3://{bucket}/{name}")


@BOTH
def test_motos_bucket_gives_the_batches_of_the_files(tmp_path, bucket, files):
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with client_of(f"http://{host}:{port}") as system:
        system().mkdir(bucket)
        for name, content in files.items():
            system().pipe_file(f"{bucket}/d/{name}", content)
        system().invalidate_cache()
        assert_same_as_on_disk(tmp_path / "d", files, f"s3://{bucket}/d")
    server.stop()


# ------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    with hub_stand_in.serving() as (hub, address):
        files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
        yield hub


@pytest.mark.parametrize(("files", "folder"), [(TARS, "/data"), (TABLES, "")], ids=["tars", "parquet"])
def test_a_data_set_of_the_hub_gives_the_batches_of_its_files(tmp_path, hub, files, folder):
    name = f"datasets/lab/d{uuid.uuid4().hex}"
    hub.repositories[name] = {f"{folder}/{file}".lstrip("/"): content for file, content in files.items()}
    assert_same_as_on_disk(tmp_path / "d", files, f"hf://{name}{folder}")


def test_other_content_on_the_hub_is_another_version(hub):
    versions = []
    for numbers in (range(4), range(4), range(4, 8)):
        name = f"datasets/lab/d{uuid.uuid4().hex}"
        hub.repositories[name] = {"a.tar": tar(numbers)}
        versions.append(remote.content_key(f"hf://{name}/a.tar"))
    assert versions[0] == versions[1] != versions[2] and versions[0][0] == versions[2][0]


def test_what_the_hub_does_not_have_or_refuses_is_one_sentence(hub, monkeypatch):
    name = f"datasets/lab/d{uuid.uuid4().hex}"
    hub.repositories[name] = {"README.md": b""}
    for path, sentence in {
        f"{name}/a.tar": f"hf://{name}/a.tar: no such file",
        "datasets/lab/none/a.tar": "hf://datasets/lab/none/a.tar: no such file",
        name: f"hf://{name}: no .tar and no .parquet files are listed there",
    }.items():
        with pytest.raises(RemoteError, match=f"^{re.escape(sentence)}"):
            opened(f"hf://{path}")
    other = f"datasets/lab/d{uuid.uuid4().hex}"
    hub.repositories[other] = {"a.tar": tar(range(2))}
    hub.refuses["/resolve/"] = 403
    with pytest.raises(RemoteError, match=rf"^hf://{other}/a\.tar: no permission to read it: "):
        opened(f"hf://{other}/a.tar")
