"""An export takes the place of an export and of nothing else, and whatever fails in between, one of them is there."""

import os
import shutil
from pathlib import Path

import pytest
from contracts.cases import sections

import stepdistill.training.run
from stepdistill.cli import main
from stepdistill.config import to_yaml
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.contract import CONTRACT, read_contract
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.replacing import check_replaceable, is_export, replacing
from stepdistill.families.pixel import Pixel
from stepdistill.training.config import resolve
from stepdistill.training.run import Run


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def export(folder, steps=1):
    family = Pixel.tiny()
    return export_pipeline(family, family.network, DDIM(family.schedule, family.schedule.grid(steps)), folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, its teacher, and files of the user's."""
    folder = tmp_path_factory.mktemp("run")
    Run(resolve(sections(folder, Pixel.tiny(), "lcm", steps=1))).train()
    (folder / "mine").mkdir()
    (folder / "mine/thesis.txt").write_text("years of work")
    (folder / "file").write_text("text")
    (folder / "link").symlink_to(folder / "run/pipeline")
    shutil.copytree(folder / "run/pipeline", folder / "repository")
    (folder / "repository/.git").mkdir()
    return folder


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("mine", "expected a new or empty folder, or an earlier export"),
        (".", "would replace"),
        ("run", "would replace"),
        ("run/..", "would replace"),
        ("teacher", "would replace"),
        ("file", "is a file"),
        ("file/below", "is a file"),
        ("link", "got a link"),
        ("run/checkpoint-1", "expected a new or empty folder"),
        ("repository", r"holds more than an export, \.git"),
        ("run/pipeline/below", "expected a folder outside of pipelines"),
    ],
)
def test_export_refuses_every_folder_that_is_no_export_before_it_opens_the_models(
    run, output, message, monkeypatch, capsys
):
    def opened(config):
        raise AssertionError("the models were opened")

    before = content(run)
    monkeypatch.setattr(stepdistill.training.run, "Run", opened)
    monkeypatch.chdir(run)
    for place in (output, str(run / output)):
        with pytest.raises(SystemExit) as stopped:
            main(["export", "--config", str(run / "run/config.yaml"), "--output", place])
        assert stopped.value.code == 2 and message.replace("\\", "") in capsys.readouterr().err
    assert content(run) == before


def test_the_function_refuses_the_same(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="stays as it is"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_finds_out_before_it_opens_its_teacher(tmp_path):
    wanted = sections(tmp_path, Pixel.tiny(), "lcm", steps=1)
    (tmp_path / "run/pipeline").mkdir(parents=True)
    (tmp_path / "run/pipeline/thesis.txt").write_text("years of work")
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"run/pipeline: expected a new or empty folder"):
        Run(resolve(wanted))


@pytest.mark.parametrize("name", ["pipeline.partial", "pipeline.old"])
def test_a_run_finds_out_likewise_what_would_be_in_the_way_at_its_end(tmp_path, name):
    wanted = sections(tmp_path, Pixel.tiny(), "lcm", steps=1)
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=f"run/{name}: is in the way of the export"):
        Run(resolve(wanted))


def test_a_run_finds_out_the_same_of_the_folder_of_a_stage(tmp_path):
    wanted = resolve(sections(tmp_path, Pixel.tiny(), "progressive"))
    (tmp_path / "run/pipeline-4-steps").mkdir(parents=True)
    (tmp_path / "run/pipeline-4-steps/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"run/pipeline-4-steps: expected a new or empty folder"):
        Run(wanted)


def test_a_run_does_not_replace_its_teacher_or_its_start(tmp_path):
    wanted, student = sections(tmp_path, Pixel.tiny(), "progressive"), str(export(tmp_path / "run/pipeline"))
    for changes in ({"teacher": {"path": student}}, {"bank": {"init_from": student}}):
        with pytest.raises(ValueError, match=f"the export would replace {student}"):
            Run(resolve(wanted | changes))
    shutil.move(student, tmp_path / "run/pipeline-4-steps")
    with pytest.raises(ValueError, match="the export would replace .*4-steps"):
        Run(resolve(wanted | {"bank": {"init_from": str(tmp_path / "run/pipeline-4-steps")}}))


def test_a_run_does_not_begin_over_a_configuration_of_the_user(tmp_path):
    wanted = resolve(sections(tmp_path, Pixel.tiny(), "lcm", steps=1))
    config = tmp_path / "run/config.yaml"
    config.parent.mkdir()
    config.write_text("# what I found out\ntrain: {steps: 1}\n")
    with pytest.raises(ValueError, match=r"run/config\.yaml: expected none, or that of a run, got another"):
        Run(wanted).train()
    assert config.read_text().startswith("# what I found out") and not (tmp_path / "run/pipeline").exists()
    config.write_text(to_yaml(wanted.as_sections()))  # as a run leaves it that is killed before its first checkpoint
    assert is_export(Run(wanted).train())


def test_new_and_empty_folders_and_exports_are_written_to(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/below", "empty"):
        assert is_export(export(tmp_path / name))
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "new"}


@pytest.mark.parametrize("name", ["student.partial", "student.old"])
def test_a_folder_beside_it_with_the_name_of_a_temporary_one_stays(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=f"{name}: is in the way"):
        export(tmp_path / "student")
    assert (tmp_path / name / "thesis.txt").exists()


# ------------------------------------------------------------------------------------------ failures in between


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("call", range(1, 12))
def test_a_process_that_ends_at_any_moment_leaves_a_whole_export_and_the_next_one_succeeds(tmp_path, call, monkeypatch):
    """The n-th change of the file system is the last: nothing after it happens, no cleaning up either."""
    folder, calls = export(tmp_path / "student"), []
    before = content(folder)

    def ending(original):
        def change(*args, **kwargs):
            calls.append(original)
            if len(calls) >= call:
                raise Killed
            return original(*args, **kwargs)

        return change

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink", "rmdir", "mkdir"):
            patch.setattr(Path, name, ending(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", ending(shutil.rmtree))
        try:
            with replacing(folder) as partial:
                (partial / CONTRACT).write_text(folder.joinpath(CONTRACT).read_text())
                shutil.copytree(folder, partial, dirs_exist_ok=True)
                (partial / "new.txt").write_text("new")
        except Killed:
            pass
    places = [path for path in (folder, tmp_path / "student.old") if is_export(path)]
    assert places, "no export is left"
    assert content(places[0]) in (before, before | {"new.txt": b"new"})
    export(folder, steps=2)
    assert read_contract(folder).steps == 2 and [path.name for path in tmp_path.iterdir()] == ["student"]


def test_if_the_new_export_cannot_be_moved_the_old_one_is_back(tmp_path, monkeypatch):
    folder, original = export(tmp_path / "student"), Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return original(self, target)

    before = content(folder)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "rename", fail)
        export(folder, steps=2)
    assert content(folder) == before and os.listdir(tmp_path) == ["student"]


def test_check_replaceable_names_what_it_keeps(tmp_path):
    (tmp_path / "student/teacher").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"would replace .*student/teacher"):
        check_replaceable(tmp_path / "student", (tmp_path / "student/teacher",))
