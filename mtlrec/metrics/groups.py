"""Rows kept by group, from which ranking metrics per user are read: mergeable, in bounded memory.

R rows, T tasks that are ranked, S scenarios.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mtlrec.metrics.ranking import BLOCK_BITS, NO_LABEL, NUM_SUMS, POSITIVE, rank_block

DEFAULT_CAP = 2**24
"""Outputs, rows x T, that are held at most (5 bytes each, and 20 a row)."""
NO_GROUP = np.uint64(0)
"""The hash of a row that belongs to no user: it is in no group."""
_PART_ROWS = 2**16
_SORTED_BITS = 16
_GOLDEN = 0x9E3779B97F4A7C15


class Groups:
    """Every row of every group, or, beyond `cap`, every row of some groups.

    Which groups are kept follows from the set of rows alone: those whose hash has `shift` leading zero bits,
    the fewest that keep to the cap. So the state after any sequence of `update` and `merge` is the same for
    every order and split of the rows, and what is kept is a sample of the groups by chance.
    """

    def __init__(self, num_tasks: int, cap: int = DEFAULT_CAP) -> None:
        """`cap`: outputs (rows x `num_tasks`) that are kept at most; all that are merged must agree on it."""
        if num_tasks < 1 or cap < num_tasks:
            raise ValueError(f"groups need a task, and room for a row: {num_tasks} tasks, cap {cap}")
        self.num_tasks, self.cap = num_tasks, cap
        self._shift = 0
        self._parts: list[_Rows] = []
        self._held = 0

    def update(
        self,
        users: NDArray[np.uint64],
        scenario: NDArray[np.int32],
        scores: NDArray[np.float32],
        labels: NDArray[np.uint8],
        ties: NDArray[np.uint64],
    ) -> None:
        """Add rows.

        `users` [R]: well mixed hashes; rows of NO_GROUP are left out. `ties` [R]: as of `rank_block`.
        `scores` [T, R]; `labels` [T, R]: NO_LABEL, NEGATIVE or POSITIVE. `scenario` [R]: index.
        """
        assert scores.shape == labels.shape == (self.num_tasks, len(users))
        chosen = (users != NO_GROUP) & np.any(labels != NO_LABEL, axis=0)
        rows = groups_of(users, scenario), scenario, ties, scores, labels
        self._add(rows if chosen.all() else _take(rows, np.flatnonzero(chosen)))

    def merge(self, other: Groups) -> None:
        """Add the rows of `other`, which stays as it is. ValueError where tasks or caps differ."""
        if (self.num_tasks, self.cap) != (other.num_tasks, other.cap):
            raise ValueError("groups of different tasks or caps cannot be merged")
        self._raise_shift(max(self._shift, other._shift))
        for part in other._parts:
            self._add_part(part if self._shift == other._shift else _choose(part, self._shift))

    @property
    def shift(self) -> int:
        """The groups kept are one in 2**shift; 0: all are."""
        return self._shift

    def ranking_sums(self, num_scenarios: int, k: int) -> list[NDArray[np.float64]]:
        """Of each task `Ranked.sums` by scenario, [S, 7]."""
        sums = [np.zeros((num_scenarios, NUM_SUMS)) for _ in range(self.num_tasks)]
        for groups, scenario, ties, scores, labels in self._blocks():
            for total, ranked in zip(sums, rank_block(groups, scores, labels, ties, k), strict=True):
                total += ranked.sums(scenario[ranked.some_row].astype(np.int64), num_scenarios)
        return sums

    def arrays(self) -> _Rows:
        """The rows held: groups [R], scenarios [R], ties [R], scores [T, R], labels [T, R], in some order."""
        return _join(self._parts, self.num_tasks)

    @classmethod
    def from_arrays(cls, cap: int, shift: int, arrays: _Rows) -> Groups:
        """The inverse of `arrays` and `shift`. ValueError where they cannot be a state."""
        groups, labels = arrays[0], arrays[4]
        found = cls(len(labels), cap)
        if not 0 <= shift <= 64 or labels.size > cap or np.any(labels > POSITIVE):
            raise ValueError("these arrays are not the state of groups")
        if not np.all(_kept(groups, shift)):
            raise ValueError("these arrays are not the state of groups")
        found._shift = shift
        found._add(arrays)
        return found

    def _add(self, rows: _Rows) -> None:
        """Add rows in any order, of which nothing is kept but copies."""
        for begin in range(0, len(rows[0]), _PART_ROWS):
            groups = rows[0][begin : begin + _PART_ROWS]
            kept = np.flatnonzero(_kept(groups, self._shift))
            # numpy sorts numbers of 16 bits digit by digit.
            order = np.argsort(_leading(groups[kept]).astype(np.uint16), kind="stable")
            self._add_part(_take(rows, kept[order] + begin))

    def _add_part(self, part: _Rows) -> None:
        """Add rows that are sorted by the leading bits of their groups."""
        if len(part[0]) == 0:
            return
        self._parts.append(part)
        self._held += len(part[0])
        while self._held * self.num_tasks > self.cap:
            self._raise_shift(self._shift + 1)

    def _blocks(self) -> Iterator[_Rows]:
        """The rows held, cut by the leading bits of their groups: whole groups, about 2**BLOCK_BITS rows."""
        most = max(_SORTED_BITS - self._shift, 0)  # of what is kept, the first bits are zero
        bits = min(max(self._held.bit_length() - BLOCK_BITS, 0), most)
        edges = np.arange(2**bits + 1) << (most - bits)
        cuts = [np.searchsorted(_leading(part[0]), edges).tolist() for part in self._parts]
        for block in range(2**bits):
            pieces = [
                _slice(part, cut[block], cut[block + 1])
                for part, cut in zip(self._parts, cuts, strict=True)
                if cut[block] < cut[block + 1]
            ]
            if pieces:
                yield _join(pieces, self.num_tasks)

    def _raise_shift(self, shift: int) -> None:
        if shift > self._shift:
            self._shift = shift
            self._parts = [_choose(part, shift) for part in self._parts]
            self._held = sum(len(part[0]) for part in self._parts)


def groups_of(users: NDArray[np.uint64], scenario: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Hashes [R] of the groups that users form in scenarios; those of two users meet only by chance."""
    return users ^ (scenario.astype(np.uint64) * np.uint64(_GOLDEN))


