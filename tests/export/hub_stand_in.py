"""A stand-in of the hub's HTTP API: as much of it as ``huggingface_hub`` asks for to upload, and to read data sets.

Repositories are dictionaries from paths to bytes. Weights and pictures go through the LFS batch API, other files inside
the commit, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import local_server

TOKEN = "hf_canary7f3a9d51"


class Hub:
    """What the stand-in holds and was asked.

    Attributes:
        repositories: files by path, by the repository's name; a data set's is ``datasets/owner/name``.
        private: names of those that are hidden.
        commits: number of commits, of all repositories.
        asked: method and path of every request.
        bodies: what was sent, of every request.
        role: of the one token.
        refuses: answers with code, by a pattern of ``method path``.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits = 0
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        self.role = "write"
        self.refuses: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = f"{self.command} {self.path.partition('?')[0]}"
        self.hub.asked.append(asked)
        self.hub.bodies.append(body)
        for pattern, code in self.hub.refuses.items():
            if re.search(pattern, asked):
                return self.answer({"error": "refused"}, code)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/storage/" not in asked:
            return self.answer({"error": "Invalid credentials"}, 401)
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, asked):
                return method(self, body, *found.groups())
        return self.answer({"error": "no such route"}, 404)

    do_GET = do_POST = do_PUT = handle_request

    def log_message(self, *args: Any) -> None:
        pass

    def whoami(self, body: bytes) -> None:
        token = {"type": "access_token", "accessToken": {"displayName": "t", "role": self.hub.role}}
        self.answer({"type": "user", "name": "anna", "orgs": [{"type": "org", "name": "Lab"}], "auth": token})

    def info(self, body: bytes, name: str) -> None:
        if name not in self.hub.repositories:
            return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        files = [{"rfilename": path} for path in self.hub.repositories[name]]
        sha = f"{self.hub.commits:040x}"
        return self.answer({"id": name, "private": name in self.hub.private, "siblings": files, "sha": sha})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer({"error": "You already created this model repo", "url": self.url(name)}, 409)
        self.hub.repositories[name] = {".gitattributes": b""}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(name)
        return self.answer({"url": self.url(name)})

    def validate(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

        paths = [file["path"] for file in json.loads(body)["files"]]
        self.answer({"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in paths]})

    def batch(self, body: bytes, name: str) -> None:
        def actions(oid: str) -> dict[str, Any]:
            return {"upload": {"href": self.url(f"storage/{oid}")}, "verify": {"href": self.url("verify")}}

        objects = [{**one, "actions": actions(one["oid"])} for one in json.loads(body)["objects"]]
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        self.hub.blobs[oid] = body
        self.answer({})

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        self.answer({}, 200 if len(self.hub.blobs[asked["oid"]]) == asked["size"] else 422)

    def commit(self, body: bytes, name: str) -> None:
        files = self.hub.repositories[name]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits += 1
        oid = f"{self.hub.commits:040x}"
        self.answer(
            {"commitUrl": self.url(f"{name}/commit/{oid}"), "commitOid": oid, "hookOutput": "", "success": True}
        )

    def tree(self, body: bytes, name: str, folder: str = "") -> None:
        """List a folder of a data set, whose slashes are quoted."""
        below = f"{unquote(folder)}/" if folder else ""
        contents = {
            path: found for path, found in self.hub.repositories.get(name, {}).items() if path.startswith(below)
        }
        if folder and not contents:
            return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        rows = {}
        for path, content in contents.items():
            oid = hashlib.sha1(content).hexdigest()
            rows[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
            for above in map(str, PurePosixPath(path).parents):
                if above != "." and above.startswith(below):
                    rows[above] = {"type": "directory", "path": above, "oid": "0" * 40}
        is_whole = "recursive=true" in self.path.lower()
        return self.answer([row for path, row in rows.items() if is_whole or "/" not in path.removeprefix(below)])

    def resolve(self, body: bytes, name: str, path: str) -> None:
        """Send a file of a data set, or the range of it that is asked for."""
        content = self.hub.repositories[name].get(path, b"")
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(found[1]) : int(found[2]) + 1] if found else content
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{path}"


ROUTES = {
    r"GET /api/whoami-v2": Handler.whoami,
    r"GET /api/models/(\w+/[\w.-]+)(?:/revision/main)?": Handler.info,
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": Handler.validate,
    r"POST /api/models/(\w+/[\w.-]+)/preupload/main": Handler.preupload,
    r"POST /(\w+/[\w.-]+)\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /storage/(\w+)": Handler.store,
    r"POST /verify": Handler.verify,
    r"POST /api/models/(\w+/[\w.-]+)/commit/main": Handler.commit,
    r"GET /api/(datasets/\w+/[\w.-]+)(?:/revision/main)?": Handler.info,
    r"GET /api/(datasets/\w+/[\w.-]+)/tree/main(?:/([\w%.-]+))?": Handler.tree,
    r"GET /(datasets/\w+/[\w.-]+)/resolve/main/(.+)": Handler.resolve,
}


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """Yield the stand-in and its address."""
    hub = Hub()
    with local_server.serving(type("OneHub", (Handler,), {"hub": hub})) as address:
        yield hub, address
