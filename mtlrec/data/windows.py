"""Threads that fill the windows of lanes, ahead of use and in the order they are needed. No torch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mtlrec.data.columns import Columns, Cut, column_names, join_cuts, shuffle_cuts
from mtlrec.data.decode import build_columns, unreadable_columns
from mtlrec.data.negatives import Sampler
from mtlrec.data.order import (
    Fill,
    Lane,
    Position,
    build_lanes,
    fills,
    groups_order,
    lane_rows,
    window_permutation,
)
from mtlrec.data.quarantine import Quarantine
from mtlrec.data.shards import Dataset, Unreadable
from mtlrec.data.source import BadRows
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.priority import BATCHES, step_back
from mtlrec.schema import Schema

_JOIN_S = 10.0
"""A thread that hangs in a read for longer after `close` is left behind; it is a daemon."""


class Windows:
    """The windows of the lanes `served`, one after the other, from `position` to the end of the last epoch.

    They come in the order of `order.fills`, the same for any number of threads; without any, whoever takes
    one fills it. Arguments as for `Reader`.
    """

    def __init__(
        self,
        dataset: Dataset,
        schema: Schema,
        *,
        lanes: int,
        served: range,
        window: int,
        shuffle: bool,
        seed: int,
        position: Position,
        epochs: int,
        rows_per_step: int,
        labels: bool,
        keys: Sequence[str],
        vocabularies: Mapping[str, Vocabulary],
        negatives: Sampler | None,
        quarantine: Quarantine | None,
        threads: int,
    ) -> None:
        self._quarantine = quarantine
        self._vocabularies, self._negatives = vocabularies, negatives
        self._dataset, self._schema, self._labels, self._keys = dataset, schema, labels, tuple(keys)
        self._num_lanes, self._shuffle, self._seed = lanes, shuffle, seed
        self._names = column_names(schema, labels, self._keys)
        self._fills = fills(lane_rows(dataset.rows, lanes), served, window, position, epochs, rows_per_step)
        # A quarter of what the lanes hold bridges most of an epoch's end, where all need a window at once.
        self._most_ahead = max(window, len(served) * window // 4)
        self._changed = threading.Condition()
        self._ready: dict[int, tuple[Fill, Columns] | BaseException] = {}
        self._next: Fill | None = next(self._fills, None)
        self._handed_out = self._taken = self._rows_ahead = 0
        self._failure: BaseException | None = None
        self._closed = False
        self._lanes: tuple[Lane, ...] = ()
        self._lanes_epoch = -1
        self._groups = _Groups()
        self._threads = [
            threading.Thread(target=self._work, name=f"mtlrec-windows-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> tuple[Fill, Columns] | None:
        """The next window, its rows shuffled; None after the last, and once closed.

        Raises what reading this window raised: an error of a later window waits for its turn.
        """
        if not self._threads:
            return self._take_at_once()
        with self._changed:
            while not self._closed and self._failure is None and self._taken not in self._ready:
                if self._next is None and self._taken == self._handed_out:
                    return None
                self._changed.wait()
            if self._closed:
                return None
            result = self._ready.pop(self._taken) if self._failure is None else self._failure
            if isinstance(result, BaseException):
                self._closed = True
            else:
                self._taken += 1
                self._rows_ahead -= len(result[1])
            self._changed.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def _take_at_once(self) -> tuple[Fill, Columns] | None:
        order = self._hand_out()
        if order is None:
            return None
        _, fill, lane = order
        self._rows_ahead = 0
        return fill, self._fill(fill, lane)

    def stop(self) -> None:
        """Let go of everything, without waiting."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._groups.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the threads and wait for them."""
        self.stop()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _work(self) -> None:
        step_back(BATCHES)
        try:
            while (order := self._hand_out()) is not None:
                number, fill, lane = order
                try:
                    result: tuple[Fill, Columns] | BaseException = (fill, self._fill(fill, lane))
                except Exception as error:
                    result = error
                with self._changed:
                    if self._closed:
                        return
                    self._ready[number] = result
                    if isinstance(result, Exception):
                        self._next = None
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _hand_out(self) -> tuple[int, Fill, Lane] | None:
        """The next window to fill, once there is room for it; None when there is nothing left to do."""
        with self._changed:
            while not self._closed and self._next is not None:
                rows = self._next.end - self._next.begin
                # With nothing ahead one is always allowed, or whoever takes it would wait for ever.
                if self._rows_ahead and self._rows_ahead + rows > self._most_ahead:
                    self._changed.wait()
                    continue
                fill, number = self._next, self._handed_out
                self._next = next(self._fills, None)
                self._handed_out += 1
                self._rows_ahead += rows
                if fill.epoch != self._lanes_epoch:
                    self._lanes, self._lanes_epoch = self._cut_lanes(fill.epoch), fill.epoch
                self._changed.notify_all()
                return number, fill, self._lanes[fill.lane]
            return None

    def _cut_lanes(self, epoch: int) -> tuple[Lane, ...]:
        num_groups = len(self._dataset.group_rows)
        order = np.arange(num_groups, dtype=np.int64)
        if self._shuffle:
            order = groups_order(num_groups, self._dataset.fingerprint, self._seed, epoch)
        return build_lanes(self._dataset.group_rows, order, self._num_lanes)

    def _fill(self, fill: Fill, lane: Lane) -> Columns:
        cuts, group = [], None
        for segment in lane.cut(fill.begin, fill.end):
            group = self._groups.get(segment.group)
            with group.lock:
                if group.columns is None:
                    group.columns = self._read(segment.group)
            cuts.append(Cut(group.columns, segment.begin, segment.end))
        # The lane's next window goes on in the group where this one ends.
        self._groups.hold(fill, group if fill.end < lane.rows else None)
        if not self._shuffle:
            return join_cuts(cuts)
        rows, data = fill.end - fill.begin, self._dataset.fingerprint
        return shuffle_cuts(
            cuts, window_permutation(data, self._seed, fill.epoch, fill.lane, fill.window, rows)
        )

    def _read(self, group: int) -> Columns:
        dataset, quarantine = self._dataset, self._quarantine
        first_row, num_rows = int(dataset.group_start[group]), int(dataset.group_rows[group])
        try:
            table = dataset.read_group(group, self._names)
        except Unreadable as error:
            if quarantine is None:
                raise
            quarantine.add_group(group, error)
            columns = unreadable_columns(
                num_rows, self._schema, first_row=first_row, labels=self._labels, keys=self._keys
            )
            return (
                columns if self._negatives is None else replace(columns, user=np.full(num_rows, -1, np.int32))
            )
        bad = None if quarantine is None else BadRows(num_rows)
        columns = build_columns(
            table,
            self._schema,
            where=dataset.where(group),
            first_row=first_row,
            labels=self._labels,
            keys=self._keys,
            vocabularies=self._vocabularies,
            bad=bad,
        )
        if quarantine is not None and bad is not None:
            quarantine.add_rows(group, bad)
        if self._negatives is None:
            return columns
        return replace(columns, user=self._negatives.users_of(table, columns))


class _Group:
    """One row group, read by the first who needs it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.columns: Columns | None = None


class _Groups:
    """Row groups in memory: those that a lane stands in, and those that are being read.

    Lanes that stand in one row group share it, so small data with few row groups is read once an epoch.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: weakref.WeakValueDictionary[int, _Group] = weakref.WeakValueDictionary()
        self._held: dict[int, tuple[int, int, _Group | None]] = {}

    def get(self, number: int) -> _Group:
        with self._lock:
            group = self._alive.get(number)
            if group is None:
                group = self._alive[number] = _Group()
            return group

    def hold(self, fill: Fill, group: _Group | None) -> None:
        """Keep `group` until a later window of the same lane is filled."""
        with self._lock:
            epoch, window, _ = self._held.get(fill.lane, (-1, -1, None))
            if (epoch, window) < (fill.epoch, fill.window):
                self._held[fill.lane] = fill.epoch, fill.window, group

    def clear(self) -> None:
        with self._lock:
            self._held.clear()
