"""How sure a metric, or the difference between two models, is: the bootstrap over users.

R rows, U users, C replicates at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtlrec.metrics.groups import NO_GROUP
from mtlrec.metrics.metrics import binary_losses, regression_errors
from mtlrec.metrics.ranking import DEFAULT_K, rank_groups

REPLICATES = 1000
AUC_WORK = 2**30
"""Rows x replicates that one AUC is given: with more than a million rows it gets fewer replicates."""
LEAST_AUC_REPLICATES = 200
_CHUNK = 2**20
"""Users times replicates that are held at a time."""
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class LabelledRows:
    """The rows that carry a label for one task, on which models are measured."""

    users: NDArray[np.uint64]
    """[R] Hash of each row's user, who is drawn or not as a whole; NO_GROUP: drawn by itself, in no list."""
    groups: NDArray[np.uint64]
    """[R] Hash of the list in which the row is ranked; looked at only where there is a user."""
    ties: NDArray[np.uint64]
    """[R] Hash of the row's number: ranks rows of one score, and stands for the user of a row without."""
    labels: NDArray[np.float32]
    """[R] 0 or 1, or a value."""


def metric_names(kind: str, grouped: bool, k: int = DEFAULT_K) -> list[str]:
    """The metrics of a task of `kind` that can be bootstrapped. `grouped`: rows have users."""
    if kind == "regression":
        return ["rmse", "mae"]
    names = ["auc", "logloss"] if kind == "binary" else ["auc"]
    return [*names, "gauc", f"ndcg@{k}", f"recall@{k}", f"hit@{k}", "mrr"] if grouped else names


