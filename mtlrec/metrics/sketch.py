"""A mergeable histogram of scores, from which the area under the ROC curve is read.

K distinct keys that are held.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DEFAULT_CAP = 2**18
"""Distinct scores up to which nothing is rounded (20 bytes each)."""

_LEAST_PENDING = 2**16

_Counts = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]
"""Keys [K] increasing, and how many positive and negative rows each has, [K] and [K]."""


class ScoreSketch:
    """Counts of positive and negative rows per score: exact up to `cap` distinct scores, then ever coarser.

    A float32 score becomes a 32-bit key in the same order. Beyond `cap` distinct keys every key loses its
    lowest bits, just as many as needed, so scores whose relative distance is small fall together and count as
    ties. How many bits go follows from the set of scores alone: the state after any sequence of `update` and
    `merge` is the same for every order and split of the rows. With 2**18 keys left the error of the area is
    far below 1e-4.
    """

    def __init__(self, cap: int = DEFAULT_CAP) -> None:
        """`cap`: keys that are kept at most; sketches that are merged must agree on it."""
        if cap < 2:
            raise ValueError(f"cap: {cap} is below 2")
        self.cap = cap
        self._shift = 0
        self._counts: _Counts = (np.zeros(0, np.uint32), np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._pending: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]] = []
        self._pending_rows = 0

    def update(self, scores: NDArray[np.float32], positive: NDArray[np.bool_]) -> None:
        """Add rows: `scores` float32 [rows], none of them NaN, and whether each is positive, bool [rows]."""
        keys = score_keys(scores)
        self.update_keys(keys[positive], keys[~positive])

    def update_keys(self, positive: NDArray[np.uint32], negative: NDArray[np.uint32]) -> None:
        """Add rows by the `score_keys` of the positive and of the negative ones; the arrays are kept."""
        self._pending.append((positive, negative))
        self._pending_rows += len(positive) + len(negative)
        # Waiting for rows in proportion to what may be held keeps the cost of a row independent of it; four
        # times as many take about the memory of the state itself.
        if self._pending_rows >= max(_LEAST_PENDING, 4 * self.cap):
            self._settle()

    def merge(self, *others: ScoreSketch) -> None:
        """Add the rows of `others`, which stay as they are. ValueError if the caps differ."""
        for other in others:
            if other.cap != self.cap:
                raise ValueError(f"sketches with caps {self.cap} and {other.cap} cannot be merged")
            other._settle()
        self._settle()
        self._raise_shift(max([self._shift, *(other._shift for other in others)]))
        self._add(*(_coarsen(other._counts, self._shift - other._shift) for other in others))

    @property
    def shift(self) -> int:
        """Low bits of every key that were given up; 0: every score is held exactly."""
        self._settle()
        return self._shift

    def auc(self) -> float | None:
        """`auc` of this sketch alone."""
        return auc([self])

    def arrays(self) -> tuple[int, NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
        """The state: (shift, keys [K] increasing, positive rows [K], negative rows [K])."""
        self._settle()
        return self._shift, *self._counts

    @classmethod
    def from_arrays(
        cls,
        cap: int,
        shift: int,
        keys: NDArray[np.uint32],
        positives: NDArray[np.int64],
        negatives: NDArray[np.int64],
    ) -> ScoreSketch:
        """The inverse of `arrays`. ValueError where they cannot be the state of a sketch."""
        counts = np.concatenate((positives, negatives))
        fits = len(keys) == len(positives) == len(negatives) <= cap and 0 <= shift < 32
        if not fits or np.any(keys[1:] <= keys[:-1]) or np.any(counts < 0):
            raise ValueError("these arrays are not the state of a sketch")
        sketch = cls(cap)
        sketch._shift, sketch._counts = shift, (keys, positives, negatives)
        return sketch

    def _settle(self) -> None:
        """Bring the pending rows into the sorted state."""
        if not self._pending:
            return
        sides = [np.concatenate(side) for side in zip(*self._pending, strict=True)]
        self._pending, self._pending_rows = [], 0
        for keys in sides:
            keys >>= np.uint32(self._shift)
            keys.sort()
        # What one side alone has to give up, all have to: it need not be merged first.
        bits = max(_bits_to_drop(keys, self.cap) for keys in sides)
        self._raise_shift(self._shift + bits)
        parts: list[_Counts] = []
        for keys in sides:
            keys >>= np.uint32(bits)
            starts = _run_starts(keys)
            rows = np.diff(starts, append=len(keys))
            none = np.zeros(len(rows), np.int64)
            parts.append((keys[starts], none, rows) if parts else (keys[starts], rows, none))
        self._add(*parts)

    def _add(self, *parts: _Counts) -> None:
        """Add what has been counted by keys at the current shift, and keep to the cap."""
        merged = _merge([self._counts, *parts])
        bits = _bits_to_drop(merged[0], self.cap)
        self._shift, self._counts = self._shift + bits, _coarsen(merged, bits)

    def _raise_shift(self, shift: int) -> None:
        self._shift, self._counts = shift, _coarsen(self._counts, shift - self._shift)


def auc(sketches: Sequence[ScoreSketch]) -> float | None:
    """Area under the ROC curve over the rows of all `sketches`, ties counted half; None without a positive or
    without a negative row. As coarse as the coarsest, whatever the number of their scores together."""
    states = [sketch.arrays() for sketch in sketches]
    shift = max([0, *(state[0] for state in states)])
    counts = [_coarsen(state[1:], shift - state[0]) for state in states]
    if not counts:
        return None
    _, positive, negative = _merge(counts) if len(counts) > 1 else counts[0]
    positives, negatives = int(positive.sum()), int(negative.sum())
    if positives == 0 or negatives == 0:
        return None
    below = np.cumsum(negative) - negative
    twice_below = 2 * below + negative
    if positives * negatives < 2**61:
        # Integers up to the one division: the result does not depend on how the sum is cut.
        return int(np.sum(positive * twice_below)) / (2 * positives * negatives)
    return float(np.sum((positive / positives) * (twice_below / (2 * negatives))))


def score_keys(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """float32 [rows] -> uint32 [rows] in the same order; 0.0 and -0.0 have one key."""
    bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.uint32)
    # IEEE 754: flip all bits of a negative number, the sign bit alone of another.
    flip = (bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000)
    return bits ^ flip


def _run_starts(ordered: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Where each run of equal values begins in a sorted array."""
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return np.flatnonzero(new)


