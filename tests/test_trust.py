"""What lies in a teacher's folder and can run: refused by every command alike, and taken when it is asked for."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contracts.cases import pipeline_images, reference_images, save_images, save_teacher, sections
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

import stepdistill.evaluation.evaluate
import stepdistill.evaluation.summary
from stepdistill import load_pipeline
from stepdistill.benchmark.benchmark import Benchmark
from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.cli import main
from stepdistill.config import to_yaml
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.contract import Origin
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.hub import locate
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.files.schema import build
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

SCRIPTS = Path(__file__).parents[1] / "scripts"


def pickled(folder):
    """The same teacher with its weights as torch pickles, named as diffusers and transformers look for them."""
    for file in sorted(folder.rglob("*.safetensors")):
        name = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(load_file(file), file.with_name(f"{name}.bin"))
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pickled teacher, data, and a student of it."""
    folder = tmp_path_factory.mktemp("pickled")
    family = SD.tiny()
    pickled(save_teacher(family, folder / "teacher"))
    save_images(family, folder / "images.npz", 8)
    sampler, origin = DDIM(family.schedule, family.schedule.grid(1)), Origin(teacher=str(folder / "teacher"))
    export_pipeline(family, family.network, sampler, folder / "student", origin=origin)
    return folder


# -------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("make", [SD.tiny, Pixel.tiny])
def test_a_teacher_of_pickles_is_opened_when_it_is_asked_for_and_is_the_same(tmp_path, make):
    plain = make()
    path = str(pickled(save_teacher(plain, tmp_path)))
    with pytest.raises(ValueError, match=r"model\.bin is a pickle.*can run code.*teacher\.trust_pickles=true"):
        load_teacher(TeacherConfig(path=path))
    opened = load_teacher(TeacherConfig(path=path, trust_pickles=True))
    modules = zip((plain.network, *plain.frozen_modules), (opened.network, *opened.frozen_modules), strict=True)
    for one, other in modules:
        torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)


def test_pickles_beside_safetensors_or_beside_the_parts_are_no_reason_to_refuse(tmp_path):
    folder = save_teacher(SD.tiny(), tmp_path)
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"")
    (folder / "checkpoint-500").mkdir()
    for name in ("model.ckpt", "checkpoint-500/optimizer.bin"):  # of a training that ended in this folder
        (folder / name).write_bytes(b"")
    assert type(load_teacher(TeacherConfig(path=str(folder)))) is SD


class Evil:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.mkdir, (self.place,)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"])
def test_what_a_trusted_pickle_would_call_is_still_not_called(tmp_path, file):
    folder = pickled(save_teacher(SD.tiny(), tmp_path / "teacher"))
    torch.save({"weight": Evil(tmp_path / "called")}, folder / file)
    with pytest.raises(ValueError, match=r"diffusers cannot open it"):
        load_teacher(TeacherConfig(path=str(folder), trust_pickles=True))
    assert not (tmp_path / "called").exists()
    torch.load(folder / file, weights_only=False)
    assert (tmp_path / "called").exists(), "the pickle is harmless: the test cannot fail"


# ------------------------------------------------------------------------------------------------ every command


def teacher_section(folder, trust):
    return {"path": str(folder / "teacher")} | ({"trust_pickles": True} if trust else {})


def flags(trust):
    return ["--trust_pickles"] if trust else []


def train(folder, out, trust):
    data, steps = {"name": "images", "path": str(folder / "images.npz"), "batch_size": 4}, {"steps": 1}
    student = Run(
        resolve({
            "teacher": teacher_section(folder, trust), "method": {"name": "lcm"}, "data": data,
            "train": {**steps, "output_dir": str(out)},
        })
    ).train()  # fmt: skip
    assert not list(student.rglob("*.bin")) and len(list(student.rglob("*.safetensors"))) == 3


def script(name, out, config):
    (out / "config.yaml").write_text(to_yaml(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, "--config", str(out / "config.yaml")])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def cache(folder, out, trust):
    data = {"name": "images", "path": str(folder / "images.npz"), "batch_size": 4}
    config = {"teacher": teacher_section(folder, trust), "data": data, "cache": {"output_dir": str(out / "cache")}}
    script("cache.py", out, config)


def make_pairs(folder, out, trust):
    (out / "prompts.txt").write_text("a cat")
    pairs = {"output_dir": str(out / "pairs"), "prompts": str(out / "prompts.txt"), "count": 1, "steps": 1}
    script("make_pairs.py", out, {"teacher": teacher_section(folder, trust), "pairs": pairs})


def benchmark(folder, out, trust):
    section = {"teacher": teacher_section(folder, trust), "output": str(out / "bench.json")}
    config = build(BenchmarkConfig, section)
    family = load_teacher(config.teacher)
    opened = SimpleNamespace(config=config, family=family, device="cpu")  # and no judge, who takes seconds
    Benchmark.solver_pipeline(opened, "DDIM")


def generate(folder, out, trust):
    compare = ["--compare", "teacher", "--compare_steps", "1", *flags(trust)]
    asked = ["--prompt", "a cat", "--num_images", "1", "--output", str(out / "a.png")]
    main(["generate", "--pipeline", str(folder / "student"), *asked, *compare])


