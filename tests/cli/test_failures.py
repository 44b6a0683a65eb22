"""What is wrong with the input or the machine is one message and exit code 2; a fault of ours is a traceback."""

import errno
import json
import runpy
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

from stepdistill.cli import main
from stepdistill.cli.failures import REPORT_IT, failures_as_sentences

ROOT = Path(__file__).parents[2]


def leaving(capsys, error, config=None):
    with pytest.raises(SystemExit) as left, failures_as_sentences("program", config):
        raise error
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a.json: expected text"), "program: a.json: expected text\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "program: a/b: No such file\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "program: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x\x1b[31m"), "program: x\\x1b[31m: Permission denied\n"),
        (yaml.YAMLError("line 1"), "program: line 1\n"),
        (SafetensorError("a.safetensors: header"), "program: a.safetensors: header\n"),
        (zipfile.BadZipFile("a.npz: no zip"), "program: a.npz: no zip\n"),
        (ModuleNotFoundError("No module named 'lpips'", name="lpips"), "program: No module named 'lpips'\n"),
        (RecursionError(), "program: the input is nested too deeply\n"),
        (MemoryError("3 GiB"), "program: out of memory: 3 GiB; try a smaller batch size\n"),
        (torch.OutOfMemoryError("3 GiB"), "program: out of memory: 3 GiB; try a smaller batch size\n"),
        (RuntimeError("[..] DefaultCPUAllocator: can't allocate memory: you tried"), "program: out of memory: "),
        (ValueError("two\nlines"), "program: two\n  lines\n"),
    ],
)  # fmt: skip
def test_every_kind_of_error_is_a_message_with_exit_code_2(capsys, error, message):
    """FAULTS 9: one place in the command line for all errors that are not ValueError."""
    code, printed = leaving(capsys, error)
    assert code == 2 and printed.startswith(message)


def test_an_interrupt_is_130(capsys):
    assert leaving(capsys, KeyboardInterrupt()) == (130, "program: interrupted\n")


def test_the_configuration_is_named_once(capsys):
    assert leaving(capsys, ValueError("steps: expected ..."), "a.yaml")[1] == "program a.yaml: steps: expected ...\n"
    assert leaving(capsys, ValueError("a.yaml: no such file"), "a.yaml")[1] == "program: a.yaml: no such file\n"


@pytest.mark.parametrize("error", [TypeError("x"), AssertionError("x"), KeyError("x"), RuntimeError("x"),
                                   ModuleNotFoundError("x", name="stepdistill.nothing")])  # fmt: skip
def test_a_fault_of_ours_is_not_hidden(error):
    with pytest.raises(type(error)), failures_as_sentences("program"):
        raise error


def test_a_fault_of_ours_shows_its_traceback_and_asks_to_be_reported():
    code = "from stepdistill.cli.failures import *\nwith failures_as_sentences('program'):\n    {}['a']"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "KeyError: 'a'" in done.stderr and done.stderr.endswith(REPORT_IT + "\n")


def test_warnings_are_one_line_without_power(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with failures_as_sentences("program"):
        pass
    line = warnings.formatwarning("skipped a\x1b[2J\n.png", UserWarning, "x.py", 1)
    assert line == "UserWarning: skipped a\\x1b[2J\\n.png\n"


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["train", "--config", "a.yaml", "--dry-run"], "--dry_run"),
        (["evaluate", "--images", "a", "--num-samples=9"], "--num_samples"),
    ],
)
def test_the_nearest_flag_of_an_unknown_one_is_named(capsys, command, meant):
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {command[-1]}; did you mean {meant!r}?\n")


def result(path, **changed):
    content = {"name": "a", "fd": 1.0, "fd_low": 0.9, "fd_high": 1.1, "calls": 4, "setting": {"size": 8}} | changed
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"fd": "1"}, {"fd": None}, {"fd": [1]}, {"fd": float("nan")}, {"fd_low": "0"}, {"setting": 3}, {"setting": []},
        {"name": 3}, {"name": {}}, {"name": "\ud800"}, {"fd": 10**400},
    ],
)  # fmt: skip
def test_damaged_results_are_named_by_compare_and_report(tmp_path, capsys, changed):
    """FAULTS 9: 217 of 573 result files gave tracebacks."""
    good, bad = result(tmp_path / "good.json"), result(tmp_path / "bad.json", **changed)
    for command in (["compare", good, bad], ["report", good, bad, "--output", str(tmp_path / "page.html")]):
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 2 and "bad.json: " in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_result_without_a_key_of_another_and_one_without_its_interval_are_shown(tmp_path, capsys):
    one, two = result(tmp_path / "one.json"), tmp_path / "two.json"
    two.write_text(json.dumps({"name": "b", "fd": 2, "recall": 0.5, "tried": [1], "ok": True, "setting": {"size": 8}}))
    main(["report", one, str(two), "--output", str(tmp_path / "page.html")])
    main(["compare", one, str(two)])
    assert "fd: a 1, b 2 (no interval)" in capsys.readouterr().out


