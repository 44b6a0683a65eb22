"""The students of a benchmark: trained or exported before it, if they are missing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stepdistill.benchmark.results import Row
from stepdistill.config import fingerprint_json, flatten, read_config
from stepdistill.export.contract import read_contract
from stepdistill.files.reading import read_yaml
from stepdistill.files.words import LISTED, nearest
from stepdistill.networks.fingerprint import fingerprint_pipeline
from stepdistill.training.config import FREE_KEYS, RunConfig, resolve
from stepdistill.training.run import Run


class StudentRow(NamedTuple):
    """An exported student at a number of network calls per image, or (None) at that of its contract."""

    name: str
    folder: str
    calls: int | None


def student_rows(students: Mapping[str, str], calls: Sequence[int]) -> list[StudentRow]:
    """Return the rows of a table: every student at every number of ``calls``, or as its contract says if there is none.

    At n calls a student is the export ``pipeline-<n>-steps`` beside its own, which methods in stages write, or else its
    own, called with n steps.
    """
    if not calls:
        return [StudentRow(name, folder, None) for name, folder in students.items()]
    rows = []
    for name, folder in students.items():
        for n in calls:
            staged = Path(folder).with_name(f"pipeline-{n}-steps")
            place = str(staged) if is_pipeline(staged) else folder
            rows.append(StudentRow(f"{name}, {n} call{'s' if n > 1 else ''}", place, n))
    return rows


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a diffusers pipeline."""
    return (folder / "model_index.json").is_file()


def check_students(students: Mapping[str, str]) -> None:
    """Raise ``ValueError`` for the first of the named folders that holds no pipeline."""
    for name, folder in students.items():
        if not is_pipeline(Path(folder)):
            siblings = [str(path) for path in Path(folder).parent.glob("pipeline*")]
            raise ValueError(f"students.{name}: no pipeline in {folder}{nearest(folder, siblings)}")


def check_awaited(students: Mapping[str, str], runs: Sequence[str]) -> None:
    """Raise ``ValueError`` for the first of the named folders that holds no pipeline, and lies in no run's folder.

    Args:
        students: folders by name.
        runs: the path of a configuration each, followed by ``key=value`` for the keys that are changed.
    """
    outputs = [resolved(line).train.output_dir for line in runs]
    written = [Path(output).resolve() for output in outputs]
    for name, folder in students.items():
        place = Path(folder)
        if not is_pipeline(place) and not can_be_exported(place) and place.resolve().parent not in written:
            raise ValueError(
                f"students.{name}: expected a pipeline, or a folder in the train.output_dir of a run that comes first, "
                f"got {folder}{nearest(folder, [f'{output}/pipeline' for output in outputs])}"
            )


def train_runs(runs: Mapping[str, RunConfig]) -> None:
    """Train runs, by their lines, in turn."""
    for command, config in runs.items():
        print(f"training {command}", flush=True)
        Run(config).train()


def missing_runs(runs: Sequence[str]) -> dict[str, RunConfig]:
    """Return the configurations of the runs that have not exported their student yet, and warn of others that differ.

    Args:
        runs: the path of a configuration each, followed by ``key=value`` for the keys that are changed.

    Raises:
        ValueError: if one of all is at fault.
    """
    missing = {}
    for command in runs:
        config = resolved(command)
        folder = Path(config.train.output_dir)
        if is_pipeline(folder / "pipeline"):
            warn_of_changes(folder, config)
        else:
            missing[command] = config
    return missing


def warn_of_changes(folder: Path, config: RunConfig) -> None:
    """Warn if a finished run was trained with other values than its line names now; it is not trained again."""
    before = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    now = flatten(config.as_sections())
    shared = {key: value for key, value in flatten(before).items() if key in now.keys() - set(FREE_KEYS)}
    if changed := [key for key, value in shared.items() if value != now[key]]:
        warnings.warn(
            f"{folder}: its student was trained with other values of {', '.join(changed[:LISTED])} than asked for now, "
            "and is measured as it is; move the folder away to train it again",
            stacklevel=2,
        )


