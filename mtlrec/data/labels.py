"""Labels, what makes them count, and sample weights. No torch.

R rows, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec.data.source import Source, is_valid, without_nulls
from mtlrec.schema import Task

Valid = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


def read_labels(source: Source, tasks: Sequence[Task]) -> tuple[Floats, Valid]:
    """float32 [R, T], 0 where there is none, and bool [R, T]: the row has a label that counts.

    Refuses an infinite label, and one of a binary or pairwise task beside 0 and 1.
    """
    # Of each task its own stretch of memory.
    labels = np.zeros((len(tasks), len(source)), np.float32).T
    valid = np.zeros((len(tasks), len(source)), np.bool_).T
    for index, task in enumerate(tasks):
        _label(source, task, labels[:, index], valid[:, index])
    keep_given(tasks, labels, valid)
    return labels, valid


def keep_given(tasks: Sequence[Task], labels: npt.NDArray[Any], valid: Valid) -> None:
    """Take away, in place, each label whose `given` task does not allow it, [R, T].

    A task counts only in rows where the task that it is given has a label that counts, and it is 1.
    """
    place = {task.name: index for index, task in enumerate(tasks)}
    settled = {index for index, task in enumerate(tasks) if task.given is None}

    def settle(index: int) -> None:
        if index in settled:
            return
        settled.add(index)
        given = place[tasks[index].given or ""]
        settle(given)
        valid[:, index] &= valid[:, given] & (labels[:, given] == 1)
        labels[~valid[:, index], index] = 0

    for index in range(len(tasks)):
        settle(index)


def read_weight(source: Source, column: str) -> Floats:
    """Sample weights, float32 [R]. Refuses one that is null, NaN, negative or infinite."""
    array = source[column]
    values = without_nulls(
        array if array.type == pa.float32() else pc.cast(array, pa.float64(), safe=False), 0
    )
    # A NaN among them is the least and the greatest.
    if not array.null_count and values.min(initial=0) >= 0 and values.max(initial=0) < np.inf:
        weight = np.empty(len(values), np.float32)
        source.store(column, values, weight)
        return weight
    fits = is_valid(array) & (values >= 0) & (values < np.inf)
    if not fits.all():
        rows = np.flatnonzero(~fits)

        def problem(at: int) -> str:
            value = values[rows[at]] if array[int(rows[at])].is_valid else "null"
            return f"{value} is no sample weight; a finite number from 0 on is"

        source.refuse(column, rows, problem)
        values = np.where(fits, values, 0)
    weight = np.empty(len(values), np.float32)
    source.store(column, values, weight)
    return weight


def _label(source: Source, task: Task, target: Floats, valid: Valid) -> None:
    column, array = task.label, source[task.label]
    if task.kind != "regression" and pa.types.is_integer(array.type):
        whole = without_nulls(array, 0)
        if whole.min(initial=0) >= 0 and whole.max(initial=0) <= 1:
            valid[:] = is_valid(array) if array.null_count else True
            target[:] = whole
            return
    values = source.floats(column, array)
    np.logical_not(np.isnan(values), out=valid)
    if task.kind != "regression" and (wrong := valid & (values != 0) & (values != 1)).any():
        rows = np.flatnonzero(wrong)
        allowed = f"is not a label of a {task.kind} task; 0, 1 (or false, true) and null are"
        source.refuse(column, rows, lambda at: f"{values[rows[at]]} {allowed}")
        values = np.where(wrong, np.nan, values)
    source.store(column, values, target)
