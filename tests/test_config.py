"""Configuration: read the way people mean it, and strict about everything else."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from stepdistill import config as configuration
from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.config import apply_overrides, fingerprint_json, flatten, read_config, to_dict, to_yaml
from stepdistill.evaluation.protocol import read_protocol
from stepdistill.files.reading import parse_yaml
from stepdistill.files.schema import ConfigError, build, convert
from stepdistill.files.words import nearest
from stepdistill.training.config import EvalConfig, resolve

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int
    name: str = "run"
    precision: Literal["no", "bf16"] = "no"
    flip: bool = False
    folder: str | None = None
    optim: dict[str, Optim] = dataclasses.field(default_factory=dict)
    main: Optim = Optim()
    extra: Any = None


def problems(mapping) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(Settings, mapping)
    return caught.value.problems


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1.", 1.0), (".5", 0.5), ("0.1", 0.1),
        ("7", 7), ("-7", -7), ("0", 0), ("1_000", 1000), ("0x1F", 31), ("010", "010"), ("1:30", "1:30"),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("n", "n"), ("Y", "Y"),
        ("true", True), ("False", False), ("null", None), ("~", None),
        ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"), ("bf16", "bf16"), ("'1e-4'", "1e-4"), ("-", "-"),
        ("[1e-4, no]", [1e-4, "no"]),
    ],
)  # fmt: skip
def test_values_are_what_people_mean(text, value):
    if text == "-":
        text = "'-'"
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["lr: 1\nlr: 2", "a: 1\nmain:\n  lr: 1\n  b: 2\n  lr: 3", "{lr: 1, lr: 1}"])
def test_a_key_given_twice_is_an_error_with_its_line(text, tmp_path):
    line = text.count("\n") + 1
    with pytest.raises(ConfigError, match=f"line {line}: the key 'lr' is given twice"):
        parse_yaml(text)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: line"):
        read_config(path)


def test_a_file_that_is_missing_malformed_or_no_mapping_is_named(tmp_path):
    (tmp_path / "pixel.yaml").write_text("steps: 1")
    with pytest.raises(ValueError, match=r"pixle\.yaml: no such file; did you mean 'pixel\.yaml'"):
        read_config(tmp_path / "pixle.yaml")
    (tmp_path / "bad.yaml").write_text("steps: [1,")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML: .*line"):
        read_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"list\.yaml: content: expected a section of keys, got \[1\]"):
        read_config(tmp_path / "list.yaml")


def test_an_empty_file_is_an_empty_configuration(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_config(tmp_path / "empty.yaml", ["steps=3"]) == {"steps": 3}


def test_yaml_cannot_build_objects():
    with pytest.raises(Exception, match="could not determine a constructor"):
        parse_yaml("!!python/object/apply:os.system [true]")


def test_overrides_set_values_deep_down_and_leave_the_original_alone():
    original = {"main": {"lr": 1.0}, "steps": 1}
    found = apply_overrides(original, ["main.lr=1e-3", "optim.student.lr=2", "name=no", "folder=a=b", "steps=4"])
    assert found == {
        "main": {"lr": 1e-3}, "optim": {"student": {"lr": 2}}, "name": "no", "folder": "a=b", "steps": 4,
    }  # fmt: skip
    assert original == {"main": {"lr": 1.0}, "steps": 1}
    assert apply_overrides({"main": None}, ["main.lr=1"]) == {"main": {"lr": 1}}  # as a file has an empty section


@pytest.mark.parametrize(("override", "message"), [("steps", r"section\.key=value"), ("steps.a=1", "not a section")])
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ConfigError, match=f"override '{override}'.*{message}"):
        apply_overrides({"steps": 1}, [override])


@pytest.mark.parametrize(
    ("given", "section"),
    [(None, {"a": 1, "b": 2}), ({"a": 3, "b": 4, "c": 5}, {"a": 3, "b": 2, "c": 5}), ("word", "word")],
)
def test_a_section_lies_between_its_defaults_and_the_keys_above_it(given, section):
    assert configuration.section(given, {"a": 1}, b=2) == section


def test_a_path_may_begin_with_the_home_which_a_shell_leaves_in_an_override(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    sections = apply_overrides(
        {"teacher": {"path": "embedded"}, "method": {"name": "lcm"}, "data": {"name": "images"}, "train": {"steps": 1}},
        ["train.output_dir=~/run", "data.path=~/images", "bank.init_from=~/run/pipeline"],
    )
    found = resolve(sections)
    assert found.train.output_dir == str(tmp_path / "run")
    assert found.data.path == str(tmp_path / "images") and found.bank.init_from == str(tmp_path / "run/pipeline")
    dmd = resolve(apply_overrides(sections, ["method={name: dmd, pairs: ~/pairs}"]))
    assert dmd.method.pairs == str(tmp_path / "pairs")
    places = ["students.mine=~/run/pipeline", "judge=~/judge", "captions=~/prompts.txt"]
    benchmark = build(BenchmarkConfig, apply_overrides({"teacher": {"path": "embedded"}, "output": "x"}, places))
    assert benchmark.students == {"mine": str(tmp_path / "run/pipeline")}
    assert (benchmark.judge, benchmark.captions) == (str(tmp_path / "judge"), str(tmp_path / "prompts.txt"))
    with pytest.raises(ConfigError, match=r"^train\.output_dir: expected a path, got ''$"):
        resolve(apply_overrides(sections, ["train.output_dir=''"]))


@pytest.mark.parametrize(
    ("metrics", "message"), [("[fdd]", "metrics: 'fdd' is unknown; did you mean 'fd'"), ("[]", "metrics: .* got none")]
)
def test_metrics_are_checked_before_anything_is_opened(metrics, message, tmp_path):
    sections = {"teacher": {"path": "none"}, "method": {"name": "lcm"}, "data": {"name": "noise"}}
    with pytest.raises(ConfigError, match=f"eval: {message}"):
        resolve(apply_overrides(sections, ["train={steps: 1, output_dir: run}", f"eval.metrics={metrics}"]))
    with pytest.raises(ConfigError, match=message):
        build(BenchmarkConfig, apply_overrides({"teacher": {"path": "none"}, "output": "x"}, [f"metrics={metrics}"]))
    (tmp_path / "p.yaml").write_text(f"{{reference: none, metrics: {metrics}}}")
    with pytest.raises(ConfigError, match=f"protocol: {message}"):
        read_protocol(str(tmp_path / "p.yaml"), {})


@pytest.mark.parametrize("metric", ["clip", "adherence", "adherence_unseen", "prompt_spread"])
def test_metrics_of_prompts_are_not_measured_in_training(metric):
    """No key of the section names a CLIP, prompts or a reader of attributes."""
    with pytest.raises(ConfigError, match=f"eval: metrics: expected metrics of images alone, got '{metric}', which"):
        build(EvalConfig, {"metrics": ["fd", metric]}, "eval")


# --------------------------------------------------------------------------------------------- building


def test_a_configuration_is_built_recursively():
    found = build(
        Settings, {"steps": 3, "optim": {"fake": {"lr": 1, "betas": [0, 0.99], "clip": 2}}, "main": {"lr": 1e-3}}
    )
    assert found == Settings(steps=3, optim={"fake": Optim(lr=1.0, betas=(0.0, 0.99), clip=2.0)}, main=Optim(lr=1e-3))
    assert type(found.optim["fake"].lr) is float
    assert build(Settings, {"steps": 3, "folder": None, "main": {}}) == Settings(steps=3)


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ({"steps": 1.5}, "steps: expected whole number, got 1.5"),
        ({"steps": True}, "steps: expected whole number, got True"),
        ({"steps": "3"}, "steps: expected whole number, got '3'"),
        ({"steps": 3, "flip": "no"}, "flip: expected true/false, got 'no'"),
        ({"steps": 3, "flip": 1}, "flip: expected true/false, got 1"),
        ({"steps": 3, "name": 7}, "name: expected text, got 7"),
        ({"steps": 3, "name": None}, "name: expected text, got None"),
        ({"steps": 3, "main": {"lr": True}}, "main.lr: expected number, got True"),
        ({"steps": 3, "main": {"lr": float("nan")}}, "main.lr: expected number, got nan"),
        ({"steps": 3, "main": {"lr": float("inf")}}, "main.lr: expected number, got inf"),
        ({"steps": 3, "main": {"betas": [0.9, "x"]}}, "main.betas[1]: expected number, got 'x'"),
        ({"steps": 3, "main": {"clip": "big"}}, "main.clip: expected number, got 'big'"),
        ({"steps": 3, "main": 5}, "main: expected a section of keys, got 5"),
        ({"steps": 3, "precision": "bf61"}, "precision: expected 'no' or 'bf16', got 'bf61'; did you mean 'bf16'?"),
        ({"steps": 3, "optim": {"fake": {"lrr": 1}}}, "optim.fake.lrr: unknown key; did you mean 'lr'?"),
        ({"steps": 3, "main": {"lr": -1}}, "main: lr: expected a positive number, got -1.0"),
        ({}, "steps: missing (expected whole number)"),
        ({"stepz": 3}, "stepz: unknown key; did you mean 'steps'?"),
    ],
)  # fmt: skip
def test_a_problem_names_key_value_and_what_was_wanted(mapping, problem):
    assert problem in problems(mapping)


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (list[int], "a list of whole numbers"),
        (tuple[tuple[int, ...], ...], "a list, each entry a list of whole numbers"),
        (list[str | dict[str, int]], "a list, each entry text or a section of keys"),
    ],
)
def test_lists_are_described_in_words(hint, expected):
    with pytest.raises(ConfigError, match=f"a: expected {expected}, got 5"):
        convert(5, hint, "a")


def test_every_problem_is_reported_at_once():
    found = problems({"stepz": 3, "flip": "no", "main": {"lr": "fast", "betaz": 1}, "optim": {"a": {"lr": -1}}})
    assert len(found) == 6
    assert {problem.partition(":")[0] for problem in found} == {
        "stepz", "steps", "flip", "main.lr", "main.betaz", "optim.a",
    }  # fmt: skip
    message = str(ConfigError(found))
    assert all(f"\n  - {problem}" in message for problem in found)


def test_a_configuration_that_is_no_mapping_is_a_problem():
    assert problems([1]) == ["config: expected a section of keys, got [1]"]
    assert problems(None) == ["steps: missing (expected whole number)"]


def test_nearest_names():
    assert nearest("snr_plus", ["snr", "snr_plus_one"]) == "; did you mean 'snr_plus_one'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("zzz", []) == ""


# ----------------------------------------------------------------------------------------------- writing


def test_what_is_written_is_read_back():
    settings = Settings(steps=3, folder="café", optim={"fake": Optim(lr=1e-05)}, extra={"path": Path("a/b")})
    again = build(Settings, parse_yaml(to_yaml(settings)))
    assert to_dict(again) == to_dict(settings)
    assert again.optim["fake"].lr == 1e-5


def test_the_fingerprint_changes_with_every_value_and_with_nothing_else():
    settings = Settings(steps=3)
    assert fingerprint_json(settings) == fingerprint_json(Settings(steps=3)) == fingerprint_json(to_dict(settings))
    changed = [dataclasses.replace(settings, steps=4), dataclasses.replace(settings, main=Optim(lr=2e-4))]
    assert len({fingerprint_json(s) for s in [settings, *changed]}) == 3


def test_flat_keys_are_the_dotted_ones():
    flat = flatten(Settings(steps=3, optim={"fake": Optim()}))
    assert flat["steps"] == 3 and flat["optim.fake.lr"] == 1e-4 and flat["main.betas"] == [0.9, 0.999]
    assert flatten(Settings(steps=3))["optim"] == {}  # an empty section is a value


# -------------------------------------------------------------------------------------------------- budgets

FILE = """train: {steps: 10, output_dir: a}
optim: {lr: 1}
budgets:
  full:
    train: {steps: 90}
    data: {size: 2}
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"train": {"steps": 10, "output_dir": "a"}, "optim": {"lr": 1}}),
        (["budget=quick", "optim.lr=2"], {"train": {"steps": 10, "output_dir": "a"}, "optim": {"lr": 2}}),
        (["budget=full"], {"train": {"steps": 90, "output_dir": "a"}, "optim": {"lr": 1}, "data": {"size": 2}}),
        (["train.steps=3", "budget=full"],
         {"train": {"steps": 3, "output_dir": "a"}, "optim": {"lr": 1}, "data": {"size": 2}}),
    ],
)  # fmt: skip
def test_a_budget_is_laid_over_the_file_and_overrides_over_both(tmp_path, overrides, expected):
    (tmp_path / "a.yaml").write_text(FILE)
    assert read_config(tmp_path / "a.yaml", overrides) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [(FILE, "budget: expected one of quick, full, got 'fast'"), ("a: 1", "budget: expected one of quick, got 'fast'"),
     ("budgets: 3", "budgets: expected a section of keys, got 3"), ("budgets: {fast: 3}", "budget: expected one of")],
)  # fmt: skip
def test_a_budget_that_is_not_there_is_named_with_those_that_are(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "a.yaml", ["budget=fast"])


