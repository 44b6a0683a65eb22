"""Everyone who judges: a feature network, and for captions a CLIP; each image passes each of them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.suite import Judge, embed_pixels, of_mean
from stepdistill.features.clip import Clip, clip_scores
from stepdistill.inference.sampling import Images

OF_CLIP = ("clip", "cmmd")
"""Metrics that a panel's CLIP takes, where there is one."""


class Panel:
    """Who judges: a feature network, and for captions a CLIP.

    Args:
        judge: for all metrics but the CLIP's.
        clip: for the CLIP score.
        clip_judge: the same CLIP's image half with the reference, for CMMD.
    """

    def __init__(self, judge: Judge, clip: Clip | None = None, clip_judge: Judge | None = None) -> None:
        self.judge, self.clip, self.clip_judge = judge, clip, clip_judge

    @classmethod
    def open(cls, protocol: Protocol, device: torch.device | str = "cpu") -> Panel:
        """As a protocol wants it; metrics that it cannot give are refused here."""
        assert protocol.reference is not None, "read_protocol refuses this"
        options: dict[str, Any] = {"max_images": protocol.reference_images, "size": protocol.size, "device": device}
        clip = Clip.open(protocol.clip, device) if protocol.clip else None
        clip_judge = None
        if clip is not None and "cmmd" in protocol.metrics:
            assert protocol.clip is not None
            clip_judge = Judge.open(protocol.clip, protocol.reference, **options)
        panel = cls(
            Judge.open(protocol.features, protocol.reference, resize=protocol.resize, **options), clip, clip_judge
        )
        panel.check(protocol.metrics)
        return panel

    def check(self, wanted: Sequence[str]) -> None:
        """Refuse what cannot be had.

        Raises:
            ValueError: names the metric and what it needs.
        """
        if "clip" in wanted and self.clip is None:
            raise ValueError("metrics: 'clip' needs a CLIP: give --clip, a folder or hub id")
        self.judge.check(self._of_judge(wanted))
        if self.clip_judge is not None:
            self.clip_judge.check(["cmmd"] if "cmmd" in wanted else [])

    def refuse_critic(self, critic: Mapping[str, str]) -> None:
        """Raise ``ValueError`` if who judges is among the networks, by their sha256, that trained what is judged."""
        networks = [self.judge.features, *([] if self.clip is None else [self.clip.images])]
        for network in networks:
            if network.sha256 in critic.values():
                raise ValueError(
                    f"features: {network.name!r} is what this student's critic saw through in training, and would find "
                    "what it asked for; wanted another network to judge"
                )

    def embed(self, images: Images) -> dict[str, Tensor]:
        """All features of some images: one pass for every metric."""
        self.judge.check_shape(images.pixels.shape[1:])
        found = {"features": self.judge.embed(images.pixels)}
        if self.clip is not None:
            if images.captions is None:
                raise ValueError("metrics: 'clip' needs captions: give --captions, or images with a metadata.jsonl")
            found["clip"] = embed_pixels(self.clip.images, images.pixels)
            found["captions"], found["cut"] = self.clip.embed_captions(images.captions)
        return found

    def score(self, found: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, float]:
        """The wanted metrics of what :meth:`embed` found."""
        labels = found.get("labels")
        scores = self.judge.score_features(found["features"], labels, self._of_judge(wanted))
        if "clip" in wanted:
            scores |= of_mean("clip_score", clip_scores(found["clip"], found["captions"]))
            scores["captions_cut"] = int(found["cut"].sum())
        if "cmmd" in wanted and self.clip_judge is not None:
            scores |= self.clip_judge.score_features(found["clip"], labels, ["cmmd"])
        return scores

    def describe(self) -> dict[str, Any]:
        """Networks and reference, as JSON values."""
        clip = None if self.clip is None else self.clip.images.describe()
        return {"features": self.judge.features.describe(), "clip": clip, "reference": self.judge.describe_reference()}

    def _of_judge(self, wanted: Sequence[str]) -> list[str]:
        elsewhere = OF_CLIP if self.clip_judge is not None else ("clip",)
        return [name for name in wanted if name not in elsewhere]
