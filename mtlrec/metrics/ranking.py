"""How well rows are ranked within groups: AUC, nDCG@k, recall@k, hit@k and reciprocal rank of each group.

R rows, G groups that have rows. Relevance is binary: a row is positive or it is not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mtlrec.metrics.sketch import score_keys

DEFAULT_K = 10
"""Places at the top of a list that nDCG@k, recall@k and hit@k look at."""


@dataclass(frozen=True)
class Ranked:
    """What each group's list is worth, in the order of the groups' hashes."""

    rows: NDArray[np.int64]
    """[G] At least one."""
    positives: NDArray[np.int64]
    """[G]"""
    auc: NDArray[np.float64]
    """[G] Ties count half; NaN where the group has one class alone."""
    ndcg: NDArray[np.float64]
    """[G] DCG@k / the best DCG@k that so many positives allow; NaN here and below without a positive."""
    recall: NDArray[np.float64]
    """[G] Positives among the first k / positives."""
    hit: NDArray[np.float64]
    """[G] 1 where a positive is among the first k, else 0."""
    reciprocal_rank: NDArray[np.float64]
    """[G] 1 / the rank of the first positive, over the whole list."""
    some_row: NDArray[np.int64]
    """[G] Index of one of the group's rows."""

    def take(self, chosen: NDArray[np.int64] | slice) -> Ranked:
        """Some of the groups, or all in another order."""
        return Ranked(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def summary(self, k: int) -> dict[str, float | int | None]:
        """gauc, ndcg@k, recall@k, hit@k, mrr; None where no group counts. `groups`: those with a positive.

        gauc (Zhou et al. 2018, Deep Interest Network): mean AUC of the groups with both classes, weighted by
        their rows. The others: plain means over the groups with a positive.
        """
        ranked = self.positives > 0
        groups = int(np.count_nonzero(ranked))
        both = ranked & (self.positives < self.rows)
        weights = self.rows[both]
        values: dict[str, float | int | None] = {"gauc": None}
        if len(weights):
            values["gauc"] = float(np.sum(self.auc[both] * weights) / weights.sum())
        for name, each in self.means(k).items():
            values[name] = float(np.mean(each[ranked])) if groups else None
        return {**values, "groups": groups}

    def means(self, k: int) -> dict[str, NDArray[np.float64]]:
        """The values [G] of the metrics that are plain means over groups with a positive, by metric name."""
        names = [*(f"{name}@{k}" for name in ("ndcg", "recall", "hit")), "mrr"]
        return dict(zip(names, (self.ndcg, self.recall, self.hit, self.reciprocal_rank), strict=True))


def rank_groups(
    groups: NDArray[np.uint64],
    scores: NDArray[np.float32],
    positive: NDArray[np.bool_],
    ties: NDArray[np.uint64],
    k: int = DEFAULT_K,
) -> Ranked:
    """Rank the rows of each group by falling score.

    `groups` [R]: hash of each row's group. `ties` [R]: rows of one score are ranked by it, rising; a hash of
    the row's number makes a constant model score as chance does, whatever the order of the rows. nDCG as
    Järvelin and Kekäläinen (2002) with gain 1 and the discount log2(rank + 1).
    """
    if k < 1:
        raise ValueError(f"k: {k} is below 1")
    key, order = _order(groups, scores, ties)
    key = key[order]
    positive = positive[order]
    group = (key >> np.uint64(32)).astype(np.int64)
    starts = _starts(group)
    rows = np.diff(starts, append=len(group))
    # Exclusive running count of positives over all groups: a group's own starts at above[start].
    above = np.cumsum(positive, dtype=np.int64) - positive
    positives = np.diff(above[starts], append=int(np.count_nonzero(positive)))

    runs = _starts(key)  # rows of one group and one score
    run_rows = np.diff(runs, append=len(key))
    run_above = above[runs]
    run_positives = np.diff(run_above, append=int(np.count_nonzero(positive)))
    run_above -= above[starts][group[runs]]
    twice_won = (run_rows - run_positives) * (2 * run_above + run_positives)
    # Integers up to the one division, so that the area is exact.
    won = _sums(twice_won, np.searchsorted(runs, starts))
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = won / (2 * positives * (rows - positives))

    hits = np.flatnonzero(positive)
    hit_group = group[hits]
    rank = hits - starts[hit_group] + 1
    first = _starts(hit_group)
    reciprocal = np.full(len(starts), np.nan)
    reciprocal[hit_group[first]] = 1 / rank[first]
    discounts = 1 / np.log2(np.arange(2, k + 2))
    top = rank <= k
    found = np.bincount(hit_group[top], minlength=len(starts))
    gained = np.bincount(hit_group[top], weights=discounts[rank[top] - 1], minlength=len(starts))
    ideal = np.concatenate(([0.0], np.cumsum(discounts)))
    with np.errstate(invalid="ignore"):  # 0 / 0 without a positive
        return Ranked(
            rows=rows,
            positives=positives,
            auc=auc,
            ndcg=gained / ideal[np.minimum(positives, k)],
            recall=found / positives,
            hit=np.where(positives > 0, (found > 0).astype(np.float64), np.nan),
            reciprocal_rank=reciprocal,
            some_row=order[starts],
        )


def _order(
    groups: NDArray[np.uint64], scores: NDArray[np.float32], ties: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A key [R] that rises with the group and, within it, with falling score; and the rows' order by it."""
    order = _sort_within(np.zeros(len(groups), np.uint64), groups)
    number = np.empty(len(groups), np.uint64)
    number[order] = _run_numbers(groups[order])
    falling = (~score_keys(scores)).astype(np.uint64) << np.uint64(32)
    order = _sort_within(number, falling)
    key = (number << np.uint64(32)) | (falling >> np.uint64(32))
    run = _run_numbers(key[order])
    tied = np.zeros(len(key), bool)
    tied[1:] = run[1:] == run[:-1]
    tied[:-1] |= tied[1:]
    some = order[tied]
    order[tied] = some[_sort_within(run[tied], ties[some])]
    return key, order


def _sort_within(number: NDArray[np.uint64], minor: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The order by `number`, small ones, and then by `minor`, whole words: as lexsort((minor, number)).

    numpy sorts words ten times as fast as it sorts their indices. So the leading bits of both travel in one
    word with the index, and what those bits leave open, few rows, is sorted again.
    """
    index_bits = np.uint64(len(number).bit_length())
    number_bits = np.uint64(int(number.max(initial=0)).bit_length())
    word = (number << (np.uint64(64) - number_bits)) | (minor >> number_bits)
    word = ((word >> index_bits) << index_bits) | np.arange(len(word), dtype=np.uint64)
    word.sort()
    order = (word & ((np.uint64(1) << index_bits) - np.uint64(1))).astype(np.int64)
    word >>= index_bits
    open_ = np.zeros(len(word), bool)
    open_[1:] = word[1:] == word[:-1]
    # Rows that are equal in full may stay as they are, in the order of their indices.
    differ = (number[order[1:]] != number[order[:-1]]) | (minor[order[1:]] != minor[order[:-1]])
    if np.any(open_[1:] & differ):
        open_[:-1] |= open_[1:]
        some = order[open_]
        order[open_] = some[np.lexsort((minor[some], number[some]))]
    return order


def _run_numbers(ordered: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers the runs of equal values in a sorted array, from 0."""
    numbers = np.zeros(len(ordered), np.uint64)
    np.cumsum(ordered[1:] != ordered[:-1], out=numbers[1:])
    return numbers


def _starts(ordered: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each run of equal values begins in a sorted array."""
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return np.flatnonzero(new)


def _sums(values: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of the stretches of `values` that begin at `starts`."""
    sums: NDArray[np.int64] = np.add.reduceat(values, starts) if len(starts) else values[:0]
    return sums
