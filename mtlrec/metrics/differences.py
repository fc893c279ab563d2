"""Two models on the same rows: how they differ in every task that both have, and how sure that is.

R rows, T tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtlrec.metrics.bootstrap import REPLICATES, LabelledRows, metric_names, paired_bootstrap
from mtlrec.metrics.groups import NO_GROUP, groups_of
from mtlrec.metrics.metrics import ALL
from mtlrec.metrics.ranking import DEFAULT_K


@dataclass(frozen=True)
class Subject:
    """What a model measures itself at: its tasks and scenarios, in the order of their indices."""

    tasks: tuple[tuple[str, str, str], ...]
    """(name, kind, column of the label)."""
    scenarios: tuple[str, ...]
    """["all"] alone: no scenarios."""


@dataclass(frozen=True)
class Scored:
    """What a model made of a data set, row by row in the order of the files."""

    subject: Subject
    ties: NDArray[np.uint64]
    """[R] Hash of each row's number in the data set."""
    users: NDArray[np.uint64]
    """[R] Hash of each row's user; NO_GROUP where it has none."""
    scenario: NDArray[np.int32]
    """[R] Index."""
    labels: NDArray[np.float32]
    """[R, T]"""
    valid: NDArray[np.bool_]
    """[R, T]"""
    outputs: NDArray[np.float32]
    """[R, T]: logits, scores or values."""


def common_tasks(first: Subject, second: Subject) -> list[tuple[str, int, int]]:
    """(name, index in the first, index in the second) of the tasks that can be compared.

    Both have one name and one label, and both predict a value, or both rank: a binary task may be compared
    with a pairwise one.
    """
    there = {name: (t, kind, label) for t, (name, kind, label) in enumerate(second.tasks)}
    found = []
    for t, (name, kind, label) in enumerate(first.tasks):
        if name in there:
            other, other_kind, other_label = there[name]
            if label == other_label and (kind == "regression") == (other_kind == "regression"):
                found.append((name, t, other))
    return found


def num_comparisons(first: Subject, second: Subject) -> int:
    """How often `differences` tells of its progress."""
    scenarios = (first if first.scenarios != (ALL,) else second).scenarios
    return (1 if scenarios == (ALL,) else 1 + len(scenarios)) * len(common_tasks(first, second))


def differences(
    first: Scored,
    second: Scored,
    replicates: int = REPLICATES,
    seed: int = 0,
    k: int = DEFAULT_K,
    show: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """{"all": {task: {metric: as of `paired_bootstrap`, first - second}}, scenario: {task: ...}}, plain JSON.

    Scenarios and users are the first's, or, where it knows none, the second's. Rows that carry a label for
    both count (`given` may differ). In "all" a user is drawn with the rows of all scenarios, and ranked in
    each by itself. Without users, rows are drawn one by one. `show` is told of the progress,
    `num_comparisons` times.
    """
    if not np.array_equal(first.ties, second.ties):
        raise ValueError("the two models were measured on different rows")
    named = first if first.subject.scenarios != (ALL,) else second
    users = first.users if np.any(first.users != NO_GROUP) else second.users
    scenarios: Sequence[str] = named.subject.scenarios
    parts: dict[str, NDArray[np.bool_] | None] = {ALL: None}
    if scenarios != (ALL,):
        parts |= {name: named.scenario == s for s, name in enumerate(scenarios)}
    groups = groups_of(users, named.scenario)
    tasks = common_tasks(first.subject, second.subject)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    began, done = time.monotonic(), 0
    for scenario, here in parts.items():
        found[scenario] = {}
        for name, mine, other in tasks:
            both = first.valid[:, mine] & second.valid[:, other]
            chosen = np.flatnonzero(both if here is None else both & here)
            rows = LabelledRows(users[chosen], groups[chosen], first.ties[chosen], first.labels[chosen, mine])
            kinds = (first.subject.tasks[mine][1], second.subject.tasks[other][1])
            grouped = bool(np.any(rows.users != NO_GROUP))
            theirs = metric_names(kinds[1], grouped, k)
            metrics = [metric for metric in metric_names(kinds[0], grouped, k) if metric in theirs]
            outputs = first.outputs[chosen, mine], second.outputs[chosen, other]
            found[scenario][name] = paired_bootstrap(rows, *outputs, metrics, replicates, seed)
            done += 1
            rate, total = done / (time.monotonic() - began), num_comparisons(first.subject, second.subject)
            event = {"kind": "progress", "what": "resample", "unit": "tasks", "done": done, "total": total}
            show({**event, "rows_per_s": rate, "seconds_left": (total - done) / rate})
    return found
