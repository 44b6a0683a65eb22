"""``stepdistill generate``: from prompts or labels to a grid or single files, optionally beside the teacher's images.

Image i is a function of (pipeline, seed, i, its prompt), the same for every batch size. A single file records
how it was made as PNG text: ``prompt`` or ``class_label``, ``seed`` and ``index`` (``stepdistill generate`` repeats the
image from both), ``generator_seed`` (for ``torch.Generator().manual_seed`` in diffusers), ``pipeline`` and, if there is
one, ``negative_prompt``. A folder of such files with its ``metadata.jsonl`` is training data: LADD and other methods
can learn from a teacher's own samples.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.data.prompts import first_prompts, prompt_lines
from stepdistill.data.text import decode_text
from stepdistill.export.contract import contract_of, read_contract
from stepdistill.export.habits import guidance_argument
from stepdistill.export.pipeline import load_pipeline
from stepdistill.families.config import OPTIONS, TeacherConfig
from stepdistill.families.prompts import prompt_reader, warn_too_long
from stepdistill.files.schema import build
from stepdistill.inference.processes import open_state, own_part, together
from stepdistill.inference.rows import network_of
from stepdistill.inference.sampling import Images, class_count, sample_images
from stepdistill.inference.saving import FRAMES_ARGUMENTS
from stepdistill.inference.solvers import check_steps, load_to_call, pipeline_under, teacher_call

NUM_IMAGES = 16
"""Number of images if neither a number nor several prompts are given."""


CONTENT_ARGUMENTS = (
    "height", "width", *FRAMES_ARGUMENTS, "use_resolution_binning", "max_sequence_length", "clean_caption",
)  # fmt: skip
"""Arguments of a student's call that its teacher gets too: they define the image, not the steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The images to generate.

    Attributes:
        prompts: of a text-to-image pipeline; image i gets prompt i modulo their number.
        negative_prompt: what guidance leads every image away from.
        labels: of a class-conditional pipeline, likewise; None is all classes in turn.
        num_images: number of images; None is one per prompt, or 16 for at most one prompt.
        seed: of the whole set.
        batch_size: images per call; changes only the speed.
        call: further arguments of the pipeline's call.
    """

    prompts: Sequence[str] = ()
    negative_prompt: str | None = None
    labels: Sequence[int] | None = None
    num_images: int | None = None
    seed: int = 0
    batch_size: int = 100
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: expected at least 1, got {value}")

    @property
    def count(self) -> int:
        """Number of images."""
        if self.num_images is not None:
            return self.num_images
        return len(self.prompts) if len(self.prompts) > 1 else NUM_IMAGES


def decode_flag(text: str, flag: str) -> str:
    """Return a text of the command line; raise ``ValueError`` with the flag's name if it is not UTF-8."""
    return decode_text(os.fsencode(text), flag)


def collect_prompts(lines: Sequence[str], file: str | None) -> list[str]:
    """Return the prompts of the command line, then those of a file, or of standard input (``-``), one per line.

    Raises:
        ValueError: if the file is missing or has no prompts, or a text is not UTF-8; it names the line.
    """
    given = [decode_flag(line, "--prompt") for line in lines]
    if file is None:
        return given
    if file != "-" and not Path(file).is_file():
        raise ValueError(f"--prompt_file: no such file {file!r} ('-' is standard input)")
    if file == "-" and open_state().num_processes > 1:
        raise ValueError("--prompt_file: expected a file for several processes, got standard input")
    more = prompt_lines(decode_text(sys.stdin.buffer.read(), "stdin")) if file == "-" else first_prompts(Path(file))
    if not more:
        raise ValueError("--prompt_file: standard input holds no prompts")
    return [*given, *more]


def generate_images(pipeline: Any, request: Request) -> Images:
    """Return the images of a request, sampled from one pipeline by all processes, each on its device."""
    part, own = own_part(request.count), []
    if part:
        pipeline.to(open_state().device)
        own = [sample_images(
            pipeline, len(part), first=part.start, seed=request.seed, batch_size=request.batch_size,
            num_classes=class_count(pipeline), labels=request.labels, captions=list(request.prompts) or None,
            negative_prompt=request.negative_prompt, call=request.call,
        )]  # fmt: skip
    return together(own)


def open_pipeline(path: str, request: Request, trust: Mapping[str, bool]) -> Any:
    """Open a pipeline for a request.

    Args:
        path: its folder.
        request: the images to generate.
        trust: arguments of :func:`stepdistill.load_pipeline` about untrusted files.

    Raises:
        ValueError: if there is no pipeline, prompts are missing or not accepted, or the negative prompt would be
            ignored.
    """
    pipeline = load_pipeline(path, **trust)
    takes_text = "prompt" in inspect.signature(type(pipeline).__call__).parameters
    if takes_text and not request.prompts:
        raise ValueError(f"{path} generates images from text; give --prompt or --prompt_file")
    if not takes_text and request.prompts:
        raise ValueError(f"{path} takes no text; give --class_labels, or nothing, in place of prompts")
    check_labels(pipeline, path, request)
    check_negative_prompt(pipeline, path, request, "--guidance_scale", {**contract_of(pipeline).call, **request.call})
    warn_of_other_steps(pipeline, path, request)
    if takes_text:
        tokenizer, limit = prompt_reader(pipeline, contract_of(pipeline).call)
        warn_too_long(tokenizer, request.prompts, limit=limit, what="prompts")
        if request.negative_prompt is not None:
            warn_too_long(tokenizer, [request.negative_prompt], limit=limit, what="negative prompts")
    return pipeline


