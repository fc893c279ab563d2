from __future__ import annotations

from typing import Any

import pytest

from mtlrec.data.order import Position
from mtlrec.job.errors import InputError
from mtlrec.job.run import EvaluateSection
from mtlrec.judge import Judge


def judge_of(**fields: Any) -> Judge:
    return Judge(EvaluateSection(**{"metric": ["click/auc"], **fields}))


def metrics(**values: float | None) -> dict[str, Any]:
    return {"all": {"click": {"auc": values.get("auc"), "logloss": values.get("logloss")}}}


def at(epoch: int, done: int = 0) -> Position:
    return Position(0, epoch, (done,))


def test_every_epoch_unless_told_otherwise() -> None:
    judge = judge_of()
    assert not judge.is_due(4, at(0, 3), at(0, 4), ends=False)
    assert judge.is_due(5, at(0, 4), at(1), ends=False)
    assert judge.is_due(4, at(0, 3), at(0, 4), ends=True), "the last step is always measured"
    second = judge_of(every_epochs=2)
    assert [second.is_due(5, at(epoch, 4), at(epoch + 1), False) for epoch in range(4)] == [False, True] * 2


def test_every_steps() -> None:
    judge = judge_of(every_steps=3)
    due = [judge.is_due(step, at(0, step), at(0, step + 1), False) for step in range(1, 8)]
    assert due == [False, False, True, False, False, True, False]


def test_nothing_is_due_without_a_section() -> None:
    judge = Judge(None)
    assert not judge.is_due(5, at(0, 4), at(1), ends=True) and not judge.is_over


def test_the_best_is_kept_and_patience_counts_from_it() -> None:
    judge = judge_of(patience=2)
    for step, auc in enumerate([0.6, 0.7, 0.7, 0.65], start=1):
        assert not judge.is_over
        judge.consider(metrics(auc=auc), step)
    assert (judge.best, judge.best_step, judge.since, judge.last) == (0.7, 2, 2, 0.65)
    assert judge.is_over and "done" in judge.describe(4)


def test_smaller_losses_are_better() -> None:
    judge = judge_of(metric=["click/logloss"])
    judge.consider(metrics(logloss=0.5), 1)
    judge.consider(metrics(logloss=0.6), 2)
    assert judge.best_step == 1 and judge.best == -0.5
    assert "0.60000 (best 0.50000 at step 1)" in judge.describe(2)


def test_a_mean_of_several_and_of_a_scenario() -> None:
    judge = judge_of(metric=["click/auc", "a/b/click/auc"])
    judge.consider({"all": {"click": {"auc": 0.5}}, "a/b": {"click": {"auc": 0.7}}}, 1)
    assert judge.best == pytest.approx(0.6)


def test_the_state_travels() -> None:
    judge, other = judge_of(patience=2), judge_of(patience=2)
    judge.consider(metrics(auc=0.6), 1)
    judge.consider(metrics(auc=0.5), 2)
    assert other.load(judge.to_json())
    assert other == judge
    assert not other.load(None) and other == judge


def test_what_another_metric_has_said_is_not_taken_over() -> None:
    judge, other = judge_of(), judge_of(metric=["click/logloss"])
    judge.consider(metrics(auc=0.7), 1)
    assert not other.load(judge.to_json())
    assert (other.best, other.best_step, other.since) == (None, None, 0)
    assert not judge_of().load(Judge(None).to_json())


@pytest.mark.parametrize("value", [None, float("nan")])
def test_an_undefined_metric_is_refused(value: float | None) -> None:
    with pytest.raises(InputError, match=r"click/auc is undefined on data\.eval at step 7"):
        judge_of().consider(metrics(auc=value), 7)
