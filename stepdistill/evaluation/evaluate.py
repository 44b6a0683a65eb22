"""How good is this pipeline? Numbers that can be compared, and what they cost.

Images pass once through the networks that judge (:mod:`~stepdistill.evaluation.extraction`), whatever number of metrics
is asked for (:mod:`~stepdistill.evaluation.suite`). A result says everything that gives its numbers a meaning: under
``setting`` what two results must share to be compared, under ``subject`` what was measured, under ``timing`` on what
machine. On one machine the numbers are the same, to the last digit, for every number of processes and interruption; for
every batch size, they are where no text encoder or decoder sees the batch (:mod:`~stepdistill.inference.sampling`).
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from stepdistill.config import fingerprint
from stepdistill.evaluation.cost import flops_per_image, parameter_count, peak_memory
from stepdistill.evaluation.extraction import OnDisk, Sampled, Source, collect, read_captions
from stepdistill.evaluation.image_set import ImageFiles
from stepdistill.evaluation.panel import Panel
from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.results import machine, versions, write_result
from stepdistill.evaluation.suite import Judge
from stepdistill.inference.sampling import ROWS, Images, network_of


def measure(
    source: Source, panel: Panel, wanted: Sequence[str], *, setting: Mapping[str, Any], work: Path | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Scores of a set of images, the same in every process, and what was found on the way."""
    panel.check(wanted)
    found = collect(source, panel.embed, work=work, identity=setting)
    scores = [panel.score(found, wanted) if PartialState().is_main_process else {}]
    broadcast_object_list(scores)
    return scores[0], found


def evaluate_pipeline(
    pipeline: Any,
    judge: Judge | Panel,
    *,
    wanted: Sequence[str] = ("fd",),
    count: int = 5000,
    seed: int = 0,
    batch_size: int = 100,
    precision: str = "fp32",
    call: Mapping[str, Any] | None = None,
    captions: Sequence[str] | None = None,
    size: int | None = None,
    rows: int = ROWS,
    work: Path | None = None,
    name: str = "pipeline",
) -> dict[str, Any]:
    """Sample a pipeline and score it: one row of a table, with all it takes to repeat it.

    Args:
        pipeline: see :func:`stepdistill.inference.sampling.sample_images`.
        judge: who judges.
        wanted: metrics, see :mod:`stepdistill.evaluation.metrics.names`; ``clip`` with a panel that has a CLIP.
        count: images.
        seed: of the set.
        batch_size: images a call; changes nothing but the speed.
        precision: ``"bf16"`` runs the network under autocast.
        call: further arguments of the pipeline's call.
        captions: prompts, one an image.
        size: images are resized and cropped to a square of this side.
        rows: rows that the network sees at a time: what the memory must hold, and what the last bits depend on.
        work: folder where finished chunks are kept; the same call again goes on from there.
        name: of the row.
    """
    panel, call = (judge if isinstance(judge, Panel) else Panel(judge)), dict(call or {})
    panel.refuse_critic(getattr(pipeline, "contract_critic", {}))
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it would paint some images black
    source = Sampled(
        pipeline, count, size=size, seed=seed, batch_size=batch_size, captions=captions, precision=precision, call=call,
        rows=rows, description=name,
    )  # fmt: skip
    setting = _setting(
        panel, num_samples=count, seed=seed, precision=precision, size=size, rows=rows, captions=captions
    )
    subject = describe_pipeline(pipeline, call)
    scores, found = measure(source, panel, wanted, setting={**setting, **subject}, work=work)
    cost = {
        "calls": _mean(found["calls"], found["images"]),
        "seconds_per_image": statistics.median(found["seconds"].tolist()),
        "parameters": parameter_count(pipeline),
        **peak_memory(pipeline.device),
    }
    timing = {**machine(pipeline.device), "batch_size": batch_size, "processes": PartialState().num_processes}
    return {"name": name, **cost, **scores, "setting": setting, "subject": subject, "timing": timing}