def check_labels(pipeline: Any, path: str, request: Request) -> None:
    """Raise ``ValueError`` if a pipeline takes no class labels, but some are asked for, or has no such class."""
    count = class_count(pipeline)
    if request.labels is None:
        return
    if count is None:
        raise ValueError(f"--class_labels: {path} ({type(pipeline).__name__}) takes none")
    for label in request.labels:
        if label not in (*range(count), pipeline.config.get("null_class")):
            raise ValueError(f"--class_labels: expected 0 to {count - 1}, the classes of {path}, got {label}")


def warn_of_other_steps(pipeline: Any, path: str, request: Request) -> None:
    """Warn if a student is asked for another number of steps than it was trained for."""
    contract = contract_of(pipeline)
    asked = request.call.get("num_inference_steps", contract.steps)
    if contract.origin.method is not None and asked != contract.steps:
        warnings.warn(
            f"--num_inference_steps: got {asked}; {path} was made for {contract.steps}, and other numbers may give "
            "worse images",
            stacklevel=2,
        )


def check_negative_prompt(pipeline: Any, path: str, request: Request, flag: str, call: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` with the reason if a call of the pipeline would ignore the negative prompt.

    Args:
        pipeline: the pipeline.
        path: its folder.
        request: the images to generate.
        flag: the command-line flag that sets the guidance of the call.
        call: arguments of that call; the pipeline's defaults are those of the others.
    """
    if request.negative_prompt is None:
        return
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if "negative_prompt" not in accepted:
        raise ValueError(f"--negative_prompt: {path} ({type(pipeline).__name__}) takes none")
    if network_of(pipeline).config.get("time_cond_proj_dim") is not None:
        raise ValueError(f"--negative_prompt: {path}: guidance is an input of its network; nothing reads it")
    if "true_cfg_scale" in accepted:  # FLUX.1's is 1, and no student is trained for another
        if (scale := call.get("true_cfg_scale", accepted["true_cfg_scale"].default)) <= 1:
            raise ValueError(f"--negative_prompt: {path} is called with true_cfg_scale {scale:g}; nothing reads it")
        return
    _, none = guidance_argument(contract_of(pipeline))
    scale = call.get("guidance_scale", accepted["guidance_scale"].default)
    if scale <= none:
        raise ValueError(
            f"--negative_prompt: expected {flag} above {none:g}: {path} is called without guidance ({scale:g})"
        )


def check_condition(teacher: Any, name: str, request: Request, path: str, num_classes: int | None) -> None:
    """Raise ``ValueError`` if a teacher's pipeline is conditioned otherwise than its student, at ``path``."""
    takes_text = "prompt" in inspect.signature(type(teacher).__call__).parameters
    if takes_text != bool(request.prompts):
        takes = "generates images from text" if takes_text else "takes no text"
        raise ValueError(f"--compare: expected a teacher of {path}, got {name}, which {takes}")
    check_labels(teacher, name, request)
    if request.labels is None and (classes := class_count(teacher)) != num_classes:
        raise ValueError(
            f"--compare: expected a teacher of {path}, which has {num_classes} classes, got {name}, which has "
            f"{classes}; give --class_labels"
        )


def open_teacher(
    path: str, other: str, request: Request, steps: int, guidance: float | None, trust: Mapping[str, bool]
) -> tuple[Any, Request]:
    """Open the teacher of a pipeline; return it with a request for the same noise and prompts.

    Args:
        path: the pipeline's folder, whose contract names its teacher and the guidance of the distillation.
        other: ``"teacher"``, or a teacher's folder.
        request: what the pipeline is asked for.
        steps: of the teacher, by DDIM or, if it is a flow, by its own scheduler.
        guidance: of the teacher; None is that of the distillation.
        trust: keys of the ``teacher`` section about untrusted files.

    Raises:
        ValueError: if the contract names no teacher, there is none, or it would ignore the negative prompt.
    """
    contract = read_contract(Path(path))
    teacher = contract.origin.teacher if other == "teacher" else other
    options = contract.origin.teacher_options if other == "teacher" else {}
    options = {key: value for key, value in options.items() if key in OPTIONS}
    if teacher is None:
        raise ValueError(f"--compare: the contract of {path} names no teacher; give the teacher's folder")
    config = build(TeacherConfig, {"path": teacher, **options, **trust}, "--compare")
    try:
        family = load_to_call(config)
        pipeline = pipeline_under(family, config, "DDIM")
    except ValueError as error:
        raise ValueError(f"--compare: {str(error).removeprefix('teacher.path: ')}") from error
    check_steps(pipeline.scheduler.config, steps, "--compare_steps", teacher)
    check_condition(pipeline, teacher, request, path, contract.num_classes)
    accepted = inspect.signature(type(pipeline).__call__).parameters
    call = {name: value for name, value in contract.call.items() if name in CONTENT_ARGUMENTS and name in accepted}
    guidance = contract.reproduced_guidance if guidance is None else guidance
    call |= teacher_call(family, {"num_inference_steps": steps, "guidance_scale": guidance})
    check_negative_prompt(pipeline, teacher, request, "--compare_guidance_scale", call)
    if request.negative_prompt is not None:
        call.pop("negative_prompt", None)  # the null prompt, with which some pipelines are told to guide
    return pipeline, dataclasses.replace(request, call=call)
