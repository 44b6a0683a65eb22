"""The README of an export: what it is, how to call it, what it was measured at, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from stepdistill.export.contract import Contract
from stepdistill.export.provenance import hub_id, public_name
from stepdistill.families.config import several
from stepdistill.files.words import shortened

EXAMPLES = {"prompt": "prompt='your prompt'", "class_labels": "class_labels=[0, 1, 2]", "none": "batch_size=3"}
"""Arguments of an example call, by the kind of condition."""
TASKS = {"prompt": "text-to-image"}
"""The hub's name of what a pipeline of images does, by the kind of condition; the hub has none for classes."""
MARKUP = "&<>{}[]|`*#"
"""Characters with a meaning in HTML, Markdown and Jinja."""
FOLDER = '"path/to/this/folder"'
"""What the calls of a card open before it is on the hub."""


class SampleSheet(NamedTuple):
    """The picture of a card: the student's samples above, the teacher's below.

    Attributes:
        picture: two rows, with the same noise and condition in a column.
        teacher_steps: of the teacher's row.
        conditions: of every column; empty without conditions.
    """

    picture: Image.Image
    teacher_steps: int
    conditions: Sequence[str] = ()


def model_card(contract: Contract, samples: SampleSheet | None = None) -> str:
    """Return the README of an export, whose picture lies as ``samples.png`` beside it."""
    parts = [
        f"---\n{front_matter(contract)}\n---\n# A {contract.steps}-step student", introduction(contract),
        samples_text(contract, samples), call_text(contract), seeding(contract), results_text(contract),
        training_text(contract), additions_text(contract), limits(contract), license_text(contract),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts)) + "\n"


def card_on_hub(card: str, name: str) -> str:
    """Return the README of an export as it is in the repository ``name``: with calls that open it from there."""
    ours = f"import stepdistill\n\npipe = stepdistill.load_pipeline({FOLDER})"
    there = (
        "from huggingface_hub import snapshot_download\n\n"
        f'import stepdistill\n\npipe = stepdistill.load_pipeline(snapshot_download("{name}"))'
    )
    return card.replace(ours, there).replace(FOLDER, f'"{name}"')


def front_matter(contract: Contract) -> str:
    """Return what the hub reads, as YAML."""
    from huggingface_hub import ModelCardData

    origin = contract.origin
    license: dict[str, Any] = {"license": "unknown"}
    for key, value in origin.license.items():
        license[key] = one_line(value)
    return ModelCardData(
        base_model=hub_id(origin.teacher),
        library_name="diffusers",
        pipeline_tag=task(contract),
        tags=["stepdistill", "distillation", *filter(None, [one_line(origin.method or "")])],
        **license,
    ).to_yaml()


def task(contract: Contract) -> str:
    """Return the hub's name of what the pipeline does."""
    if makes_clips(contract):
        return "text-to-video"
    return TASKS.get(contract.conditioning or "none", "unconditional-image-generation")


def makes_clips(contract: Contract) -> bool:
    """Return whether the student makes clips (C, F, H, W)."""
    return len(contract.sample_shape) == 4


def sampled(contract: Contract, arguments: str) -> str:
    """Return a line of Python that calls the pipeline."""
    return f"clips = pipe({arguments}).frames" if makes_clips(contract) else f"images = pipe({arguments}).images"


def introduction(contract: Contract) -> str:
    """Return whose student this is."""
    origin = contract.origin
    teacher = "?" if origin.teacher is None else public_name(origin.teacher)
    return f"Distilled by **{plain(origin.method or '?')}** with stepdistill from {code(teacher)}."


def steps_of(contract: Contract) -> str:
    """Return the number of steps in words."""
    return "1 step, one network call" if contract.steps == 1 else f"{contract.steps} steps, one network call each"


def samples_text(contract: Contract, samples: SampleSheet | None) -> str:
    """Return the picture and what it shows; empty without one."""
    if samples is None:
        return ""
    text = (
        f"![samples](samples.png)\n\nAbove: this student in {steps_of(contract)}. Below: its teacher in "
        f"{samples.teacher_steps}, from the same noise. The images were not selected."
    )
    conditions = "; ".join(plain(shortened(condition) or "(empty)") for condition in samples.conditions)
    return f"{text} From left to right: {conditions}." if conditions else text


def call_text(contract: Contract) -> str:
    """Return the call with diffusers alone and with stepdistill."""
    custom = ", trust_remote_code=True" if contract.own_code else ""
    custom += "".join(f", {name}=None" for name in contract.absent)
    linked = ", ".join(code(name) for name in contract.linked)
    return f"""## Use

With diffusers alone:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({FOLDER}{custom})
{sampled(contract, example_call(contract))}
```

With stepdistill, which knows the arguments:

```python
import stepdistill

pipe = stepdistill.load_pipeline({FOLDER})
{sampled(contract, EXAMPLES[contract.conditioning or "none"])}
```

Scheduler: {code(contract.scheduler)}, timesteps {contract.timesteps}.
{linked + " are links into the teacher's folder: `cp -rL` makes a complete copy." if linked else ""}""".rstrip()


def seeding(contract: Contract) -> str:
    """Return what must be seeded for the same images in every call, as Markdown."""
    generators = "`generator=[torch.Generator().manual_seed(seed) for seed in seeds]`"
    if not contract.global_noise:
        return f"With one generator per image, {generators}, an image does not depend on its batch."
    return f"""`{contract.pipeline}` draws the initial noise from `generator`, but does not pass it to its scheduler:
the noise that a step adds comes from torch's global generator. For the same images in every call, seed both:

```python
torch.manual_seed(0)
{sampled(contract, example_call(contract) + ", generator=torch.Generator().manual_seed(0)")}
```

An image then still depends on its batch. `stepdistill.load_pipeline` passes the generators on, as in training: there
{generators} makes an image independent of its batch."""


