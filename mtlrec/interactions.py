"""Builds the index that negatives are drawn from, all workers together. docs/negatives.md

Each worker reads its share of the row groups and sends what is distinct in it. Everything is sorted, and of
the rows that tell an item's features the first counts: the index is the same for any number of workers.

c entries (an item in a scenario) and p distinct positive pairs in what one worker has read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtlrec.control import Control
from mtlrec.data.columns import Columns, Lists, column_names, join, offsets_of
from mtlrec.data.decode import build_columns
from mtlrec.data.negatives import Index, column_of, item_schema
from mtlrec.data.shards import Dataset
from mtlrec.data.source import Source
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World, all_gather_bytes
from mtlrec.job.errors import InputError
from mtlrec.job.job import NegativesSection
from mtlrec.lockstep import together
from mtlrec.schema import Schema
from mtlrec.share import over_share

Array = npt.NDArray[Any]

_SETTLE = 2**20
"""Entries and pairs that may wait, doubles and all, before they are merged with what is there."""
_PIECE_BYTES = 64 * 2**20
"""What a worker sends at a time."""


def build_index(
    dataset: Dataset,
    schema: Schema,
    section: NegativesSection,
    vocabularies: Mapping[str, Vocabulary],
    world: World,
    control: Control,
    may_be_empty: bool = False,
) -> Index:
    """The index of the training data. A collective: every rank calls it, and gets the same.

    Raises InputError, on every rank alike, for a row that does not fit the schema, and, unless it
    `may_be_empty`, where no row is a positive.
    """
    found = together(world, lambda: _read_share(dataset, schema, section, vocabularies, world, control))
    scenario, item = _gather(found.scenario, world), _gather(found.item, world)
    rows, positives = _gather(found.columns.rows, world), _gather(found.positives, world)
    owner = _gather(np.full(len(found.item), world.rank, np.int32), world)
    order, first = _runs(rows, item, scenario)
    chosen = order[first]
    users, items = np.unique(_gather(np.unique(found.user), world)), np.unique(item)
    if not len(users) and not may_be_empty:
        raise InputError(
            f"{dataset.url}: no row has the label 1 for task {section.task!r} and both a user and an item, "
            "so that data.negatives has nothing to draw for"
        )
    pairs = np.searchsorted(users, found.user) << 32 | np.searchsorted(items, found.partner)
    # Of the rows that were chosen each worker sends its own, so that they come in the order of their places.
    begin = int(np.searchsorted(owner, world.rank))
    mine = np.sort(chosen[owner[chosen] == world.rank]) - begin
    place = np.empty(len(chosen), np.int64)
    place[np.argsort(chosen)] = np.arange(len(chosen))
    return Index(
        users,
        items,
        np.unique(_gather(pairs, world)),
        scenario[chosen].astype(np.int64) << 32 | np.searchsorted(items, item[chosen]),
        np.add.reduceat(positives[order], first),
        _gather_columns(found.columns.take(mine), world).take(place),
    )


@dataclass(frozen=True)
class _Found:
    """What some rows have, each entry and each pair once."""

    scenario: npt.NDArray[np.int32]
    """[c]"""
    item: npt.NDArray[np.uint64]
    """[c] hashes."""
    positives: npt.NDArray[np.int64]
    """[c]: positive rows."""
    columns: Columns
    """[c] features of the item, in the entry's first row."""
    user: npt.NDArray[np.uint64]
    """[p] hashes."""
    partner: npt.NDArray[np.uint64]
    """[p] hashes of the items that the users have a positive with."""

    @property
    def size(self) -> int:
        return len(self.item) + len(self.user)

    @classmethod
    def merge(cls, parts: Sequence[_Found]) -> _Found:
        """Of parts, entries and pairs that may still be there several times, in the order of their rows."""
        scenario, item, positives, user, partner = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("scenario", "item", "positives", "user", "partner")
        )
        order, first = _runs(item, scenario)
        chosen = order[first]
        pairs, first_pair = _runs(partner, user)
        return cls(
            scenario[chosen],
            item[chosen],
            np.add.reduceat(positives[order], first) if len(first) else positives,
            join([part.columns for part in parts]).take(chosen),
            user[pairs[first_pair]],
            partner[pairs[first_pair]],
        )


