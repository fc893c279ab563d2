"""Rows of windows -> batches, several steps at a time. Letters as in reader.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtlrec.batch import Batch
from mtlrec.data.columns import Columns, Cut, interleave, join_but_ids, join_cuts
from mtlrec.data.negatives import Sampler
from mtlrec.data.order import Position, advance, steps_left
from mtlrec.data.windows import Windows
from mtlrec.schema import Schema

_Array = npt.NDArray[Any]

_ROWS_TOGETHER = 16_384
"""Rows of batches that are built together: what each costs whatever its size is paid once, and a lane's rows
are read in longer stretches."""


class Run(NamedTuple):
    """The rows of one step, or of several that have as many rows of each lane."""

    cuts: list[Cut]
    """Lane after lane; of more than one step, each has its rows of the first, of the second, and so on."""
    positions: list[Position]
    """Behind each step."""


def runs(
    windows: Windows,
    served: range,
    rows: tuple[int, ...],
    rows_per_step: int,
    position: Position,
    epochs: int,
) -> Iterator[Run]:
    """This worker's rows of all steps from `position` to the end of epoch `epochs - 1`. rows: by lane [L]."""
    most = max(_ROWS_TOGETHER // (rows_per_step * max(len(served), 1)), 1)
    # Of each lane, and how many of its rows are used, of how many.
    held: dict[int, tuple[Columns, int, int]] = {}
    while position.epoch < epochs:
        steps = min(most, steps_left(rows, position.done, rows_per_step))
        if steps == 0:
            position = advance(position, rows, rows_per_step)
            continue
        cuts: list[Cut] = []
        for lane in served:
            left = rows[lane] - position.done[lane]
            missing = min(rows_per_step, left)
            while missing:
                if lane not in held:
                    taken = windows.take()
                    if taken is None:
                        return  # closed
                    fill, columns = taken
                    assert (fill.epoch, fill.lane) == (position.epoch, lane)
                    held[lane] = columns, fill.done, len(columns)
                columns, used, size = held[lane]
                end = min(used + missing, size)
                # A step that goes on in the next window stands alone, and so does one that a lane ends in.
                steps = min(steps, (size - used) // rows_per_step) if left >= rows_per_step else 1
                cuts.append(Cut(columns, used, end))
                missing -= end - used
                if end < size:
                    held[lane] = columns, end, size
                else:
                    del held[lane]
        if steps > 1:
            cuts = [Cut(cut.columns, cut.begin, cut.begin + steps * rows_per_step) for cut in cuts]
            for lane in [lane for lane in served if lane in held]:
                columns, used, size = held[lane]
                if (used := used + (steps - 1) * rows_per_step) < size:
                    held[lane] = columns, used, size
                else:
                    del held[lane]
        positions = []
        for _ in range(max(steps, 1)):
            position = advance(position, rows, rows_per_step)
            positions.append(position)
        yield Run(cuts, positions)


class _Part(NamedTuple):
    """Some rows of each step of a run."""

    cuts: Sequence[Cut]
    rest: Columns
    """The rows of the first step, of the second, and so on, without ids."""
    places: slice | _Array
    """Among the M, rising."""


def _all_of(columns: Columns) -> Cut:
    return Cut(columns, 0, len(columns))


def _neighbours(is_list: Sequence[bool]) -> list[tuple[slice, slice, bool]]:
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


class Builder:
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
        self._neighbours = _neighbours([feature.source == "id_list" for feature in schema.id_features])
        self._num_dense, self._num_tasks = schema.dense_width, len(schema.tasks)

    def build(self, run: Run, step: int) -> list[Batch]:
        """The batches of a run, whose first is step number `step` of the whole training."""
        steps = len(run.positions)
        # What differs from step to step is built step by step.
        if steps > 1 and (
            self._negatives is not None
            or self._keys
            or any(columns.bad is not None for columns, _, _ in run.cuts)
        ):
            found = []
            for number, position in enumerate(run.positions):
                cuts = [cut.of_step(number, steps) for cut in run.cuts]
                found += self._build(cuts, [position], step + number)
            return found
        return self._build(run.cuts, run.positions, step)

    def _build(self, cuts: Sequence[Cut], positions: Sequence[Position], step: int) -> list[Batch]:
        steps = len(positions)
        if not self._keep_bad and any(columns.bad is not None for columns, _, _ in cuts):
            cuts = [_all_of(join_cuts(cuts).good())]
        num_rows = sum(cut.end - cut.begin for cut in cuts) // steps
        parts: list[_Part] = []
        present = None
        if self._negatives is not None:
            present = np.zeros((steps, self._stride, self._negatives.per_positive), np.bool_)
        if num_rows:
            if self._negatives is not None and present is not None:
                cuts = [_all_of(join_cuts(cuts))]
                present[0, :num_rows], drawn = self._negatives.negatives_of(cuts[0].columns, step)
                behind = self._stride + np.flatnonzero(present)
                parts = [_Part([_all_of(drawn)], drawn, behind)]
            parts.insert(0, _Part(cuts, join_but_ids(cuts, steps), slice(0, num_rows)))
        blank = self._blank(num_rows)
        dense = blank((steps, self._model_rows, self._num_dense), np.float32)
        scenario = blank((steps, self._model_rows), np.int64)
        for part in parts:
            scenario[:, part.places] = part.rest.scenario.reshape(steps, -1)
            # Number by number: numpy copies a row of three numbers no faster than one of a hundred.
            for number, source in enumerate(part.rest.dense.T):
                dense[:, part.places, number] = source.reshape(steps, -1)
        labels = np.zeros((steps, self._stride, self._num_tasks), np.float32)
        valid = np.zeros((steps, self._stride, self._num_tasks), np.bool_)
        rows = np.full((steps, self._stride), -1, np.int64)
        weight = blank((steps, self._stride), np.float32) if self._weighted else None
        whole = parts[0].rest if parts else None
        if whole is not None:
            rows[:, :num_rows] = whole.rows.reshape(steps, -1)
            for task, of_task in enumerate(whole.targets):
                targets = of_task.reshape(steps, -1)
                known = np.isfinite(targets)
                valid[:, :num_rows, task] = known
                np.copyto(labels[:, :num_rows, task], targets, where=known)
            if weight is not None and whole.weight is not None:
                weight[:, :num_rows] = whole.weight.reshape(steps, -1)
        nothing = (None,) * steps
        each_step = zip(
            positions,
            self._jagged(parts, steps),
            self._steps_of(dense),
            self._steps_of(labels),
            self._steps_of(valid),
            self._steps_of(scenario),
            torch.from_numpy(rows).unbind(),
            nothing if weight is None else self._steps_of(weight),
            nothing if present is None else self._steps_of(present),
            strict=True,
        )
        return [
            Batch(
                ids=of_ids,
                dense=of_dense,
                labels=of_labels,
                valid=of_valid,
                scenario=of_scenario,
                rows=of_rows,
                num_rows=num_rows,
                position=position,
                step=number,
                weight=of_weight,
                negatives=of_negatives,
                keys=self._key_table(whole) if self._keys else None,
                bad=None if whole is None else whole.bad,
            )
            for number, (
                position,
                of_ids,
                of_dense,
                of_labels,
                of_valid,
                of_scenario,
                of_rows,
                of_weight,
                of_negatives,
            ) in enumerate(each_step, step)
        ]

    def _blank(self, num_rows: int) -> Callable[..., _Array]:
        """Makes what is padded with zeros, where there is padding."""
        return np.empty if num_rows == self._model_rows else np.zeros

    def _jagged(self, parts: Sequence[_Part], steps: int) -> list[KeyedJaggedTensor]:
        """Of each step: values of feature 0 for all rows, then of feature 1, ...; lengths [F * M] likewise.

        Rows that no part has have no ids.
        """
        cuts = [cut for part in parts for cut in part.cuts]
        complete = all(part.rest.complete for part in parts)
        num_rows = sum(len(part.rest) for part in parts) // steps
        lengths = self._blank(num_rows)((steps, len(self._names), self._model_rows), np.int32)
        # By step: of each feature, how many values; and by neighbours, arrays of them, [..., rows or ids].
        per_feature: list[list[int]] = [[] for _ in range(steps)]
        pieces: list[list[list[_Array]]] = [[] for _ in range(steps)]
        for features, numbers, is_list in self._neighbours:
            count = features.stop - features.start
            if is_list:
                of_cuts = [cut.values_of_steps(numbers.start, steps) for cut in cuts]
                for step, sizes in enumerate(per_feature):
                    pieces[step].append([of_cut[step] for of_cut in of_cuts])
                    sizes.append(sum(map(len, pieces[step][-1])))
                for part in parts:
                    lengths[:, features, part.places] = _by_step(part.rest.lengths[numbers], steps)
            elif complete:
                by_step = [_by_step(cut.ids(numbers), steps) for cut in cuts]
                for step, sizes in enumerate(per_feature):
                    pieces[step].append([of_cut[step] for of_cut in by_step])
                    sizes += [num_rows] * count
                for part in parts:
                    lengths[:, features, part.places] = 1
            else:
                ids = _by_step(interleave([cut.ids(numbers) for cut in cuts], steps), steps)
                present = ids >= 0
                for step, sizes in enumerate(per_feature):
                    pieces[step].append([ids[step][present[step]]])
                    sizes += present[step].sum(axis=1).tolist()
                begin = 0
                for part in parts:
                    end = begin + len(part.rest) // steps
                    lengths[:, features, part.places] = present[:, :, begin:end]
                    begin = end
        ends = list(accumulate(map(sum, per_feature)))
        values = np.empty(ends[-1], np.int64)
        begin = 0
        for arrays in chain.from_iterable(pieces):
            if arrays:
                size = sum(map(np.size, arrays))
                target = values[begin : begin + size].reshape(*arrays[0].shape[:-1], -1)
                np.concatenate(arrays, axis=-1, out=target)
                begin += size
        all_values = self._tensor(values)
        return [
            KeyedJaggedTensor(
                keys=list(self._names),
                values=all_values[end - sum(sizes) : end],
                lengths=of_step,
                stride=self._model_rows,
                # TorchRec would add up the lengths, and on CUDA wait for the sums.
                length_per_key=sizes,
            )
            for sizes, end, of_step in zip(
                per_feature, ends, self._steps_of(lengths.reshape(steps, -1)), strict=True
            )
        ]

    def _key_table(self, whole: Columns | None) -> pa.Table:
        if whole is None:
            return pa.table({name: pa.nulls(0) for name in self._keys})
        return whole.keys

    def _tensor(self, array: _Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin_memory else tensor

    def _steps_of(self, array: _Array) -> tuple[torch.Tensor, ...]:
        return self._tensor(array).unbind()


def _by_step(rows: _Array, steps: int) -> _Array:
    """[n, steps * rows of one] -> [steps, n, rows of one], a view."""
    return rows.reshape(len(rows), steps, -1).swapaxes(0, 1)
