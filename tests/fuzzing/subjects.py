"""What is damaged and who reads it: one subject for every kind of file that comes from outside."""

import dataclasses
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from contracts.cases import sections
from fuzzing import mutations as m
from PIL import Image
from safetensors.torch import save_file

from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.samples import Samples
from stepdistill.cli import main
from stepdistill.cli.failures import failures_as_sentences
from stepdistill.config import read_config
from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.ode_pairs import Pairs, PairsConfig, make_pairs
from stepdistill.evaluation.metrics.frechet import Moments
from stepdistill.evaluation.protocol import PRESETS, read_protocol
from stepdistill.evaluation.reference import Reference, ReferenceStatistics
from stepdistill.families.additions import add_to_teacher
from stepdistill.families.config import TeacherConfig
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.features.classifier import SmallConvNet
from stepdistill.features.loading import load_features
from stepdistill.files.schema import build
from stepdistill.inference.generate import collect_prompts
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

JSON = (m.json_tree, m.json_tree, m.json_tree, m.json_text, *m.BYTES[:5])
YAML = (m.yaml_tree, m.yaml_tree, m.yaml_tree, m.yaml_text, *m.BYTES[:5])
LINES = (m.lines, m.lines, *m.BYTES[:5])
ZIP = (m.zip_members, m.zip_members, *m.BYTES)
TAR = (m.tar_members, m.tar_members, *m.BYTES)
WEIGHTS = (m.safetensors_header, m.safetensors_header, *m.BYTES)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A file of the world, how it is damaged, and the command that meets it; a refusal names one of ``names``."""

    path: str
    changes: tuple[m.Mutation, ...]
    run: Callable[[Path], object]
    names: tuple[str, ...] = ()
    reader: str = ""

    @property
    def id(self) -> str:
        return f"{self.path}{self.reader}"

    @property
    def named(self) -> tuple[str, ...]:
        return (Path(self.path).name, *self.names)


# ------------------------------------------------------------------------------------------------ the world


def make_world(folder: Path) -> None:
    """Whole and right files of every kind."""
    family = Pixel.tiny()
    config = sections(folder, family, "lcm", save_every=1)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.txt").write_text("method.steps=4\ndata.batch_size=2\noptim.student.lr=1e-3\ntrain.seed=[1]\n")
    Run(resolve(config)).train()
    pairs = PairsConfig(output_dir=str(folder / "pairs"), count=4, batch_size=4, steps=2)
    make_pairs(family, pairs)
    make_pictures(folder)
    make_results(folder)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_{end}.weight": torch.randn(16, 16) for end in "AB"}, folder / "lora.safetensors")
    save_file({"<cat>": torch.randn(2, 16)}, folder / "word.safetensors")
    network = SmallConvNet(3, 4, 4)
    network.save_pretrained(folder / "features")
    features = SmallConvNet.from_pretrained(folder / "features")
    rows = torch.randn(40, features.num_features)
    ReferenceStatistics.of(
        Moments.of(rows), features, rows=rows, labels=torch.arange(40) % 4, images={"sha256": "0", "shape": [3, 8, 8]}
    ).write(folder / "reference.npz")
    shutil.copy(PRESETS / "embedded.yaml", folder / "protocol.yaml")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "prompts.csv").write_text('prompt,category\na cat,animals\n"a dog, running",animals\n')
    (folder / "prompts.json").write_text('[{"prompt": "a cat"}, {"prompt": "a dog"}]')
    (folder / "prompts.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    benchmark = {
        "teacher": {"path": "embedded"},
        "output": "b.json",
        "students": {"a": "b"},
        "solvers": {"DDIM": [1, 2]},
    }
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(benchmark | {"guidance_scales": [1.5, 2]}))


def make_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = [Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)) for _ in range(4)]
    for kind in ("png", "jpeg", "gif", "tiff", "webp", "bmp"):
        (folder / kind).mkdir()
        for index, picture in enumerate(pixels[:3]):
            picture.save(folder / kind / f"{index}.{kind}")
    shutil.copytree(folder / "png", folder / "listed")
    rows = [{"file_name": f"{index}.png", "label": index, "text": f"number {index}"} for index in range(3)]
    (folder / "listed/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(folder / "png", folder / "table")
    table = ["file_name,label,text", *(f"{index}.png,{index},number {index}" for index in range(3))]
    (folder / "table/metadata.csv").write_text("\n".join(table))
    samples = {"arr_0": np.stack([np.asarray(picture) for picture in pixels]), "arr_1": np.arange(4)}
    np.savez_compressed(folder / "samples.npz", **samples)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for index in range(3):
            members = {
                "png": (folder / f"png/{index}.png").read_bytes(),
                "cls": b"%d" % index,
                "txt": b"a cat",
                "json": b'{"a": 1}',
            }
            for suffix, content in members.items():
                entry = tarfile.TarInfo(f"{index}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def make_results(folder: Path) -> None:
    numbers = {"calls": 4.0, "fd": 0.9, "fd_low": 0.8, "fd_high": 1.0, "recall": 0.5, "seconds_per_image": 0.1}
    setting = {
        "num_samples": 10,
        "seed": 0,
        "precision": "fp32",
        "features": {"name": "x", "sha256": "0"},
        "versions": {"torch": "2"},
    }
    for name in ("one", "two"):
        result = {
            "name": name,
            **numbers,
            "setting": setting,
            "subject": {"kind": "pipeline"},
            "timing": {"threads": 1},
        }
        (folder / f"{name}.json").write_text(json.dumps(result))
    rows = [
        {"name": "real images", "kind": "floor", "calls": 0, "fd": 0.1},
        {
            **numbers,
            "name": "teacher",
            "kind": "teacher",
            "calls": 50,
            "solver": "DDIM",
            "steps": 50,
            "guidance_scale": 1.0,
        },
        {
            **numbers,
            "name": "ours",
            "kind": "student",
            "method": "progressive",
            "steps": 4,
            "training": {"teacher_forwards": 10, "cpu_minutes": 1.5},
        },
        {
            **numbers,
            "name": "UniPC",
            "kind": "solver",
            "solver": "UniPC",
            "steps": 4,
            "guidance_scale": 1.5,
            "tried": {"1.5": 0.9},
        },
    ]
    setting |= {"guidance_scales": [1.5, 2], "search_samples": 10, "solvers": {"UniPC": [4]}, "teacher": {"path": "x"}}
    (folder / "bench.json").write_text(json.dumps({"metric": "fd", "setting": setting, "rows": rows}))
    pictures = {"real images": torch.rand(2, 3, 8, 8), "ours": torch.rand(2, 3, 8, 8)}
    Samples.of(pictures, ["a cat", "a dog"]).write(folder / "bench-samples.npz")


# -------------------------------------------------------------------------------------------------- readers


def guarded(function: Callable[[Path], object]) -> Callable[[Path], object]:
    """A function of the library, called as a script calls it."""

    def run(folder: Path) -> None:
        with failures_as_sentences("fuzz"):
            function(folder)

    return run


def dry_run(folder: Path) -> None:
    main(["train", "--config", str(folder / "config.yaml"), "--dry_run"])


def added(folder: Path, **what: Any) -> None:
    add_to_teacher(SD.tiny().pipe, TeacherConfig(path=str(folder), **what))


def lora(folder: Path) -> None:
    added(folder, lora=str(folder / "lora.safetensors"))


def word(folder: Path) -> None:
    added(folder, embeddings={"<cat>": str(folder / "word.safetensors")})


def with_overrides(folder: Path) -> None:
    text = (folder / "overrides.txt").read_bytes().decode("utf-8", "surrogateescape").replace("\0", "")
    overrides = [line for line in text.split("\n") if line and not line.startswith("-")]
    main(["train", "--config", str(folder / "config.yaml"), "--dry_run", *overrides])


def train_on(folder: Path) -> None:
    main(["train", "--config", str(folder / "config.yaml")])


def generate(folder: Path) -> None:
    main(
        [
            "generate",
            "--pipeline",
            str(folder / "run/pipeline"),
            "--num_images",
            "1",
            "--output",
            str(folder / "out.png"),
        ]
    )


def export(folder: Path) -> None:
    main(["export", "--config", str(folder / "run/config.yaml"), "--output", str(folder / "exported")])


def report(name: str) -> Callable[[Path], object]:
    return lambda folder: main(["report", str(folder / name), "--output", str(folder / "page.html")])


def compare(folder: Path) -> None:
    main(["compare", str(folder / "one.json"), str(folder / "two.json")])


def images(
    name: str, channels: int = 3, num_classes: int | None = None, takes_text: bool = False
) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        config = DataConfig(name="images", path=str(folder / name), resolution=8)
        dataset = open_data(config, channels=channels, size=(8, 8), num_classes=num_classes, takes_text=takes_text)
        for index in range(min(len(dataset), 8)):
            dataset.load([index])

    return guarded(read)


def reference(folder: Path) -> None:
    Reference.open(load_features(str(folder / "features")), str(folder / "reference.npz"))


def pairs(folder: Path) -> None:
    opened = Pairs(folder / "pairs")
    opened.rows(range(len(opened)))


def protocol(folder: Path) -> None:
    read_protocol(str(folder / "protocol.yaml"), {})


def odd_override(data: bytes, rng: random.Random) -> bytes:
    return data + b"train=" + m.yaml_text(b"", rng)


def benchmark(folder: Path) -> None:
    build(BenchmarkConfig, read_config(folder / "benchmark.yaml"), "benchmark")


MODEL = ("teacher", "pipeline", "config.yaml")
SUBJECTS = (
    Subject("config.yaml", YAML, dry_run),
    Subject("overrides.txt", (*m.BYTES[:5], odd_override), with_overrides, ("override", "config.yaml")),
    Subject("teacher/model_index.json", JSON, dry_run, MODEL),
    Subject("teacher/unet/config.json", JSON, dry_run, MODEL),
    Subject("teacher/scheduler/scheduler_config.json", JSON, dry_run, MODEL),
    Subject("teacher/unet/diffusion_pytorch_model.safetensors", WEIGHTS, dry_run, MODEL),
    Subject("lora.safetensors", WEIGHTS, guarded(lora)),
    Subject("word.safetensors", WEIGHTS, guarded(word)),
    Subject("run/pipeline/model_index.json", JSON, generate, MODEL),
    Subject("run/pipeline/stepdistill.json", JSON, generate, MODEL),
    Subject("run/pipeline/scheduler/scheduler_config.json", JSON, generate, MODEL),
    Subject("run/pipeline/unet/config.json", JSON, generate, MODEL),
    Subject("run/config.yaml", YAML, export, ("config.yaml", "run")),
    Subject("run/checkpoint-4/manifest.json", JSON, export, ("checkpoint",)),
    Subject("run/checkpoint-4/state.json", JSON, export, ("checkpoint",)),
    Subject("run/metrics.jsonl", LINES, train_on),
    Subject("one.json", JSON, compare, ("not comparable", ), reader="-compare"),
    Subject("two.json", JSON, report("two.json"), reader="-report"),
    Subject("bench.json", JSON, report("bench.json")),
    Subject("bench-samples.npz", ZIP, report("bench.json")),
    Subject("protocol.yaml", YAML, guarded(protocol), ("protocol",)),
    Subject("benchmark.yaml", YAML, guarded(benchmark), ("benchmark",)),
    Subject("reference.npz", ZIP, guarded(reference)),
    Subject("features/config.json", JSON, guarded(reference), ("features",)),
    Subject("features/model.safetensors", WEIGHTS, guarded(reference), ("features",)),
    Subject("images.npz", ZIP, images("images.npz", channels=1, num_classes=4)),
    Subject("shard.tar", TAR, images("shard.tar", num_classes=4, takes_text=True)),
    Subject("listed/metadata.jsonl", LINES, images("listed", num_classes=4, takes_text=True), ("listed",)),
    Subject("table/metadata.csv", m.BYTES, images("table", num_classes=4, takes_text=True), ("table",)),
    Subject("samples.npz", ZIP, images("samples.npz", num_classes=4)),
    *(Subject(f"{kind}/1.{kind}", m.BYTES, images(kind)) for kind in ("png", "jpeg", "gif", "tiff", "webp", "bmp")),
    Subject("prompts.txt", m.BYTES[:5], guarded(lambda folder: collect_prompts([], str(folder / "prompts.txt")))),
    Subject("prompts.jsonl", LINES, guarded(lambda folder: collect_prompts([], str(folder / "prompts.jsonl")))),
    Subject("prompts.csv", m.BYTES[:5], guarded(lambda folder: collect_prompts([], str(folder / "prompts.csv")))),
    Subject("prompts.json", JSON, guarded(lambda folder: collect_prompts([], str(folder / "prompts.json")))),
    Subject("pairs/pairs.json", JSON, guarded(pairs), ("pairs",)),
    Subject("pairs/shard-00000.safetensors", WEIGHTS, guarded(pairs), ("pairs",)),
)  # fmt: skip
