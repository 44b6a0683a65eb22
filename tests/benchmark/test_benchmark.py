"""The benchmark: fair rows, made once, never mixed; and its tables, plots and page."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts.cases import pipeline_images, save_images, save_teacher, sections
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from transformers import CLIPModel

from stepdistill.benchmark.benchmark import Benchmark
from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.demo import demo
from stepdistill.benchmark.pictures import shown_rows
from stepdistill.benchmark.plots import pareto_front
from stepdistill.benchmark.publish import benchmark, shape_tables
from stepdistill.benchmark.report import write_report
from stepdistill.benchmark.samples import COLUMNS, places_by_class
from stepdistill.benchmark.shapes import at_shapes
from stepdistill.benchmark.solvers import solver_rows
from stepdistill.benchmark.students import export_missing, missing_runs, train_runs
from stepdistill.benchmark.tables import (
    best_solver,
    caption,
    compared,
    insert,
    markdown,
    paper_ratio,
    paper_source,
    text,
)
from stepdistill.config import read_config, to_yaml
from stepdistill.diffusion.samplers import DDIM
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.export.contract import Origin
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.loading import families
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.features.classifier import SmallConvNet
from stepdistill.files.schema import build
from stepdistill.inference.sampling import ROWS
from stepdistill.inference.solvers import SOLVERS, make_solver, steps_within, teacher_call
from stepdistill.methods import method_names
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline
from stepdistill.pretraining.clip import clip_config, image_processor, train_tokenizer
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

SETTING = {
    "solvers": {"UniPC": [1, 2, 4], "Heun": [1, 2, 3]}, "guidance_scales": [1.5, 3.0], "search_samples": 6,
    "teacher_steps": 4, "num_samples": 20, "batch_size": 20, "metrics": ["fd", "spread", "accuracy"],
}  # fmt: skip


def config_of(folder, **changed):
    teacher = save_teacher(Pixel.tiny(size=28, num_classes=10), folder / "teacher")
    fixed = {"teacher": {"path": str(teacher)}, "output": str(folder / "result/bench.json")}
    return build(BenchmarkConfig, {**fixed, **SETTING, **changed})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole benchmark of a random teacher and a student of two training steps."""
    folder = tmp_path_factory.mktemp("benchmark")
    family = Pixel.tiny(size=28, num_classes=10)
    student = Run(resolve(sections(folder / "training", family, "progressive", steps=2))).train()
    config = config_of(folder, students={"ours, 2 steps": str(student)})
    benchmark(config)
    return folder, config


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "result/bench.json").read_text())["rows"]}


# ------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize(
    ("name", "unguided", "guided"),
    [
        ("zimage", {"guidance_scale": 0.0}, {"guidance_scale": 2.0}),
        ("qwen_image", {"true_cfg_scale": 1.0}, {"true_cfg_scale": 3.0, "negative_prompt": " "}),
    ],
)
def test_a_teacher_is_guided_in_the_words_of_its_pipeline(name, unguided, guided):
    family = families()[name].tiny()
    for scale, words in ((1.0, unguided), (3.0, guided)):
        assert teacher_call(family, {"num_inference_steps": 2, "guidance_scale": scale}) == {
            "num_inference_steps": 2,
            **words,
        }
    assert teacher_call(family, {"num_inference_steps": 2}) == {"num_inference_steps": 2}


def test_rows_of_a_teacher_are_sampled_so(finished, monkeypatch):
    bench = Benchmark(finished[1])
    monkeypatch.setattr(bench.family, "guidance_arguments", lambda scale: {"guidance_scale": 10 * scale})
    sources = []
    monkeypatch.setattr(bench, "_row", lambda source, metrics: sources.append(source) or {"fd": 0.0})
    bench.teacher("teacher", 1.5)
    assert [source.call["guidance_scale"] for source in sources] == [15.0]
    teacher = next(row for row in bench.rows if row["kind"] == "teacher")
    assert bench.opened(teacher)[1]["guidance_scale"] == 10 * teacher["guidance_scale"]


