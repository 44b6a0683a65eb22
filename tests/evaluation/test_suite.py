"""The table of metrics and the suite: facts that are complete, parts that add up, processes that add up."""

import importlib

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher

from stepdistill.evaluation.metrics.bootstrap import Interval
from stepdistill.evaluation.metrics.frechet import Moments
from stepdistill.evaluation.metrics.rows import ROWS, FeatureRows
from stepdistill.evaluation.metrics.scores import Score
from stepdistill.evaluation.metrics.table import METRICS, check_sample, directions
from stepdistill.evaluation.reference import Reference
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.features.classifier import SmallConvNet
from stepdistill.inference.sampling import Images

PLAIN = [name for name, metric in METRICS.items() if metric.plain is None and "captions" not in metric.needs]


@pytest.fixture(scope="module")
def suite():
    torch.manual_seed(0)
    network = SmallConvNet(num_classes=3, width=4, num_features=6).eval()
    real = images(60, seed=1)
    rows = network.extract(real.pixels)
    return MetricSuite(network, Reference(Moments.of(rows), rows=rows, labels=real.labels))


def images(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    return Images(torch.from_numpy(pixels), torch.arange(count) % 3)


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_all_its_facts(name):
    metric = METRICS[name]
    scores = importlib.import_module("stepdistill.evaluation.metrics.scores")
    assert metric.name == name and metric.values and callable(getattr(scores, metric.function))
    assert (metric.plain is None) == ("inception" not in metric.needs)
    if metric.plain is not None:
        assert name in METRICS[metric.plain].values[0].published.values()


def test_reported_names_are_of_one_metric_each():
    owners = {}
    for name, metric in METRICS.items():
        for value in metric.values:
            for reported in (value.name, *value.published.values()):
                assert owners.setdefault(reported, metric.plain or name) == (metric.plain or name)


def test_directions_are_those_of_older_results():
    lower = {"fd", "fid", "kd", "kid", "mmd", "cmmd"}
    higher = {
        "precision", "recall", "density", "coverage", "accuracy", "classifier_score", "inception_score", "authenticity",
        "clip_score", "adherence", "adherence_unseen",
    }  # fmt: skip
    assert directions() == dict.fromkeys(lower, False) | dict.fromkeys(higher, True)


def test_published_names_are_kept_for_published_features():
    (fd,), (score,), (mmd,) = (METRICS[name].values for name in ("fd", "inception_score", "cmmd"))
    assert [fd.name_on(kind) for kind in ("other", "inception", "clip")] == ["fd", "fid", "fd"]
    assert [score.name_on(kind) for kind in ("other", "inception")] == ["classifier_score", "inception_score"]
    assert [mmd.name_on(kind) for kind in ("other", "inception", "clip")] == ["mmd", "mmd", "cmmd"]


def test_the_console_lists_every_metric(capsys):
    from stepdistill.cli import main

    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    listed = capsys.readouterr().out.split()
    assert set(METRICS) <= set(listed)


def test_a_score_is_flat_in_a_result():
    assert Score(1.0).flat("a") == {"a": 1.0}
    assert Score(1.0, Interval(0.5, 2.0, 0.95), 0.1).flat("a") == {"a": 1.0, "a_low": 0.5, "a_high": 2.0, "a_std": 0.1}


# ------------------------------------------------------------------------------------------------------- the suite


@pytest.mark.parametrize("name", PLAIN)
def test_a_metric_reports_what_its_table_says(suite, name):
    suite.check([name])
    found = suite.score(images(40), [name])
    names = {value.name for value in METRICS[name].values}
    assert names <= found.keys()
    assert {key.removesuffix("_low").removesuffix("_high").removesuffix("_std") for key in found} == names


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "spread"])  # that one needs two of each class
def test_the_least_images_of_a_metric_are_enough_and_no_more_than_it_needs(suite, name):
    least = METRICS[name].least
    check_sample([name], least)
    suite.score(images(least), [name])
    if least > 2:
        with pytest.raises(
            ValueError, match=rf"^num_samples: expected at least {least} for '{name}', got {least - 1}$"
        ):
            check_sample([name], least - 1)
        with pytest.raises(ValueError, match=f"expected at least {least} images, got {least - 1}"):
            suite.score(images(least - 1), [name])


