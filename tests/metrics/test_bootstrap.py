from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error, roc_auc_score

from mtlrec.metrics import bootstrap
from mtlrec.metrics.bootstrap import LabelledRows, interval, metric_names, paired_bootstrap, resamples
from mtlrec.metrics.groups import NO_GROUP
from mtlrec.metrics.metrics import Metrics
from mtlrec.metrics.ranking import rank_groups

Drawn = tuple[LabelledRows, np.ndarray, np.ndarray]


def draw(seed: int, rows: int, users: int, *, binary: bool = True, alone: bool = True) -> Drawn:
    """Rows of `users` users in two lists each, some of no user, and the outputs of two models."""
    random = np.random.default_rng(seed)
    hashes = np.append(random.integers(1, 2**64, users, dtype=np.uint64), NO_GROUP)
    user = hashes[random.integers(0, users + alone, rows)]
    groups = user + random.integers(0, 2, rows).astype(np.uint64)
    drawn = (random.random(rows) < 0.4) * 1.0 if binary else random.normal(size=rows)
    labels = drawn.astype(np.float32)
    first, second = np.round(labels + random.normal(size=(2, rows)), 1).astype(np.float32)
    return (
        LabelledRows(user, groups, 2**40 + random.permutation(rows).astype(np.uint64), labels),
        first,
        second,
    )


def naive(rows: LabelledRows, outputs: np.ndarray, drawn: np.ndarray, metrics: list[str]) -> dict[str, float]:
    """The metrics on the rows of the users drawn; who is drawn again is another user by then."""
    alone = rows.users == NO_GROUP
    names = np.unique(np.where(alone, rows.ties, rows.users))
    index, copy = [], []
    for name, times in zip(names, drawn, strict=True):
        mine = np.flatnonzero(np.where(alone, rows.ties, rows.users) == name)
        for time in range(times):
            index += mine.tolist()
            copy += [time] * len(mine)
    at, again = np.array(index, dtype=np.int64), np.array(copy, dtype=np.uint64)
    labels, scores = rows.labels[at], outputs[at].astype(np.float64)
    found = dict.fromkeys(metrics, float("nan"))
    if not len(at):
        return found
    if "rmse" in metrics:
        found["rmse"] = mean_squared_error(labels, scores) ** 0.5
        found["mae"] = mean_absolute_error(labels, scores)
        return found
    if 0 < labels.sum() < len(labels):
        found["auc"] = roc_auc_score(labels, scores)
    found["logloss"] = log_loss(labels, 1 / (1 + np.exp(-scores)), labels=[0, 1])
    listed = ~alone[at]
    groups = rows.groups[at] + (again << np.uint64(3)) * np.uint64(0x9E3779B97F4A7C15)
    summary = rank_groups(
        groups[listed], outputs[at][listed], labels[listed] > 0, rows.ties[at][listed], 2
    ).summary(2)
    return found | {
        name: np.nan if value is None else value for name, value in summary.items() if name in found
    }


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 60), users=st.integers(1, 8), binary=st.booleans())
def test_agrees_with_measuring_every_resample(seed: int, rows: int, users: int, binary: bool) -> None:
    data, first, second = draw(seed, rows, users, binary=binary)
    metrics = metric_names("binary" if binary else "regression", grouped=True, k=2)
    found = paired_bootstrap(data, first, second, metrics, replicates=10, seed=seed)
    units = found[metrics[0]]["users"]
    whole = [naive(data, outputs, np.ones(units, int), metrics) for outputs in (first, second)]
    drawn = list(resamples(units, 10, seed))
    each = [[naive(data, outputs, w, metrics) for w in drawn] for outputs in (first, second)]
    for name in metrics:
        result = found[name]
        differences = np.array([a[name] - b[name] for a, b in zip(*each, strict=True)])
        differences = differences[np.isfinite(differences)]
        assert result["replicates"] == len(differences)
        if not np.isfinite(whole[0][name]):
            assert result["a"] is result["difference"] is result["low"] is None and result["reason"]
            continue
        assert result["a"] == pytest.approx(whole[0][name], abs=1e-6)
        assert result["b"] == pytest.approx(whole[1][name], abs=1e-6)
        assert result["difference"] == result["a"] - result["b"]
        low, high = np.quantile(differences, [0.025, 0.975])
        assert (result["low"], result["high"]) == pytest.approx((low, high), abs=1e-6)
    alone = interval(data, first, metrics, replicates=10, seed=seed)
    for name in metrics:
        values = np.array([numbers[name] for numbers in each[0]])
        values = values[np.isfinite(values)]
        if alone[name]["value"] is not None:
            assert alone[name]["value"] == found[name]["a"]
            assert alone[name]["high"] == pytest.approx(np.quantile(values, 0.975), abs=1e-6)
    json.dumps([found, alone], allow_nan=False)