def test_names_of_results_have_no_power_over_the_terminal(tmp_path, capsys):
    """RELIABILITY row 30 (the terminal): escape codes and line ends in names and settings; FAULTS, low."""
    name, path = "a\x1b[31m\nstepdistill: all is well", tmp_path / "b\x1b]0;x\x07.json"
    one, two = result(tmp_path / "one.json", name=name), result(path, name=name, fd=2)
    main(["compare", one, two])
    table = capsys.readouterr().out
    assert table.count("\n") == 1 and table.strip().isprintable()
    with pytest.raises(SystemExit):
        main(["compare", one, result(path, name="b", setting={"size": "\x1b[2J"})])
    assert capsys.readouterr().err.strip().isprintable()
    main(["report", one, two, "--output", str(tmp_path / "page\x1b[31m.html")])
    assert capsys.readouterr().out.strip().isprintable()
    page = (tmp_path / "page\x1b[31m.html").read_text()
    assert "\x1b" not in page and "\\x1b[31m\\n" in page


@pytest.mark.parametrize("script", ["cache", "make_pairs", "train_teacher", "step_cost"])
def test_scripts_print_one_sentence_too(script, tmp_path, monkeypatch, capsys):
    missing = str(tmp_path / "nothing.yaml")
    monkeypatch.setattr(sys, "argv", [script, "--config", missing, *(["--plan"] if script == "step_cost" else [])])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr() == ("", f"{script}.py: {missing}: no such file\n")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("make_cifar10", ["--tar", "text"], "--tar: expected a tar, got another file, text"),
        ("make_faces", ["--faces", "none", "--output_dir", "new"], "none_16.npz: No such file or directory"),
        ("train_reader", ["--data", "none", "--output_dir", "new"], "new/attributes.yaml: no such file"),
        ("step_cost", ["--floor", "--plan"], "--floor: expected no --plan, --tiny or overrides"),
    ],
)
def test_what_a_script_cannot_use_is_one_sentence(script, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no tar\n" * 200)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
    assert left.value.code == 2 and capsys.readouterr().err.startswith(f"{script}.py: {message}")


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--output", "folder", "expected a file to write, got a folder"),
        ("--report", "result.json", "expected a file to write whose name ends in .html"),
        ("--write_reference", "folder", "expected a file to write whose name ends in .npz"),
    ],
)
def test_what_is_no_place_for_a_result_is_refused_before_anything_is_measured(tmp_path, capsys, flag, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit):
        main(["evaluate", "--images", "none", "--output", str(tmp_path / "result.json"), flag, str(tmp_path / name)])
    assert f"{tmp_path / name}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--output", "--write_reference"])
def test_a_file_of_the_user_is_never_replaced(tmp_path, capsys, flag):
    file = tmp_path / "images.npz"
    np.savez(file, images=np.zeros((3, 8, 8), np.uint8))
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        main(["evaluate", "--images", str(file), flag, str(file)])
    assert f"{file}: expected a new file or earlier " in capsys.readouterr().err.replace("an earlier", "earlier")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("subject", "flags", "message"),
    [
        ("--pipeline", ["--solver", "UniPC"], "--solver: expected --teacher, which a solver samples, got none"),
        ("--images", ["--seed", "0"], "--seed: expected --pipeline or --teacher, which make images, got --images"),
        ("--images", ["--compile"], "--compile: expected --pipeline or --teacher"),
        ("--images", ["--captions", "x.txt"], "--captions: expected --pipeline or --teacher"),
        ("--images", ["--clip", "x"], "--clip: expected a metric that uses it (cmmd, clip), got fd"),
        (
            "--images",
            ["--attributes", "faces"],
            "--attributes: expected a metric that uses it (adherence, adherence_uns",
        ),
    ],
)
def test_a_flag_that_nothing_would_read_is_refused(tmp_path, capsys, subject, flags, message):
    with pytest.raises(SystemExit):
        main(["evaluate", subject, "none", "--metrics", "fd", *flags, "--output", str(tmp_path / "result.json")])
    assert message in capsys.readouterr().err


def test_a_page_does_not_replace_the_result_that_it_shows(tmp_path, capsys):
    (tmp_path / "result.json").write_text('{"name": "student", "setting": {}}')
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "result.json"), "--output", str(tmp_path / "result.json")])
    assert "ends in .html" in capsys.readouterr().err and "student" in (tmp_path / "result.json").read_text()
