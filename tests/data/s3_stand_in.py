"""A stand-in of S3 on this machine: as much of it as s3fs asks of a store that it reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import local_server


class Store:
    """What the stand-in holds, and does.

    Attributes:
        objects: content by ``bucket/key``.
        refuses: HTTP's code that every request gets, 0 for none.
        parts: length of every range that was sent.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.refuses = 0
        self.parts: list[int] = []


class Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        place = unquote(urlsplit(self.path).path).strip("/")
        if self.store.refuses:
            return self.answer(b"", self.store.refuses)
        if "/" not in place:
            return self.answer(self.listing(place, parse_qs(urlsplit(self.path).query)))
        if place not in self.store.objects:
            return self.answer(b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>", 404)
        content = self.store.objects[place]
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        if (found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))) is None:
            return self.answer(content, ETag=tag)
        part = content[int(found[1]) : int(found[2]) + 1]
        self.store.parts.append(len(part))
        return self.answer(part, 206, ETag=tag, Content_Range=f"bytes {found[1]}-{found[2]}/{len(content)}")

    do_HEAD = do_GET

    def listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        """Return ``ListObjectsV2`` of what lies right below a prefix."""
        prefix = query.get("prefix", [""])[0]
        rows = [
            f"<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size><ETag>&quot;{len(content)}&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for place, content in self.store.objects.items()
            if (name := place.removeprefix(f"{bucket}/")).startswith(prefix) and "/" not in name[len(prefix) :]
        ]
        about = f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{about}{''.join(rows)}</ListBucketResult>".encode()

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        sent = {"Content-Length": str(len(body)), "Last-Modified": formatdate(0, usegmt=True), **headers}
        for name, value in sent.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[Store, str]]:
    """Yield the stand-in and its address."""
    store = Store()
    with local_server.serving(type("OneStore", (Handler,), {"store": store})) as address:
        yield store, address
