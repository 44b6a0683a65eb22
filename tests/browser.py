"""A headless browser on this machine, for what people open in theirs."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from local_server import serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required")

PLAYED = """<!doctype html><title>clip</title><video id="clip" src="%s" muted></video><script>
const clip = document.getElementById("clip"), shown = new Set();
const say = why => fetch("/said", {method: "POST", body: JSON.stringify({
  why: why, error: clip.error && clip.error.message, seconds: clip.duration, at: clip.currentTime,
  width: clip.videoWidth, height: clip.videoHeight, ready: clip.readyState, frames: shown.size})});
const see = (now, frame) => { shown.add(frame.mediaTime); clip.requestVideoFrameCallback(see); };
clip.requestVideoFrameCallback(see);
clip.onended = () => say("ended");
clip.onerror = () => say("error");
clip.play().catch(reason => say(String(reason)));
</script>
"""
"""A page that plays a clip to its end, and says how that was."""

SEEN = """<!doctype html><title>page</title>
<iframe id="page" src="%s" style="width: 1200px; height: 900px"></iframe><script>
const errors = [];
document.getElementById("page").onload = async () => {
  const inner = document.getElementById("page").contentDocument, images = [...inner.images];
  await Promise.all(images.map(image => image.decode().catch(reason => errors.push(String(reason)))));
  fetch("/said", {method: "POST", body: JSON.stringify({
    errors: errors, title: inner.title, images: images.length, words: inner.body.innerText,
    broken: images.filter(image => !image.naturalWidth).length, wide: inner.documentElement.scrollWidth})});
};
</script>
"""
"""A page that opens another, and says what is seen of it."""


class Answers(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what its pages post."""

    said: Queue[Any]

    def do_POST(self) -> None:
        self.said.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


def said_by(page: str, file: Path, seconds: float = 60) -> Any:
    """What a page says of a file, both in the file's folder, when a browser opens it."""
    assert CHROMIUM is not None
    (file.parent / "asking.html").write_text(page % file.name)
    said: Queue[Any] = Queue()
    handler = type("Handler", (Answers,), {"said": said})
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # its processes end a little after it
    with serving(functools.partial(handler, directory=str(file.parent))) as address, folder as own:
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={own}", "--remote-debugging-port=0", f"{address}/asking.html"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return said.get(timeout=seconds)
        finally:
            browser.terminate()
            browser.wait(timeout=20)