def test_parts_give_the_numbers_of_the_whole(suite):
    whole, rows = images(100), FeatureRows()
    for start in range(0, 100, 50):
        part = Images(whole.pixels[start : start + 50], whole.labels[start : start + 50])
        rows.update(suite.embed(part))
    assert suite.score_rows(rows.compute(), PLAIN) == suite.score(whole, PLAIN)


def test_a_reference_without_labels_is_refused_before_any_work(suite):
    bare = MetricSuite(suite.features, Reference(suite.reference.moments, rows=suite.reference.rows))
    with pytest.raises(ValueError, match="'spread' needs class labels; the reference has none"):
        bare.check(["spread"])
    bare.check(["kd", "fd"])


# ----------------------------------------------------------------------------------------------- torchmetrics' contract


def chunk(start, count=3):
    return {
        "features": torch.arange(start, start + count).double()[:, None].expand(-1, 2),
        "calls": torch.tensor([2.0]),
    }


def test_rows_are_appended_computed_and_forgotten():
    rows = FeatureRows()
    rows.update(chunk(0))
    rows.update(chunk(3))
    found = rows.compute()
    assert found.keys() == {"features", "calls"}
    assert found["features"][:, 0].tolist() == [0, 1, 2, 3, 4, 5] and found["calls"].tolist() == [2, 2]
    rows.update(chunk(6, 1))  # a result that was computed earlier is not kept
    assert len(rows.compute()["features"]) == 7
    rows.reset()
    rows.update({})
    assert rows.compute() == {}


def gathered(monkeypatch, parts, rank):
    """The rows that process ``rank`` computes when each process has one of ``parts``, with the gathering simulated."""
    metrics = [FeatureRows() for _ in parts]
    for metric, part in zip(metrics, parts, strict=True):
        metric.update(part)
    states = iter([[getattr(metric, name) for metric in metrics] for name in ROWS])

    def all_gather_object(target, mine, group=None):
        del mine, group
        target[:] = [torch.cat(state) if state else torch.tensor([]) for state in next(states)]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: len(parts))
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    metrics[rank].distributed_available_fn = lambda: True
    return metrics[rank].compute()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("second", [chunk(3, 1), {}], ids=["shorter", "empty"])
def test_processes_add_up_in_order_whatever_they_have(monkeypatch, rank, second):
    first = chunk(0) | {"labels": torch.arange(3), "cut": torch.tensor([True, False, True])}
    found = gathered(monkeypatch, [first, second], rank)
    assert found["features"][:, 0].tolist() == list(range(len(found["features"]))) and len(found["features"]) >= 3
    assert found["labels"].dtype == torch.int64 and found["cut"].dtype == torch.bool


def test_rows_that_every_process_has_are_not_gathered():
    rows = FeatureRows(sync_on_compute=False)
    rows.dist_sync_fn, rows.distributed_available_fn = None, lambda: True
    rows.update(chunk(0))
    assert len(rows.compute()["features"]) == 3


def in_two_processes(folder):
    rank = PartialState(cpu=True).process_index
    one, both = FeatureRows(), FeatureRows()
    one.update({} if rank else chunk(0, 2))
    both.update(chunk(5 * rank, 2 + rank))
    torch.save((one.compute(), both.compute()), folder / f"{rank}.pt")


def test_two_processes_have_the_same_rows(tmp_path):
    PartialState._reset_state()
    debug_launcher(in_two_processes, (tmp_path,), num_processes=2)
    for rank in range(2):
        one, both = torch.load(tmp_path / f"{rank}.pt")
        assert one["features"][:, 0].tolist() == [0, 1]
        assert both["features"][:, 0].tolist() == [0, 1, 5, 6, 7]


def test_what_metrics_need_of_the_images_is_known_before_there_are_any(suite):
    asked = torch.arange(7) % 3
    suite.check_conditions(["fd", "spread", "accuracy"], asked, None)
    suite.check_conditions(["prompt_spread"], None, ["a cat", "a dog", "a cat"])
    for metrics, labels, captions, message in (
        (["spread"], asked[:5], None, r"spread: expected 2 images of class 2, got 20 real, 1 fake"),
        (["fd", "accuracy"], None, None, "'accuracy' needs the class labels"),
        (["prompt_spread"], asked, None, "'prompt_spread' needs captions"),
        (["prompt_spread"], None, ["a cat", "a dog"], "needs prompts with two images"),
    ):
        with pytest.raises(ValueError, match=message):
            suite.check_conditions(metrics, labels, captions)
