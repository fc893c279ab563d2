"""Published text files, line by line: compressed or not, every fault named by file, line and column."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from mtlrec import storage
from mtlrec.job.errors import InputError

_LONGEST_LINE = 4096
"""Bytes; the published files stay below 1,000. A file of one endless line must not fill the memory."""


class Lines:
    """The lines of a text file; one whose name ends in .gz is decompressed on the way.

    Raises FileNotFoundError (or NotADirectoryError) where there is none, and InputError, naming file and
    line, where it is not gzip, corrupt, cut short inside its compression, or not lines of ASCII.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        data = storage.read(url)
        self.size = len(data)
        """Bytes of the file as it is stored."""
        self._raw = io.BytesIO(data)
        self._stream: io.BytesIO | gzip.GzipFile = self._raw
        if url.endswith(".gz"):
            if data[:2] != b"\x1f\x8b":
                raise InputError(
                    f"{url}: line 1: not gzip (it begins with {data[:8]!r}); fetch the file again"
                )
            self._stream = gzip.GzipFile(fileobj=self._raw)

    @property
    def read(self) -> int:
        """How many of those bytes have been read."""
        return self._raw.tell()

    def __iter__(self) -> Iterator[bytes]:
        number = 0
        while True:
            number += 1
            try:
                line = self._stream.readline(_LONGEST_LINE)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(
                    f"{self.url}: line {number:,}: corrupt or cut short ({error}); fetch it again"
                ) from None
            if not line:
                return
            if len(line) == _LONGEST_LINE:
                raise InputError(
                    f"{self.url}: line {number:,}: longer than {_LONGEST_LINE} bytes; not the published file"
                )
            if not line.isascii() or b"\r" in line.rstrip(b"\r\n"):
                raise InputError(f"{self.url}: line {number:,}: not plain text; is this the published file?")
            yield line


class Chunk:
    """Some lines of a file, numbered from `first`, as columns of texts without the blanks around them.

    Raises InputError, naming file and line, for a line with another number of columns than `names`.
    """

    def __init__(
        self, lines: Sequence[bytes], first: int, url: str, names: Sequence[str], delimiter: str
    ) -> None:
        self._first, self._url = first, url
        separator = delimiter.encode()
        for number, line in enumerate(lines, first):
            if line.count(separator) != len(names) - 1:
                raise InputError(
                    f"{url}: line {number:,}: {line.count(separator) + 1} columns; "
                    f"every line has {len(names)}"
                )
        parsed = csv.read_csv(
            pa.BufferReader(b"".join(lines)),
            csv.ReadOptions(column_names=names, use_threads=False, block_size=len(lines) * _LONGEST_LINE),
            csv.ParseOptions(delimiter=delimiter, quote_char=False),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.dictionary(pa.int32(), pa.string()))),
        )
        self.columns: dict[str, pa.DictionaryArray] = {
            name: _trim(parsed[name].combine_chunks()) for name in names
        }

    def refuse(self, name: str, wrong: npt.NDArray[np.bool_], allowed: str) -> None:
        """Raise InputError for the first line whose value of column `name` is one of the `wrong` ones.

        `wrong`: for each of the column's distinct texts, in the order of its dictionary.
        """
        at = wrong[self.columns[name].indices.to_numpy()]
        if at.any():
            row = int(np.argmax(at))
            value = self.columns[name][row].as_py()
            raise InputError(
                f"{self._url}: line {self._first + row:,}, column {name}: {value!r} is not {allowed}"
            )

    def texts(self, name: str) -> list[str]:
        """The distinct texts of a column, in the order of its dictionary."""
        found: list[str] = self.columns[name].dictionary.to_pylist()
        return found

    def numbers(self, name: str, low: float, high: float, allowed: str) -> npt.NDArray[np.float64]:
        """[lines] A column of finite numbers, low <= x <= high; InputError tells what is `allowed`."""
        distinct = np.array([_number(text) for text in self.texts(name)])
        self.refuse(name, ~((distinct >= low) & (distinct <= high)), allowed)
        return distinct[self.columns[name].indices.to_numpy()]


def _trim(column: pa.DictionaryArray) -> pa.DictionaryArray:
    """Without the blanks around each text, and still without repeats."""
    texts = pc.utf8_trim_whitespace(column.dictionary).dictionary_encode()
    return pa.DictionaryArray.from_arrays(texts.indices.take(column.indices), texts.dictionary)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return float("nan")
    return value if abs(value) < float("inf") else float("nan")
