"""Clips from files of videos, by PyAV (the extra ``video``).

A clip begins with its file. Its frames are ``data.fps`` a second: of the file's own frames those nearest in time. A
file that is too short is unreadable; frames are not repeated. Each frame is made to fit as an image is.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from stepdistill.data.base import Fit
from stepdistill.data.decoding import UnreadableImageError, fit_image
from stepdistill.data.remote import RemoteError
from stepdistill.data.tars import MAX_FILE_BYTES, TarMember

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
"""Endings of the files that are listed as clips."""


def open_reader() -> Any:
    """Return PyAV; raise ``ValueError`` that names the package if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "data.fps: expected the package av, which reads clips: pip install 'stepdistill[video]'"
        ) from error
    return av


def read_clip(source: str | TarMember, size: Sequence[int], fps: float, fit: Fit = "crop") -> np.ndarray:
    """Return the pixels (3, F, H, W) uint8 of the beginning of a video.

    Args:
        source: a path, or a file in a tar.
        size: (F, H, W).
        fps: frames a second.
        fit: how a frame of other proportions is made to fit, see ``data.fit``.

    Raises:
        UnreadableImageError: saying why, but not which video.
    """
    frames, (count, height, width) = [], size
    with opened(source) as container:
        for frame in nearest_frames(timed(container), count, fps):
            frames.append(fit_image(frame, 3, (height, width), fit))
    if len(frames) < count:
        raise UnreadableImageError(f"expected {count} frames at {fps:g} a second, got {len(frames)}")
    return np.stack(frames, 1)


def read_frame_size(source: str | TarMember) -> tuple[int, int]:
    """Return the (height, width) of a video, as its header tells it.

    Raises:
        UnreadableImageError: saying why, but not which video.
    """
    with opened(source) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width


@contextlib.contextmanager
def opened(source: str | TarMember) -> Iterator[Any]:
    """Yield a video as PyAV's container; what goes wrong inside the context is said as ``UnreadableImageError``."""
    av = open_reader()
    try:
        with av.open(io.BytesIO(source.read(MAX_FILE_BYTES)) if isinstance(source, TarMember) else source) as container:
            yield container
    except RemoteError:  # of the network, and not of this video
        raise
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise UnreadableImageError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def timed(container: Any) -> Iterator[tuple[float, Image.Image]]:
    """Yield the time in seconds and the picture of every frame of the first video stream."""
    began = None
    for frame in container.decode(container.streams.video[0]):
        began = frame.time if began is None else began
        yield frame.time - began, frame.to_image()


def nearest_frames(frames: Iterator[tuple[float, Any]], count: int, fps: float) -> Iterator[Any]:
    """Yield the ``count`` frames nearest to the times 0, 1 / fps, 2 / fps, ..., as long as the frames reach them.

    >>> list(nearest_frames(iter([(0.0, "a"), (0.4, "b"), (1.1, "c")]), 4, fps=2))
    ['a', 'b', 'c']
    """
    wanted, before = 0, None
    for now in frames:
        while wanted < count and now[0] >= wanted / fps:
            yield nearer(before or now, now, wanted / fps)[1]
            wanted += 1
        if wanted == count:  # what follows, often most of the video, is not decoded
            return
        before = now
    if before is not None and wanted / fps - before[0] < 0.5 / fps:
        yield before[1]


def nearer(before: tuple[float, Any], now: tuple[float, Any], time: float) -> tuple[float, Any]:
    """Return that of two frames, with their times, which is nearer to ``time``."""
    return before if abs(before[0] - time) < abs(now[0] - time) else now
