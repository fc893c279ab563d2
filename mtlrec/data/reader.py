"""Batches in the order of the contract, built by background threads ahead of whoever consumes them.

L lanes, W workers, b rows of a lane in every step, S rows of this worker's batch with its padding (its
stride), K negatives a row, M = S (1 + K), F id features, N dense numbers, T tasks.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType

from mtlrec import storage
from mtlrec.batch import Batch
from mtlrec.data.assemble import Builder, Run, runs
from mtlrec.data.negatives import Sampler
from mtlrec.data.order import Position, check_position, lane_rows, steps_left, stride, worker_lanes
from mtlrec.data.quarantine import Quarantine
from mtlrec.data.shards import Dataset
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.data.windows import Windows
from mtlrec.doctor import read_cores
from mtlrec.job.errors import InputError
from mtlrec.priority import BATCHES, step_back
from mtlrec.schema import Schema

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
    say so. ahead: batches kept ready, at least. pin_memory: put batches where a GPU copies them from while it
    computes. threads: row groups that are read and decoded side by side; 0: where batches are built; None: as
    with 0 for files of this machine where the process has one core, else 2.

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
        threads: int | None = None,
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
            threads=_threads(dataset) if threads is None else threads,
        )
        builder = Builder(
            schema,
            stride(lanes, world_size, self._rows_per_step),
            weighted=labels and schema.weight_column is not None,
            keys=tuple(keys),
            negatives=negatives,
            keep_bad=keep_bad,
            pin_memory=pin_memory,
        )
        of_runs = runs(windows, served, self._rows, self._rows_per_step, position, epochs)
        self._windows, self._ready = windows, _Ready(ahead)
        # The threads do not know the reader, so that it stops when it is dropped without being closed.
        self._thread = threading.Thread(
            target=_build_ahead,
            args=(of_runs, builder, first_step, self._ready),
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


def _threads(dataset: Dataset) -> int:
    """That read and decode: on one core they would take turns, of which each costs, but for the time in which
    they wait for object storage.
    """
    return 0 if read_cores() <= 1 and storage.local_path(dataset.url) else 2


def _stop(windows: Windows, ready: _Ready) -> None:
    windows.stop()
    ready.stop()


def _build_ahead(of_runs: Iterator[Run], builder: Builder, first_step: int, ready: _Ready) -> None:
    step_back(BATCHES)
    failure: BaseException | None = None
    try:
        step = first_step
        for run in of_runs:
            if not ready.put(builder.build(run, step)):
                return
            step += len(run.positions)
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

    def put(self, batches: Sequence[Batch]) -> bool:
        """Wait for room for one, and put all: each costs both threads a turn, and those that were built
        together lie in the same memory. False once nobody wants more.
        """
        with self._changed:
            while len(self._batches) >= self._size and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                self._batches.extend(batches)
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
