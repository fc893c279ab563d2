"""Reads byte ranges of a checkpoint's files and checks them against the manifest. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mtlrec import storage
from mtlrec.checkpoint import layout
from mtlrec.checkpoint.manifest import CHUNK_ROWS, FileEntry, Manifest, TensorEntry, broken, checksum

PIECE_BYTES = 32 * 2**20
"""What a thread reads at once, or one chunk of rows where that is more."""
THREADS = 8
"""Files that are read side by side: object storage answers slowly, and to many."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Collection[Item], threads: int) -> Iterator[Result]:
    """`function` of each item, in order. The first failure is raised; what has not begun never does."""
    with ThreadPoolExecutor(max(1, min(threads, len(items)))) as pool:
        yield from pool.map(function, items)


def pieces(entries: Collection[TensorEntry], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together hold rows [begin, end) of every one of `entries`, which have equal rows.

    Each starts and ends where a chunk does, and is of PIECE_BYTES at most over all entries, or one chunk.
    """
    total = min(entry.rows for entry in entries)
    row_bytes = max(sum(entry.row_bytes for entry in entries), 1)
    rows = max(PIECE_BYTES // row_bytes // CHUNK_ROWS, 1) * CHUNK_ROWS
    start = begin // CHUNK_ROWS * CHUNK_ROWS
    while start < end:
        # Not beyond the last chunk that is wanted.
        stop = min(start + rows, -(-end // CHUNK_ROWS) * CHUNK_ROWS, total)
        yield start, stop
        start = stop


def read_rows(
    url: str, file: FileEntry, names: Collection[str], begin: int, end: int
) -> dict[str, memoryview]:
    """The bytes of rows [begin, end), cut at chunk borders, of the tensors `names` in one file.

    url: the checkpoint's folder. Raises InputError where the file is missing, too short or damaged.
    """
    size = end - begin
    parts = {name: memoryview(bytearray(size * file.tensors[name].row_bytes)) for name in names}
    read_rows_into(url, file, parts, begin, end)
    return parts


def read_rows_into(url: str, file: FileEntry, places: Mapping[str, memoryview], begin: int, end: int) -> None:
    """Read rows [begin, end), cut at chunk borders, of tensors in one file into `places`, by name, and check.

    Where it raises, as `read_rows` does, the places may hold anything.
    """
    entries = [file.tensors[name] for name in places]
    spans = [
        (entry.offset + begin * entry.row_bytes, place)
        for entry, place in zip(entries, places.values(), strict=True)
    ]
    _read(url, file, spans)
    for name, place in places.items():
        _check_chunks(url, file, name, begin, end, place)


def read_whole(url: str, file: FileEntry, name: str) -> bytearray:
    """All bytes of one tensor, checked."""
    entry = file.tensors[name]
    whole = bytearray(entry.bytes)
    for begin, end in pieces([entry], 0, entry.rows):
        place = memoryview(whole)[begin * entry.row_bytes : end * entry.row_bytes]
        read_rows_into(url, file, {name: place}, begin, end)
    return whole


def verify(url: str, manifest: Manifest, progress: Callable[[int, int], None]) -> None:
    """Read every byte of the checkpoint in `url` and check it; InputError names the first bad file.

    progress: called with the bytes done and the bytes in all.
    """
    done, total = 0, sum(file.size for file in manifest.files())
    for count in in_threads(lambda file: _verify_header(url, file), manifest.files(), THREADS):
        done += count
        progress(done, total)
    rows = [
        (file, name, begin, end)
        for file in manifest.files()
        for name, entry in file.tensors.items()
        for begin, end in pieces([entry], 0, entry.rows)
    ]
    for part in in_threads(lambda each: _num_bytes_read(url, *each), rows, THREADS):
        done += part
        progress(done, total)


def _num_bytes_read(url: str, file: FileEntry, name: str, begin: int, end: int) -> int:
    return len(read_rows(url, file, [name], begin, end)[name])


def _verify_header(url: str, file: FileEntry) -> int:
    head = memoryview(bytearray(file.header_bytes))
    _read(url, file, [(0, head)])
    if checksum(head) != file.header_checksum:
        raise broken(url, file.file, "damaged: its header does not match its checksum")
    try:
        slots = layout.parse(bytes(head))
    except ValueError as error:
        raise broken(url, file.file, str(error)) from None
    told = {
        name: layout.Slot(entry.dtype, tuple(entry.shape), entry.offset)
        for name, entry in file.tensors.items()
    }
    if slots != told:
        raise broken(url, file.file, "its header and the manifest tell of different tensors")
    return len(head)


def _read(url: str, file: FileEntry, spans: list[tuple[int, memoryview]]) -> None:
    try:
        counts = storage.read_into(storage.join(url, file.file), spans)
    except FileNotFoundError:
        raise broken(url, file.file, "the file is missing") from None
    for (start, place), count in zip(spans, counts, strict=True):
        if count != len(place):
            raise broken(url, file.file, f"truncated: it ends at byte {start + count:,} of {file.size:,}")


def _check_chunks(url: str, file: FileEntry, name: str, begin: int, end: int, part: memoryview) -> None:
    entry = file.tensors[name]
    assert begin % CHUNK_ROWS == 0 and (end % CHUNK_ROWS == 0 or end == entry.rows), (begin, end)
    for row in range(begin, end, CHUNK_ROWS):
        stop = min(row + CHUNK_ROWS, end)
        chunk = part[(row - begin) * entry.row_bytes : (stop - begin) * entry.row_bytes]
        if checksum(chunk) != entry.checksums[row // CHUNK_ROWS]:
            raise broken(
                url, file.file, f"damaged: rows {row:,} to {stop:,} of {name!r} do not match their checksum"
            )
