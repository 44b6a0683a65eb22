"""The accelerator, and what the environment may ask of it.

``accelerate launch`` turns its flags, and the file of defaults in the home directory that ``accelerate config`` writes,
into variables of the environment; without the launcher nothing reads that file. Each variable that could change the
numbers of a run has one row below: it is refused, or the configuration decides and a sentence says so. Which device is
used, and by how many processes, the environment alone decides (``ACCELERATE_USE_CPU``, ``ACCELERATE_TORCH_DEVICE``,
``CUDA_VISIBLE_DEVICES``), and whether networks are sharded (``ACCELERATE_USE_FSDP``, see
:mod:`stepdistill.training.fsdp`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

logger = get_logger(__name__)

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, sequence or context parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}
"""Ways of training that this project does not have."""

PRECISION, ACCUMULATION = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
DECIDED_HERE = {
    PRECISION: ("no", "the configuration's precision decides"),
    ACCUMULATION: ("1", "train.accumulation decides"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "train.compile decides"),
}
"""What is ignored: the value that asks for nothing, and why."""

HEEDED = {
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "torch rounds float32 products on a GPU differently",
    "NVIDIA_TF32_OVERRIDE": "CUDA rounds float32 products on a GPU differently",
}
"""What changes the last digits below anything that this project sets."""


def check_environment() -> None:
    """Raise ``ValueError`` if the environment asks for a way of training that this project does not have."""
    for variable, name in REFUSED.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"{variable}: expected false, got {os.environ[variable]} ({name} is not supported); launch with "
                "configs/accelerate/multi_gpu.yaml or fsdp2.yaml"
            )


def check_alone(command: str) -> None:
    """Raise ``ValueError`` if several processes were launched for a command that writes its files in one.

    >>> check_alone("benchmark")
    """
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"{command}: expected one process, got {count}; launch train, generate and evaluate in several"
        )


def open_accelerator(
    mixed_precision: str | None, agreed: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> Accelerator:
    """Return an accelerator that takes no number from the environment, and say what is ignored there.

    Args:
        mixed_precision: accelerate's word; None takes what the session has, for callers that do not rest on it.
        agreed: values of variables, by name, with which the configuration agrees.
        options: further arguments of the ``Accelerator``.

    Raises:
        ValueError: as :func:`check_environment` does, or if the session has an accelerator of another precision.
    """
    check_environment()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise processes on CPUs would not find each other
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        **options,
    )
    for sentence in remarks(os.environ, agreed):
        logger.warning(sentence)
    return accelerator


def own_device() -> torch.device:
    """Return the device of a process that may have others beside it: the GPU of its number, or the CPU.

    It is the CPU, too, where the environment asks for it (``ACCELERATE_USE_CPU``).

    >>> own_device().type in ("cpu", "cuda")
    True
    """
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def remarks(environment: Mapping[str, str], agreed: Mapping[str, str]) -> list[str]:
    """Return a sentence for every variable of the environment that a run should not pass over in silence."""
    sentences = []
    for variable, (nothing, reason) in DECIDED_HERE.items():
        if environment.get(variable, nothing).lower() not in (nothing, agreed.get(variable)):
            sentences.append(f"{variable}={environment[variable]} is ignored: {reason}")
    for variable, effect in HEEDED.items():
        if variable in environment:
            sentences.append(f"{variable}={environment[variable]} takes effect: {effect}")
    return sentences
