"""Images on request: prompts or labels in, a grid or single files out, beside the teacher's where that is asked for.

Image i of a call is a function of (pipeline, seed, i, its prompt), up to rounding for every batch size. A file carries
what made it as PNG text: ``prompt`` or ``class_label``, ``seed`` and ``index`` (``stepdistill generate`` repeats the
image from both), ``generator_seed`` (what ``torch.Generator().manual_seed`` takes for this image in diffusers),
``pipeline`` and, where there is one, ``negative_prompt``. A folder of them is data to train on, as ``metadata.jsonl``
says what each was asked for: a teacher's own samples are what LADD and others learn from where there are no images.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo

from stepdistill.config import build
from stepdistill.data.text import decode_text, prompt_lines, read_prompts
from stepdistill.export.pipeline import load_pipeline, read_contract
from stepdistill.families.config import TeacherConfig
from stepdistill.families.prompts import prompt_reader, warn_too_long
from stepdistill.inference.grids import save_grid, to_pil
from stepdistill.inference.sampling import Images, class_count, network_of, sample_images
from stepdistill.inference.solvers import teacher_pipeline
from stepdistill.randomness import derive_seed

NUM_IMAGES = 16
"""Where neither a number nor several prompts are given."""


WHAT = ("height", "width", "use_resolution_binning", "max_sequence_length", "clean_caption")
"""Arguments of a student's call that say what is painted, and not in which steps: its teacher gets them too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        prompts: of a text-to-image pipeline; image i gets prompt i modulo their number.
        negative_prompt: what guidance leads every image away from.
        labels: of a class-conditional one, likewise; all classes in turn where there are none.
        num_images: how many; None is one a prompt, or 16 where there is one prompt or none.
        seed: of the whole set.
        batch_size: images a call; changes nothing but the speed.
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
                raise ValueError(f"--{name}: found {value}, wanted at least 1")

    @property
    def count(self) -> int:
        """How many images."""
        if self.num_images is not None:
            return self.num_images
        return len(self.prompts) if len(self.prompts) > 1 else NUM_IMAGES


def decode_flag(text: str, flag: str) -> str:
    """A text of the command line; raises ``ValueError`` with the flag's name if it is no UTF-8."""
    return decode_text(os.fsencode(text), flag)