def resolved(command: str) -> RunConfig:
    """Return the configuration that a line of a benchmark's ``train`` names."""
    path, *overrides = command.split()
    return resolve(read_config(path, overrides))


def seed_lines(seeds: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Return the lines of runs with other training seeds, by the line of the first; each has its own folder."""
    lines: dict[str, list[str]] = {}
    for command, numbers in seeds.items():
        train = resolved(command).train
        for seed in numbers:
            other = f" train.seed={seed} train.output_dir={train.output_dir}-seed-{seed}"
            lines.setdefault(command, []).append(command + (other if seed != train.seed else ""))
    return lines


def seed_students(seeds: Mapping[str, Sequence[int]]) -> dict[str, dict[str, str]]:
    """Return the students of :func:`seed_lines` by the names of their rows, by the name of their group."""
    groups: dict[str, dict[str, str]] = {}
    for command, lines in seed_lines(seeds).items():
        for line in lines:
            train, (path, *_) = resolved(line).train, command.split()
            name = f"{Path(path).stem}, seed {train.seed}"
            groups.setdefault(command, {})[name] = str(Path(train.output_dir) / "pipeline")
    return groups


def export_missing(students: Mapping[str, str]) -> None:
    """Export students for other numbers of steps, which the names of missing folders tell: ``pipeline-2-steps``."""
    for folder in map(Path, students.values()):
        if can_be_exported(folder) and not is_pipeline(folder):
            steps, config = folder.name.split("-")[1], folder.parent / "config.yaml"
            Run(resolve(read_config(config, [f"method.steps={steps}"]))).export_checkpoint(folder)


def can_be_exported(folder: Path) -> bool:
    """Whether a folder's name tells a number of steps, and it lies beside the configuration of a run."""
    return bool(re.fullmatch(r"pipeline-\d+-steps?", folder.name)) and (folder.parent / "config.yaml").is_file()


def start_of(folder: Path) -> Path | None:
    """Return the pipeline of what a student started from, under its own sampler; it is exported where it is missing.

    None where it cannot be told: beside the student lies no run, or its weights were no student before they were
    converted.
    """
    config, steps = folder.parent / "config.yaml", read_contract(folder).steps
    if not config.is_file() or steps is None:
        return None
    start = folder.parent / f"start-{steps}-steps"
    if not is_pipeline(start):
        run = run_to(config, steps)
        if run.distiller.converts:
            return None
        run.export_start(start, steps)
    return start


def run_to(config: Path, steps: int) -> Run:
    """Return the run of a configuration that makes a student of ``steps`` steps, at its end or in a stage."""
    run = Run(resolve(read_config(config, ["eval.every=0"])))
    made = [run.config.method.steps, *(stage.value for stage in run.distiller.stages(run.config.train.steps))]
    if steps in made:
        return run
    return Run(resolve(read_config(config, [f"method.steps={steps}", "eval.every=0"])))


def fingerprints(folder: str) -> Row:
    """Return what tells the images of two students apart, as values of their rows: hashes of weights and sampling."""
    return {"sha256": fingerprint_pipeline(folder), "sampling": fingerprint_sampling(Path(folder))}


def is_of(row: Row, folder: str) -> bool:
    """Whether a row is of the student that lies in a folder; one of an older version does not say how it sampled."""
    now = fingerprints(folder)
    return row.get("sha256") == now["sha256"] and row.get("sampling", now["sampling"]) == now["sampling"]


def fingerprint_start(folder: Path) -> str:
    """Return what tells the images of two starts apart: hashes of their weights and sampling."""
    return "-".join(fingerprints(str(folder)).values())


def fingerprint_sampling(folder: Path) -> str:
    """Return a hash of a student's sampler and call."""
    facts = read_contract(folder)
    return fingerprint_json([facts.sampler, facts.timesteps, facts.gamma, facts.guidance_scale, facts.call])