@pytest.mark.parametrize(("rows", "seen"), [(None, ROWS), (7, 7)])
def test_the_network_sees_as_many_rows_at_a_time_as_the_configuration_says(tmp_path, monkeypatch, rows, seen):
    bench, sources = Benchmark(config_of(tmp_path, rows=rows)), []
    monkeypatch.setattr(bench, "_row", lambda source, metrics: sources.append(source) or {"fd": 0.0})
    bench.teacher("teacher", 1.0)
    assert [source.rows for source in sources] == [seen]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guided", [False, True])
def test_a_row_takes_no_more_calls_than_its_name_says_and_no_fewer_than_it_could(solver, guided):
    scheduler = make_solver(solver, Pixel.tiny().scheduler_config)
    for calls in (1, 2, 4, 8, 16):
        steps = steps_within(solver, calls, guided=guided)
        for n, fits in ((steps, True), (steps + 1, False)):
            if n:
                scheduler.set_timesteps(n)
                assert (len(scheduler.timesteps) * (1 + guided) <= calls) is fits


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_on_its_teachers_process_at_zero_terminal_snr_too(solver):
    process = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    teacher = DDIMScheduler(**process, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = make_solver(solver, {**teacher.config, "_class_name": "DDIMScheduler"})
    torch.testing.assert_close(scheduler.alphas_cumprod, teacher.alphas_cumprod, atol=1e-6, rtol=0)
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("steps", "same"), [(1, SOLVERS), (2, ("DDIM", "Euler", "UniPC", "DPM-Solver++ 2M")), (4, ("DDIM", "Euler"))]
)
def test_solvers_that_the_shipped_benchmark_measures_once_are_the_same(steps, same):
    family = Pixel.tiny()
    images = {}
    for solver in SOLVERS:
        pipeline = ClassConditionalPipeline(family.network, make_solver(solver, family.scheduler_config), null_class=3)
        images[solver] = pipeline_images(pipeline, family, 3, seed=1, num_inference_steps=steps, guidance_scale=1.0)
    # Euler and Heun start from noise of standard deviation 20,000, of which float32 keeps 7 digits; images are halved
    rounding = 3 * 20_291 * torch.finfo(torch.float32).eps / 2
    apart = {solver for solver in SOLVERS if (images[solver] - images["DDIM"]).abs().max() > rounding}
    assert apart == set(SOLVERS) - set(same)


def test_counted_calls_are_within_the_budget_and_guidance_is_on_the_grid(finished):
    rows = rows_of(finished[0])
    solvers = {name: row for name, row in rows.items() if row["kind"] == "solver"}
    names = {"UniPC, 1 call", "UniPC, 2 calls", "UniPC, 4 calls", "UniPC, 2 calls, guided", "UniPC, 4 calls, guided",
             "Heun, 1 call", "Heun, 3 calls", "Heun, 2 calls, guided"}  # fmt: skip
    assert solvers.keys() == names
    for name, row in solvers.items():
        assert row["calls"] == int(name.split(", ")[1].split()[0])
        guided = name.endswith("guided")
        assert row["guidance_scale"] in ([1.5, 3.0] if guided else [1.0])
        if guided:
            assert row["tried"][f"{row['guidance_scale']:g}"] == min(row["tried"].values())
    assert rows["teacher, 4 steps"]["calls"] == 4 and rows["ours, 2 steps"]["calls"] == 2


def test_the_scale_is_chosen_on_other_seeds(tmp_path):
    """With as many samples in the search as in the table, what was tried is a table's value of the next seed."""
    common = {"solvers": {"UniPC": [2]}, "search_samples": 20, "metrics": ["fd"]}
    benchmark(config_of(tmp_path, **common))
    row = rows_of(tmp_path)["UniPC, 2 calls, guided"]
    chosen = row["tried"][f"{row['guidance_scale']:g}"]
    alone = {"guidance_scales": [row["guidance_scale"]], "seed": 1, "output": str(tmp_path / "next/result/bench.json")}
    benchmark(config_of(tmp_path, **common, **alone))
    assert rows_of(tmp_path / "next")["UniPC, 2 calls, guided"]["fd"] == chosen
    assert row["fd"] != chosen


