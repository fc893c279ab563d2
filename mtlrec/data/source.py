"""The columns of one row group as numbers, and how a value of them is refused. No torch.

R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec.data.ids import hash_ids
from mtlrec.job.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Misfit:
    """Values of one column that do not fit the schema."""

    column: str
    rows: npt.NDArray[np.int64]
    """Numbers of their rows in the row group, each once, rising."""
    problems: tuple[str, ...]
    """Of the first `BadRows.EXPLAINED` rows, what is wrong with each, and what is allowed."""


class BadRows:
    """Collects the rows of one row group that do not fit the schema, where they are no error."""

    EXPLAINED = 100
    """Rows of a column whose values are told; of the others the number is."""

    def __init__(self, num_rows: int) -> None:
        self.mask = np.zeros(num_rows, np.bool_)
        """[R]: the row does not fit."""
        self.misfits: list[Misfit] = []

    def add(self, column: str, rows: npt.NDArray[np.int64], problem: Callable[[int], str]) -> None:
        """rows: rising, maybe repeated; problem: place in `rows` -> what is wrong there."""
        rows, first = np.unique(rows, return_index=True)
        self.mask[rows] = True
        self.misfits.append(Misfit(column, rows, tuple(problem(int(at)) for at in first[: self.EXPLAINED])))


class Source:
    """The columns of one row group, and how to refuse a value of them: by an error, or into `bad`."""

    def __init__(self, table: pa.Table, where: str, bad: BadRows | None = None) -> None:
        self._table, self._where, self._bad = table, where, bad

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, column: str) -> pa.Array:
        chunks = self._table[column]
        if chunks.num_chunks == 1:
            return chunks.chunk(0)
        return chunks.unify_dictionaries().combine_chunks()

    def refuse(self, column: str, rows: npt.NDArray[np.int64], problem: Callable[[int], str]) -> None:
        """Some values of a column do not fit. Raises InputError for the first, or puts them all on the list.

        rows: of these values, rising, at least one; problem: place in `rows` -> what is wrong, what is
        allowed. Where it returns, the caller puts anything harmless in their place.
        """
        if self._bad is None:
            raise self.error(column, int(rows[0]), problem(0))
        self._bad.add(column, rows, problem)

    def error(self, column: str, row: int, problem: str) -> InputError:
        """What is wrong with a column's values of whatever row, first seen at `row`: an error in any case."""
        return InputError(f"{self._where}, row {row}, column {column}: {problem}")

    def floats(self, column: str, array: pa.Array, row_of: npt.NDArray[np.int64] | None = None) -> Array:
        """float32 or float64 copy of `array`, NaN for null; infinite is refused. row_of: element -> row."""
        if array.type != pa.float32():
            array = pc.cast(array, pa.float64(), safe=False)
        if array.null_count:
            array = pc.fill_null(array, float("nan"))
        values: Array = array.to_numpy(zero_copy_only=False)
        if not sum_is_finite(values) and (infinite := np.isinf(values)).any():
            at = np.flatnonzero(infinite)
            self.refuse(
                column,
                at if row_of is None else row_of[at],
                lambda n: f"{values[at[n]]} is not a finite number; null or NaN stand for none",
            )
            return np.where(infinite, np.nan, values)
        return values

    def store(self, column: str, values: Array, target: npt.NDArray[np.float32]) -> None:
        """Put numbers into `target`, [R] or [R, width], with 0 for NaN; refuse what float32 cannot hold."""
        with np.errstate(over="ignore"):
            target[:] = values
        if sum_is_finite(target):
            return
        np.copyto(target, 0, where=np.isnan(target))
        if (infinite := np.isinf(target)).any():
            large = values[infinite]
            rows = np.nonzero(infinite)[0]
            self.refuse(column, rows, lambda n: f"{large[n]} is too large for float32; scale the column")
            target[infinite] = 0

    def hashes(self, column: str) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """64-bit hashes of a column's raw ids, [R], void where there is none; and where there is one, [R]."""
        array = self[column]
        if not pa.types.is_integer(array.type):
            # Each distinct text is hashed once.
            encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
            if not len(encoded.dictionary):
                return np.zeros(len(array), np.uint64), np.zeros(len(array), np.bool_)
            found = hash_ids(encoded.dictionary)[without_nulls(encoded.indices, 0)]
        else:
            found = hash_ids(without_nulls(array, 0))
        return found, is_valid(array)


def sum_is_finite(values: Array) -> bool:
    """A cheap witness that no value is infinite or NaN: the sum is finite only if every value is.

    The sum of many large ones may be infinite too: where this is False, look at each.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum()))


def without_nulls(array: pa.Array, value: int) -> Array:
    numbers: Array = (pc.fill_null(array, value) if array.null_count else array).to_numpy()
    return numbers


def is_valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    valid: npt.NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return valid
