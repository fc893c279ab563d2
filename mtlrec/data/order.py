"""The order of the samples: a pure function of (data fingerprint, seed, epoch, window, lanes). No I/O.

G row groups, L lanes, b rows of a lane in every step. How it all fits together is told in docs/order.md.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mtlrec.job.errors import InputError


@dataclass(frozen=True)
class Position:
    """Where a run stands: what a checkpoint keeps, in units that know no batch size and no worker."""

    generation: int
    """Number of the set of shards, from 0; shards that arrive later are the next one."""
    epoch: int
    """Passes over the generation's data that are complete."""
    done: tuple[int, ...]
    """Rows of each lane that were trained in this epoch."""

    @classmethod
    def start(cls, lanes: int, generation: int = 0) -> Position:
        """Before the first row of a generation."""
        return cls(generation, 0, (0,) * lanes)

    def to_json(self) -> dict[str, Any]:
        return {"generation": self.generation, "epoch": self.epoch, "done": list(self.done)}

    @classmethod
    def from_json(cls, value: Any, where: str = "position") -> Position:
        """What `to_json` made, or InputError that names `where` it was read."""
        fields = ("generation", "epoch", "done")
        if not isinstance(value, dict) or set(value) != set(fields) or not isinstance(value["done"], list):
            raise InputError(f"{where}: {value!r} is not a position; it has {', '.join(fields)}")
        for number in (value["generation"], value["epoch"], *value["done"]):
            if type(number) is not int or number < 0:
                raise InputError(f"{where}: a position holds whole numbers from 0 on, not {number!r}")
        return cls(value["generation"], value["epoch"], tuple(value["done"]))


class Segment(NamedTuple):
    """Rows [begin, end) of one row group."""

    group: int
    begin: int
    end: int


class Fill(NamedTuple):
    """One window of one lane, and when it is needed."""

    step: int
    """Steps that are complete, of those left in the epoch, before the first that needs the window."""
    lane: int
    epoch: int
    window: int
    """Number of the window in its lane and epoch."""
    begin: int
    """The window is the rows [begin, end) of its lane, before they are shuffled."""
    end: int
    done: int
    """Rows of the window, in shuffled order, that were trained before the run resumed."""


