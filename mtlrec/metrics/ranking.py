"""How well rows are ranked within groups: AUC, nDCG@k, recall@k, hit@k and reciprocal rank of each group.

R rows, T tasks, G groups with a positive row, P parts in which groups are summed up. Relevance is binary: a
row is positive or it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from mtlrec.metrics.sketch import score_keys

DEFAULT_K = 10
"""Places at the top of a list that nDCG@k, recall@k and hit@k look at."""
NO_LABEL, NEGATIVE, POSITIVE = range(3)
"""What a row is to a task."""

BLOCK_BITS = 15
"""Rows are best ranked in blocks of about 2**15: what a block needs stays in the cache."""
NUM_SUMS = 7
"""That `summary` needs."""
_FEW = 4
"""Where fewer than one row in so many is positive, it pays to look for the groups that have one first."""


@dataclass(frozen=True)
class Ranked:
    """What each group's list is worth, in the order of the groups' hashes; groups without a positive row,
    of which no metric is defined, are left out."""

    rows: NDArray[np.int64]
    """[G]"""
    positives: NDArray[np.int64]
    """[G] At least one."""
    auc: NDArray[np.float64]
    """[G] Ties count half; NaN where every row is positive."""
    ndcg: NDArray[np.float64]
    """[G] DCG@k / the best DCG@k that so many positives allow."""
    recall: NDArray[np.float64]
    """[G] Positives among the first k / positives."""
    hit: NDArray[np.float64]
    """[G] 1 where a positive is among the first k, else 0."""
    reciprocal_rank: NDArray[np.float64]
    """[G] 1 / the rank of the first positive, over the whole list."""
    some_row: NDArray[np.int64]
    """[G] Index of one of the group's rows."""

    def sums(self, part: NDArray[np.int64], num_parts: int) -> NDArray[np.float64]:
        """[P, NUM_SUMS], for `summary`: sums over the groups of each part, which add up over parts.

        `part` [G]: index of each group's part.
        """
        both = self.positives < self.rows
        weights, in_both = self.rows[both], part[both]
        sums = [
            np.bincount(part, minlength=num_parts),
            np.bincount(in_both, weights=weights, minlength=num_parts),
            np.bincount(in_both, weights=self.auc[both] * weights, minlength=num_parts),
        ]
        for each in (self.ndcg, self.recall, self.hit, self.reciprocal_rank):
            sums.append(np.bincount(part, weights=each, minlength=num_parts))
        return np.stack(sums, axis=1).astype(np.float64)

    def summary(self, k: int) -> dict[str, float | int | None]:
        """`summary` of all groups."""
        return summary(self.sums(np.zeros(len(self.rows), np.int64), 1)[0], k)

    def means(self, k: int) -> dict[str, NDArray[np.float64]]:
        """The values [G] of the metrics that are plain means over groups, by metric name."""
        return dict(zip(mean_names(k), (self.ndcg, self.recall, self.hit, self.reciprocal_rank), strict=True))


def mean_names(k: int) -> list[str]:
    """The metrics that are plain means over groups with a positive."""
    return [*(f"{name}@{k}" for name in ("ndcg", "recall", "hit")), "mrr"]


def summary(sums: NDArray[np.float64], k: int) -> dict[str, float | int | None]:
    """gauc, ndcg@k, recall@k, hit@k, mrr; None where no group counts. `groups`: those with a positive.

    gauc (Zhou et al. 2018, Deep Interest Network): mean AUC of the groups with both classes, weighted by
    their rows. The others: plain means over the groups with a positive. `sums`: as of
    `Ranked.sums`, of one part.
    """
    groups, weight, area, *others = sums.tolist()
    values: dict[str, float | int | None] = {"gauc": area / weight if weight else None}
    for name, total in zip(mean_names(k), others, strict=True):
        values[name] = total / groups if groups else None
    return {**values, "groups": int(groups)}


def rank_groups(
    groups: NDArray[np.uint64],
    scores: NDArray[np.float32],
    positive: NDArray[np.bool_],
    ties: NDArray[np.uint64],
    k: int = DEFAULT_K,
) -> Ranked:
    """`rank_block` of any number of rows, for one task of which each has a label.

    `scores`, `positive` [R].
    """
    labels = np.where(positive, POSITIVE, NEGATIVE).astype(np.uint8)
    found = []
    for rows in _blocks(groups):
        [block] = rank_block(groups[rows], scores[None, rows], labels[None, rows], ties[rows], k)
        found.append(replace(block, some_row=rows[block.some_row]))
    names = [field.name for field in fields(Ranked)]
    return Ranked(**{name: np.concatenate([getattr(each, name) for each in found]) for name in names})


def rank_block(
    groups: NDArray[np.uint64],
    scores: NDArray[np.float32],
    labels: NDArray[np.uint8],
    ties: NDArray[np.uint64],
    k: int = DEFAULT_K,
) -> list[Ranked]:
    """Rank the rows of each group by falling score, for each of T tasks.

    `groups` [R]: hash of each row's group. `scores` [T, R]; `labels` [T, R]: NO_LABEL (the row is in no list
    of the task), NEGATIVE or POSITIVE. `ties` [R]: rows of one score are ranked by it, rising; a hash of the
    row's number makes a constant model score as chance does, whatever the order of the rows. nDCG as
    Järvelin and Kekäläinen (2002) with gain 1 and the discount log2(rank + 1).
    """
    if k < 1:
        raise ValueError(f"k: {k} is below 1")
    discounts = 1 / np.log2(np.arange(2, k + 2))
    group = _number(groups)
    return [_rank(group, *task, ties, discounts) for task in zip(scores, labels, strict=True)]


