"""The table that ``evaluate`` prints: every number of the result, beside its interval and its direction."""

from pathlib import Path

from stepdistill.cli import make_parser
from stepdistill.evaluation.metrics.table import directions
from stepdistill.evaluation.summary import aligned, lines, summary

RESULT = {
    "name": "a\x1b[2J", "calls": 4.0, "parameters": 1_234_567, "peak_memory_of": "process",
    "fd": 0.22, "fd_low": 0.2, "fd_high": 0.25, "spread": 1.0, "spread_low": 0.9, "spread_high": 1.1,
    "inception_score": 4.5, "inception_score_std": 0.125,
    "setting": {"num_samples": 5000, "seed": 0, "features": {"name": "embedded"}, "clip": None},
}  # fmt: skip


def test_every_number_is_in_the_table_once_and_no_end_of_an_interval_alone():
    assert [tuple(line) for line in lines(RESULT)] == [
        ("fd", "0.2200", "0.2000 - 0.2500", "lower"),
        ("spread", "1.000", "0.9000 - 1.100", ""),
        ("inception_score", "4.500", "std 0.1250", "higher"),
        ("calls", "4", "", ""),
        ("parameters", "1,234,567", "", ""),
    ]


def test_the_direction_of_every_metric_is_told():
    for name, higher in directions().items():
        assert lines({name: 0.5})[0].better == ("higher" if higher else "lower")


def test_the_table_has_a_head_and_shows_names_without_power_over_the_terminal():
    head, measured, _, columns, *rows = summary(RESULT).splitlines()
    assert head == r"a\x1b[2J" and measured == "5,000 images, seed 0, features embedded"
    assert columns.split("  ")[0] == "metric" and len(rows) == 5
    assert len({row.index(text) for row, text in [(columns, "better"), (rows[0], "lower"), (rows[2], "higher")]}) == 1
    assert summary({"name": "x", "setting": {}})  # a result without numbers, or without what made it


def test_columns_are_as_wide_as_their_widest_cell():
    assert aligned([("a", "1", "x"), ("bbb", "22", "y")]) == "a     1  x\nbbb  22  y"


def test_a_result_has_a_file_without_being_asked_for_one():
    assert make_parser().parse_args(["evaluate", "--images", "samples"]).output == Path("evaluation.json")
