"""Negatives: items drawn for each positive row while training. docs/negatives.md defines them. No torch.

n rows, K negatives a row, U users with a positive, I items, C entries (an item in a scenario), P features.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mtlrec.data.columns import Columns, list_features, single_features, span_index
from mtlrec.data.ids import hash_ids
from mtlrec.data.source import Source, is_valid
from mtlrec.job.job import NegativesSection
from mtlrec.schema import Schema

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

TRIES = 8
"""Draws of any item before one among those that are allowed: part of the definition."""
_WEIGHT_BITS = 40
"""The most popular item of a scenario weighs 2^40: whole numbers, whose sums are exact."""
_EXACT_PAIRS = 2**20
"""Pairs looked at together where users' items are enumerated."""
_LOW = 2**32 - 1


@dataclass(frozen=True)
class Index:
    """Of the whole training set: who has which positives, and each scenario's items with their features."""

    users: UInt64
    """[U] hashes of raw ids, sorted; a user's number is its place here."""
    items: UInt64
    """[I] hashes of the raw ids of all items, sorted."""
    pairs: Int64
    """Sorted, distinct: user's number << 32 | item's number, of every positive row."""
    entries: Int64
    """[C], sorted: scenario << 32 | item's number, of every item that a row of the scenario has."""
    positives: Int64
    """[C]: positive rows of the entry."""
    catalogue: Columns
    """[C]: the entries' features, as in `item_schema`, from the first row (`rows`) that each has."""


def item_schema(schema: Schema, section: NegativesSection) -> Schema:
    """The features that belong to the item, in the order of `schema`, and the tasks that make a positive."""
    names = {schema.item, *section.features}
    dense, start = [], 0
    for feature in schema.dense_features:
        if feature.name in names:
            dense.append(replace(feature, start=start))
            start += feature.width
    tasks = {task.name: task for task in schema.tasks}
    chain = [tasks[section.task]]
    while chain[-1].given is not None:
        chain.append(tasks[chain[-1].given])
    return replace(
        schema,
        id_features=tuple(feature for feature in schema.id_features if feature.name in names),
        dense_features=tuple(dense),
        tasks=tuple(chain),
        weight_column=None,
    )


def column_of(schema: Schema, feature: str | None) -> str:
    """The column of the id feature that `schema.user` or `schema.item` names."""
    return next(each.column for each in schema.id_features if each.name == feature)


