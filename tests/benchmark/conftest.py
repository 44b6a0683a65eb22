"""What every test of a benchmark shares."""

import functools

import pytest

from stepdistill.evaluation.suite import MetricSuite


@pytest.fixture(scope="module", autouse=True)
def one_suite():
    """Opened once: it embeds thousands of real images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricSuite, "open", functools.cache(MetricSuite.open))
        yield