def example_call(contract: Contract) -> str:
    """Return the arguments of a call that samples as trained, as Python source."""
    condition = EXAMPLES[contract.conditioning or "none"]
    if contract.pipeline == "ConsistencyModelPipeline" and contract.conditioning == "class_labels":
        condition += ", batch_size=3"  # it does not count the labels
    return ", ".join([condition, *(f"{name}={value!r}" for name, value in contract.call.items())])


def results_text(contract: Contract) -> str:
    """Return the measured results with their setting; that nothing was measured, if so."""
    results, setting = contract.origin.results, contract.origin.measured_on
    if not results:
        return "## Measured\n\nNothing was measured."
    rows = []
    for name, value in results.items():
        ends = [results[f"{name}{end}"] for end in ("_low", "_high") if f"{name}{end}" in results]
        if not name.endswith(("_low", "_high")):
            interval = " to ".join(plain(number(end)) for end in ends)
            rows.append(f"| {plain(name)} | {plain(number(value))} | {interval} |\n")
    told = []
    for key, value in setting.items():
        if key in ("features", "reference", "seed"):
            named = f"of {value.get('images')} images" if type(value) is dict else public_name(str(value))
            told.append(f"{key} {plain(named)}")
    chosen = contract.origin.selected
    bias = " The student was chosen by such a measurement, so its numbers are biased in its favour." if chosen else ""
    where = f"On {', '.join(told)}.{bias}" if told else bias.strip()
    return f"## Measured\n\n| measured | value | 95 % |\n|---|---|---|\n{''.join(rows)}\n{where}".rstrip()


def number(value: Any) -> Any:
    """Return four digits of a number that is not whole; anything else as it is."""
    return f"{value:.4g}" if type(value) is float else value


def training_text(contract: Contract) -> str:
    """Return how the student was trained, as far as its contract tells."""
    origin, cost = contract.origin, contract.origin.training
    facts = {"method": code(origin.method or "?"), "data": code(origin.data) if origin.data else ""}
    if cost.get("steps") and "images" in cost:
        facts["training steps"] = f"{cost['steps']:,}"
        facts["images"] = f"{cost['images']:,}, {cost['images'] / cost['steps']:.0f} per step"
    for key, name in (("teacher_forwards", "images through a network"), ("cpu_minutes", "CPU minutes")):
        facts[name] = f"{cost[key]:,.0f}" if key in cost else ""
    if origin.guidance_distilled not in (None, 1):
        facts["the teacher's guidance scale"] = f"{origin.guidance_distilled:g}"
    if "path" in origin.start:
        facts["started from the student"] = f"{code(public_name(origin.start['path']))}, whose training is counted too"
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items() if value)
    return f"## Training\n\n| what | value |\n|---|---|\n{rows}".rstrip()


def additions_text(contract: Contract) -> str:
    """Return what was added to the teacher, and what the student's adapter then needs; empty if nothing was."""
    options = contract.origin.teacher_options
    loras = several(options.get("lora", ()))
    weights = several(options.get("lora_weights", ())) or (1,) * len(loras)
    items = []
    for path, weight in zip(loras, weights, strict=False):
        name = code(public_name(str(path)))
        items.append(f"- the LoRA {name} at the weight {plain(number(weight))}, in its weights\n")
    for word, path in dict(options.get("embeddings", {})).items():
        items.append(f"- the word {code(word)}, embeddings {code(public_name(str(path)))}, in its text encoders\n")
    if not items:
        return ""
    return (
        f"## Added to the teacher\n\n{''.join(items)}\nThis pipeline contains them. The adapter in `lora/`, if there "
        "is one, does not: load them together with it, at the same weights."
    )


def limits(contract: Contract) -> str:
    """Return what the student cannot do."""
    items = [f"It is made for {steps_of(contract)}. Other step counts give worse images."]
    if contract.origin.guidance_distilled not in (None, 1):
        items.append(
            f"The teacher's guidance scale of {contract.origin.guidance_distilled:g} is built in. A call with guidance "
            "of its own guides twice."
        )
    if contract.conditioning == "prompt" and (contract.guidance_scale or 1) <= 1:
        items.append("Called without guidance, it ignores a negative prompt.")
    items.append("It has its teacher's limits and biases, and may show less variety.")
    return "## Limits\n\n" + "\n".join(f"- {item}" for item in items)


def license_text(contract: Contract) -> str:
    """Return the teacher's licence, or that it is not known."""
    license = contract.origin.license
    if not license:
        return "## Licence\n\nUnknown: the teacher's folder names none. Find out before you pass this student on."
    name = license.get("license_name", license["license"])
    link = f", {code(license['license_link'])}" if "license_link" in license else ""
    return f"## Licence\n\nThe teacher's: {plain(name)}{link}."


def plain(text: object) -> str:
    """Return text that says only what it says: one line, no HTML, no Markdown, no template, no terminal code.

    >>> plain("a<b> {{ c }}")
    'a&lt;b&gt; &#123;&#123; c &#125;&#125;'
    """
    line = "".join(f"&#{ord(character)};" if character in MARKUP else character for character in one_line(text))
    return line.replace("&#60;", "&lt;").replace("&#62;", "&gt;")


def code(text: object) -> str:
    """Return text as Markdown code, in which nothing but the backtick has a meaning."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def one_line(text: object) -> str:
    """Return text without line breaks and control characters."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())