def test_a_student_row_says_what_it_is_and_what_it_cost(finished):
    row = rows_of(finished[0])["ours, 2 steps"]
    assert (row["method"], row["steps"], row["training"]["images"]) == ("progressive", 2, 2 * 4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["a word"], 560, 12)
    half = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**half, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = clip_config({"projection_dim": 8, "text_config": half, "vision_config": vision}, tokenizer)
    for part in (CLIPModel(config), tokenizer, image_processor(16)):
        part.save_pretrained(folder)
    return str(folder)


def test_a_teacher_that_takes_text_is_asked_with_captions(tmp_path, clip_folder):
    family = SD.tiny()
    teacher, images = save_teacher(family, tmp_path / "teacher"), save_images(family, tmp_path / "images.npz", 20)
    options = {
        "teacher": {"path": str(teacher)}, "output": str(tmp_path / "result/bench.json"), "solvers": {"DDIM": [2]},
        "features": clip_folder, "reference": str(images), "metrics": ["fd", "clip"], "num_samples": 5,
        "guidance_scales": [2.0], "teacher_steps": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"captions: missing; .* takes text"):
        Benchmark(build(BenchmarkConfig, {**SETTING, **options, "clip": clip_folder}))
    with pytest.raises(ValueError, match="'clip' needs a CLIP"):
        Benchmark(build(BenchmarkConfig, {**SETTING, **options, "captions": str(images)}))
    config = build(BenchmarkConfig, {**SETTING, **options, "captions": str(images), "clip": clip_folder})
    bench = Benchmark(config)
    rows = {row["name"]: row for row in bench.run()}
    assert rows.keys() == {"real images", "teacher, 2 steps", "DDIM, 2 calls", "DDIM, 2 calls, guided"}
    assert rows["DDIM, 2 calls, guided"]["calls"] == 2 and all("clip_score" in row for row in rows.values())
    assert "| CLIP score |" in markdown(compared(bench.rows, "fd"), "fd")
    real = np.load(images)["images"]  # the picture's real images are those of the captions, in their order
    shown = (bench.images(rows["real images"], 5) * 255).round().permute(0, 2, 3, 1)
    assert np.array_equal(shown.numpy(), real[:5])
    assert bench.setting["contents"]["clip"] == bench.suite.clip.images.sha256
    np.savez(images, images=real, captions=np.array([f"another picture {i}" for i in range(20)]))
    with pytest.raises(ValueError, match=r"another contents\.captions"):
        Benchmark(config)


def test_students_are_measured_at_shapes_they_were_not_trained_at_beside_the_teacher(tmp_path, clip_folder):
    family = SD.tiny()
    teacher, images = save_teacher(family, tmp_path / "teacher"), save_images(family, tmp_path / "images.npz", 20)
    sampler = DDIM(family.schedule, family.schedule.grid(1))
    origin = Origin(method="lcm", teacher=str(teacher))
    student = export_pipeline(family, family.network, sampler, tmp_path / "student", origin=origin)
    side = family.image_shape[-1]
    config = build(BenchmarkConfig, {
        **SETTING, "teacher": {"path": str(teacher)}, "output": str(tmp_path / "result/bench.json"), "solvers": {},
        "features": clip_folder, "reference": str(images), "captions": str(images), "metrics": ["fd"],
        "num_samples": 4, "teacher_steps": 2, "students": {"mine": str(student)}, "shapes": [[side, 2 * side]],
    })  # fmt: skip
    (table,) = shape_tables(config)
    assert f"{side} by {2 * side} pixels" in table and "**mine**" in table and "teacher, 2 steps" in table
    (other,) = at_shapes(config)
    bench = Benchmark(other)  # of finished rows
    assert bench.setting == Benchmark(config).setting_of(other)
    seen = bench._source("mine", bench.open_student(str(student)), {}, count=4).take(range(2)).pixels
    whole = bench.open_student(str(student))("x", height=side, width=2 * side, output_type="np").images
    assert whole.shape == (1, side, 2 * side, 3) and seen.shape == (2, 3, side, side)
    assert [row["name"] for row in bench.rows] == ["real images", "teacher, 2 steps", "mine"]
    for row in bench.rows:  # pictures and seconds, too
        assert bench.images(row, 2).shape == (2, 3, side, side)
    assert all(bench.opened(row)[1].items() >= bench.size.items() for row in bench.rows[1:])
    other_seed = dataclasses.replace(config, seed=1)
    with pytest.raises(ValueError, match=rf"bench-{side}x{2 * side}\.json was measured with another seed"):
        Benchmark(other_seed)  # nothing of the main file was measured yet
    with pytest.raises(ValueError, match=r"shapes\[0\]: expected multiples of 2, got"):
        Benchmark(dataclasses.replace(config, shapes=((side, side + 1),)))


