"""What a row of the log holds."""

from types import SimpleNamespace

import torch

from stepdistill.methods.base import Stage
from stepdistill.training.metrics_log import MetricsLog
from stepdistill.training.reporting import Reporter


def test_numbers_of_any_size_are_logged_to_six_digits(tmp_path):
    alone = SimpleNamespace(is_main_process=True, num_processes=1, log=lambda values, step: None)
    reporter, loss = Reporter(alone, tmp_path, 1), {"small": 1.23456789e-7, "usual": 0.123456789, "large": 12345678.9}
    reporter.collect({f"student/{name}": torch.tensor(value, dtype=torch.float64) for name, value in loss.items()})
    reporter.write(1, Stage("train", 1), {})
    (row,) = MetricsLog(tmp_path).rows()
    assert [row[f"student/{name}"] for name in loss] == [1.23457e-07, 0.123457, 12345700.0]