class Sampler:
    """Draws negatives: a function of (seed, step, number of the row), whoever draws. Safe in many threads."""

    def __init__(self, index: Index, schema: Schema, section: NegativesSection, seed: int) -> None:
        self._index, self._seed = index, seed
        self.per_positive = section.per_positive
        self._user_column, self._item_column = (column_of(schema, f) for f in (schema.user, schema.item))
        self._task = next(number for number, task in enumerate(schema.tasks) if task.name == section.task)
        # Where the features of the item stand among all.
        names = {schema.item, *section.features}
        self._singles = [n for n, each in enumerate(single_features(schema)) if each.name in names]
        self._lists = [n for n, each in enumerate(list_features(schema)) if each.name in names]
        self._dense = [
            column
            for each in schema.dense_features
            if each.name in names
            for column in range(each.start, each.start + each.width)
        ]
        # Entries of scenario s are [starts[s], starts[s + 1]); entry e has places [sums[e], sums[e + 1]).
        bounds = np.arange(len(schema.scenarios) + 1, dtype=np.int64) << 32
        starts = np.searchsorted(index.entries, bounds)
        self._uniform = section.distribution == "uniform"
        self._sums = np.arange(len(index.entries) + 1, dtype=np.int64)
        if not self._uniform:
            np.cumsum(weights(index.positives, starts, section.exponent), out=self._sums[1:])
        self._before = self._sums[starts[:-1]]
        self._total = self._sums[starts[1:]] - self._before

    def users_of(self, table: pa.Table, columns: Columns) -> Int32:
        """For `Columns.user` of a row group's columns, -1 where the row is no positive."""
        source = Source(table, "")
        chosen = columns.valid[:, self._task] & (columns.labels[:, self._task] == 1)
        users, has_user = source.hashes(self._user_column)
        chosen &= has_user & is_valid(source[self._item_column])
        found = np.full(len(columns), -1, np.int32)
        found[chosen] = np.searchsorted(self._index.users, users[chosen])
        return found

    def draw(self, rows: Int64, users: Int32, scenarios: Int32, step: int) -> Int64:
        """Entries of the index, int64 [n, K], -1 for none.

        rows: numbers in the whole data set; users: `Columns.user`; scenarios: all [n]; step: of the run.
        """
        count = self.per_positive
        found = np.full((len(rows), count), -1, np.int64)
        positive = np.flatnonzero(users >= 0)
        user, scenario = users[positive].astype(np.int64) << 32, scenarios[positive]
        key = hash_ids(rows[positive].view(np.uint64) ^ self._step_key(step))
        entries = np.empty(len(positive) * count, np.int64)
        pending = np.arange(len(entries))
        at, which = np.divmod(pending, count)
        for attempt in range(TRIES):
            entry = self._any(_chance(key[at], which, attempt), scenario[at])
            met = self._has_met(user[at], entry)
            entries[pending] = entry
            pending, at, which = pending[met], at[met], which[met]
            if not len(pending):
                break
        else:
            entries[pending] = self._allowed(_chance(key[at], which, TRIES), user[at], scenario[at])
        found[positive] = entries.reshape(-1, count)
        return found

    def negatives_of(self, columns: Columns, step: int) -> tuple[npt.NDArray[np.bool_], Columns]:
        """Draw for n rows that the run trains as its step number `step`; `columns.user` must be there.

        Returns bool [n, K], False where the row is no positive or its user has met every item; and the
        negatives that there are, row after row: the positive's row with the item's features replaced, and
        without labels.
        """
        assert columns.user is not None
        found = self.draw(columns.rows, columns.user, columns.scenario, step)
        present = found >= 0
        at, _ = np.nonzero(present)
        entries = found[present]
        catalogue = self._index.catalogue
        ids = np.empty((len(columns.ids), len(at)), columns.ids.dtype)
        for number, (source, target) in enumerate(zip(columns.ids, ids, strict=True)):
            if number not in self._singles:
                np.take(source, at, out=target, mode="clip")
        for source, number in zip(catalogue.ids, self._singles, strict=True):
            ids[number] = source[entries]
        dense = columns.dense.take(at, axis=0)
        if self._dense:
            dense[:, self._dense] = catalogue.dense.take(entries, axis=0)
        replaced = dict(zip(self._lists, catalogue.lists, strict=True))
        return (
            present,
            Columns.of(
                columns.rows[at],
                ids,
                [
                    replaced[number].take(entries) if number in replaced else each.take(at)
                    for number, each in enumerate(columns.lists)
                ],
                dense,
                np.zeros((len(at), 0), np.float32),
                np.zeros((len(at), 0), np.bool_),
                columns.scenario[at],
            ),
        )

    def _step_key(self, step: int) -> np.uint64:
        digest = hashlib.blake2b(f"negatives|{self._seed}|{step}".encode(), digest_size=8).digest()
        return np.uint64(int.from_bytes(digest, "little"))

    def _any(self, chance: UInt64, scenario: Int32) -> Int64:
        """Any entry of each scenario, by weight."""
        return self._entry_at(self._before[scenario] + scaled(chance, self._total[scenario]))

    def _entry_at(self, place: Int64) -> Int64:
        """The entries that have these places among the summed weights."""
        return place if self._uniform else np.searchsorted(self._sums, place, side="right") - 1

    def _has_met(self, user: Int64, entry: Int64) -> npt.NDArray[np.bool_]:
        """Whether each user (number << 32) has a positive with the item of the entry."""
        pairs = self._index.pairs
        wanted = user | (self._index.entries[entry] & _LOW)
        place = np.searchsorted(pairs, wanted)
        met: npt.NDArray[np.bool_] = pairs.take(place, mode="clip") == wanted
        return met

    def _allowed(self, chance: UInt64, user: Int64, scenario: Int32) -> Int64:
        """An entry of each scenario, by weight, among those the user has not met; -1 where there is none."""
        pairs = self._index.pairs
        # Rows of one user and scenario share what is enumerated.
        asked, of = np.unique(user | scenario, return_inverse=True)
        scenarios = asked & _LOW
        begin = np.searchsorted(pairs, asked - scenarios)
        lengths = np.searchsorted(pairs, asked - scenarios + 2**32) - begin
        part = (np.cumsum(lengths) - lengths) // _EXACT_PAIRS
        cuts = np.searchsorted(part, np.arange(part[-1] + 2))
        entry = np.empty(len(chance), np.int64)
        for first, last in pairwise(cuts.tolist()):
            here = (of >= first) & (of < last)
            chosen = slice(first, last)
            items = pairs[span_index(begin[chosen], lengths[chosen])] & _LOW
            owner = np.repeat(np.arange(last - first), lengths[chosen])
            entry[here] = self._among_others(chance[here], of[here] - first, scenarios[chosen], owner, items)
        return entry

    def _among_others(self, chance: UInt64, of: Int64, scenario: Int64, owner: Int64, items: Int64) -> Int64:
        """For each chance, an entry of scenario[of] whose item is not among the items that `of` owns."""
        entries = self._index.entries
        wanted = scenario[owner] << 32 | items
        met = np.searchsorted(entries, wanted)
        there = entries.take(met, mode="clip") == wanted
        met, owner = met[there], owner[there]
        starts = np.searchsorted(owner, np.arange(len(scenario) + 1))
        taken = np.zeros(len(met) + 1, np.int64)
        # The sum may run over 2^64; the differences that are used do not.
        np.cumsum(self._sums[met + 1] - self._sums[met], out=taken[1:])
        before = self._before[scenario]
        # How much that is allowed lies before each entry that was met: rises with the entries of an owner.
        allowed_before = self._sums[met] - before[owner] - (taken[:-1] - taken[starts[owner]])
        allowed = self._total[scenario] - (taken[starts[1:]] - taken[starts[:-1]])
        place = scaled(chance, allowed[of])
        passed = _count_up_to(allowed_before, starts[of], starts[of + 1], place)
        entry = self._entry_at(before[of] + place + (taken[passed] - taken[starts[of]]))
        return np.where(allowed[of] > 0, entry, -1)


