"""Names of metrics, as `run.evaluate.metric` takes them: "task/metric" or "scenario/task/metric"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

RANKING = ("gauc", "ndcg@10", "recall@10", "hit@10", "mrr")
"""Metrics by user, which need schema.user."""
BY_KIND = {
    "binary": ("auc", *RANKING, "logloss"),
    "pairwise": ("auc", *RANKING),
    "regression": ("rmse", "mae"),
}
"""Those that can be the measure of a model, by kind of task."""
SMALLER_IS_BETTER = ("logloss", "rmse", "mae")


def check_metrics(
    names: Sequence[str], scenarios: Sequence[str], kinds: Mapping[str, str], by_user: bool
) -> None:
    """ValueError unless every name is one of a model with these scenarios and tasks (name -> kind)."""
    for name in names:
        scenario, task, metric = split(name)
        if scenario not in ("all", *scenarios):
            raise ValueError(
                f"run.evaluate.metric: {name!r}: {scenario!r} is no scenario; allowed: {', '.join(scenarios)}"
            )
        if task not in kinds:
            raise ValueError(
                f"run.evaluate.metric: {name!r} names no task; allowed: task/metric or scenario/task/metric "
                f"with one of the tasks {', '.join(kinds)}"
            )
        allowed = [each for each in BY_KIND[kinds[task]] if by_user or each not in RANKING]
        if metric not in allowed:
            hint = " (and schema.user for metrics by user)" if metric in RANKING and not by_user else ""
            raise ValueError(
                f"run.evaluate.metric: {name!r}: {metric!r} is not a metric of a {kinds[task]} task; "
                f"allowed: {', '.join(allowed)}{hint}"
            )
    if len({split(name)[2] in SMALLER_IS_BETTER for name in names}) > 1:
        raise ValueError(
            "run.evaluate.metric: of some a larger value is better, of others a smaller; use one sort"
        )


def split(name: str) -> tuple[str, str, str]:
    """(scenario, task, metric) of a name; scenario "all" where it names none. A scenario may have slashes."""
    parts = name.rsplit("/", 2)
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    return ("all", parts[0], parts[1]) if len(parts) == 2 else ("all", name, "")


def score(metrics: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """The mean of the named metrics, negated where smaller is better: greater is better. None: undefined."""
    values = []
    for name in names:
        scenario, task, metric = split(name)
        value = metrics.get(scenario, {}).get(task, {}).get(metric)
        if value is None or not math.isfinite(value):
            return None
        values.append(-value if metric in SMALLER_IS_BETTER else value)
    return sum(values) / len(values)