def _blocks(groups: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """Indices of the rows, cut by the leading bits of their groups: whole groups, hashes rising."""
    # Of sampled groups the first bits are all zero.
    width = int(groups.max(initial=0)).bit_length()
    bits = min(max(len(groups).bit_length() - BLOCK_BITS, 0), width, 16)
    # numpy sorts numbers of 16 bits digit by digit.
    block = (groups >> np.uint64(width - bits)).astype(np.uint16)
    order, end = np.argsort(block, kind="stable"), 0
    for size in np.bincount(block, minlength=1).tolist():
        yield order[end : end + size]
        end += size


def _number(groups: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Numbers the groups of a block from 0, in the order of their hashes; the number of each row's."""
    order, ordered = _sort(groups)
    new = np.ones(len(groups), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    number = np.empty(len(groups), np.int64)
    number[order] = np.cumsum(new) - 1
    return number


def _rank(
    group: NDArray[np.int64],
    scores: NDArray[np.float32],
    labels: NDArray[np.uint8],
    ties: NDArray[np.uint64],
    discounts: NDArray[np.float64],
) -> Ranked:
    """`rank_block` for one task. `group` [R]: number of each row's group."""
    positive, counts = labels == POSITIVE, labels != NO_LABEL
    num_groups = int(group.max(initial=-1)) + 1
    if np.count_nonzero(positive) < len(group) // _FEW:
        # Most groups have no positive: their rows need not be sorted.
        ranked = np.zeros(num_groups, bool)
        ranked[group[positive]] = True
        counts &= ranked[group]
    inside = np.flatnonzero(counts)
    if len(inside) < len(group):
        group, scores, positive = group[inside], scores[inside], positive[inside]

    # By group, falling score, and of one score the positive rows first.
    key = group.astype(np.uint64) << np.uint64(33)
    key |= (~score_keys(scores)).astype(np.uint64) << np.uint64(1)
    key |= ~positive
    order, key = _sort(key)
    ahead = key & np.uint64(1) == 0
    hits = np.flatnonzero(ahead)
    sizes = np.bincount(group, minlength=num_groups)
    positives = np.bincount((key[hits] >> np.uint64(33)).astype(np.int64), minlength=num_groups)
    found = np.flatnonzero(positives)
    starts = (np.cumsum(sizes) - sizes)[found]
    sizes, positives = sizes[found], positives[found]
    hit_starts = np.cumsum(positives) - positives
    hit_group = np.repeat(np.arange(len(found)), positives)
    rank = hits - starts[hit_group] + 1
    negatives = sizes - positives
    # Of the rows before a group's n-th positive all but n - 1 are negative. Integers up to the one division,
    # so that the area is exact.
    lost = np.add.reduceat(rank, hit_starts) - positives * (positives + 1) // 2 if len(hits) else sizes
    twice_won = 2 * (positives * negatives - lost)

    tied = np.flatnonzero(key[1:] ^ key[:-1] == 1)  # the last positive and the first negative of one score
    if len(tied):
        begin = np.searchsorted(key, key[tied], side="left")
        end = np.searchsorted(key, key[tied + 1], side="right")
        owner = np.searchsorted(found, group[order[tied]])
        np.subtract.at(twice_won, owner, (tied + 1 - begin) * (end - tied - 1))
        run = np.repeat(np.arange(len(tied)), end - begin)
        at = np.arange(len(run)) + (begin - np.cumsum(end - begin) + end - begin)[run]
        among = order[at]
        ahead[at] = positive[among[np.lexsort((ties[inside[among]], run))]]
        rank = np.flatnonzero(ahead) - starts[hit_group] + 1

    k = len(discounts)
    top = rank <= k
    in_top = hit_group[top]
    recalled = np.bincount(in_top, minlength=len(sizes))
    gained = np.bincount(in_top, weights=discounts[rank[top] - 1], minlength=len(sizes))
    with np.errstate(invalid="ignore"):  # 0 / 0 without a negative
        auc = twice_won / (2 * positives * negatives)
    return Ranked(
        rows=sizes,
        positives=positives,
        auc=auc,
        ndcg=gained / np.cumsum(discounts)[np.minimum(positives, k) - 1],
        recall=recalled / positives,
        hit=(recalled > 0).astype(np.float64),
        reciprocal_rank=1 / rank[hit_starts],
        some_row=inside[order[starts]],
    )


def _sort(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The order that sorts `keys`, what is equal staying as it is; and the keys in that order."""
    # numpy sorts words several times as fast as it sorts their indices: so an index takes each word's last
    # bits, and the key, of which the last ones may find no room, the others.
    above = keys - keys.min(initial=2**64 - 1)
    bits = len(keys).bit_length()
    dropped = max(int(above.max(initial=0)).bit_length() + bits - 64, 0)
    word = (above >> np.uint64(dropped)) << np.uint64(bits)
    word |= np.arange(len(keys), dtype=np.uint64)
    word.sort()
    order = (word & np.uint64((1 << bits) - 1)).astype(np.int64)
    ordered = keys[order]
    if dropped and np.any(ordered[1:] < ordered[:-1]):
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
    return order, ordered