def paired_bootstrap(
    rows: LabelledRows,
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    metrics: Sequence[str],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """How two models differ on the same rows, and how far chance in the choice of users could explain it.

    `first`, `second` [R]: their outputs (logits, scores or values). Every replicate draws U users with
    replacement and measures both models on the rows of those; the interval is the 95 % percentile interval
    of the differences (Efron and Tibshirani 1993, chapter 13).

    Returns {metric: {a, b, difference (a - b), low, high, replicates, users}}, plain JSON; a metric that is
    undefined is null in the first five, with a `reason`. AUC of more than a million rows gets
    fewer replicates; and replicates in which a metric is undefined, as AUC where all labels drawn are
    alike, are not counted.
    """
    found = _measure(rows, (first, second), metrics, replicates, seed)
    results = {}
    for metric, (values, drawn, users) in found.items():
        difference, drawn_differences = values[0] - values[1], drawn[0] - drawn[1]
        body = {"a": values[0], "b": values[1], "difference": difference}
        results[metric] = _with_interval(body, drawn_differences, users, _not_finite(first, second))
    return results


def interval(
    rows: LabelledRows,
    outputs: NDArray[np.float32],
    metrics: Sequence[str],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """{metric: {value, low, high, replicates, users}} of one model; see `paired_bootstrap`."""
    found = _measure(rows, (outputs,), metrics, replicates, seed)
    return {
        metric: _with_interval({"value": values[0]}, drawn[0], users, _not_finite(outputs))
        for metric, (values, drawn, users) in found.items()
    }


def resamples(users: int, replicates: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each of `users` users is drawn, [U], for one replicate after the other."""
    random = np.random.Generator(np.random.Philox(seed))
    for _ in range(replicates):
        yield np.bincount(random.integers(0, users, users), minlength=users)


def _with_interval(
    body: dict[str, float], drawn: NDArray[np.float64], users: int, not_finite: str | None
) -> dict[str, float | int | str | None]:
    drawn = drawn[np.isfinite(drawn)]
    counts = {"replicates": len(drawn), "users": users}
    if not np.all(np.isfinite(list(body.values()))):
        reason = not_finite or "undefined on these rows"
        return {**dict.fromkeys((*body, "low", "high")), **counts, "reason": reason}
    low, high = np.quantile(drawn, _TAILS).tolist() if len(drawn) else (None, None)
    return {**body, "low": low, "high": high, **counts}


def _not_finite(*outputs: NDArray[np.float32]) -> str | None:
    """Why nothing is defined, where it is not."""
    wrong = sum(int(np.count_nonzero(~np.isfinite(each))) for each in outputs)
    return f"{wrong} of {sum(len(each) for each in outputs)} predictions are not finite" if wrong else None


class _Ratio:
    """A metric that is a sum over users divided by another: a mean over rows, lists or weighted lists."""

    def __init__(self, above: NDArray[np.float64], below: NDArray[np.float64], root: bool = False) -> None:
        """`above`, `below` [U]: each user's share of either sum. `root`: the metric is the ratio's root."""
        self._sums, self._root = np.stack((above, below)), root

    def evaluate(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """`weights` [C, U]: how often each user was drawn. The metric [C]; NaN where it is undefined."""
        above, below = (weights @ self._sums.T).T
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = above / below
        return np.sqrt(ratio, out=ratio) if self._root else ratio


class _Area:
    """AUC over all rows, each as often as its user was drawn, ties counted half."""

    def __init__(
        self, user: NDArray[np.int64], scores: NDArray[np.float32], positive: NDArray[np.bool_]
    ) -> None:
        order = np.argsort(scores)
        user, scores, positive = user[order], scores[order], positive[order]
        self._positives, self._negatives = user[positive], user[~positive]
        against = scores[~positive]
        self._below = np.searchsorted(against, scores[positive], side="left")
        self._not_above = np.searchsorted(against, scores[positive], side="right")

    def evaluate(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """As `_Ratio.evaluate`. Sums of whole numbers in float64, exact up to about 60 million rows."""
        below = np.zeros(len(self._negatives) + 1)
        areas = np.empty(len(weights))
        # One replicate at a time: its arrays stay in the cache, and a running sum along rows is fast.
        for place, drawn in enumerate(weights):
            np.cumsum(drawn[self._negatives], out=below[1:])
            mine = drawn[self._positives]
            twice_won = mine @ (below[self._below] + below[self._not_above])
            with np.errstate(invalid="ignore"):
                areas[place] = twice_won / (2 * mine.sum() * below[-1])
        return areas


def _measure(
    rows: LabelledRows,
    outputs: Sequence[NDArray[np.float32]],
    metrics: Sequence[str],
    replicates: int,
    seed: int,
) -> dict[str, tuple[list[float], NDArray[np.float64], int]]:
    """{metric: (each model's value, its values [models, replicates], U)}; all see the same resamples."""
    if replicates < 1:
        raise ValueError(f"replicates: {replicates} is below 1")
    alone = rows.users == NO_GROUP
    users, user = np.unique(np.where(alone, rows.ties, rows.users), return_inverse=True)
    statistics: dict[str, list[_Ratio | _Area]] = {metric: [] for metric in metrics}
    for scores in outputs:
        if _not_finite(scores) is None:
            found = _statistics(rows, user, len(users), scores, metrics)
        else:
            found = dict.fromkeys(metrics, _Ratio(np.full(len(users), np.nan), np.ones(len(users))))
        for metric in metrics:
            statistics[metric].append(found[metric])
    few = min(replicates, max(LEAST_AUC_REPLICATES, AUC_WORK // max(len(user), 1)))
    wanted = {metric: few if metric == "auc" else replicates for metric in metrics}
    drawn = {metric: np.full((len(outputs), wanted[metric]), np.nan) for metric in metrics}
    size = max(_CHUNK // max(len(users), 1), 1)
    source, done = resamples(len(users), replicates if len(users) else 0, seed), 0
    while chunk := list(islice(source, size)):
        weights = np.array(chunk, np.float64)
        for metric in metrics:
            here = drawn[metric][:, done : done + len(chunk)]
            for model, statistic in enumerate(statistics[metric]):
                here[model] = statistic.evaluate(weights[: here.shape[1]])
        done += len(chunk)
    once = np.ones((1, len(users)))
    return {
        metric: ([float(each.evaluate(once)[0]) for each in statistics[metric]], drawn[metric], len(users))
        for metric in metrics
    }


def _statistics(
    rows: LabelledRows,
    user: NDArray[np.int64],
    num_users: int,
    outputs: NDArray[np.float32],
    metrics: Sequence[str],
) -> dict[str, _Ratio | _Area]:
    """Each metric of one model as a function of how often users are drawn. `user` [R]: 0 <= user < U."""

    def sums(values: NDArray[Any], users: NDArray[np.int64] = user) -> NDArray[np.float64]:
        return np.asarray(np.bincount(users, weights=values, minlength=num_users), np.float64)

    found: dict[str, _Ratio | _Area] = {}
    positive, count = rows.labels > 0.5, sums(np.ones(len(user)))
    if "auc" in metrics:
        found["auc"] = _Area(user, outputs, positive)
    if "logloss" in metrics:
        found["logloss"] = _Ratio(sums(binary_losses(outputs, rows.labels)[0]), count)
    if "rmse" in metrics or "mae" in metrics:
        squared, absolute = regression_errors(outputs, rows.labels)
        found["rmse"] = _Ratio(sums(squared), count, root=True)
        found["mae"] = _Ratio(sums(absolute), count)
    cuts = {int(name.partition("@")[2]) for name in metrics if "@" in name}
    cuts |= {DEFAULT_K} if not cuts and {"gauc", "mrr"} & set(metrics) else set()
    for k in cuts:
        listed = np.flatnonzero(rows.users != NO_GROUP)
        ranked = rank_groups(rows.groups[listed], outputs[listed], positive[listed], rows.ties[listed], k)
        owner = user[listed][ranked.some_row]
        both = ranked.positives < ranked.rows
        weights = ranked.rows[both].astype(np.float64)
        found["gauc"] = _Ratio(sums(ranked.auc[both] * weights, owner[both]), sums(weights, owner[both]))
        lists = sums(np.ones(len(owner)), owner)
        for name, values in ranked.means(k).items():
            found[name] = _Ratio(sums(values, owner), lists)
    unknown = [name for name in metrics if name not in found]
    if unknown:
        raise ValueError(f"there is no bootstrap of {', '.join(unknown)}")
    return {name: found[name] for name in metrics}
