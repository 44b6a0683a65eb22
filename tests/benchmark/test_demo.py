"""The demo on a tiny text-to-image teacher: the same bits every time, whole pixels, a student of any text method."""

import json

import numpy as np
import pytest
import torch
from contracts.cases import save_teacher, sections
from PIL import Image

from stepdistill.assets import TEACHERS
from stepdistill.benchmark.benchmark import Benchmark
from stepdistill.benchmark.demo import demo, demo_of
from stepdistill.benchmark.poster import GAP, LABEL, LINE, SIDE, TITLE, caption, images_of, poster_rows
from stepdistill.benchmark.students import student_rows
from stepdistill.benchmark.tables import of_kind
from stepdistill.cli import main
from stepdistill.config import read_config, to_yaml
from stepdistill.export.pipeline import load_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.hub import locate
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.inference.sampling import sample_images
from stepdistill.training.run import Run

MEASURED = {
    "student_calls": [1, 2], "solvers": {"UniPC": [1, 2]}, "guidance_scales": [2.0], "search_samples": 4,
    "teacher_steps": 3, "teacher_guidance_scales": [2.0], "features": "faces", "clip": "faces", "attributes": "faces",
    "reference": "faces-held-out", "captions": "faces-prompts", "num_samples": 40,
    "metrics": ["fd", "clip", "adherence", "prompt_spread"],
    "shown": [{"prompt": "a face with green hair", "seed": 3}, {"prompt": "", "seed": 1}],
}  # fmt: skip


def written(folder, family, method="lcm", **changed):
    """A file of a demo whose run lies in ``folder/run``; with two training steps, or one in each of three stages."""
    mapping = sections(folder, family, method, steps=2)
    mapping["train"]["output_dir"] = str(folder / "run")
    if method == "progressive":
        mapping["method"] |= {"steps": 1, "start": 4}
        mapping["train"]["steps"] = 3
    path = folder / "demo.yaml"
    path.write_text(to_yaml(mapping | {"demo": {**MEASURED, **changed}}))
    return str(path)


@pytest.fixture(scope="module")
def family():
    return SD.tiny()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, family):
    """A whole demo, and its configuration."""
    path = written(tmp_path_factory.mktemp("demo"), family)
    picture = demo(path)
    return picture.parent, path


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in ("report.png", "report.html", "result.json")}


