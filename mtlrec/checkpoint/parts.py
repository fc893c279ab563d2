"""What one rank writes of a checkpoint, and how the ranks' lists become its manifest. No collectives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from mtlrec import storage, watchdog
from mtlrec.checkpoint import layout
from mtlrec.checkpoint.folder import MANIFEST
from mtlrec.checkpoint.manifest import (
    CHUNK_ROWS,
    DENSE_FILE,
    MAX_MANIFEST_BYTES,
    Block,
    FileEntry,
    Manifest,
    TableEntry,
    TensorEntry,
    VocabularyEntry,
    checksum,
    encode,
    find_missing,
    find_problem,
    num_chunks,
)
from mtlrec.checkpoint.ranges import in_threads
from mtlrec.checkpoint.tensors import TableBlock, Values, dtype_name, tensors_of, to_bytes
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.job.errors import InputError
from mtlrec.storage import StorageError

BLOCK_ROWS = 65_536
BLOCK_BYTES = 64 * 2**20
"""A file of a table has at most so many rows and bytes (but always one chunk of rows)."""
THREADS = 4
"""Files that are written side by side, each with one block in memory."""
_PARTS = "parts"


class Part(BaseModel):
    """What one rank wrote."""

    model_config = ConfigDict(strict=True, frozen=True)

    rank: int
    tables: dict[str, list[Block]]
    dense: FileEntry | None
    vocabularies: dict[str, VocabularyEntry]


class _Piece(NamedTuple):
    """Rows [begin, end) of a local block: what goes into one file."""

    block: TableBlock
    begin: int
    end: int


def write_part(
    url: str,
    blocks: Iterable[TableBlock],
    dense: Mapping[str, torch.Tensor] | None,
    rank: int,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    threads: int | None = None,
) -> Part:
    """Write this rank's files, and their list to `parts/`. It may run in any thread.

    threads: files that are written side by side; None: THREADS.
    """
    pieces = [piece for block in blocks if rank == 0 or not block.replicated for piece in _cut(block)]
    tables: dict[str, list[Block]] = {}
    written = in_threads(lambda piece: _write_piece(url, piece), pieces, threads or THREADS)
    for piece, entry in zip(pieces, written, strict=True):
        tables.setdefault(piece.block.table, []).append(entry)
    part = Part(
        rank=rank,
        tables=tables,
        dense=_write_file(url, DENSE_FILE, dense, {}) if dense is not None else None,
        vocabularies={name: _write_vocabulary(url, name, v) for name, v in (vocabularies or {}).items()},
    )
    storage.write(storage.join(url, part_name(rank)), part.model_dump_json().encode())
    return part


def merge(url: str, meta: Mapping[str, Any], world_size: int) -> Manifest:
    """Put the ranks' parts together, make sure that all is there, and write the manifest. One rank calls."""
    tables: dict[str, list[Block]] = {}
    vocabularies: dict[str, VocabularyEntry] = {}
    dense = None
    part_urls = [storage.join(url, part_name(rank)) for rank in range(world_size)]
    for text in in_threads(storage.read, part_urls, THREADS):
        part = Part.model_validate_json(text)
        dense = part.dense or dense
        vocabularies.update(part.vocabularies)
        for name, blocks in part.tables.items():
            tables.setdefault(name, []).extend(blocks)
    assert dense is not None, "rank 0 writes the dense tensors"
    manifest = Manifest(
        chunk_rows=CHUNK_ROWS,
        meta=plain(meta),
        tables={name: _table(blocks) for name, blocks in sorted(tables.items())},
        dense=dense,
        vocabularies=vocabularies,
    )
    problem = find_problem(manifest)
    assert problem is None, problem
    if missing := find_missing(url, manifest.files()):
        raise StorageError(f"{storage.join(url, missing[0])}: just written, and now {missing[1]}")
    text = encode(manifest)
    assert len(text) <= MAX_MANIFEST_BYTES, f"a manifest of {len(text):,} bytes"
    target = storage.join(url, MANIFEST)
    # A create that was repeated after a lost answer finds its own first try.
    if not storage.create(target, text) and storage.read(target) != text:
        raise StorageError(f"{target}: another process wrote this checkpoint meanwhile")
    with contextlib.suppress(InputError, StorageError):
        storage.remove_tree(storage.join(url, _PARTS))
    return manifest


def _table(blocks: list[Block]) -> TableEntry:
    rows = max(block.row + block.rows for block in blocks)
    dim = max(block.column + block.columns for block in blocks)
    return TableEntry(rows=rows, dim=dim, blocks=sorted(blocks, key=lambda block: (block.row, block.column)))


def _cut(block: TableBlock) -> Iterable[_Piece]:
    """The block in pieces of whole chunks, each small enough for a file."""
    row_bytes = sum(each.element_size() * (each.numel() // block.rows) for each in tensors_of(block).values())
    rows = min(BLOCK_ROWS, max(BLOCK_BYTES // row_bytes // CHUNK_ROWS, 1) * CHUNK_ROWS)
    for begin in range(0, block.rows, rows):
        yield _Piece(block, begin, min(begin + rows, block.rows))


def _write_piece(url: str, piece: _Piece) -> Block:
    block, begin, end = piece
    row = block.row + begin
    suffix = f".c{block.column:04d}" if block.column else ""
    file = f"tables/{block.table}/{row:012d}{suffix}.safetensors"
    tensors = {name: value[begin:end] for name, value in tensors_of(block).items()}
    about = {"table": block.table, "row": str(row), "column": str(block.column)}
    entry = _write_file(url, file, tensors, about)
    return Block(row=row, rows=end - begin, column=block.column, columns=block.columns, **dict(entry))


def _write_vocabulary(url: str, table: str, vocabulary: Vocabulary) -> VocabularyEntry:
    kind, reserved = vocabulary.kind, vocabulary.reserved
    about = {"table": table, "kind": kind, "reserved": str(reserved)}
    entry = _write_file(url, f"vocabularies/{table}.safetensors", vocabulary.to_arrays(), about)
    return VocabularyEntry(kind=kind, ids=len(vocabulary), reserved=reserved, **dict(entry))


def _write_file(url: str, file: str, tensors: Mapping[str, Values], metadata: Mapping[str, str]) -> FileEntry:
    head, slots = layout.arrange(
        {name: (dtype_name(value), tuple(value.shape)) for name, value in tensors.items()}, metadata
    )
    entries = {}
    with storage.write_stream(storage.join(url, file)) as stream:
        stream.write(head)
        for name, slot in slots.items():
            data = to_bytes(tensors[name])
            stream.write(data)
            watchdog.alive("a piece of a save")
            entries[name] = TensorEntry(
                dtype=slot.dtype,  # type: ignore[arg-type]  # one of the format's names
                shape=list(slot.shape),
                offset=slot.offset,
                bytes=len(data),
                checksums=_checksums(data, slot.shape),
            )
    size = len(head) + sum(entry.bytes for entry in entries.values())
    return FileEntry(file=file, size=size, header_checksum=checksum(head), tensors=entries)


def _checksums(data: memoryview, shape: tuple[int, ...]) -> list[str]:
    rows = shape[0] if shape else 1
    step = CHUNK_ROWS * (len(data) // rows) if rows else 0
    return [checksum(data[index * step : (index + 1) * step]) for index in range(num_chunks(rows))]


def part_name(rank: int) -> str:
    """Of the list of what a rank wrote, within the checkpoint's folder; gone once it is complete."""
    return f"{_PARTS}/{rank:05d}.json"


def plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read again: lists for tuples, and nothing that JSON cannot hold."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
    return plain
