"""Batches in the order of the contract, built by background threads ahead of whoever consumes them.

L lanes, W workers, b rows of a lane in every step, S rows of this worker's batch with its padding (its
stride), K negatives a row, M = S (1 + K), F id features, N dense numbers, T tasks.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtlrec.batch import Batch
from mtlrec.data.columns import Columns, Cut, join_but_ids, join_cuts
from mtlrec.data.negatives import Sampler
from mtlrec.data.order import Position, advance, check_position, lane_rows, steps_left, stride, worker_lanes
from mtlrec.data.quarantine import Quarantine
from mtlrec.data.shards import Dataset
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.data.windows import Windows
from mtlrec.job.errors import InputError
from mtlrec.schema import Schema

_Array = npt.NDArray[Any]

_JOIN_S = 10.0


class Reader:
    """This worker's batches from `position` to the end of epoch `epochs - 1`; iterate over it once.

    Every rank gets the same number of batches, of the same stride. Reading begins at once, in daemon threads,
    so that it overlaps the building of the model; an error in them is raised where the batches are consumed,
    once. Without `shuffle` and with `lanes=world_size`, the ranks' rows one after the other are in the order
    of the files.

    batch_size: rows of a step over all workers, a multiple of `lanes`. window: rows of a lane that are
    shuffled among themselves. labels: whether labels and sample weights are read. keys: columns passed
    through in `Batch.keys`. vocabularies: by table. first_step: `Batch.step` of the first batch. negatives:
    what draws them, if any. quarantine: is told which rows are bad, which no batch then has (they keep their
    place in the order); None: a bad row is an error. keep_bad: bad rows are in the batches after all, which
    say so. ahead: batches that are kept ready. pin_memory: put batches where a GPU copies them from while it
    computes. threads: row groups that are read and decoded side by side.

    Raises InputError for a batch size that lanes do not divide, and for a position of other data or lanes.
    """

    def __init__(
        self,
        dataset: Dataset,
        schema: Schema,
        *,
        batch_size: int,
        lanes: int,
        window: int,
        shuffle: bool,
        seed: int,
        position: Position,
        epochs: int,
        rank: int = 0,
        world_size: int = 1,
        labels: bool = True,
        keys: Sequence[str] = (),
        vocabularies: Mapping[str, Vocabulary] = MappingProxyType({}),
        first_step: int = 0,
        negatives: Sampler | None = None,
        quarantine: Quarantine | None = None,
        keep_bad: bool = False,
        ahead: int = 4,
        pin_memory: bool = False,
        threads: int = 2,
    ) -> None:
        if batch_size < 1 or batch_size % lanes:
            raise InputError(f"data.batch_size: {batch_size} is not a multiple of data.lanes ({lanes})")
        self.schema, self.epochs = schema, epochs
        self._rows = lane_rows(dataset.rows, lanes)
        check_position(position, self._rows)
        self._rows_per_step = batch_size // lanes
        served = worker_lanes(lanes, rank, world_size)
        windows = Windows(
            dataset,
            schema,
            lanes=lanes,
            served=served,
            window=window,
            shuffle=shuffle,
            seed=seed,
            position=position,
            epochs=epochs,
            rows_per_step=self._rows_per_step,
            labels=labels,
            keys=keys,
            vocabularies=vocabularies,
            negatives=negatives,
            quarantine=quarantine,
            threads=threads,
        )
        builder = _Builder(
            schema,
            stride(lanes, world_size, self._rows_per_step),
            weighted=labels and schema.weight_column is not None,
            keys=tuple(keys),
            negatives=negatives,
            keep_bad=keep_bad,
            pin_memory=pin_memory,
        )
        steps = _Steps(windows, served, self._rows, self._rows_per_step, position, epochs)
        self._windows, self._ready = windows, _Ready(ahead)
        # The threads do not know the reader, so that it stops when it is dropped without being closed.
        self._thread = threading.Thread(
            target=_build_ahead,
            args=(steps, builder, first_step, self._ready),
            name="mtlrec-batches",
            daemon=True,
        )
        self._stop = weakref.finalize(self, _stop, windows, self._ready)
        self._thread.start()

    @property
    def steps_per_epoch(self) -> int:
        return steps_left(self._rows, (0,) * len(self._rows), self._rows_per_step)

    def steps_left(self, position: Position) -> int:
        """Batches from `position` to the end of the last epoch."""
        if position.epoch >= self.epochs:
            return 0
        rest = steps_left(self._rows, position.done, self._rows_per_step)
        return rest + (self.epochs - 1 - position.epoch) * self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch, waiting for it. Raises InputError for a row that does not fit the schema."""
        batch = self._ready.get()
        if batch is None:
            raise StopIteration
        return batch

    def close(self) -> None:
        """Stop the threads and wait for them; the batches that are left are dropped."""
        self._stop()
        self._windows.close()
        self._thread.join(_JOIN_S)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stop(windows: Windows, ready: _Ready) -> None:
    windows.stop()
    ready.stop()