def collect_prompts(lines: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of a file (``-``: standard input), one a line.

    Raises:
        ValueError: if the file is missing or holds none, or anything is no UTF-8 text; it names the line.
    """
    given = [decode_flag(line, "--prompt") for line in lines]
    if file is None:
        return given
    if file != "-" and not Path(file).is_file():
        raise ValueError(f"--prompt_file: no such file {file!r} ('-' is standard input)")
    more = prompt_lines(decode_text(sys.stdin.buffer.read(), "stdin")) if file == "-" else read_prompts(Path(file))
    if not more:
        raise ValueError("--prompt_file: standard input holds no prompts")
    return [*given, *more]


def generate_images(pipeline: Any, request: Request) -> Images:
    """The images of a request by one pipeline."""
    return sample_images(
        pipeline, request.count, seed=request.seed, batch_size=request.batch_size, num_classes=class_count(pipeline),
        labels=request.labels, captions=list(request.prompts) or None,
        negative_prompt=request.negative_prompt, call=request.call,
    )  # fmt: skip


def open_pipeline(path: str, request: Request, trust: Mapping[str, bool]) -> Any:
    """A pipeline that can take the request.

    Args:
        path: its folder.
        request: what is asked for.
        trust: what of it may run, as :func:`stepdistill.load_pipeline` takes it.

    Raises:
        ValueError: if there is none, or it wants prompts and has none, or the other way round, or it would not heed the
            negative prompt.
    """
    pipeline = load_pipeline(path, **trust)
    takes_text = "prompt" in inspect.signature(type(pipeline).__call__).parameters
    if takes_text and not request.prompts:
        raise ValueError(f"{path} paints from text; give --prompt or --prompt_file")
    if not takes_text and request.prompts:
        raise ValueError(f"{path} takes no text; give --class_labels, or nothing, in place of prompts")
    check_negative_prompt(pipeline, path, request, "--guidance_scale")
    if takes_text:
        tokenizer, limit = prompt_reader(pipeline, getattr(pipeline, "contract_call", {}))
        warn_too_long(tokenizer, request.prompts, limit=limit, what="prompts")
        if request.negative_prompt is not None:
            warn_too_long(tokenizer, [request.negative_prompt], limit=limit, what="negative prompts")
    return pipeline


def check_negative_prompt(pipeline: Any, path: str, request: Request, flag: str) -> None:
    """Refuse a negative prompt that a call of the pipeline would ignore.

    Args:
        pipeline: what is called.
        path: its folder.
        request: what is asked for.
        flag: what sets the guidance of the call.

    Raises:
        ValueError: saying why it would be ignored.
    """
    if request.negative_prompt is None:
        return
    taken = inspect.signature(type(pipeline).__call__).parameters
    if "negative_prompt" not in taken:
        raise ValueError(f"--negative_prompt: {path} ({type(pipeline).__name__}) takes none")
    # FLUX.1 has a guidance of its own for it, which no student is made for; its guidance_scale is an input, or nothing
    if "true_cfg_scale" in taken or network_of(pipeline).config.get("time_cond_proj_dim") is not None:
        raise ValueError(f"--negative_prompt: {path}: guidance is at most an input of its network; nothing reads it")
    usual = getattr(pipeline, "contract_call", {}).get("guidance_scale", taken["guidance_scale"].default)
    scale = request.call.get("guidance_scale", usual)
    if scale <= 1:
        raise ValueError(f"--negative_prompt: {path} is called without guidance ({scale:g}); wanted {flag} above 1")


def beside_teacher(
    images: Images, path: str, other: str, request: Request, steps: int, guidance: float | None,
    trust: Mapping[str, bool],
) -> Images:  # fmt: skip
    """Every image with another pipeline's for the same noise and prompt on its right.

    Args:
        images: of the pipeline at ``path``.
        path: its folder, whose contract knows its teacher, and the guidance it was distilled at.
        other: ``"teacher"``, or a teacher's folder.
        request: what was asked for.
        steps: of the teacher, by DDIM or, where it is a flow, by its own scheduler.
        guidance: of the teacher; None is what the student was distilled at.
        trust: what of the teacher may run, as the ``teacher`` section says it.

    Raises:
        ValueError: if the contract names no teacher, it would not heed the negative prompt, or the two pipelines'
            images differ in size.
    """
    contract = read_contract(Path(path))
    teacher = contract.get("teacher") if other == "teacher" else other
    if teacher is None:
        raise ValueError(f"--compare: {path} does not say what its teacher was; give the teacher's folder")
    pipeline = teacher_pipeline(build(TeacherConfig, {"path": teacher, **trust}, "--compare"), "DDIM")
    taken = inspect.signature(type(pipeline).__call__).parameters
    call = {name: value for name, value in contract.get("call", {}).items() if name in WHAT and name in taken}
    call |= {"num_inference_steps": steps, "guidance_scale": distilled_at(contract) if guidance is None else guidance}
    asked = dataclasses.replace(request, call=call)
    check_negative_prompt(pipeline, teacher, asked, "--compare_guidance_scale")
    right = generate_images(pipeline, asked)
    if right.pixels.shape != images.pixels.shape:
        sizes = " and ".join(f"{found.pixels.shape[2]} x {found.pixels.shape[3]}" for found in (images, right))
        raise ValueError(f"--compare: {path} and {teacher} paint images of different sizes: {sizes}")
    return dataclasses.replace(images, pixels=torch.cat([images.pixels, right.pixels], dim=3))


def distilled_at(contract: Mapping[str, Any]) -> float:
    """The guidance scale whose images a student was to make: baked in, or else what a call of it asks with."""
    baked = contract.get("guidance_distilled", 1.0)
    return contract.get("guidance_scale", 1.0) if baked == 1 else baked


def save_images(images: Images, output: Path, *, seed: int, about: Mapping[str, str]) -> None:
    """Write a grid (a ``.png``) or single images (a folder of data), the latter with what made them as PNG text."""
    if output.suffix == ".png":
        save_grid(images.pixels / 255, output)
        return
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, pixels in enumerate(images.pixels):
        facts = {**about, "seed": seed, "index": index, "generator_seed": derive_seed(seed, index)}
        rows.append({"file_name": f"{index:06d}.png"})
        if images.captions is not None:
            facts["prompt"] = rows[-1]["text"] = images.captions[index]
        if images.labels is not None:
            facts["class_label"] = rows[-1]["label"] = int(images.labels[index])
        to_pil(pixels).save(output / rows[-1]["file_name"], pnginfo=png_text(facts))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (output / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def png_text(facts: Mapping[str, Any]) -> PngInfo:
    """Facts as international text chunks of a PNG."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    return info
