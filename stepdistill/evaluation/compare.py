"""Which of some results is better, and where chance does not allow to say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.evaluation.metrics.bootstrap import Interval
from stepdistill.evaluation.metrics.names import HIGHER_IS_BETTER, LOWER_IS_BETTER

FREE = ("versions", "seed", "precision", "rows")
"""Settings in which comparable results may differ."""


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Result files, named by their paths where two have one name.

    Raises:
        ValueError: fewer than two, or a file that holds no result.
    """
    if len(paths) < 2:
        raise ValueError(f"compare: wanted two or more results, found {len(paths)}")
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a result file ({error})") from error
        if "setting" not in result or "name" not in result:
            raise ValueError(f"{path}: not a result of evaluate: it has no 'setting'")
        results.append(result)
    unique = len({result["name"] for result in results}) == len(results)
    return results if unique else [result | {"name": str(path)} for result, path in zip(results, paths, strict=True)]


def compare(results: Sequence[Mapping[str, Any]]) -> str:
    """Which of some results is better, metric by metric, and where their intervals do not allow to say.

    Raises:
        ValueError: results of different settings; names the first that differs.
    """
    first = results[0]
    for other in results[1:]:
        for key, value in first["setting"].items():
            found = other["setting"].get(key)
            if key not in FREE and found != value:
                raise ValueError(
                    f"not comparable: {key} is {value!r} in {first['name']!r}, {found!r} in {other['name']!r}"
                )
    shared = [key for key in first if all(key in other for other in results)]
    lines = [_verdict(key, results) for key in shared if key in LOWER_IS_BETTER + HIGHER_IS_BETTER]
    return "\n".join(lines)


def _verdict(metric: str, results: Sequence[Mapping[str, Any]]) -> str:
    """One line: the values from the best down, and whether the best is distinguishable from the next."""
    ordered = sorted(results, key=lambda result: result[metric], reverse=metric in HIGHER_IS_BETTER)
    values = ", ".join(f"{result['name']} {result[metric]:.4g}" for result in ordered)
    best, second = ordered[:2]
    if f"{metric}_low" not in best:
        return f"{metric}: {values} (no interval)"
    first, next_best = (Interval(row[f"{metric}_low"], row[f"{metric}_high"], 0.95) for row in (best, second))
    return f"{metric}: {values}: " + (
        "not distinguishable" if first.overlaps(next_best) else f"{best['name']} is better"
    )