def _build_ahead(steps: _Steps, builder: _Builder, first_step: int, ready: _Ready) -> None:
    failure: BaseException | None = None
    try:
        for step, (cuts, position) in enumerate(steps, first_step):
            if not ready.put(builder.build(cuts, position, step)):
                return
    except BaseException as error:
        failure = error
    ready.finish(failure)


class _Ready:
    """Batches on their way from the thread that builds them to the one that trains."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._batches: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._finished = self._stopped = False
        self._failure: BaseException | None = None

    def put(self, batch: Batch) -> bool:
        """Wait for room; False once nobody wants more."""
        with self._changed:
            while len(self._batches) >= self._size and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                self._batches.append(batch)
                self._changed.notify_all()
            return not self._stopped

    def get(self) -> Batch | None:
        """The next batch, or None after the last; a failure is raised once, after the batches before it."""
        with self._changed:
            while not self._batches and not self._finished and not self._stopped:
                self._changed.wait()
            if self._batches:
                self._changed.notify_all()
                return self._batches.popleft()
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return None

    def finish(self, failure: BaseException | None) -> None:
        with self._changed:
            self._finished, self._failure = True, failure
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._batches.clear()
            self._changed.notify_all()


class _Steps:
    """For each step, this worker's rows, lane after lane, and the position behind it."""

    def __init__(
        self,
        windows: Windows,
        served: range,
        rows: tuple[int, ...],
        rows_per_step: int,
        position: Position,
        epochs: int,
    ) -> None:
        self._windows, self._served, self._rows, self._rows_per_step = windows, served, rows, rows_per_step
        self._position, self._epochs = position, epochs

    def __iter__(self) -> Iterator[tuple[list[Cut], Position]]:
        position = self._position
        # Of each lane, and how many of its rows are used, of how many.
        windows: dict[int, tuple[Columns, int, int]] = {}
        while position.epoch < self._epochs:
            if steps_left(self._rows, position.done, self._rows_per_step) == 0:
                position = advance(position, self._rows, self._rows_per_step)
                continue
            cuts = []
            for lane in self._served:
                missing = min(self._rows_per_step, self._rows[lane] - position.done[lane])
                while missing:
                    if lane not in windows:
                        taken = self._windows.take()
                        if taken is None:
                            return  # closed
                        fill, columns = taken
                        assert (fill.epoch, fill.lane) == (position.epoch, lane)
                        windows[lane] = columns, fill.done, len(columns)
                    columns, used, size = windows[lane]
                    end = used + missing
                    if end < size:
                        windows[lane] = columns, end, size
                    else:
                        end = size
                        del windows[lane]
                    cuts.append(Cut(columns, used, end))
                    missing -= end - used
            position = advance(position, self._rows, self._rows_per_step)
            yield cuts, position


class _Part(NamedTuple):
    """Some of a batch's rows."""

    cuts: Sequence[Cut]
    rest: Columns
    """The cuts one after the other, without ids."""
    places: slice | _Array
    """Among the M, rising."""


def _all_of(columns: Columns) -> Cut:
    return Cut(columns, 0, len(columns))


def _runs(is_list: Sequence[bool]) -> list[tuple[slice, slice, bool]]:
    """Features that are assembled together: neighbours with one id a row, or one list.

    Of each run: which of all features, which of those of its kind, and whether it is a list.
    """
    found: list[tuple[slice, slice, bool]] = []
    seen = {False: 0, True: 0}
    for feature, kind in enumerate(is_list):
        number = seen[kind]
        seen[kind] += 1
        if found and not kind and not found[-1][2]:
            features, numbers, _ = found[-1]
            found[-1] = slice(features.start, feature + 1), slice(numbers.start, number + 1), kind
        else:
            found.append((slice(feature, feature + 1), slice(number, number + 1), kind))
    return found


