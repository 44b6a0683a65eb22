"""Compare results: which is better, and whether the difference exceeds chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.evaluation.metrics.bootstrap import Interval
from stepdistill.evaluation.metrics.table import directions
from stepdistill.evaluation.results import read_result
from stepdistill.files.words import shown, visible

FREE = ("versions", "seed", "precision", "rows")
"""Settings in which comparable results may differ."""


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read result files; where two have the same name, all are named by their paths.

    Raises:
        ValueError: if there are fewer than two, or a file holds no result.
    """
    if len(paths) < 2:
        raise ValueError(f"expected two or more results, got {len(paths)}")
    results = [read_result(path) for path in paths]
    if len({result["name"] for result in results}) < len(results):
        for result, path in zip(results, paths, strict=True):
            result["name"] = visible(str(path))
    return results


def compare(results: Sequence[Mapping[str, Any]]) -> str:
    """Return one line a metric: the results from the best down, and whether the best two differ by more than chance.

    Raises:
        ValueError: if the results have different settings; names the first that differs.
    """
    first = results[0]
    for other in results[1:]:
        for key, value in first["setting"].items():
            found = other["setting"].get(key)
            if key not in FREE and found != value:
                raise ValueError(
                    f"not comparable: {visible(key)} is {shown(value)} in {first['name']!r}, "
                    f"{shown(found)} in {other['name']!r}"
                )
    higher_is_better = directions()
    shared = set(first).intersection(*results)
    lines = [_verdict(key, results, higher_is_better[key]) for key in first if key in shared & higher_is_better.keys()]
    return "\n".join(lines)


def _verdict(metric: str, results: Sequence[Mapping[str, Any]], higher_is_better: bool) -> str:
    ordered = sorted(results, key=lambda result: result[metric], reverse=higher_is_better)
    values = ", ".join(f"{result['name']} {result[metric]:.4g}" for result in ordered)
    best, second = ordered[:2]
    if f"{metric}_low" not in best or f"{metric}_low" not in second:
        return f"{metric}: {values} (no interval)"
    alike = _interval(best, metric).overlaps(_interval(second, metric))
    return f"{metric}: {values}: " + ("not distinguishable" if alike else f"{best['name']} is better")


def _interval(result: Mapping[str, Any], metric: str) -> Interval:
    return Interval(result[f"{metric}_low"], result[f"{metric}_high"], 0.95)