def generate_from(folder, out, trust):
    asked = ["--prompt", "a cat", "--num_images", "1", "--num_inference_steps", "1", "--output", str(out / "a.png")]
    main(["generate", "--pipeline", str(folder / "teacher"), *asked, *flags(trust)])


def evaluate(subject, folder, out, trust):
    with pytest.MonkeyPatch.context() as patch:  # what follows once all is open is tested elsewhere
        patch.setattr(stepdistill.evaluation.evaluate, "run_protocol", lambda *args, **kwargs: {})
        patch.setattr(stepdistill.evaluation.summary, "summary", lambda result: "")
        main(["evaluate", subject, str(folder / "teacher"), "--output", str(out / "a.json"), *flags(trust)])


def evaluate_teacher(*where):
    evaluate("--teacher", *where)


def evaluate_pipeline(*where):
    evaluate("--pipeline", *where)


COMMANDS = (train, cache, make_pairs, benchmark, generate, generate_from, evaluate_teacher, evaluate_pipeline)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_opens_a_teacher_refuses_and_takes_the_same(folder, tmp_path, command, capsys):
    with pytest.raises((ValueError, SystemExit)) as refused:
        command(folder, tmp_path, False)
    said = f"{refused.value} {capsys.readouterr().err}"
    assert "model.bin is a pickle" in said and "--trust_pickles" in said
    command(folder, tmp_path, True)


def test_no_export_links_to_pickles(folder, tmp_path):
    wanted = {
        "teacher": teacher_section(folder, True), "method": {"name": "lcm"}, "export": {"frozen": "link"},
        "data": {"name": "images", "path": str(folder / "images.npz")},
        "train": {"steps": 1, "output_dir": str(tmp_path)},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"export\.frozen: expected copy: .*\.bin is a pickle"):
        Run(resolve(wanted))


def test_of_a_hub_id_only_what_is_trusted_is_fetched(tmp_path, monkeypatch):
    asked, teacher = [], save_teacher(Pixel.tiny(), tmp_path)
    (teacher / "unet/diffusion_pytorch_model.safetensors").unlink()  # as fetched of a repository that has only pickles

    def fetch(path, *, revision, allow_patterns):
        asked.append({Path(name).suffix for name in allow_patterns} - {".json"})
        return teacher

    names = ["unet/config.json", "unet/diffusion_pytorch_model.bin", "scheduler/scheduler_config.json", "pipeline.py"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *args, **kwargs: names)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for trusted in ({}, {"trust_pickles": True}, {"trust_remote_code": True}):
        locate(TeacherConfig(path="someone/teacher", **trusted))
    assert asked == [set(), {".bin"}, {".py"}]
    with pytest.raises(ValueError, match=r"pickles \(\.bin\) are not downloaded.*teacher\.trust_pickles=true"):
        load_teacher(TeacherConfig(path="someone/teacher"))


# ------------------------------------------------------------------------------------------------------ remote code

MINE = """
from diffusers import StableDiffusionPipeline
from .signs import SIGN


class Mine(StableDiffusionPipeline):
    def encode_prompt(self, *args, **kwargs):
        positive, negative = super().encode_prompt(*args, **kwargs)
        return SIGN * positive, negative
"""
ENCODER = """
from transformers import CLIPTextModel


class MyEncoder(CLIPTextModel):
    pass
"""


def bring_code(teacher):
    """The teacher with a pipeline class of its own, which turns embeddings about, and its own text encoder's class."""
    (teacher / "pipeline.py").write_text(MINE)
    (teacher / "signs.py").write_text("SIGN = -1\n")
    (teacher / "text_encoder/my_encoder.py").write_text(ENCODER)
    index = json.loads((teacher / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline", "Mine"], "text_encoder": ["my_encoder", "MyEncoder"]}
    (teacher / "model_index.json").write_text(json.dumps(index))


def test_a_teacher_with_code_of_its_own_is_distilled_when_asked_and_its_student_brings_the_code(tmp_path):
    wanted = sections(tmp_path, SD.tiny(), "lcm", steps=1)
    bring_code(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"own code \(pipeline\.py, signs\.py, .*teacher\.trust_remote_code=true"):
        Run(resolve(wanted))
    wanted["teacher"]["trust_remote_code"] = True
    run = Run(resolve(wanted))
    assert type(run.family) is SD and type(run.family.pipe).__name__ == "Mine"
    pixel = Pixel.tiny()
    sampler = DDIM(pixel.schedule, pixel.schedule.grid(1))
    load_pipeline(export_pipeline(pixel, pixel.network, sampler, tmp_path / "pixel"))  # another pipeline.py
    student = run.train()
    with pytest.raises(ValueError, match=r"own code \(pipeline\.py, signs\.py, text_encoder/my_encoder\.py\)"):
        load_pipeline(student)
    images = pipeline_images(load_pipeline(student, trust_remote_code=True), run.family, 3, seed=5)
    assert (images - reference_images(run, 3, seed=5)).abs().max() < 1e-5
    contract = json.loads((student / "stepdistill.json").read_text())
    assert contract["own_code"]
    stock = DiffusionPipeline.from_pretrained(student, trust_remote_code=True)
    without = StableDiffusionPipeline(**stock.components, requires_safety_checker=False)
    found = [pipeline_images(one, run.family, 3, seed=5, **contract["call"]) for one in (stock, without)]
    assert torch.equal(found[0], images) and (found[1] - images).abs().max() > 1e-4
