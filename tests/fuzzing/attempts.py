"""One try: what a command did with a damaged file, how long it took, and whether it touched anything outside."""

import contextlib
import dataclasses
import io
import os
import re
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS = 20
"""A try that takes longer hangs."""
MEMORY = 6 * 2**30
"""Bytes beyond those in use that a try may ask for."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "os.fork")
CHANGES = (
    "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.copytree",
)  # fmt: skip
ONTO = ("os.link", "os.symlink", "shutil.copyfile", "shutil.copytree")
"""Changes of the second path only."""
ALLOWED = ("/dev/null",)


def _folder_of(event: str, args: tuple) -> str:
    """The folder to which a relative path of an event belongs: that of its descriptor, or the present one."""
    if event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] not in (-1, None):
        return os.readlink(f"/proc/self/fd/{args[-1]}")
    return os.getcwd()


class Hang(BaseException):
    """A try that took too long; no handler of the package catches it."""


class Watch:
    """Notes every change outside a folder; installed once, since an audit hook cannot be removed."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        sys.addaudithook(self._event)

    @contextlib.contextmanager
    def outside(self, folder: Path) -> Iterator[list[str]]:
        self.folder, self.found = str(folder.resolve()), []
        try:
            yield self.found
        finally:
            self.folder = None

    def _event(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.found.append(f"{event} {args[0]!r}")
        elif event == "open" and isinstance(args[0], (str, bytes)) and args[2] is not None and args[2] & WRITING:
            self._note(event, os.path.join(os.getcwd(), os.fsdecode(args[0])))
        elif event in CHANGES:
            at = _folder_of(event, args)
            for path in args[1:2] if event in ONTO else args[:2]:
                if isinstance(path, (str, bytes)):
                    self._note(event, os.path.join(at, os.fsdecode(path)))

    def _note(self, event: str, path: str) -> None:
        full = os.path.normpath(path)
        if not full.startswith(self.folder) and full not in ALLOWED:
            self.found.append(f"{event} {full}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened: ``done``, ``refused``, or a fault."""

    kind: str
    text: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("done", "refused")


def attempt(run: Callable[[Path], object], folder: Path, names: tuple[str, ...], watch: Watch) -> Outcome:
    """Run a command on ``folder``; what refuses has to name one of ``names``."""
    errors, printed = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed)
    with watch.outside(folder) as foreign, _limits(), redirected[0], redirected[1]:
        outcome = _outcome(run, folder, errors)
    if foreign:
        return Outcome("foreign write", "; ".join(foreign))
    return _judged(outcome, names) if outcome.kind == "refused" else outcome


def _outcome(run: Callable[[Path], object], folder: Path, errors: io.StringIO) -> Outcome:
    try:
        run(folder)
    except SystemExit as leaving:
        return Outcome("refused" if leaving.code == 2 else f"exit {leaving.code}", errors.getvalue())
    except Hang:
        return Outcome("hang", traceback.format_exc(limit=-8))
    except BaseException:
        return Outcome("traceback", traceback.format_exc())
    return Outcome("done")


def _judged(refusal: Outcome, names: tuple[str, ...]) -> Outcome:
    """A refusal is a fault if it names no file, or is longer than anybody reads, or has power over the terminal."""
    message = re.split(r"[\r\n](?=stepdistill |fuzz)", refusal.text)[-1].strip()  # progress bars come before it
    if not any(name in message for name in names):
        return Outcome("no name", message)
    if len(message) > 8_000:
        return Outcome("too long", message[:2_000])
    if any(not char.isprintable() and char != "\n" for char in message):
        return Outcome("raw characters", repr(message))
    return Outcome("refused", message)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again and again: a destructor swallows it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
