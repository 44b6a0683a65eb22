"""The share of the time that a loop waits for its data."""

import time

import pytest

from stepdistill.training.reporting import Waiting


def test_only_the_time_until_an_item_is_there_counts(monkeypatch):
    now = iter([0.0, 0.0, 3.0, 4.0, 7.0, 8.0, 8.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    waiting = Waiting()  # at 0
    items = waiting.timed(["a", "b"])
    assert next(items) == "a"  # from 0 to 3
    assert next(items) == "b"  # from 4 to 7
    assert waiting.take() == pytest.approx(6 / 8)
    assert waiting.take() == 0  # nothing was waited for since
