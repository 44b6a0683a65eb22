"""Measure a pipeline, or images, and write down everything that gives the numbers a meaning.

A result holds under ``setting`` what two results must share to be compared, under ``subject`` what was measured, and
under ``timing`` the machine. On one machine the numbers are the same, to the last digit, for every number of processes
and after an interruption; also for every batch size, unless a text encoder or a decoder sees the batch
(:mod:`~stepdistill.inference.sampling`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from stepdistill.evaluation.cost import flops_per_image
from stepdistill.evaluation.extraction import collect, remove_chunks
from stepdistill.evaluation.image_set import ImageSet
from stepdistill.evaluation.networks import Networks
from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.reference import check_size
from stepdistill.evaluation.results import versions, write_result
from stepdistill.evaluation.sources import FileSource, PipelineSource, Source, read_captions
from stepdistill.evaluation.suite import MetricSuite


def evaluate(
    source: Source, suite: MetricSuite, *, metrics: Sequence[str] = ("fd",), name: str, work: Path | None = None
) -> dict[str, Any]:
    """Return the metrics of a set of images, with what they depend on and cost: the same in every process.

    Args:
        source: the images.
        suite: what measures them.
        metrics: names of :data:`stepdistill.evaluation.metrics.table.METRICS`.
        name: of the result.
        work: folder for finished chunks; the same call continues from there.

    Raises:
        ValueError: if a metric cannot be computed, or a network of the suite trained what is measured.
    """
    suite.check(metrics)
    suite.check_conditions(metrics, source.labels, source.captions)
    suite.refuse_critic(source.critic)
    setting = {**source.setting(), **suite.describe(), "versions": versions()}
    subject = source.subject()
    rows = collect(source, suite, work=work, identity={**setting, **subject})
    scores = [suite.score_rows(rows, metrics) if PartialState().is_main_process else {}]
    broadcast_object_list(scores)
    result = {"name": name, **source.cost(rows), **scores[0]}
    return result | {"setting": setting, "subject": subject, "timing": source.timing()}


def run_protocol(
    protocol: Protocol, about: Mapping[str, Any], *, output: Path, pipeline: Any = None,
    call: Mapping[str, Any] | None = None, images: str | None = None, name: str, batch_size: int = 100,
    write_reference: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a pipeline, or otherwise a folder of ``images``, by a protocol, and write the result file.

    Args:
        protocol: how to measure.
        about: the protocol's name and what was overridden, see :func:`stepdistill.evaluation.protocol.read_protocol`.
        output: the result file; finished chunks are kept beside it until it is written.
        pipeline: what is measured.
        call: arguments of its calls, see :meth:`stepdistill.evaluation.protocol.Protocol.call`.
        images: what is measured where there is no pipeline.
        name: of the result.
        batch_size: images per call of the pipeline.
        write_reference: where to write the reference's statistics.
    """
    assert protocol.reference is not None, "read_protocol refuses this"
    check_size(protocol.reference, protocol.size)
    state = PartialState(cpu=not torch.accelerator.is_available())  # or processes on CPUs would not find each other
    source = open_source(protocol, pipeline, images, call=call or {}, name=name, batch_size=batch_size)
    networks = Networks.of_protocol(protocol, state.device)
    networks.check_conditions(protocol.metrics, source.labels, source.captions)
    networks.refuse_critic(source.critic)
    suite = MetricSuite.of_protocol(protocol, networks)  # takes hours for a large reference, so all else comes before
    work = output.with_suffix(".work")
    result = evaluate(source, suite, metrics=protocol.metrics, name=name, work=work)
    if isinstance(source, PipelineSource):
        result["flops_per_image"] = flops_per_image(source.pipeline, source.call, source.captions)
    result["protocol"] = dict(about)
    if state.is_main_process:
        if write_reference is not None:
            suite.statistics().write(write_reference)
        write_result(output, result)
        remove_chunks(work)
    state.wait_for_everyone()
    return result


def open_source(
    protocol: Protocol, pipeline: Any, images: str | None, *, call: Mapping[str, Any], name: str, batch_size: int
) -> Source:
    """Return the images that a protocol measures: of a pipeline, on this process's device, or of files."""
    if images is not None:
        return FileSource(ImageSet(images, size=protocol.size, limit=protocol.num_samples), protocol.size)
    captions = read_captions(protocol.captions, protocol.num_samples) if protocol.captions else None
    return PipelineSource(
        pipeline=pipeline.to(PartialState().device), count=protocol.num_samples, seed=protocol.seed,
        batch_size=batch_size, precision=protocol.precision, call=call, captions=captions,
        size=protocol.size, rows=protocol.rows, name=name,
    )  # fmt: skip
