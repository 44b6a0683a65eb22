"""The second judge: what it sees, how it ranks, and that a table says where the two disagree."""

import numpy as np
import torch

from stepdistill.benchmark.judge import Judge, disagreements, judge_of, with_ranks
from stepdistill.benchmark.tables import compared, markdown
from stepdistill.evaluation.sources import FileSource
from stepdistill.features.loading import load_features
from stepdistill.inference.sampling import Images


class Counted(FileSource):
    """Random images, and how many were taken."""

    def __init__(self, count):
        self.count, self.taken = count, []
        self.pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()

    def take(self, indices):
        self.taken.extend(indices)
        return Images(self.pixels[indices.start : indices.stop], None)


def test_it_judges_the_first_samples_and_keeps_its_reference(tmp_path, monkeypatch):
    kept, source = tmp_path / "folder/judge.npz", Counted(30)
    images = tmp_path / "real.npz"
    np.savez(images, images=np.random.default_rng(1).integers(0, 256, (40, 28, 28, 1), np.uint8))
    judge = Judge("embedded", str(images), 20, kept)
    row = judge.judge(source)
    assert list(row) == ["fd_on_embedded"] and source.taken == list(range(20)) and kept.is_file()
    assert row == judge.judge_images(source.take(range(30)))
    images.unlink()  # the reference is not read again
    assert Judge("embedded", str(images), 20, kept).judge(source) == row
    assert judge.suite.features.sha256 == load_features("embedded").sha256


def student(name, calls, fd, other, **more):
    return {"name": name, "kind": "student", "calls": calls, "fd": fd, "fd_low": fd - 0.1, "fd_high": fd + 0.1,
            "fd_on_other": other, "seconds_per_image": 1.0, **more}  # fmt: skip


ROWS = [student("a", 1, 1.0, 30.0), student("b", 1, 2.0, 20.0), student("c", 2, 0.5, 10.0),
        student("d", 2, 0.55, 9.0)]  # fmt: skip


def test_ranks_are_by_both_judges_among_all_students():
    ranks = {row["name"]: row["ranks"] for row in with_ranks(ROWS, "fd")}
    assert ranks == {"a": "3 / 4", "b": "4 / 3", "c": "1 / 2", "d": "2 / 1"}
    assert judge_of(ROWS) == "fd_on_other" and "| FD on other |" in markdown(compared(ROWS, "fd"), "fd")


def test_only_what_the_first_judge_tells_apart_is_called_a_disagreement():
    said = disagreements(ROWS, "fd")
    assert said == (
        "Of 1 pairs of students at equal calls that FD tells apart, the features of other order 1 the other way: "
        "a before b."
    )
    alike = [ROWS[0], ROWS[1] | {"fd_on_other": 40.0}]
    assert disagreements(alike, "fd").endswith("order all alike.")


def test_without_a_second_judge_nothing_is_said():
    alone = [{key: value for key, value in row.items() if key != "fd_on_other"} for row in ROWS]
    assert disagreements(alone, "fd") == "" and with_ranks(alone, "fd") == alone
