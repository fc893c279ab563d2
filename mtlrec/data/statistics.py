"""What number features leave to be measured on the training data: mean and std, quantile boundaries.

Measured once, before the model is built; the run keeps the numbers. The same data gives the same numbers,
however many threads read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec.data.quarantine import good_rows, open_dataset
from mtlrec.data.shards import Dataset
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job
from mtlrec.job.schema import NumberFeature, SchemaSection
from mtlrec.schema import Column, build_schema

EXACT_ROWS = 2_000_000
"""Quantiles are exact up to so many rows; beyond, they are those of so many rows, in evenly spaced groups."""
_THREADS = 2
_COLUMNS_AT_ONCE = 16
"""Quantile columns held in memory at a time: 16 bytes a row and column while sorting."""

Progress = Callable[[int, int], None]
"""Called with the rows measured so far, and all rows to be measured."""
Floats = npt.NDArray[np.float64]


def needs_measuring(section: SchemaSection) -> bool:
    """Whether a number feature of this schema has neither been measured nor been given its numbers."""
    return bool(_wanting(section))


def measure(data: str | Dataset, section: SchemaSection, progress: Progress | None = None) -> SchemaSection:
    """The schema with mean and std, or boundaries, filled in wherever they are wanting.

    data: a folder or file, or shards that are open. Mean and (population) standard deviation are exact, over
    every number that is neither null nor NaN; a column of one value has std 1. Boundaries are the distinct
    quantiles k / buckets of those numbers. Raises InputError, naming file, row group, row and column, for an
    infinite number; and naming the column where it has no number at all.
    """
    wanting = _wanting(section)
    columns = {name: feature.column or name for name, feature in wanting.items()}
    if isinstance(data, str):
        asked = [Column(column, "number", f"schema.features.{name}") for name, column in columns.items()]
        data = Dataset.open(data, asked)
    dataset = data
    standardised = [name for name, feature in wanting.items() if feature.transform == "standardise"]
    bucketised = [name for name, feature in wanting.items() if feature.transform == "bucketise"]
    every = range(len(dataset.group_rows))
    sample = _evenly_spaced(dataset)
    passes: list[tuple[list[str], Sequence[int]]] = [(standardised, every)] if standardised else []
    passes += [
        (bucketised[begin : begin + _COLUMNS_AT_ONCE], sample)
        for begin in range(0, len(bucketised), _COLUMNS_AT_ONCE)
    ]
    total = sum(int(dataset.group_rows[group]) for _, groups in passes for group in groups)
    done = 0
    features: dict[str, Any] = {}
    for names, groups in passes:
        moments = {name: _Moments() for name in names}
        values: dict[str, list[Floats]] = {name: [] for name in names}
        for group, found in _read(dataset, groups, [columns[name] for name in names]):
            for name, numbers in zip(names, found, strict=True):
                if wanting[name].transform == "standardise":
                    moments[name].add(numbers)
                else:
                    values[name].append(numbers)
            done += int(dataset.group_rows[group])
            if progress is not None:
                progress(done, total)
        for name in names:
            feature = wanting[name]
            where = f"{dataset.url}: column {columns[name]!r} (schema.features.{name})"
            if feature.transform == "standardise":
                features[name] = moments[name].fill(feature, where)
            else:
                features[name] = _with_boundaries(feature, np.concatenate(values.pop(name)), where)
    return section.model_copy(update={"features": {**section.features, **features}})


def good_training_rows(job: Job) -> Dataset | None:
    """The rows to be measured, where bad ones are left out; None where a bad row is an error.

    A feature that is yet to be measured accepts any finite number here, as it will then: none among n is
    further than sqrt(n) standard deviations from their mean, so that none is too large for float32.
    """
    tolerance = job.data.tolerance
    if tolerance is None:
        return None
    accepting = {
        name: feature.model_copy(update={"transform": "bucketise", "boundaries": [0.0]})
        for name, feature in _wanting(job.schema_).items()
    }
    features = {**job.schema_.features, **accepting}
    schema = build_schema(job.schema_.model_copy(update={"features": features}), job.model)
    return good_rows(open_dataset(job.data.train, schema.columns(), tolerance), schema, tolerance)


def _wanting(section: SchemaSection) -> dict[str, NumberFeature]:
    return {
        name: feature
        for name, feature in section.features.items()
        if isinstance(feature, NumberFeature)
        and (
            (feature.transform == "standardise" and feature.mean is None)
            or (feature.transform == "bucketise" and feature.boundaries is None)
        )
    }


def _evenly_spaced(dataset: Dataset) -> Sequence[int]:
    """All row groups, or enough evenly spaced ones to hold about EXACT_ROWS rows."""
    count = len(dataset.group_rows)
    if dataset.rows <= EXACT_ROWS:
        return range(count)
    some = max(1, round(count * EXACT_ROWS / dataset.rows))
    return [(2 * number + 1) * count // (2 * some) for number in range(some)]


def _read(
    dataset: Dataset, groups: Sequence[int], columns: Sequence[str]
) -> Iterator[tuple[int, list[Floats]]]:
    """The numbers of some columns, group by group in the order of `groups`, a few groups read ahead."""

    def read(group: int) -> tuple[int, list[Floats]]:
        table = dataset.read_group(group, list(dict.fromkeys(columns)))
        return group, [_numbers(dataset, group, column, table[column]) for column in columns]

    with ThreadPoolExecutor(_THREADS) as pool:
        for begin in range(0, len(groups), 2 * _THREADS):
            yield from pool.map(read, groups[begin : begin + 2 * _THREADS])


def _numbers(dataset: Dataset, group: int, column: str, chunks: pa.ChunkedArray) -> Floats:
    """float64 of the numbers that are there: no null, no NaN."""
    array = pc.cast(chunks, pa.float64(), safe=False)
    if array.null_count:
        array = pc.fill_null(array, float("nan"))
    values: Floats = array.to_numpy()
    infinite = np.isinf(values)
    if infinite.any():
        row = int(np.argmax(infinite))
        shard = dataset.shards[int(dataset.group_shard[group])]
        raise InputError(
            f"{shard.url}: row group {int(dataset.group_index[group])}, row {row}, column {column}: "
            f"{values[row]} is not a finite number; null or NaN stand for none"
        )
    return values[~np.isnan(values)]


class _Moments:
    """Count, mean and sum of squared deviations of parts that are added in a fixed order.

    Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._least, self._most = np.inf, -np.inf

    def add(self, values: Floats) -> None:
        if not len(values):
            return
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is told of in fill
            mean = float(values.mean())
            squares = float(np.square(values - mean).sum())
        count = self._count + len(values)
        shift = mean - self._mean
        self._mean += shift * len(values) / count
        self._squares += squares + shift * shift * self._count * len(values) / count
        self._count = count
        self._least, self._most = min(self._least, values.min()), max(self._most, values.max())

    def fill(self, feature: NumberFeature, where: str) -> NumberFeature:
        if not self._count:
            raise InputError(f"{where} holds no number to measure; give mean and std, or drop the feature")
        if self._least == self._most:
            # Rounding would leave a std of almost nothing, and blow up what later data has of other values.
            return feature.model_copy(update={"mean": float(self._least), "std": 1.0})
        std = float(np.sqrt(self._squares / self._count))
        if not (np.isfinite(self._mean) and np.isfinite(std) and std > 0):
            raise InputError(
                f"{where}: its mean and std do not fit a double; scale it, or use transform: log1p"
            )
        return feature.model_copy(update={"mean": self._mean, "std": std})


def _with_boundaries(feature: NumberFeature, values: Floats, where: str) -> NumberFeature:
    if not len(values):
        raise InputError(f"{where} holds no number to measure; give boundaries, or drop the feature")
    assert feature.buckets is not None
    values.sort()
    # Quantiles that are numbers of the column, so that no boundary depends on how floats are interpolated.
    places = [number * len(values) // feature.buckets for number in range(1, feature.buckets)]
    boundaries = np.unique(values[places])
    if boundaries[0] == values[0]:
        # Nothing is below the smallest number. Where it fills every place, the rest is the other bucket.
        above = values[np.searchsorted(values, values[0], side="right") :][:1]
        boundaries = boundaries[1:] if len(boundaries) > 1 else above if len(above) else boundaries
    return feature.model_copy(update={"boundaries": boundaries.tolist()})