def _runs(*keys: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The order that sorts by the last key, then the one before; and where in it the last two are new.

    What is alike stays in the order it came in.
    """
    order = np.lexsort(keys)
    new = np.ones(len(order), np.bool_)
    new[1:] = False
    for key in keys[-2:]:
        by_order = key[order]
        new[1:] |= by_order[1:] != by_order[:-1]
    return order, np.flatnonzero(new)


def _read_share(
    dataset: Dataset,
    schema: Schema,
    section: NegativesSection,
    vocabularies: Mapping[str, Vocabulary],
    world: World,
    control: Control,
) -> _Found:
    """What this worker's share of the row groups has."""
    items = item_schema(schema, section)
    user_column, item_column = column_of(schema, schema.user), column_of(schema, schema.item)
    names = list(dict.fromkeys([*column_names(items, True, ()), user_column]))

    def read(group: int) -> _Found:
        table = dataset.read_group(group, names)
        shard = dataset.shards[dataset.group_shard[group]]
        columns = build_columns(
            table,
            items,
            where=f"{shard.url}, row group {dataset.group_index[group]}",
            first_row=int(dataset.group_start[group]),
            vocabularies=vocabularies,
        )
        source = Source(table, "")
        item, has_item = source.hashes(item_column)
        user, has_user = source.hashes(user_column)
        positive = columns.valid[:, 0] & (columns.labels[:, 0] == 1) & has_item & has_user
        there = np.flatnonzero(has_item)
        raw = _Found(
            columns.scenario[there],
            item[there],
            positive[there].astype(np.int64),
            columns.without_labels().take(there),
            user[positive],
            item[positive],
        )
        return _Found.merge([raw])

    held: list[_Found] = []
    for found in over_share(read, dataset, world, control, "negatives"):
        held.append(found)
        waiting = sum(part.size for part in held[1:])
        if waiting > max(held[0].size, _SETTLE):
            held = [_Found.merge(held)]
    if held:
        return _Found.merge(held)
    # More workers than row groups: this one has nothing, in the types of what others have.
    some = read(0)
    return _Found(
        some.scenario[:0],
        some.item[:0],
        some.positives[:0],
        some.columns.slice(0, 0),
        some.user[:0],
        some.partner[:0],
    )


def _gather(array: Array, world: World) -> Array:
    """Every rank's `array`, [n], of one type, in rank order, on every rank."""
    if world.world_size == 1:
        return array
    sizes = [
        int.from_bytes(size, "little") for size in all_gather_bytes(len(array).to_bytes(8, "little"), world)
    ]
    starts = np.cumsum([0, *sizes])
    whole = np.empty(starts[-1], array.dtype)
    step = _PIECE_BYTES // array.itemsize
    for begin in range(0, max(sizes), step):
        pieces = all_gather_bytes(array[begin : begin + step].tobytes(), world)
        for start, piece in zip(starts[:-1] + begin, pieces, strict=True):
            values = np.frombuffer(piece, array.dtype)
            whole[start : start + len(values)] = values
    return whole


def _gather_columns(columns: Columns, world: World) -> Columns:
    """Every rank's rows, which have neither labels nor keys, in rank order."""
    rows = _gather(columns.rows, world)
    width = columns.dense.shape[1]
    return Columns.of(
        rows,
        np.stack([_gather(each, world) for each in columns.ids]),
        [
            Lists(
                offsets_of(_gather(np.diff(each.offsets), world)),
                _gather(each.values[each.offsets[0] : each.offsets[-1]], world),
            )
            for each in columns.lists
        ],
        _gather(columns.dense.reshape(-1), world).reshape(-1, width)
        if width
        else np.zeros((len(rows), 0), np.float32),
        np.zeros((len(rows), 0), np.float32),
        np.zeros((len(rows), 0), np.bool_),
        _gather(columns.scenario, world),
    )
