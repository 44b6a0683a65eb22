"""Cost of an image: floating-point operations, memory, parameters. Calls and seconds are counted while sampling."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepdistill.inference.rows import network_of
from stepdistill.inference.sampling import class_count, condition_of, cycle_labels


def flops_per_image(pipeline: Any, call: Mapping[str, Any], captions: Sequence[str] | None = None) -> int:
    """Return the floating-point operations of one image, a multiply-add being two; runs the pipeline for one image.

    Matrix products, convolutions and attention count, element-wise work does not. Attention runs unfused, because the
    counter does not know the CPU's fused kernels.
    """
    classes = class_count(pipeline)
    labels = None if classes is None else cycle_labels(1, range(classes))
    condition = condition_of(pipeline, range(1), labels, captions and captions[:1])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        pipeline(**condition, generator=[torch.Generator("cpu").manual_seed(0)], output_type="np", **call)
    return int(counter.get_total_flops())


def parameter_count(pipeline: Any) -> int:
    """Return the number of parameters of the denoising network."""
    return sum(parameter.numel() for parameter in network_of(pipeline).parameters())


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the most memory in use so far, in MB: the GPU allocator's, or the whole process's on a CPU."""
    if device.type == "cuda":
        return {"peak_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6, "peak_memory_of": "GPU allocator"}
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return {"peak_memory_mb": peak, "peak_memory_of": "process"}
