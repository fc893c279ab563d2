from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mtlrec.metrics.bootstrap import LabelledRows, metric_names, paired_bootstrap
from mtlrec.metrics.differences import Scored, Subject, common_tasks, differences, num_comparisons
from mtlrec.metrics.groups import NO_GROUP

TASKS = (("click", "binary", "click"), ("choice", "pairwise", "choice"), ("stars", "regression", "rating"))


def scored(seed: int) -> Scored:
    """400 rows of 30 users in two scenarios; the seed decides the outputs alone."""
    random = np.random.default_rng(0)
    users = random.integers(1, 2**64, 30, dtype=np.uint64)[random.integers(0, 30, 400)]
    labels = (random.random((400, 3)) < 0.4).astype(np.float32)
    valid = random.random((400, 3)) < 0.8
    scenario = random.integers(0, 2, 400).astype(np.int32)
    ties = random.integers(0, 2**64, 400, dtype=np.uint64)
    outputs = (labels + np.random.default_rng(seed).normal(size=(400, 3))).astype(np.float32)
    subject = Subject(TASKS, ("feed", "search"))
    return Scored(subject, ties, users, scenario, labels, valid, outputs)


def test_every_scenario_and_task_is_one_paired_bootstrap() -> None:
    first, second = scored(1), scored(2)
    events: list[Any] = []
    found = differences(first, second, replicates=50, seed=5, show=events.append)
    assert list(found) == ["all", "feed", "search"]
    for s, scenario in enumerate(("feed", "search")):
        for t, (task, kind, _) in enumerate(TASKS):
            here = (first.scenario == s) & first.valid[:, t]
            rows = LabelledRows(first.users[here], first.users[here], first.ties[here], first.labels[here, t])
            outputs = first.outputs[here, t], second.outputs[here, t]
            expected = paired_bootstrap(rows, *outputs, metric_names(kind, grouped=True), 50, 5)
            assert list(found[scenario][task]) == list(expected)
            for metric, numbers in expected.items():
                assert found[scenario][task][metric] == pytest.approx(numbers, rel=1e-12)
    # In all scenarios together a user is drawn once, and is a list in each.
    assert found["all"]["click"]["auc"]["users"] == 30
    assert [event["done"] for event in events] == list(range(1, 10)) and events[0]["total"] == 9
    json.dumps(found, allow_nan=False)


def test_a_model_without_scenarios_is_measured_in_those_of_the_other() -> None:
    first, second = scored(1), scored(2)
    plain = replace(
        second, subject=Subject(TASKS[:1], ("all",)), scenario=np.zeros(400, np.int32), users=second.users * 0
    )
    plain = replace(plain, labels=plain.labels[:, :1], valid=plain.valid[:, :1], outputs=plain.outputs[:, :1])
    whole, part, turned = (
        differences(a, b, replicates=20) for a, b in ((first, second), (first, plain), (plain, first))
    )
    assert list(part) == ["all", "feed", "search"]
    for a, b, results in (
        (first, second, whole),
        (first, plain, part),
        (plain, first, turned),
        (plain, plain, None),
    ):
        told = sum(map(len, results.values())) if results is not None else 1
        assert num_comparisons(a.subject, b.subject) == told
    for scenario, tasks in part.items():
        assert tasks == {"click": whole[scenario]["click"]}
        for metric, numbers in turned[scenario]["click"].items():
            assert numbers["a"] == tasks["click"][metric]["b"]
            assert numbers["difference"] == -tasks["click"][metric]["difference"]
            assert numbers["low"] == pytest.approx(-tasks["click"][metric]["high"])


def test_rows_count_that_both_have_a_label_for() -> None:
    first, second = scored(1), scored(2)
    fewer = replace(second, valid=second.valid & (np.arange(400) % 2 == 0)[:, None])
    expected = differences(replace(first, valid=fewer.valid), fewer, replicates=5)
    assert differences(first, fewer, replicates=5) == expected


def test_tasks_of_one_name_and_label_are_common_across_kinds_that_rank() -> None:
    mine = Subject((("like", "binary", "like"), ("stars", "regression", "r"), ("a", "binary", "x")), ("all",))
    other = Subject(
        (
            ("a", "binary", "y"),
            ("stars", "binary", "r"),
            ("like", "pairwise", "like"),
        ),
        ("all",),
    )
    assert common_tasks(mine, other) == [("like", 0, 2)]
    first = replace(scored(1), subject=Subject(TASKS, ("all",)))
    kinds = (("click", "pairwise", "click"), *TASKS[1:])
    second = replace(scored(2), subject=Subject(kinds, ("all",)))
    assert list(differences(first, second, replicates=5)["all"]["click"]) == metric_names("pairwise", True)


def test_without_users_rows_are_drawn_one_by_one() -> None:
    first, second = (replace(scored(seed), users=np.full(400, NO_GROUP)) for seed in (1, 2))
    click = differences(first, second, replicates=5)["all"]["click"]
    assert list(click) == ["auc", "logloss"]
    assert click["auc"]["users"] == np.count_nonzero(first.valid[:, 0])


def test_outputs_that_are_not_finite_leave_nothing_to_compare() -> None:
    first, second = scored(1), scored(2)
    second.outputs[np.flatnonzero(second.valid[:, 0])[0], 0] = np.inf
    click = differences(first, second, replicates=5)["all"]["click"]
    assert {numbers["difference"] for numbers in click.values()} == {None}
    assert click["auc"]["reason"] == f"1 of {2 * first.valid[:, 0].sum()} predictions are not finite"


def test_different_rows_are_refused() -> None:
    first, second = scored(1), scored(2)
    with pytest.raises(ValueError, match="different rows"):
        differences(first, replace(second, ties=second.ties[::-1]))
