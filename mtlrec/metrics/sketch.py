"""A mergeable histogram of scores, from which the area under the ROC curve is read.

K distinct keys that are held.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DEFAULT_CAP = 2**18
"""Distinct scores up to which nothing is rounded (20 bytes each)."""

_LEAST_PENDING = 2**16


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
        self._keys = np.zeros(0, np.uint32)
        self._positives = np.zeros(0, np.int64)
        self._negatives = np.zeros(0, np.int64)
        self._pending: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]] = []
        self._pending_rows = 0

    def update(self, scores: NDArray[np.float32], positive: NDArray[np.bool_]) -> None:
        """Add rows: `scores` float32 [rows], none of them NaN, and whether each is positive, bool [rows]."""
        keys = score_keys(scores)
        self._pending.append((keys[positive], keys[~positive]))
        self._pending_rows += len(keys)
        # Waiting for rows in proportion to what is held keeps the cost of a row independent of K; four times
        # as many take about the memory of the state itself.
        if self._pending_rows >= max(_LEAST_PENDING, 4 * len(self._keys)):
            self._settle()

    def merge(self, other: ScoreSketch) -> None:
        """Add the rows of `other`, which stays as it is. ValueError if the caps differ."""
        if other.cap != self.cap:
            raise ValueError(f"sketches with caps {self.cap} and {other.cap} cannot be merged")
        self._settle()
        other._settle()
        self._raise_shift(max(self._shift, other._shift))
        keys, positives, negatives = _coarsen(
            other._keys, other._positives, other._negatives, self._shift - other._shift
        )
        self._add([(keys, positives, True), (keys, negatives, False)])

    @property
    def shift(self) -> int:
        """Low bits of every key that were given up; 0: every score is held exactly."""
        self._settle()
        return self._shift

    def auc(self) -> float | None:
        """Area under the ROC curve, ties counted half; None without a positive or without a negative row."""
        self._settle()
        positives, negatives = int(self._positives.sum()), int(self._negatives.sum())
        if positives == 0 or negatives == 0:
            return None
        below = np.cumsum(self._negatives) - self._negatives
        twice_below = 2 * below + self._negatives
        if positives * negatives < 2**61:
            # Integers up to the one division: the result does not depend on how the sum is cut.
            return int(np.sum(self._positives * twice_below)) / (2 * positives * negatives)
        return float(np.sum((self._positives / positives) * (twice_below / (2 * negatives))))

    def arrays(self) -> tuple[int, NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
        """The state: (shift, keys [K] increasing, positive rows [K], negative rows [K])."""
        self._settle()
        return self._shift, self._keys, self._positives, self._negatives

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
        sketch._shift, sketch._keys = shift, keys
        sketch._positives, sketch._negatives = positives, negatives
        return sketch

    def _settle(self) -> None:
        """Bring the pending rows into the sorted state."""
        if not self._pending:
            return
        parts = []
        for side in (0, 1):
            keys = np.concatenate([pending[side] for pending in self._pending])
            if self._shift:
                keys >>= np.uint32(self._shift)
            keys.sort()
            starts = _run_starts(keys)
            parts.append((keys[starts], np.diff(starts, append=len(keys)), side == 0))
        self._pending, self._pending_rows = [], 0
        self._add(parts)

    def _add(self, parts: list[tuple[NDArray[np.uint32], NDArray[np.int64], bool]]) -> None:
        """Add (increasing keys at the current shift, rows, are they positive) and keep to the cap."""
        merged = np.concatenate([self._keys] + [keys for keys, _, _ in parts])
        merged.sort()
        merged = merged[_run_starts(merged)]
        positives, negatives = np.zeros((2, len(merged)), np.int64)
        held = np.searchsorted(merged, self._keys)
        positives[held] = self._positives
        negatives[held] = self._negatives
        for keys, rows, positive in parts:
            (positives if positive else negatives)[np.searchsorted(merged, keys)] += rows
        self._keys, self._positives, self._negatives = merged, positives, negatives
        self._raise_shift(self._shift + _bits_to_drop(merged, self.cap))

    def _raise_shift(self, shift: int) -> None:
        self._keys, self._positives, self._negatives = _coarsen(
            self._keys, self._positives, self._negatives, shift - self._shift
        )
        self._shift = shift


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
    """The least number of low bits without which at most `cap` of the increasing `keys` stay distinct."""
    if len(keys) <= cap:
        return 0
    # Neighbours stay distinct after a shift by n if the highest bit in which they differ is bit n or above.
    differing = np.frexp((keys[1:] ^ keys[:-1]).astype(np.float64))[1]
    stay = np.cumsum(np.bincount(differing, minlength=33)[::-1])[::-1]
    return int(np.argmax(np.append(stay[1:], 0) + 1 <= cap))


def _coarsen(
    keys: NDArray[np.uint32], positives: NDArray[np.int64], negatives: NDArray[np.int64], bits: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    if bits == 0 or len(keys) == 0:
        return keys, positives, negatives
    keys = keys >> np.uint32(bits)
    starts = _run_starts(keys)
    return keys[starts], np.add.reduceat(positives, starts), np.add.reduceat(negatives, starts)