def evaluate_files(
    files: ImageFiles, judge: Judge | Panel, *, wanted: Sequence[str] = ("fd",), size: int | None = None,
    work: Path | None = None, name: str = "images",
) -> dict[str, Any]:  # fmt: skip
    """Score images that were generated elsewhere."""
    panel = judge if isinstance(judge, Panel) else Panel(judge)
    setting = _setting(panel, num_samples=len(files), seed=None, precision=None, size=size, rows=None, captions=None)
    subject = {"kind": "images", "path": str(files.path)}
    scores, _ = measure(OnDisk(files), panel, wanted, setting={**setting, **subject}, work=work)
    return {"name": name, **scores, "setting": setting, "subject": subject, "timing": machine(torch.device("cpu"))}


def _setting(panel: Panel, *, captions: Sequence[str] | None, **settings: Any) -> dict[str, Any]:
    hashed = None if captions is None else hashlib.sha256("\n".join(captions).encode()).hexdigest()
    return {**settings, "captions": hashed, **panel.describe(), "versions": versions()}


def _mean(values: Tensor, weights: Tensor) -> float:
    return ((values * weights).sum() / weights.sum()).item()


def describe_pipeline(pipeline: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline is, so far as its images depend on it: weights, scheduler, call."""
    weights = hashlib.sha256()
    for key, tensor in network_of(pipeline).state_dict().items():
        weights.update(key.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    scheduler = {key: value for key, value in dict(pipeline.scheduler.config).items() if not key.startswith("_")}
    own = {key: value for key, value in dict(pipeline.config).items() if not key.startswith("_") and _plain(value)}
    return {
        "kind": "pipeline",
        "pipeline": type(pipeline).__name__,
        "weights_sha256": weights.hexdigest(),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": fingerprint(scheduler),
        "config": own,
        "call": {**getattr(pipeline, "contract_call", {}), **call},
    }


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def read_images(path: Path, limit: int | None) -> Images:
    """Reference images from an ``.npz`` or a folder, mixed by a fixed permutation, as bytes."""
    files = ImageFiles(path)
    return files.read(range(min(limit or len(files), len(files))))


def run_protocol(
    protocol: Protocol, about: Mapping[str, Any], *, output: Path, pipeline: Any = None, images: str | None = None,
    name: str, batch_size: int = 100, call: Mapping[str, Any] | None = None, write_reference: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a pipeline, or else a folder of ``images``, by a protocol, and write the result file.

    Args:
        protocol: how.
        about: the protocol's name and what was overridden, see :func:`stepdistill.evaluation.protocol.read_protocol`.
        output: the result file; finished chunks are kept beside it until it is written.
        pipeline: what is measured.
        images: what is measured where there is no pipeline.
        name: of the result.
        batch_size: images a call.
        call: arguments of the pipeline's call beside the protocol's.
        write_reference: where to write the reference's statistics.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())  # or processes on CPUs would not find each other
    files = None if images is None else ImageFiles(images, size=protocol.size, limit=protocol.num_samples)
    captions = read_captions(protocol.captions, protocol.num_samples) if protocol.captions else None
    panel = Panel.open(protocol, state.device)
    work = output.with_suffix(".work")
    if files is not None:
        result = evaluate_files(files, panel, wanted=protocol.metrics, size=protocol.size, work=work, name=name)
    else:
        asked = {key: getattr(protocol, key) for key in ("guidance_scale", "num_inference_steps")}
        call = {**(call or {}), **{key: value for key, value in asked.items() if value is not None}}
        result = evaluate_pipeline(
            pipeline.to(state.device), panel, wanted=protocol.metrics, count=protocol.num_samples, seed=protocol.seed,
            batch_size=batch_size, precision=protocol.precision, call=call, captions=captions, size=protocol.size,
            rows=protocol.rows, work=work, name=name,
        )  # fmt: skip
        result["flops_per_image"] = flops_per_image(pipeline, call, captions)
    result |= {"protocol": dict(about)}
    if state.is_main_process:
        if write_reference is not None:
            panel.judge.statistics().write(write_reference)
        write_result(output, result)
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()
    return result