def weights(positives: Int64, starts: Int64, exponent: float) -> Int64:
    """positives^exponent of each entry, in units of the scenario's largest / 2^40 or so: whole numbers, [C].

    starts: [S + 1], where the entries of each scenario begin. An entry with a positive weighs at least 1.
    """
    bits = min(_WEIGHT_BITS, 62 - len(positives).bit_length())
    found = np.zeros(len(positives), np.int64)
    for begin, end in pairwise(starts.tolist()):
        here = positives[begin:end]
        most = here.max(initial=0)
        if most:
            share = (here / most) ** exponent
            found[begin:end] = np.maximum(np.rint(np.ldexp(share, bits)), here > 0)
    return found


def scaled(chance: UInt64, size: Int64) -> Int64:
    """floor(chance * size / 2^64), exactly: a whole number below `size`, evenly spread. size: below 2^62."""
    # Lemire 2019, "Fast random integer generation in an interval", on halves of 32 bits.
    low, thirty_two = np.uint64(_LOW), np.uint64(32)
    by = size.view(np.uint64)
    chance_high, chance_low = chance >> thirty_two, chance & low
    by_high, by_low = by >> thirty_two, by & low
    middle = chance_high * by_low + (chance_low * by_low >> thirty_two)
    other = chance_low * by_high + (middle & low)
    whole = chance_high * by_high + (middle >> thirty_two) + (other >> thirty_two)
    return whole.view(np.int64)


def _chance(key: UInt64, which: Int64, attempt: int) -> UInt64:
    """64 bits of chance for try `attempt` of negative number `which` of a row."""
    return hash_ids(key ^ (which | attempt << 32).view(np.uint64))


def _count_up_to(values: Int64, begin: Int64, end: Int64, limit: Int64) -> Int64:
    """For each span [begin, end) of rising values, where its values beyond `limit` begin."""
    low, high = begin.copy(), end.copy()
    while (open_ := low < high).any():
        middle = (low + high) >> 1
        up = open_ & (values.take(middle, mode="clip") <= limit)
        low = np.where(up, middle + 1, low)
        high = np.where(open_ & ~up, middle, high)
    return low
