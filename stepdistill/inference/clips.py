"""Clips as files that browsers play."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

FPS = 16
"""Frames a second of a written clip, as Wan's are."""


def open_writer() -> Any:
    """Return PyAV; raise ``ValueError`` that names the package if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "clips: expected the package av, which writes them: pip install 'stepdistill[video]'"
        ) from error
    return av


def write_clip(clip: Tensor, path: Path, fps: int = FPS) -> None:
    """Write a clip (3, F, H, W) of bytes as H.264 in an mp4; an odd last row or column is left out.

    Raises:
        ValueError: if PyAV is not installed.
    """
    av = open_writer()
    _, _, height, width = clip.shape
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height // 2 * 2, width // 2 * 2, "yuv420p"
        for frame in clip[:, :, : stream.height, : stream.width].permute(1, 2, 3, 0).cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