_Rows = tuple[
    NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint64], NDArray[np.float32], NDArray[np.uint8]
]


def _kept(groups: NDArray[np.uint64], shift: int) -> NDArray[np.bool_]:
    """Which hashes have `shift` leading zero bits."""
    return groups >> np.uint64(64 - shift) == 0 if shift else np.ones(len(groups), bool)


def _leading(groups: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The bits by which the rows of a part are sorted."""
    return groups >> np.uint64(64 - _SORTED_BITS)


def _choose(rows: _Rows, shift: int) -> _Rows:
    kept = _kept(rows[0], shift)
    return rows if kept.all() else _take(rows, np.flatnonzero(kept))


def _take(rows: _Rows, order: NDArray[np.int64]) -> _Rows:
    groups, scenario, ties, scores, labels = rows
    return groups[order], scenario[order], ties[order], scores.take(order, axis=1), labels.take(order, axis=1)


def _slice(rows: _Rows, begin: int, end: int) -> _Rows:
    """As views."""
    groups, scenario, ties, scores, labels = rows
    return (
        groups[begin:end],
        scenario[begin:end],
        ties[begin:end],
        scores[:, begin:end],
        labels[:, begin:end],
    )


def _join(parts: list[_Rows], num_tasks: int) -> _Rows:
    """The parts one after the other."""
    empty = (
        np.zeros(0, np.uint64),
        np.zeros(0, np.int32),
        np.zeros(0, np.uint64),
        np.zeros((num_tasks, 0), np.float32),
        np.zeros((num_tasks, 0), np.uint8),
    )
    groups, scenario, ties, scores, labels = zip(empty, *parts, strict=True)
    return (
        np.concatenate(groups),
        np.concatenate(scenario),
        np.concatenate(ties),
        np.concatenate(scores, axis=1),
        np.concatenate(labels, axis=1),
    )