PIXEL = sorted(path for path in CONFIGS.glob("pixel_*.yaml") if path.stem != "pixel_dmd_pairs")


@pytest.mark.parametrize("path", PIXEL, ids=lambda path: path.stem)
def test_every_pixel_configuration_states_two_budgets_whose_curves_are_measured(path):
    quick, full = resolve(read_config(path)), resolve(read_config(path, ["budget=full"]))
    assert full.train.output_dir != quick.train.output_dir
    images = [run.train.steps * run.data.batch_size * run.train.accumulation for run in (quick, full)]
    assert images[0] < images[1]
    for run in (quick, full):
        assert run.eval.every and run.train.steps / run.eval.every >= 4  # a slope is fitted to four points
        assert (run.eval.num_samples, run.eval.seed) == (1000, 1)  # those of the benchmark's search


@pytest.mark.parametrize(
    ("file", "budget"),
    [("benchmark_fashion", ["budget=quick"]), ("benchmark_fashion", ["budget=full"]), ("benchmark_fashion_flow", [])],
)
def test_the_benchmark_trains_what_its_students_are(file, budget):
    config = build(BenchmarkConfig, read_config(CONFIGS / f"{file}.yaml", budget))
    trained = {resolved(CONFIGS.parent, line).train.output_dir for line in config.train}
    assert {str(Path(folder).parent) for folder in config.students.values()} == trained
    for line in config.train:  # a run starts from one that is trained before it
        start = resolved(CONFIGS.parent, line).bank.init_from
        assert start is None or str(Path(start).parent) in trained


def resolved(root, line):
    path, *overrides = line.split()
    return resolve(read_config(root / path, overrides))