def test_values_are_those_that_evaluation_shows() -> None:
    data, first, second = draw(0, 3000, 200)
    lists = LabelledRows(data.users, data.users, data.ties, data.labels)
    found = paired_bootstrap(lists, first, second, metric_names("binary", grouped=True), replicates=5)
    for outputs, side in ((first, "a"), (second, "b")):
        metrics = Metrics(["all"], [("click", "binary")], grouped=True)
        valid, scenario = np.ones((3000, 1), bool), np.zeros(3000, np.int64)
        metrics.update(
            outputs[:, None], data.labels[:, None], valid, scenario, users=data.users, ties=data.ties
        )
        shown = metrics.result()["all"]["click"]
        for name, numbers in found.items():
            assert numbers[side] == pytest.approx(shown[name], rel=1e-12), name


def test_the_same_seed_draws_the_same_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data, first, second = draw(1, 500, 40)
    metrics = metric_names("binary", grouped=True)
    before = paired_bootstrap(data, first, second, metrics, replicates=50, seed=3)
    assert before == paired_bootstrap(data, first, second, metrics, replicates=50, seed=3)
    assert before != paired_bootstrap(data, first, second, metrics, replicates=50, seed=4)
    monkeypatch.setattr(bootstrap, "_CHUNK", 300)
    after = paired_bootstrap(data, first, second, metrics, replicates=50, seed=3)
    for name, numbers in before.items():
        assert after[name] == pytest.approx(numbers, rel=1e-9), name


def test_a_large_auc_gets_fewer_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    data, first, second = draw(2, 500, 40)
    monkeypatch.setattr(bootstrap, "AUC_WORK", 500 * 300)
    found = paired_bootstrap(data, first, second, ["auc", "logloss"])
    assert (found["auc"]["replicates"], found["logloss"]["replicates"]) == (300, 1000)
    monkeypatch.setattr(bootstrap, "AUC_WORK", 1)
    assert paired_bootstrap(data, first, second, ["auc"])["auc"]["replicates"] == 200


def test_rows_of_one_user_count_as_one_draw() -> None:
    # 20 users with 50 equal rows each: the interval is that of 20 values, not of 1000.
    users = np.repeat(np.arange(1, 21, dtype=np.uint64), 50)
    labels = np.repeat(np.random.default_rng(0).normal(size=20), 50).astype(np.float32)
    rows = LabelledRows(users, users, np.arange(1000, dtype=np.uint64), labels)
    found = interval(rows, np.zeros(1000, np.float32), ["mae"], replicates=2000)["mae"]
    by_user = np.abs(labels[::50])
    expected = 2 * 1.96 * by_user.std() / np.sqrt(20)
    assert found["users"] == 20
    assert found["high"] - found["low"] == pytest.approx(expected, rel=0.15)


def test_intervals_cover_the_true_difference() -> None:
    """Users have a difficulty that both models share; 95 % of the intervals should hold the truth."""
    random = np.random.default_rng(4)
    covered = narrower = 0
    for trial in range(200):
        users = np.repeat(np.arange(1, 101, dtype=np.uint64), 5)
        shared = np.repeat(random.normal(size=100), 5) + 5
        first = shared + random.normal(scale=0.5, size=500) + 0.2
        second = shared + random.normal(scale=0.5, size=500)
        rows = LabelledRows(users, users, np.arange(500, dtype=np.uint64), np.zeros(500, np.float32))
        outputs = first.astype(np.float32), second.astype(np.float32)
        paired = paired_bootstrap(rows, *outputs, ["mae"], replicates=200, seed=trial)["mae"]
        covered += paired["low"] <= 0.2 <= paired["high"]
        single = interval(rows, outputs[0], ["mae"], replicates=200, seed=trial)["mae"]
        narrower += paired["high"] - paired["low"] < 0.7 * (single["high"] - single["low"])
    # 0.95 less and more than three deviations of a count of 200.
    assert 0.90 <= covered / 200 <= 0.99
    assert narrower == 200, "what both models share must cancel"


def test_unknown_metrics_are_refused() -> None:
    data, first, second = draw(3, 10, 3)
    with pytest.raises(ValueError, match="no bootstrap of calibration"):
        paired_bootstrap(data, first, second, ["auc", "calibration"])
    with pytest.raises(ValueError, match="below 1"):
        paired_bootstrap(data, first, second, ["auc"], replicates=0)


def test_without_rows_everything_is_undefined() -> None:
    data, first, second = draw(4, 0, 3)
    found = paired_bootstrap(data, first, second, metric_names("binary", grouped=True), replicates=5)
    assert {numbers["reason"] for numbers in found.values()} == {"undefined on these rows"}
    assert {numbers["users"] for numbers in found.values()} == {0}