def _bits_to_drop(keys: NDArray[np.uint32], cap: int) -> int:
    """The least number of low bits without which at most `cap` of the sorted `keys` are distinct."""
    if len(keys) <= cap:
        return 0
    # Neighbours stay distinct after a shift by n if they differ in bit n or above.
    differing = keys[1:] ^ keys[:-1]
    return bisect_left(range(32), True, key=lambda n: bool(np.count_nonzero(differing >= 2**n) < cap))


def _merge(parts: Sequence[_Counts]) -> _Counts:
    """The parts' counts together."""
    keys, positives, negatives = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    # Stable, numpy's sort merges stretches that are sorted already: a quarter of the time of another.
    order = np.argsort(keys, kind="stable")
    return _count_runs(keys[order], positives[order], negatives[order])


def _coarsen(counts: _Counts, bits: int) -> _Counts:
    keys, positives, negatives = counts
    if bits == 0 or len(keys) == 0:
        return counts
    return _count_runs(keys >> np.uint32(bits), positives, negatives)


def _count_runs(
    keys: NDArray[np.uint32], positives: NDArray[np.int64], negatives: NDArray[np.int64]
) -> _Counts:
    """Each of the keys, which do not fall, once, with its counts summed."""
    starts = _run_starts(keys)
    if len(starts) == len(keys):
        return keys, positives, negatives
    # Running sums: faster than summing many short stretches one by one.
    last = np.append(starts[1:], len(keys)) - 1
    return keys[starts], _steps(np.cumsum(positives)[last]), _steps(np.cumsum(negatives)[last])


def _steps(totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is added from each running total to the next, from 0 on."""
    steps = totals.copy()
    steps[1:] -= totals[:-1]
    return steps
