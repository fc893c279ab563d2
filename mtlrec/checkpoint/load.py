"""Reads a checkpoint into a model that may be spread in any way: each rank only the rows that it owns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from mtlrec import watchdog
from mtlrec.checkpoint import ranges
from mtlrec.checkpoint.manifest import WEIGHTS, Block, Manifest, TableEntry
from mtlrec.checkpoint.ranges import in_threads, pieces, read_rows_into, read_whole
from mtlrec.checkpoint.tensors import TableBlock, dtype_name, from_bytes, tensors_of, to_bytes
from mtlrec.job.errors import InputError

_CURE = "use the job that it was trained by"


class _Piece(NamedTuple):
    """Rows [begin, end) of a file, counted from its first, that hold rows of a local block."""

    target: TableBlock
    source: Block
    names: tuple[str, ...]
    begin: int
    end: int


def load_tables(url: str, manifest: Manifest, blocks: Iterable[TableBlock], strict: bool = True) -> None:
    """Fill this rank's `blocks` in place from the checkpoint in `url`. No collective.

    strict: weights and optimizer state, which must be those of the checkpoint; else the weights alone, as for
    evaluation, where the model's table optimizer may be another. Raises InputError if the tables do not fit,
    before anything is read, and if a file turns out missing or damaged, when blocks may be partly filled.
    """
    work = []
    for block in blocks:
        table = manifest.tables.get(block.table)
        if table is None:
            raise InputError(
                f"{url}: it has no table {block.table!r}, only {_listed(manifest.tables)}; {_CURE}"
            )
        names = _check_fit(url, block, table, strict)
        work += [piece for source in table.blocks for piece in _overlap(block, source, names)]
    for _ in in_threads(lambda piece: _load_piece(url, piece), work, ranges.THREADS):
        watchdog.alive("a piece of a load")


def load_dense(url: str, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Every tensor that is not of a table, on the CPU, by name. InputError if any is missing or damaged."""
    return {
        name: from_bytes(read_whole(url, manifest.dense, name), entry.dtype, entry.shape)
        for name, entry in manifest.dense.tensors.items()
    }


def _check_fit(url: str, block: TableBlock, table: TableEntry, strict: bool) -> tuple[str, ...]:
    """The names of the tensors to load."""
    targets, held, where = tensors_of(block), table.blocks[0], f"{url}: table {block.table!r}"
    if block.row + block.rows > table.rows or block.column + block.columns > table.dim:
        wanted = f"{block.row + block.rows:,} x {block.column + block.columns}"
        raise InputError(
            f"{where} is {table.rows:,} x {table.dim} (rows x dim), the model's at least {wanted}; {_CURE}"
        )
    names = tuple(targets) if strict else (WEIGHTS,)
    if strict and targets.keys() != held.tensors.keys():
        raise InputError(
            f"{where} was saved with {_listed(held.tensors)} and the model has {_listed(targets)}: "
            f"optimizer.tables differs; {_CURE}"
        )
    for name in names:
        target, entry = targets[name], held.tensors[name]
        if target.dim() != len(entry.shape):
            saved, here = ("row" if dims == 1 else "weight" for dims in (len(entry.shape), target.dim()))
            raise InputError(
                f"{where}: its {name} was saved with one number a {saved}, and the model has one a {here}: "
                f"optimizer.tables differs; {_CURE}"
            )
        if strict and dtype_name(target) != entry.dtype:
            raise InputError(
                f"{where}: its {name} are {entry.dtype}, the model's {dtype_name(target)}; {_CURE}"
            )
    return names


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _overlap(target: TableBlock, source: Block, names: tuple[str, ...]) -> Iterator[_Piece]:
    begin = max(target.row, source.row) - source.row
    end = min(target.row + target.rows, source.row + source.rows) - source.row
    left = max(target.column, source.column)
    right = min(target.column + target.columns, source.column + source.columns)
    if begin < end and left < right:
        for start, stop in pieces([source.tensors[name] for name in names], begin, end):
            yield _Piece(target, source, names, start, stop)


@torch.no_grad()
def _load_piece(url: str, piece: _Piece) -> None:
    target, source, names, begin, end = piece
    targets = tensors_of(target)
    # What is read starts and ends with a chunk, and may reach beyond the target's rows.
    first = max(target.row, source.row + begin)
    last = min(target.row + target.rows, source.row + end)
    left = max(target.column, source.column)
    right = min(target.column + target.columns, source.column + source.columns)
    places, copies = {}, []
    for name in names:
        entry = source.tensors[name]
        room = targets[name][first - target.row : last - target.row]
        if room.dim() == 2:
            room = room[:, left - target.column : right - target.column]
        if list(room.shape) == [end - begin, *entry.shape[1:]] and _is_plain(room, entry.dtype):
            places[name] = to_bytes(room)
            continue
        data = bytearray((end - begin) * entry.row_bytes)
        values = from_bytes(data, entry.dtype, [end - begin, *entry.shape[1:]])
        values = values[first - source.row - begin : last - source.row - begin]
        if values.dim() == 2:
            values = values[:, left - source.column : right - source.column]
        places[name] = memoryview(data)
        copies.append((room, values))
    read_rows_into(url, source, places, begin, end)
    for room, values in copies:
        room.copy_(values)


def _is_plain(room: torch.Tensor, dtype: str) -> bool:
    """Its bytes in memory are those of the file: they can be read into place."""
    return room.device.type == "cpu" and room.is_contiguous() and dtype_name(room) == dtype
