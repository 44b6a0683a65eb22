"""The README of an export."""

from __future__ import annotations

from stepdistill.export.contract import Contract

EXAMPLES = {"prompt": "'a red apple'", "class_labels": "class_labels=[0, 1, 2]", "none": "batch_size=3"}
"""Arguments of an example call, by the kind of condition."""


MARKUP = "&<>{}[]|`*#"
"""Characters with a meaning in HTML, Markdown and Jinja."""


def model_card(contract: Contract) -> str:
    """Return the README of an export: what it is, how to call it, its measured results."""
    from huggingface_hub import ModelCardData

    origin = contract.origin
    data = ModelCardData(library_name="diffusers", tags=["stepdistill", "distillation", one_line(origin.method or "")])
    custom = ", trust_remote_code=True" if contract.own_code else ""
    custom += "".join(f", {name}=None" for name in contract.absent)
    linked = ", ".join(code(name) for name in contract.linked)
    return f"""---
{data.to_yaml()}
---
# A {contract.steps}-step student

Distilled by **{plain(origin.method or "?")}** with stepdistill from {code(origin.teacher or "?")}.

![samples](samples.png)

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder"{custom})
images = pipe({example_call(contract)}).images
```

Scheduler: {code(contract.scheduler)}, timesteps {contract.timesteps}. Other step counts give worse images.

{seeding(contract)}
{linked + " are links into the teacher's folder: `cp -rL` makes a complete copy." if linked else ""}
{results_table(contract)}"""


def seeding(contract: Contract) -> str:
    """Return what must be seeded for the same images in every call, as Markdown."""
    generators = "`generator=[torch.Generator().manual_seed(seed) for seed in seeds]`"
    if not contract.global_noise:
        return f"One generator an image, {generators}, makes an image independent of its batch."
    return f"""`{contract.pipeline}` draws the initial noise from `generator`, but does not hand it to its scheduler:
the noise that a step adds comes from torch's global generator. For the same images in every call, seed both:

```python
torch.manual_seed(0)
images = pipe({example_call(contract)}, generator=torch.Generator().manual_seed(0)).images
```

An image then still depends on its batch. `stepdistill.load_pipeline` hands the generators on, as in training: there
{generators} makes an image independent of its batch."""


def example_call(contract: Contract) -> str:
    """Return the arguments of a call that samples as trained, as Python source."""
    condition = EXAMPLES[contract.conditioning or "none"]
    if contract.pipeline == "ConsistencyModelPipeline" and contract.conditioning == "class_labels":
        condition += ", batch_size=3"  # it does not count the labels
    return ", ".join([condition, *(f"{name}={value!r}" for name, value in contract.call.items())])


def results_table(contract: Contract) -> str:
    """Return the measured results as a table; empty if there are none."""
    if not contract.origin.results:
        return ""
    rows = [f"| {plain(name)} | {plain(value)} |\n" for name, value in contract.origin.results.items()]
    return "| measured | value |\n|---|---|\n" + "".join(rows)


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