class _Builder:
    """Rows as numpy arrays -> Batch of tensors, padded to the stride."""

    def __init__(
        self,
        schema: Schema,
        stride: int,
        *,
        weighted: bool,
        keys: tuple[str, ...],
        negatives: Sampler | None,
        keep_bad: bool,
        pin_memory: bool,
    ) -> None:
        self._stride, self._weighted, self._keys, self._pin_memory = stride, weighted, keys, pin_memory
        self._negatives, self._keep_bad = negatives, keep_bad
        self._model_rows = stride * (1 + (negatives.per_positive if negatives is not None else 0))
        self._names = [feature.name for feature in schema.id_features]
        self._runs = _runs([feature.source == "id_list" for feature in schema.id_features])
        self._num_dense, self._num_tasks = schema.dense_width, len(schema.tasks)

    def build(self, cuts: Sequence[Cut], position: Position, step: int) -> Batch:
        """cuts: at most S rows in all, in their order. position: behind this batch. step: of the run."""
        if not self._keep_bad and any(cut.columns.bad is not None for cut in cuts):
            cuts = [_all_of(join_cuts(cuts).good())]
        num_rows = sum(cut.end - cut.begin for cut in cuts)
        parts: list[_Part] = []
        present = None
        if self._negatives is not None:
            present = np.zeros((self._stride, self._negatives.per_positive), np.bool_)
        if num_rows:
            if self._negatives is not None and present is not None:
                cuts = [_all_of(join_cuts(cuts))]
                present[:num_rows], drawn = self._negatives.negatives_of(cuts[0].columns, step)
                behind = self._stride + np.flatnonzero(present)
                parts = [_Part([_all_of(drawn)], drawn, behind)]
            parts.insert(0, _Part(cuts, join_but_ids(cuts), slice(0, num_rows)))
        blank = self._blank(num_rows)
        dense = blank((self._model_rows, self._num_dense), np.float32)
        scenario = blank(self._model_rows, np.int64)
        for part in parts:
            scenario[part.places] = part.rest.scenario
            # Number by number: numpy copies a row of three numbers no faster than one of a hundred.
            for source, target in zip(part.rest.dense.T, dense.T, strict=True):
                target[part.places] = source
        labels = np.zeros((self._stride, self._num_tasks), np.float32)
        valid = np.zeros((self._stride, self._num_tasks), np.bool_)
        rows = np.full(self._stride, -1, np.int64)
        weight = blank(self._stride, np.float32) if self._weighted else None
        whole = parts[0].rest if parts else None
        if whole is not None:
            rows[:num_rows] = whole.rows
            for task, targets in enumerate(whole.targets):
                known = np.isfinite(targets)
                valid[:num_rows, task] = known
                np.copyto(labels[:num_rows, task], targets, where=known)
            if weight is not None:
                weight[:num_rows] = whole.weight
        return Batch(
            ids=self._jagged(parts),
            dense=self._tensor(dense),
            labels=self._tensor(labels),
            valid=self._tensor(valid),
            scenario=self._tensor(scenario),
            rows=torch.from_numpy(rows),
            num_rows=num_rows,
            position=position,
            step=step,
            weight=None if weight is None else self._tensor(weight),
            negatives=None if present is None else self._tensor(present),
            keys=self._key_table(whole) if self._keys else None,
            bad=None if whole is None else whole.bad,
        )

    def _blank(self, num_rows: int) -> Callable[..., _Array]:
        """Makes what is padded with zeros, where there is padding."""
        return np.empty if num_rows == self._model_rows else np.zeros

    def _jagged(self, parts: Sequence[_Part]) -> KeyedJaggedTensor:
        """Values of feature 0 for all rows, then of feature 1, and so on; lengths [F * M] likewise.

        Rows that no part has have no ids.
        """
        cuts = [cut for part in parts for cut in part.cuts]
        complete = all(part.rest.complete for part in parts)
        num_rows = sum(len(part.rest) for part in parts)
        lengths = self._blank(num_rows)((len(self._names), self._model_rows), np.int32)
        # By run of features: how many values, and arrays of them, [..., rows or ids of a cut].
        pieces: list[tuple[int, list[_Array]]] = []
        per_feature: list[int] = []
        for features, numbers, is_list in self._runs:
            if is_list:
                arrays = [cut.values(numbers.start) for cut in cuts]
                per_feature.append(sum(map(len, arrays)))
                pieces.append((per_feature[-1], arrays))
                for part in parts:
                    lengths[features, part.places] = part.rest.lengths[numbers]
                continue
            arrays = [cut.ids(numbers) for cut in cuts]
            count = features.stop - features.start
            if complete:
                per_feature += [num_rows] * count
                pieces.append((num_rows * count, arrays))
                for part in parts:
                    lengths[features, part.places] = 1
            else:
                ids = np.concatenate(arrays, axis=1)
                present = ids >= 0
                pieces.append((int(np.count_nonzero(present)), [ids[present]]))
                per_feature += present.sum(axis=1).tolist()
                begin = 0
                for part in parts:
                    end = begin + len(part.rest)
                    lengths[features, part.places] = present[:, begin:end]
                    begin = end
        values = np.empty(sum(per_feature), np.int64)
        begin = 0
        for size, arrays in pieces:
            if arrays:
                target = values[begin : begin + size].reshape(*arrays[0].shape[:-1], -1)
                np.concatenate(arrays, axis=-1, out=target)
                begin += size
        return KeyedJaggedTensor(
            keys=list(self._names),
            values=self._tensor(values),
            lengths=self._tensor(lengths.reshape(-1)),
            stride=self._model_rows,
            # TorchRec would add up the lengths, and on CUDA wait for the sums.
            length_per_key=per_feature,
        )

    def _key_table(self, whole: Columns | None) -> pa.Table:
        if whole is None:
            return pa.table({name: pa.nulls(0) for name in self._keys})
        return whole.keys

    def _tensor(self, array: _Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin_memory else tensor