def groups_order(num_groups: int, fingerprint: str, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The epoch's shuffled list of row groups: int64 [G]."""
    return _permutation(num_groups, f"order|{fingerprint}|{seed}|{epoch}|groups")


def window_permutation(
    fingerprint: str, seed: int, epoch: int, lane: int, window: int, rows: int
) -> npt.NDArray[np.int64]:
    """Shuffled order of a window's rows, int64 [rows]: the i-th row trained is the window's p[i]-th."""
    return _permutation(rows, f"order|{fingerprint}|{seed}|{epoch}|lane|{lane}|window|{window}")


def _permutation(size: int, key: str) -> npt.NDArray[np.int64]:
    """`size` indices sorted by raw Philox draws, whose stream is the same in every version of numpy.

    Each index stands in the low bits of its own draw: the draws are then distinct, any sort gives the same
    order on every machine, and sorting numbers is several times as fast as a stable argsort.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    draws = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64)).random_raw(size)
    low = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    draws &= ~low
    draws |= np.arange(size, dtype=np.uint64)
    draws.sort()
    draws &= low
    return draws.view(np.int64)


def lane_rows(num_rows: int, lanes: int) -> tuple[int, ...]:
    """Rows of each lane, [L]: lane l owns rows [l * num_rows // L, (l + 1) * num_rows // L) of the list."""
    return tuple((lane + 1) * num_rows // lanes - lane * num_rows // lanes for lane in range(lanes))


def worker_lanes(lanes: int, rank: int, world_size: int) -> range:
    """The lanes that worker `rank` serves."""
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def stride(lanes: int, world_size: int, rows_per_step: int) -> int:
    """Rows of every worker's batch, padding included; `rows_per_step` of each lane."""
    return -(-lanes // world_size) * rows_per_step


def steps_left(rows: Sequence[int], done: Sequence[int], rows_per_step: int) -> int:
    """Steps to the end of the epoch, which ends when every lane is done. rows and done: [L]."""
    return max(-(-(total - past) // rows_per_step) for total, past in zip(rows, done, strict=True))


def advance(position: Position, rows: Sequence[int], rows_per_step: int) -> Position:
    """The position one step later; an epoch's last step leads to the start of the next. rows: by lane."""
    done = tuple(min(past + rows_per_step, total) for past, total in zip(position.done, rows, strict=True))
    if done == tuple(rows):
        return Position(position.generation, position.epoch + 1, (0,) * len(done))
    return Position(position.generation, position.epoch, done)


def rows_between(before: Position, after: Position, num_rows: int) -> int:
    """Rows of a generation of `num_rows` that lie between two positions in it, bad ones included."""
    return (after.epoch - before.epoch) * num_rows + sum(after.done) - sum(before.done)


class Lane:
    """One lane of one epoch: its part of the list of row groups, cut into segments."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._ends: list[int] = []
        total = 0
        for segment in self.segments:
            total += segment.end - segment.begin
            self._ends.append(total)
        self.rows = total

    def cut(self, begin: int, end: int) -> list[Segment]:
        """Segments of the lane's rows [begin, end)."""
        found = []
        index = bisect_right(self._ends, begin)
        while begin < end:
            segment, stop = self.segments[index], self._ends[index]
            shift = segment.end - stop
            found.append(Segment(segment.group, begin + shift, min(end, stop) + shift))
            begin, index = stop, index + 1
        return found


def build_lanes(
    group_rows: npt.NDArray[np.int64], order: npt.NDArray[np.int64], lanes: int
) -> tuple[Lane, ...]:
    """Cut the ordered list of row groups into lanes. group_rows: rows of each group [G]; order: int64 [G]."""
    ends = np.cumsum(group_rows[order])
    num_rows = int(ends[-1]) if len(ends) else 0
    found = []
    for lane in range(lanes):
        begin, end = lane * num_rows // lanes, (lane + 1) * num_rows // lanes
        segments = []
        at = int(np.searchsorted(ends, begin, side="right"))
        while begin < end:
            group, stop = int(order[at]), int(ends[at])
            start = stop - int(group_rows[group])
            if begin < stop:
                segments.append(Segment(group, begin - start, min(end, stop) - start))
                begin = stop
            at += 1
        found.append(Lane(segments))
    return tuple(found)


def window_span(lane: int, lanes: int, window: int, rows: int, index: int) -> tuple[int, int]:
    """Rows [begin, end) of a lane of `rows` rows that its window `index` holds, of `window` rows at most.

    The first window of lane l is cut to (l + 1) / L of the others, so that lanes need their next windows in
    different steps: the work of filling them is spread evenly, and the first batch comes sooner.
    """
    first = -(-window * (lane + 1) // lanes)
    begin = 0 if index == 0 else first + (index - 1) * window
    return begin, min(first + index * window, rows)


def fills(
    rows: Sequence[int], served: range, window: int, position: Position, epochs: int, rows_per_step: int
) -> Iterator[Fill]:
    """Every window that the lanes `served` still need from `position` to the end of epoch `epochs - 1`.

    In the order in which they are needed: by epoch, step, lane, window. rows: of each of the L lanes.
    """

    def of_lane(lane: int, epoch: int, done: int) -> Iterator[Fill]:
        index = begin = end = 0
        while end < rows[lane]:
            begin, end = window_span(lane, len(rows), window, rows[lane], index)
            if end > done:
                step = max(begin - done, 0) // rows_per_step
                yield Fill(step, lane, epoch, index, begin, end, max(done - begin, 0))
            index += 1

    for epoch in range(position.epoch, epochs):
        done = position.done if epoch == position.epoch else (0,) * len(rows)
        yield from heapq.merge(*(of_lane(lane, epoch, done[lane]) for lane in served))


def check_position(position: Position, rows: Sequence[int]) -> None:
    """InputError unless `position` can be one of data with these `rows` in each lane."""
    if len(position.done) != len(rows):
        raise InputError(
            f"position: it counts {len(position.done)} lanes and the job has {len(rows)}; "
            "data.lanes cannot change while a run goes on"
        )
    for lane, (done, total) in enumerate(zip(position.done, rows, strict=True)):
        if done > total:
            raise InputError(
                f"position: lane {lane} has {done} rows done of {total}; the position belongs to other data"
            )
