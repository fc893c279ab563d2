"""What tasks leave to be measured on the training data: priors, and the mean and deviation of targets.

R rows, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from mtlrec.data.columns import Columns, column_names
from mtlrec.data.decode import build_columns
from mtlrec.data.shards import Dataset
from mtlrec.data.statistics import Progress, good_training_rows
from mtlrec.job.job import Job
from mtlrec.job.model import ModelSection
from mtlrec.job.schema import BinaryTask, RegressionTask, SchemaSection
from mtlrec.schema import Schema, build_schema

_THREADS = 2
_AHEAD = 4
"""Row groups in memory at a time."""


def needs_measuring(section: SchemaSection) -> bool:
    """Whether a task of this schema has neither been measured nor been given its numbers."""
    return any(
        task.prior is None if isinstance(task, BinaryTask) else task.mean is None
        for task in section.tasks.values()
        if isinstance(task, BinaryTask | RegressionTask)
    )


def measure_labels(job: Job, progress: Progress | None = None) -> SchemaSection:
    """The schema with every prior, mean and std filled in that is wanting.

    All are over the training rows that have the label and whose `given` task allows it, by sample weight. A
    prior counts the negatives that training draws for its task (as if every positive got all of them),
    and stays half a row away from 0 and 1; a target without any label has mean 0, and one of a
    single value std 1. Bad rows are left out where the job says so; else raises InputError, naming file, row
    group, row and column, for a label that fits no task.
    """
    schema = _labels_alone(job)
    dataset = good_training_rows(job) or Dataset.open(job.data.train, schema.columns())
    # Weight of the labels, their weighted sum, and sum of squares around the mean: by task.
    total, sums, squares = np.zeros((3, len(schema.tasks)))
    labelled = np.zeros(len(schema.tasks), np.int64)
    done = 0
    for group, columns in enumerate(_read(dataset, schema)):
        weight = np.ones(len(columns)) if columns.weight is None else columns.weight.astype(np.float64)
        for t in range(len(schema.tasks)):
            here = columns.valid[:, t]
            label, by = columns.labels[here, t].astype(np.float64), weight[here]
            labelled[t] += len(label)
            if (part := by.sum()) == 0:
                continue
            mean = (by @ label) / part
            # Chan, Golub, LeVeque 1979, for two parts.
            shift = mean - sums[t] / total[t] if total[t] else 0.0
            squares[t] += by @ (label - mean) ** 2 + shift**2 * total[t] * part / (total[t] + part)
            total[t] += part
            sums[t] += by @ label
        done += int(dataset.group_rows[group])
        if progress is not None:
            progress(done, dataset.rows)
    drawn = job.data.negatives
    found: dict[str, Any] = {}
    for t, (name, task) in enumerate(job.schema_.tasks.items()):
        if isinstance(task, BinaryTask) and task.prior is None:
            more = drawn.per_positive * sums[t] if drawn is not None and drawn.task == name else 0.0
            prior = _prior(sums[t], total[t] + more, labelled[t])
            found[name] = task.model_copy(update={"prior": prior})
        elif isinstance(task, RegressionTask) and task.mean is None:
            mean, variance = (sums[t] / total[t], squares[t] / total[t]) if total[t] else (0.0, 0.0)
            # Rounding leaves a variance of almost nothing where all labels are alike.
            std = float(np.sqrt(variance)) if variance > 1e-12 * mean**2 else 1.0
            found[name] = task.model_copy(update={"mean": float(mean), "std": std})
    return job.schema_.model_copy(update={"tasks": {**job.schema_.tasks, **found}})


def _prior(positive: float, total: float, rows: int) -> float:
    least = 0.5 / (rows + 1.0)
    return float(np.clip(positive / total if total else 0.5, least, 1.0 - least))


def _labels_alone(job: Job) -> Schema:
    """A schema of the tasks and the sample weight, without a feature."""
    section = job.schema_.model_copy(update={"features": {}, "tables": {}, "scenario": None})
    return build_schema(section, ModelSection())


def _read(dataset: Dataset, schema: Schema) -> Iterator[Columns]:
    """The labels of every row group, in order, a few read ahead."""
    names = column_names(schema, True, ())

    def read(group: int) -> Columns:
        table = dataset.read_group(group, names)
        return build_columns(table, schema, where=dataset.where(group), first_row=0)

    groups: npt.NDArray[np.int64] = np.arange(len(dataset.group_rows))
    with ThreadPoolExecutor(_THREADS) as pool:
        for begin in range(0, len(groups), _AHEAD):
            yield from pool.map(read, groups[begin : begin + _AHEAD].tolist())