def without_seconds(folder):
    rows = json.loads((folder / "result.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in ("seconds_per_image", "timing")} for row in rows]


def test_a_second_run_has_the_same_bits_and_measures_nothing(finished, monkeypatch):
    folder, path = finished
    before = files_of(folder)
    monkeypatch.setattr(Benchmark, "_measure", lambda *args, **options: pytest.fail("measured again"))
    demo(path)
    assert files_of(folder) == before


def test_a_demo_that_was_stopped_while_it_measured_goes_on_to_the_same_picture(finished, tmp_path, family, monkeypatch):
    path, write = written(tmp_path, SD(family.pipe)), Benchmark._write

    def stop_at_the_third_row(self):
        write(self)
        if len(self.rows) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Benchmark, "_write", stop_at_the_third_row)
        demo(path)
    measured = []
    monkeypatch.setattr(Benchmark, "_write", lambda self: measured.append(self.rows[-1]["name"]) or write(self))
    picture = demo(path)
    assert len(measured) == len(without_seconds(picture.parent)) - 3
    assert picture.read_bytes() == (finished[0] / "report.png").read_bytes()


def test_images_are_enlarged_by_whole_pixels_where_their_row_and_prompt_say(finished):
    folder, path = finished
    config = demo_of(read_config(path))
    bench = Benchmark(config.measured)
    rows = poster_rows(bench.rows, bench.metric)
    assert [row["kind"] for row in rows] == ["teacher", "solver", "solver", "student", "student"]
    assert [row["calls"] for row in rows] == [6, 1, 2, 1, 2]
    with Image.open(folder / "report.png") as picture:
        drawn = np.asarray(picture.convert("RGB"))
    scale = SIDE // 16
    for line, row in enumerate(rows):
        for column, image in enumerate(images_of(bench, row, config.shown)):
            y, x = TITLE + 4 * LINE + line * (SIDE + GAP), LABEL + column * (SIDE + GAP)
            seen = drawn[y : y + SIDE, x : x + SIDE]
            expected = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
            assert np.array_equal(seen, expected), (row["name"], column)


def test_an_image_of_the_picture_is_that_of_its_prompt_and_seed_alone(finished):
    folder, path = finished
    config = demo_of(read_config(path))
    bench = Benchmark(config.measured)
    row = of_kind(bench.rows, "student")[0]
    call = {"num_inference_steps": row["steps"]}
    alone = sample_images(load_pipeline(folder / "pipeline"), 1, seed=3, captions=["a face with green hair"], call=call)
    assert torch.equal(images_of(bench, row, config.shown)[:1], alone.pixels)


def test_one_student_called_with_n_steps_is_its_export_for_n_steps(finished):
    folder, path = finished
    run = demo_of(read_config(path, ["method.steps=2"])).run
    exported = Run(run).export_checkpoint(folder / "other")
    same = [
        sample_images(load_pipeline(place), 3, captions=["a face"], call=call).pixels
        for place, call in ((folder / "pipeline", {"num_inference_steps": 2}), (exported, {}))
    ]
    assert torch.equal(*same)


def test_a_method_in_stages_is_measured_by_its_pipelines(tmp_path, family):
    config = demo_of(read_config(written(tmp_path, SD(family.pipe), "progressive")))
    Run(config.run).train()
    rows = student_rows(config.measured.students, config.measured.student_calls)
    places = {row.name: row.folder.rpartition("/")[2] for row in rows}
    assert places == {"student, 1 call": "pipeline", "student, 2 calls": "pipeline-2-steps"}


def test_without_calls_a_student_is_measured_as_its_contract_says():
    assert [tuple(row) for row in student_rows({"ours": "folder"}, ())] == [("ours", "folder", None)]


def test_a_demo_that_could_draw_nothing_is_refused_before_its_training(tmp_path, family):
    with pytest.raises(ValueError, match=r"demo\.shown: expected prompts"):
        demo(written(tmp_path, SD(family.pipe), shown=[]))
    with pytest.raises(ValueError, match=r"demo\.shown\[0\]\.sed: unknown key; did you mean 'seed'"):
        demo(written(tmp_path, SD(family.pipe), shown=[{"prompt": "a face", "sed": 1}]))
    with pytest.raises(ValueError, match=r"teacher\.path: expected a teacher that takes text"):
        demo(written(tmp_path / "pixel", Pixel.tiny(), "progressive"))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"reference": "none.npz"}, "reference: no file or folder 'none.npz'"),
        ({"captions": "none.txt"}, "captions: no file or folder 'none.txt'"),
        ({"solvers": {"UniPCC": [1]}}, "solver: got 'UniPCC'; did you mean 'UniPC'"),
    ],
)
def test_what_is_wrong_with_what_is_measured_is_said_before_the_training(tmp_path, family, monkeypatch, changed, why):
    monkeypatch.setattr(Run, "train", lambda run: pytest.fail("trained"))
    with pytest.raises(ValueError, match=why):
        demo(written(tmp_path, SD(family.pipe), **changed))


def test_the_page_is_of_the_result_wherever_it_lies(tmp_path, family, monkeypatch):
    written_pages = []
    monkeypatch.setattr("stepdistill.benchmark.demo.demo", lambda path, overrides: None)
    monkeypatch.setattr("stepdistill.cli.write_page", lambda page, result: written_pages.append(result))
    place = tmp_path / "elsewhere/numbers.json"
    main(["demo", "--config", written(tmp_path, SD(family.pipe)), f"demo.output={place}"])
    assert written_pages == [place]


def test_captions_have_at_most_four_lines():
    assert caption(" ") == "(empty prompt)"
    assert len(caption("a face with " * 20).splitlines()) == 4 and caption("a face with " * 20).endswith(" ...")


def test_an_embedded_teacher_is_found_by_its_name_and_its_absence_named(tmp_path, family, monkeypatch):
    monkeypatch.setitem(TEACHERS, "faces", tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher\.path: faces: expected the teacher in .*teacher"):
        locate(TeacherConfig(path="faces"))
    save_teacher(family, tmp_path / "teacher")
    assert locate(TeacherConfig(path="faces")) == tmp_path / "teacher"