def test_what_a_teacher_has_not_is_refused_before_anything_is_measured(tmp_path):
    for changed, why in (
        ({"shapes": ((28, 28),)}, "shapes: expected none: .* takes no text, and samples one size"),
        ({"solvers": {"DDIM": (1,), "UniPCC": (4,)}}, "solver: got 'UniPCC'; did you mean 'UniPC'"),
        ({"metrics": ("spread",)}, "metrics: expected 'fd', which the table is sorted by"),
        ({"metrics": ("fd", "prompt_spread")}, "'prompt_spread' needs captions"),
        ({"teacher_steps": 1001}, "teacher_steps: expected at most 1000, on which .* was trained, got 1001"),
        ({"solvers": {"Heun": (4, 2001)}}, "solvers.Heun: expected at most 1000, on which .* was trained, got 1001"),
    ):
        with pytest.raises(ValueError, match=why):
            Benchmark(config_of(tmp_path, **changed))
    with pytest.raises(ValueError, match=r"shapes\[0\]: expected \[height, width\], got \[28\]"):
        build(BenchmarkConfig, {"teacher": {"path": "embedded"}, "output": "bench.json", "shapes": [[28]]})


def test_held_out_images_are_the_row_of_real_images(tmp_path, monkeypatch):
    """The reference's own images are nearer to it than others: half of them measured against all have no distance."""
    rng = np.random.default_rng(0)
    held_out, reference = tmp_path / "held_out.npz", tmp_path / "reference.npz"
    for file, brightest in ((held_out, 128), (reference, 256)):
        np.savez(file, images=rng.integers(0, brightest, (20, 28, 28), dtype=np.uint8))
    monkeypatch.setattr(Benchmark, "teacher", lambda self, name, scale: made_up(name, "teacher", 50, 0.5))
    shared = {"reference": str(reference), "metrics": ["fd"], "solvers": {}}
    own = Benchmark(config_of(tmp_path / "own", **shared))
    others = Benchmark(config_of(tmp_path / "others", **shared, held_out=str(held_out)))
    floors = [own.run()[0], others.run()[0]]
    assert [row["name"] for row in floors] == ["real images", "20 held-out images"]
    assert floors[0]["fd"] < 1e-6 < 1 < floors[1]["fd"]
    assert others.images(floors[1]).max() < 0.5 < own.images(floors[0]).max()  # the picture's, too
    np.savez(held_out, images=rng.integers(0, 128, (20, 28, 28), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"another contents\.held_out"):
        Benchmark(others.config)


def test_an_unconditional_teacher_has_no_guided_rows():
    assert all(not guided for *_, guided in solver_rows({"DDIM": [1, 2, 4]}, guided=False))


def test_no_scales_make_no_guided_rows(tmp_path):
    bench = Benchmark(config_of(tmp_path, solvers={"DDIM": [2]}, guidance_scales=[]))
    assert [row["name"] for row in bench.run()] == ["real images", "teacher, 4 steps", "DDIM, 2 calls"]
    assert "guided ones" not in caption(bench.setting)


# ---------------------------------------------------------------------------------------- resuming, refusing


def test_rows_are_made_once_and_resumed(finished, monkeypatch):
    folder, config = finished
    before = rows_of(folder)
    monkeypatch.setattr(Benchmark, "_measure", lambda *args, **options: pytest.fail("measured again"))
    bench = Benchmark(config)
    bench.run()
    assert {row["name"]: row for row in bench.rows} == before


def test_rows_that_are_not_asked_for_any_more_stay_in_the_file_only(finished, monkeypatch):
    folder, config = finished
    before = rows_of(folder)
    monkeypatch.setattr(Benchmark, "_measure", lambda *args, **options: pytest.fail("measured again"))
    fewer = Benchmark(dataclasses.replace(config, solvers={"UniPC": (4,)}))
    names = [row["name"] for row in fewer.run()]
    assert "UniPC, 4 calls" in names and "start of ours, 2 steps" in names and "Heun, 3 calls" not in names
    fewer._write()
    assert rows_of(folder) == before
    assert {row["name"] for row in Benchmark(config).run()} == before.keys()


def test_seconds_of_all_rows_are_taken_again_in_one_run_and_nothing_else_changes(finished, monkeypatch):
    folder, config = finished
    before, written = rows_of(folder), []
    monkeypatch.setattr("stepdistill.benchmark.benchmark.write_result", lambda path, result: written.append(result))
    bench = Benchmark(config)
    bench.time()
    assert len(written) == 1 and len(bench.rows) == len(before)
    for row in bench.rows:
        old = before[row["name"]]
        assert {**row, "seconds_per_image": 0} == {**old, "seconds_per_image": 0}
        assert row["kind"] == "floor" or row["seconds_per_image"] != old["seconds_per_image"]


def test_a_student_that_was_trained_again_is_measured_again(finished, monkeypatch):
    folder, config = finished
    measured = []
    bench = Benchmark(config)
    monkeypatch.setattr("stepdistill.benchmark.students.fingerprint_pipeline", lambda folder: "other")
    monkeypatch.setattr(Benchmark, "student", lambda self, name, row: measured.append(name) or {"name": name})
    monkeypatch.setattr("stepdistill.benchmark.benchmark.write_result", lambda *args: None)
    bench.run()
    assert measured == ["ours, 2 steps"]
    assert [row["name"] for row in bench.rows].count("ours, 2 steps") == 1


@pytest.fixture
def copied(finished, tmp_path):
    """A finished benchmark whose result file and student may change."""
    folder, config = finished
    student = shutil.copytree(config.students["ours, 2 steps"], tmp_path / "pipeline")
    output = shutil.copy(folder / "result/bench.json", tmp_path / "bench.json")
    return dataclasses.replace(config, students={"ours, 2 steps": str(student)}, output=str(output))


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_student_that_was_exported_with_another_sampler_is_measured_again(copied, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(Benchmark, "student", lambda self, name, row: measured.append(name) or {"name": name})
    edit_json(tmp_path / "pipeline/stepdistill.json", lambda contract: contract["timesteps"].reverse())
    older = shutil.copy(tmp_path / "bench.json", tmp_path / "older.json")
    edit_json(older, lambda result: [row.pop("sampling", None) for row in result["rows"]])
    Benchmark(dataclasses.replace(copied, output=str(older))).run()
    assert measured == []  # a row of an older version does not say how its student sampled
    Benchmark(copied).run()
    assert measured == ["ours, 2 steps"]


def test_a_student_that_was_moved_is_shown_from_its_new_folder(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(Benchmark, "_measure", lambda *args, **options: pytest.fail("measured again"))
    bench = Benchmark(copied)
    (student,) = (row for row in bench.run() if row["kind"] == "student")
    assert student["pipeline"] == str(tmp_path / "pipeline")
    written = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert student in written and len(written) == len(bench.rows) + len(bench.further)


def test_pipelines_and_judges_are_on_the_device_of_this_process(finished, monkeypatch):
    _, config = finished
    opened, open_suite = [], MetricSuite.open.__func__

    def remember(cls, *args, device, **options):
        opened.append(device)
        return open_suite(cls, *args, **options)

    monkeypatch.setattr(MetricSuite, "open", classmethod(remember))
    monkeypatch.setattr("stepdistill.benchmark.benchmark.Judge", lambda *args: opened.append(args[-1]))
    monkeypatch.setattr(
        "stepdistill.benchmark.benchmark.open_state", lambda: types.SimpleNamespace(device=torch.device("meta"))
    )
    monkeypatch.setattr("stepdistill.benchmark.benchmark.finished_rows", lambda *args: [])
    bench = Benchmark(dataclasses.replace(config, judge="embedded"))
    assert opened == [torch.device("meta")] * 2
    for pipeline in (bench.solver_pipeline("DDIM"), bench.open_student(config.students["ours, 2 steps"])):
        assert pipeline.device.type == "meta"


@pytest.mark.parametrize("judge", ["efficientnet", "folder/judge", "facebook/dinov2-base"])
def test_the_file_of_a_judge_lies_beside_the_result(finished, tmp_path, monkeypatch, judge):
    monkeypatch.setattr("stepdistill.benchmark.benchmark.Judge", lambda *args: args[3])
    bench = Benchmark(dataclasses.replace(finished[1], judge=judge, output=str(tmp_path / "bench.json")))
    assert bench.judge.parent == tmp_path and bench.judge.name.startswith(f"bench-{judge.rpartition('/')[2]}-")


def test_classes_with_few_real_images_or_none_have_a_picture():
    assert places_by_class(torch.tensor([1, 1, 0]), 3, 9) == [2, 0, 0, 2, 1, 1, 2, 0, 2]


def test_rows_of_a_version_without_a_key_go_on_while_the_key_says_nothing(finished, tmp_path):
    folder, config = finished
    result = json.loads((folder / "result/bench.json").read_text())
    for key in ("resolution", "lora", "trust_pickles"):
        del result["setting"]["teacher"][key]
    del result["setting"]["contents"]
    older = tmp_path / "older.json"
    older.write_text(json.dumps(result))
    assert Benchmark(dataclasses.replace(config, output=str(older))).rows == result["rows"]
    result["setting"]["teacher"]["resolution"] = 64
    older.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"another teacher\.resolution: 64, now None"):
        Benchmark(dataclasses.replace(config, output=str(older)))


@pytest.mark.parametrize("change", [{"num_samples": 21}, {"seed": 1}, {"guidance_scales": [1.5]}])
def test_two_settings_are_never_mixed(finished, change):
    folder, _ = finished
    with pytest.raises(ValueError, match=f"another {next(iter(change))}"):
        Benchmark(config_of(folder, **change))
    more_rows = config_of(folder, solvers={"DDIM": [1]})
    assert Benchmark(more_rows).rows


def test_a_missing_student_is_named_before_anything_is_measured(tmp_path):
    (tmp_path / "run/pipeline-2-steps").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"students\.ours: no pipeline in .*pipeline-2-step; did you mean"):
        Benchmark(config_of(tmp_path, students={"ours": str(tmp_path / "run/pipeline-2-step")}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_of_a_flow_takes_straight_lines_to_a_point(solver):
    """Timesteps may be whole numbers (DPM-Solver, UniPC) and begin at 999, hence the width."""
    family = Pixel.tiny(scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    asked = []

    def velocity(x_t, timestep, class_labels):
        asked.append(timestep[0].item() / 1000)
        return UNet2DOutput((x_t - 0.5) / (timestep / 1000).view(-1, 1, 1, 1))

    family.network.forward = velocity
    pipeline = family.teacher_pipeline(make_solver(solver, family.scheduler_config))
    images = pipeline([0], num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(images, torch.full_like(images, 0.75), atol=5e-3, rtol=0)
    if solver != "Heun":  # whose diffusers grid ends in 0.001
        assert asked == pytest.approx(family.schedule.grid(3)[:-1].tolist(), abs=2e-3)


def test_no_solver_is_known_for_edm():
    with pytest.raises(ValueError, match="expected a teacher with betas or a flow, got 'EDMEulerScheduler'"):
        make_solver("UniPC", {"_class_name": "EDMEulerScheduler"})


@pytest.mark.parametrize("name", ["fashion", "fashion_flow", "cifar10", "digits", "faces"])
def test_shipped_configurations_are_valid(name):
    config = build(BenchmarkConfig, read_config(f"configs/benchmark_{name}.yaml"))
    assert set(config.solvers) <= set(SOLVERS)


def test_the_training_of_the_header_of_cifar_10_measures_in_colour(tmp_path, monkeypatch):
    path = Path("configs/benchmark_cifar10.yaml")
    line = next(line for line in path.read_text().replace("\\\n#", "").splitlines() if "pixel_progressive" in line)
    config = read_config("configs/pixel_progressive.yaml", [word for word in line.split() if "=" in word])
    monkeypatch.chdir(tmp_path)
    family = Pixel.tiny(size=32, channels=3, num_classes=10)
    save_teacher(family, tmp_path / config["teacher"]["path"])
    (tmp_path / "data").mkdir()
    save_images(family, tmp_path / config["data"]["path"])
    SmallConvNet(3, 10).save_pretrained(tmp_path / config["eval"]["features"])
    evaluation = Run(resolve(config)).evaluation
    assert evaluation.suite.reference.about["shape"] == [3, 32, 32]


def test_what_is_missing_is_trained_and_nothing_else(finished, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(Run, "train", lambda run: trained.append(run.folder))
    mapping = sections(finished[0] / "training", Pixel.tiny(size=28, num_classes=10), "progressive", steps=2)
    there, missing = tmp_path / "there.yaml", tmp_path / "missing.yaml"
    there.write_text(to_yaml(mapping))
    mapping["train"]["output_dir"] = str(tmp_path / "run")
    missing.write_text(to_yaml(mapping))
    train_runs(missing_runs([str(there), str(missing), f"{missing} train.output_dir={tmp_path / 'other'}"]))
    assert trained == [tmp_path / "run", tmp_path / "other"]
    with pytest.raises(ValueError, match=r"train\.stepz: unknown key; did you mean 'steps'"):
        train_runs(missing_runs([str(missing), f"{missing} train.stepz=3"]))
    with pytest.warns(UserWarning, match=r"training/run: .* other values of train\.seed than asked for now"):
        train_runs(missing_runs([f"{there} train.seed=7"]))
    assert len(trained) == 2


def test_several_processes_would_write_one_result(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="benchmark: expected one process, got 2"):
        benchmark(config_of(tmp_path))
    with pytest.raises(ValueError, match="demo: expected one process, got 2"):
        demo("configs/demo.yaml")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"features": "none.pt2"}, "none.pt2"),
        ({"document": "none.md"}, "document: none.md has no lines"),
        ({"output": "table.md"}, r"table.md: expected a file to write whose name ends in \.json"),
        ({"students": {"ours": "rnu/pipeline"}}, r"students\.ours: expected a pipeline, or .*, got rnu/pipeline"),
    ],
)
def test_what_is_wrong_with_a_benchmark_is_said_before_its_students_are_trained(tmp_path, monkeypatch, changed, why):
    monkeypatch.setattr(Run, "train", lambda run: pytest.fail("trained"))
    mapping = sections(tmp_path / "training", Pixel.tiny(size=28, num_classes=10), "progressive", steps=2)
    (tmp_path / "run.yaml").write_text(to_yaml(mapping))
    with pytest.raises(ValueError, match=why):
        benchmark(config_of(tmp_path, train=[str(tmp_path / "run.yaml")], **changed))


def test_a_student_of_other_calls_is_exported_from_its_run(tmp_path, monkeypatch):
    mapping = sections(tmp_path, Pixel.tiny(), "lcm")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(mapping))
    exported = []
    monkeypatch.setattr(
        Run, "export_checkpoint", lambda run, folder: exported.append((run.config.method.steps, folder))
    )
    names = ("pipeline", "pipeline-1-step", "pipeline-4-steps", "another")
    export_missing({name: str(run / name) for name in names})
    assert exported == [(1, run / "pipeline-1-step"), (4, run / "pipeline-4-steps")]


# ------------------------------------------------------------------------------------------- what is written


def test_a_document_shows_the_table_between_its_marks(tmp_path):
    document = tmp_path / "RESULTS.md"
    document.write_text("before\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nafter\n")
    for _ in range(2):
        insert("| new |\n", document)
    assert document.read_text() == "before\n<!-- benchmark -->\n| new |\n<!-- /benchmark -->\nafter\n"
    document.write_text("<!-- benchmark -->")
    with pytest.raises(ValueError, match=r"RESULTS\.md has no lines"):
        insert("| new |\n", document)


def made_up(name, kind, calls, fd, **more):
    seconds = {"seconds_per_image": calls / 100}
    return {
        "name": name,
        "kind": kind,
        "calls": calls,
        "fd": fd,
        "fd_low": fd - 0.1,
        "fd_high": fd + 0.1,
        **seconds,
        **more,
    }


MADE_UP = [
    made_up("UniPC, 4 calls", "solver", 4, 0.95, solver="UniPC"),
    made_up("UniPC, 2 calls", "solver", 2, 2.0, solver="UniPC"),
    made_up("ours, 4 steps", "student", 4, 0.9, method="progressive", steps=4),
    made_up("ours, 2 steps", "student", 2, 1.0, method="progressive", steps=2,
            training={"teacher_forwards": 2_500_000, "cpu_minutes": 12.4}),
    made_up("teacher", "teacher", 50, 0.5, solver="DDIM"),
    made_up("real images", "floor", 0, 0.1),
]  # fmt: skip


def test_rows_are_compared_with_the_teacher_the_paper_and_the_best_solver():
    rows = {row["name"]: row for row in compared(MADE_UP, "fd")}
    assert list(rows) == [
        "real images",
        "teacher",
        "ours, 2 steps",
        "UniPC, 2 calls",
        "ours, 4 steps",
        "UniPC, 4 calls",
    ]
    assert rows["ours, 2 steps"]["ratio"] == 2.0 and rows["ours, 2 steps"]["paper"] == 1.8
    assert rows["ours, 2 steps"]["against_solver"] == "0.50 of UniPC, 2 calls"
    assert rows["ours, 4 steps"]["against_solver"] == "not distinguishable: UniPC, 4 calls"
    assert text(rows["ours, 2 steps"], "teacher_forwards", "fd") == "2.50"
    assert best_solver(MADE_UP, 1, "fd") is None and best_solver(MADE_UP, 3, "fd")["calls"] == 2


def test_the_markdown_table_is_rectangular():
    lines = markdown(compared(MADE_UP, "fd"), "fd").splitlines()
    assert len(lines) == len(MADE_UP) + 2 and len({line.count("|") for line in lines}) == 1
    assert "**ours, 2 steps**" in lines[4]


def test_papers_are_those_of_our_methods():
    known = [method for method in method_names() if paper_source(method)]
    assert len(known) >= 12 and paper_ratio("dmd2", 1) == 0.55 and paper_ratio("nothing", 1) is None


def test_the_pareto_front_is_what_nothing_beats():
    assert [row["name"] for row in pareto_front(MADE_UP[:5], "fd")] == ["ours, 2 steps", "ours, 4 steps", "teacher"]


def test_plots_and_grid_are_pictures(finished):
    for what in ("calls", "pareto", "grid"):
        with Image.open(finished[0] / f"result/bench-{what}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5 and min(picture.size) > 100


def test_the_page_of_a_whole_benchmark_shows_its_samples_and_its_setting(finished, tmp_path):
    html = write_report([finished[0] / "result/bench.json"], tmp_path / "page.html").read_text()
    assert "ours, 2 steps" in html and "versions.torch" in html and "class 7" in html
    rows = shown_rows(list(rows_of(finished[0]).values()), "fd")
    assert html.count('class="pixels"') == len(rows) * COLUMNS


def test_a_report_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: expected a result"):
        write_report([tmp_path / "other.json"], tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"missing\.json: no such file"):
        write_report([tmp_path / "missing.json"], tmp_path / "page.html")
