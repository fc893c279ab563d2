"""Bad rows, row groups and files: what is left out, for any number of workers, and what is written of it."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlrec.data.columns import Columns
from mtlrec.data.decode import build_columns
from mtlrec.data.order import Position, rows_between
from mtlrec.data.quarantine import (
    EXAMPLES,
    FOLDER,
    Earlier,
    GoodRows,
    Quarantine,
    Tally,
    counted,
    good_rows,
    open_dataset,
    recorded,
    told,
)
from mtlrec.data.shards import Dataset, Unreadable
from mtlrec.data.source import BadRows
from mtlrec.job.errors import InputError
from tests.data.built import schema_of
from tests.data.numbered import LANES, SCHEMA, broken, flat, make_table, open_data, read, rows_of, write

ROWS, GROUP, FILES = 200, 20, 3

BAD_CELLS: dict[str, list[Any]] = {
    "country": ["xx", None, ""],
    "row_id": [-1, 100_000],
    "seen": [[3, -7], [100_000]],
    "maybe": [-2],
    "age": [np.inf, -np.inf],
    "pair": [[1.0], [1.0, np.inf], []],
    "click": [2, -1],
    "stars": [np.inf, 1e39],
}
"""Values that a row may not have, by column."""
CELLS = st.dictionaries(
    st.integers(0, ROWS - 1),
    st.sampled_from([(column, value) for column, values in BAD_CELLS.items() for value in values]),
    max_size=12,
)


def spoil(cells: dict[int, tuple[str, Any]]) -> Any:
    """A `Change` that puts these values into these rows."""

    def change(each: pa.Table) -> pa.Table:
        first, last = each["row_id"][0].as_py(), each["row_id"][-1].as_py()
        for at, (column, value) in cells.items():
            if first <= at <= last:
                place = each.schema.get_field_index(column)
                values = each[column].to_pylist()
                values[at - first] = value
                each = each.set_column(place, column, pa.array(values, each.schema.field(column).type))
        return each

    return change


def ruin_group(file: Path, group: int) -> None:
    """Spoil the first bytes of every column of a row group, on the disk."""
    footer, data = pq.read_metadata(file), bytearray(file.read_bytes())
    for column in range(footer.num_columns):
        chunk = footer.row_group(group).column(column)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + 16] = b"\xff" * 16
    file.write_bytes(data)


def as_if_whole(folder: Path, spoiled: Dataset) -> Dataset:
    """The same rows without a fault, in the order that the spoiled ones have."""
    whole = open_data(write(folder, ROWS, GROUP, FILES))
    whole.fingerprint = spoiled.fingerprint
    return whole


def read_good(data: Dataset, folder: str | None = None, **options: Any) -> tuple[list[Any], Quarantine]:
    quarantine = Quarantine(data, 1.0, folder)
    return read(data, quarantine=quarantine, **options), quarantine


def check_steps(data: Dataset, whole: Dataset, bad: set[int], **options: Any) -> None:
    """Each step, over 1, 2 or 3 workers, is that of the whole data without the bad rows."""
    every = read(whole, **options)
    expected = [[row for row in step if row not in bad] for step in rows_of(every)]
    for world_size in (1, 2, 3):
        ranks = [
            read_good(data, rank=rank, world_size=world_size, **options)[0] for rank in range(world_size)
        ]
        steps = list(zip(*(rows_of(each) for each in ranks), strict=True))
        assert [flat(step) for step in steps] == expected
        for step in zip(every, *ranks, strict=True):
            assert {batch.position for batch in step} == {step[0].position}
        for batch in flat(ranks):
            n = batch.num_rows
            assert (batch.rows[n:] == -1).all() and not batch.valid[n:].any() and not batch.dense[n:].any()
            assert batch.ids["row_id"].values().tolist() == batch.rows[:n].tolist()
            assert not (batch.ids["row_id"].lengths()[n:]).any()


@settings(max_examples=10)
@given(CELLS, st.booleans())
def test_bad_rows_leave_their_places_empty_for_any_number_of_workers(
    cells: dict[int, tuple[str, Any]], shuffle: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = open_data(write(folder / "data", ROWS, GROUP, FILES, spoil(cells)))
        check_steps(data, as_if_whole(folder / "whole", data), set(cells), shuffle=shuffle, batch_size=48)


def test_an_unreadable_row_group_leaves_its_places_empty_too(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "data", ROWS, GROUP, FILES, spoil({3: ("click", 5)})))
    ruin_group(folder / "part-1.parquet", 2)
    data = open_data(str(folder))
    begin = ROWS // FILES + 2 * GROUP
    lost = set(range(begin, begin + GROUP))
    check_steps(data, as_if_whole(tmp_path / "whole", data), lost | {3}, keys=("name",))
    with pytest.raises(Unreadable, match=r"part-1\.parquet: row group 2 is corrupt"):
        data.read_group(4 + 2, ["age"])
    _, quarantine = read_good(data)
    assert counted(data, quarantine.groups) == {"rows": GROUP + 1, "row_groups": 2, "files": 2}


def test_keys_of_good_rows_pass_through(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "data", ROWS, GROUP, FILES))
    ruin_group(folder / "part-0.parquet", 0)
    batches, _ = read_good(open_data(str(folder)), keys=("name",), shuffle=False)
    rows = flat(rows_of(batches))
    names = flat(batch.keys["name"].to_pylist() for batch in batches if batch.num_rows)
    assert names == make_table(rows)["name"].to_pylist() and len(rows) == ROWS - GROUP


def test_a_resume_in_the_middle_leaves_out_the_same(tmp_path: Path) -> None:
    cells = dict.fromkeys(range(0, ROWS, 9), ("click", 7))
    data = open_data(write(tmp_path / "data", ROWS, GROUP, FILES, spoil(cells)))
    straight, _ = read_good(data, epochs=2)
    for stop in (1, 3, 5):
        rest, _ = read_good(data, epochs=2, position=straight[stop - 1].position, first_step=stop)
        assert rows_of(rest) == rows_of(straight)[stop:]


def test_without_a_quarantine_a_bad_row_is_an_error(tmp_path: Path) -> None:
    data = open_data(write(tmp_path / "data", ROWS, GROUP, FILES, broken(70, "click", 3)))
    with pytest.raises(InputError, match=r"part-1\.parquet, row group 0, row 4, column click: 3\.0 is not"):
        read(data)


KINDS = schema_of(
    features={
        "id": {"kind": "id", "ids": "identity", "rows": 9},
        "word": {"kind": "id", "rows": 9},
        "ids": {"kind": "id_list", "ids": "identity", "rows": 9, "max_length": 2},
        "number": {"kind": "number", "transform": "log1p"},
        "scaled": {"kind": "number", "transform": "standardise", "mean": 1e30, "std": 1e-30},
        "bucket": {"kind": "number", "transform": "bucketise", "boundaries": [0.0]},
        "vector": {"kind": "vector", "size": 2},
    },
    tasks={
        "click": {"kind": "binary"},
        "buy": {"kind": "binary", "given": "click"},
        "stars": {"kind": "regression"},
    },
    scenario={"column": "country", "values": ["a", "b"]},
    weight="weight",
)
NUMBERS = st.sampled_from([None, 0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e39, 3.0])
VALUES = {
    "id": (st.sampled_from([None, 0, 8, 9, -1, 2**62]), pa.int64()),
    "word": (st.sampled_from([None, "a", "", "ä"]), pa.string()),
    "ids": (st.sampled_from([None, [], [1, None], [9], [9, 1, 2], [1, 2, -3]]), pa.list_(pa.int64())),
    "number": (NUMBERS, pa.float64()),
    "scaled": (NUMBERS, pa.float64()),
    "bucket": (NUMBERS, pa.float64()),
    "vector": (
        st.sampled_from([None, [1.0, 2.0], [None, 1.0], [1.0], [1.0, np.inf], [1e39, 0.0]]),
        pa.list_(pa.float64()),
    ),
    "click": (NUMBERS, pa.float64()),
    "buy": (NUMBERS, pa.float64()),
    "stars": (NUMBERS, pa.float64()),
    "country": (st.sampled_from([None, "a", "b", "c"]), pa.string()),
    "weight": (NUMBERS, pa.float64()),
}
GOOD = {
    "id": 1, "word": "a", "ids": [1], "number": 1.0, "scaled": 1e30, "bucket": 1.0, "vector": [1.0, 2.0],
    "click": 1.0, "buy": 0.0, "stars": 2.0, "country": "a", "weight": 1.0,
}  # fmt: skip


@settings(max_examples=40)
@given(st.data())
def test_a_row_is_bad_where_it_alone_would_be_refused(data: st.DataObject) -> None:
    """And the others become what they are without it, whichever columns are at fault."""
    rows = []
    for _ in range(data.draw(st.integers(1, 12))):
        changed = data.draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=2, unique=True))
        rows.append(GOOD | {name: data.draw(VALUES[name][0]) for name in changed})

    def build(some: list[dict[str, Any]], bad: BadRows | None = None) -> Columns:
        fields = pa.schema([(name, kind) for name, (_, kind) in VALUES.items()])
        return build_columns(
            pa.Table.from_pylist(some, fields), KINDS, where="x", first_row=0, vocabularies={}, bad=bad
        )

    def is_refused(row: dict[str, Any]) -> bool:
        try:
            build([row])
        except InputError:
            return True
        return False

    expected = [is_refused(row) for row in rows]
    bad = BadRows(len(rows))
    found = build(rows, bad)
    assert bad.mask.tolist() == expected
    assert (found.bad is None) == (not any(expected))
    assert {int(row) for misfit in bad.misfits for row in misfit.rows} == set(np.flatnonzero(expected))
    # What stands in bad rows can be computed with.
    assert np.isfinite(found.dense).all() and np.isfinite(found.labels).all()
    good, alone = found.good(), build([row for row, wrong in zip(rows, expected, strict=True) if not wrong])
    for name in ("ids", "dense", "labels", "valid", "scenario", "weight"):
        assert np.array_equal(getattr(good, name), getattr(alone, name)), name
    (lists,), (same,) = good.lists, alone.lists
    assert np.array_equal(np.diff(lists.offsets), np.diff(same.offsets))
    assert np.array_equal(lists.values[lists.offsets[0] : lists.offsets[-1]], same.values)


# Records


def test_records_are_the_same_whoever_writes_them(tmp_path: Path) -> None:
    cells: dict[int, tuple[str, Any]] = {3: ("click", 5), 4: ("age", np.inf), 150: ("country", "xx")}
    folder = Path(write(tmp_path / "data", ROWS, GROUP, FILES, spoil(cells)))
    ruin_group(folder / "part-1.parquet", 2)
    data = open_data(str(folder))
    written = []
    for world_size in (1, 2, 3):
        home = tmp_path / f"run-{world_size}" / FOLDER
        for rank in range(world_size):
            read_good(data, str(home), rank=rank, world_size=world_size, epochs=2)
        written.append({file.name: file.read_bytes() for file in home.iterdir()})
        assert recorded(str(home)) == {"rows": GROUP + 3, "row_groups": 3, "files": 3}
    assert written[0] == written[1] == written[2]
    records = sorted((json.loads(text) for text in written[0].values()), key=lambda each: each["file"])
    assert [(each["file"], each["row_group"], each["rows"], each["bad_rows"]) for each in records] == [
        ("part-0.parquet", 0, GROUP, 2),
        ("part-1.parquet", 2, GROUP, GROUP),
        ("part-2.parquet", 0, GROUP, 1),
    ]
    assert records[0]["columns"] == {"age": 1, "click": 1}
    assert [(each["row"], each["column"]) for each in records[0]["examples"]] == [(3, "click"), (4, "age")]
    assert records[0]["examples"][0]["problem"].startswith("5.0 is not a label of a binary task")
    assert records[1]["problem"].startswith("row group 2 is corrupt") and str(tmp_path) not in str(records)
    assert records[2]["examples"][0]["problem"].startswith("'xx' is not a scenario")
    assert told(counted(data, {0: 1})) == "1 bad row in 1 row group, 1 file"


def test_a_record_explains_some_rows_and_counts_all(tmp_path: Path) -> None:
    cells = dict.fromkeys(range(1, ROWS, 2), ("click", 9))
    data = open_data(write(tmp_path / "data", ROWS, ROWS, 1, spoil(cells)))
    read_good(data, str(tmp_path / FOLDER))
    (file,) = (tmp_path / FOLDER).iterdir()
    record = json.loads(file.read_text())
    assert record["bad_rows"] == ROWS // 2 == 100 <= EXAMPLES
    assert [each["row"] for each in record["examples"]] == list(range(1, ROWS, 2))
    spoiled = dict.fromkeys(range(1, ROWS), ("click", 9))
    read_good(open_data(write(tmp_path / "more", ROWS, ROWS, 1, spoil(spoiled))), str(tmp_path / "records"))
    (file,) = (tmp_path / "records").iterdir()
    record = json.loads(file.read_text())
    assert record["bad_rows"] == ROWS - 1 and len(record["examples"]) == EXAMPLES


def test_files_in_folders_of_like_names_have_records_of_their_own(tmp_path: Path) -> None:
    for name in ("a/b", "a_b", "a b"):
        folder = tmp_path / "data" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        write(folder, 20, 20, 1, spoil({0: ("click", 4)}))
    read_good(open_data(str(tmp_path / "data")), str(tmp_path / FOLDER))
    assert len(list((tmp_path / FOLDER).iterdir())) == 3


# Too many


def test_more_than_the_share_is_an_error_that_says_where_to_look(tmp_path: Path) -> None:
    cells = dict.fromkeys(range(21), ("click", 7))
    data = open_data(write(tmp_path / "data", ROWS, GROUP, FILES, spoil(cells)))
    read(data, quarantine=Quarantine(data, 21 / ROWS))
    with pytest.raises(InputError, match=r"2\d or more of 200 rows are bad, more than data\.max_bad_share"):
        read(data, quarantine=Quarantine(data, 20 / ROWS, str(tmp_path / FOLDER)))
    assert list((tmp_path / FOLDER).iterdir())


def test_the_tally_counts_over_all_workers_by_positions_alone(tmp_path: Path) -> None:
    cells = dict.fromkeys(range(0, ROWS, 10), ("click", 7))
    data = open_data(write(tmp_path / "data", ROWS, GROUP, FILES, spoil(cells)))
    ranks = [read_good(data, rank=rank, world_size=3, epochs=2)[0] for rank in range(3)]
    tally, before, found = Tally(0.1, "there"), Position.start(LANES), []
    for step in zip(*ranks, strict=True):
        found.append(tally.add(data, before, step[0].position, sum(batch.num_rows for batch in step)))
        before = step[0].position
        # As after a restart from a checkpoint of this step.
        tally = Tally(0.1, "there", json.loads(json.dumps(tally.to_json())))
    assert sum(found) == 2 * len(cells) and tally.rows == len(cells) and before.epoch == 2
    strict = Tally(0.099, "there")
    with pytest.raises(InputError, match=r"20 or more of 200 rows are bad.*; there says which"):
        strict.add(data, Position.start(LANES), Position(0, 1, (0,) * LANES), ROWS - len(cells))


def test_the_generations_before_count_for_what_may_be_bad(tmp_path: Path) -> None:
    """One bad row of four, behind two hundred rows with another, is less than one in a hundred."""
    data = open_data(write(tmp_path / "data", ROWS, GROUP, FILES, spoil({3: ("click", 7)})))
    small = open_data(write(tmp_path / "small", 4, 4, 1, spoil({2: ("click", 7)})))
    tally, end = Tally(0.01, "there"), Position(0, 1, (0,) * LANES)
    tally.add(data, Position.start(LANES), end, ROWS - 1)
    tally.end_generation(data.rows)
    assert tally.earlier == Earlier.of(tally.to_json()) == Earlier(ROWS, 1)
    tally.add(small, Position.start(LANES, 1), Position(1, 1, (0,) * LANES), 3)
    read(small, quarantine=Quarantine(small, 0.01, earlier=tally.earlier))
    assert good_rows(small, SCHEMA, 0.01, tally.earlier).read_group(0, ["click"]).num_rows == 3
    words = r"1 or more of 4 rows are bad \(and 1 of 200 in the generations before\), more than data\.max_bad"
    with pytest.raises(InputError, match=words):
        read(small, quarantine=Quarantine(small, 0.009, earlier=tally.earlier))
    with pytest.raises(InputError, match=r"1 or more of 4 rows are bad, more than"):
        read(small, quarantine=Quarantine(small, 0.01))


def test_rows_between_positions() -> None:
    at = Position(0, 2, (3, 4))
    assert rows_between(at, at, 20) == 0
    assert rows_between(at, Position(0, 2, (5, 6)), 20) == 4
    assert rows_between(at, Position(0, 3, (0, 1)), 20) == 14


# Files


def test_a_file_without_a_footer_is_left_out_and_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "data", ROWS, GROUP, FILES))
    whole, file = open_data(str(folder)), folder / "part-1.parquet"
    good = file.read_bytes()
    file.write_bytes(good[:-50])
    with pytest.raises(Unreadable, match=r"part-1\.parquet: not a Parquet file, or cut short"):
        open_data(str(folder))
    columns = SCHEMA.columns()
    with pytest.raises(InputError, match=r"1 of 3 files unreadable .*more than data\.max_bad_share allows"):
        open_dataset(str(folder), columns, 0.1)
    data = open_dataset(str(folder), columns, 0.5)
    rest = [row for row in range(ROWS) if not ROWS // FILES <= row < 2 * ROWS // FILES]
    assert data.rows == len(rest) and [shard.rows for shard in data.shards] == [66, 0, 67]
    batches, _ = read_good(data, shuffle=False, lanes=1, batch_size=64)
    assert flat(batch.dense[: batch.num_rows, 0].int().tolist() for batch in batches) == rest
    Quarantine(data, 0.5, str(tmp_path / FOLDER)).record_files()
    assert recorded(str(tmp_path / FOLDER)) == counted(data, {}) == {"rows": 0, "row_groups": 0, "files": 1}
    # A copy elsewhere has the same fingerprint; neither the readable files alone nor other damage do.
    shutil.copytree(folder, tmp_path / "copy")
    assert open_dataset(str(tmp_path / "copy"), columns, 0.5).fingerprint == data.fingerprint
    file.write_bytes(good[:-60])
    other = open_dataset(str(folder), columns, 0.5)
    file.unlink()
    alone = open_data(str(folder))
    file.write_bytes(good)
    assert len({each.fingerprint for each in (whole, data, other, alone)}) == 4
    assert open_dataset(str(folder), columns, 0.5).fingerprint == whole.fingerprint
    assert "1 changed: part-1.parquet" in whole.describe_change(data.index())


def test_nothing_readable_or_a_wrong_schema_is_an_error(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "data", ROWS, GROUP, FILES))
    table = pq.read_table(folder / "part-1.parquet")
    pq.write_table(table.drop_columns(["age"]), folder / "part-1.parquet")
    with pytest.raises(InputError, match=r"part-1\.parquet: column 'age' .* is missing"):
        open_dataset(str(folder), SCHEMA.columns(), 1.0)
    for file in folder.iterdir():
        file.write_bytes(b"nothing of Parquet")
    with pytest.raises(InputError, match=r"part-0\.parquet: not a Parquet file"):
        open_dataset(str(folder), SCHEMA.columns(), 1.0)


def test_a_fault_that_passes_is_not_a_bad_row_group(tmp_path: Path, monkeypatch: Any) -> None:
    folder = Path(write(tmp_path / "data", ROWS, GROUP, FILES))
    data, whole = open_data(str(folder)), (folder / "part-0.parquet").read_bytes()
    read_once = Dataset._read_group

    def spoilt_once(self: Dataset, group: int, columns: Any) -> pa.Table:
        if group == 0 and (folder / "part-0.parquet").read_bytes() == whole:
            ruin_group(folder / "part-0.parquet", 0)
            try:
                return read_once(self, group, columns)
            finally:
                (folder / "part-0.parquet").write_bytes(whole)
                monkeypatch.setattr(Dataset, "_read_group", read_once)
        return read_once(self, group, columns)

    monkeypatch.setattr(Dataset, "_read_group", spoilt_once)
    assert data.read_group(0, ["age"])["age"].to_pylist() == list(range(GROUP))


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "data", ROWS, GROUP, FILES))
    data = open_data(str(folder))
    (folder / "part-0.parquet").unlink()
    with pytest.raises(InputError, match="changed or removed while it was in use"):
        read_good(data)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(["none", "snappy", "zstd"]))
def test_flipped_bits_are_found_or_leave_columns_that_can_be_used(
    seed: int, checksums: bool, compression: str
) -> None:
    """With checksums no flip in a page's data goes unseen; without, nothing that is read can lead astray."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        folder.mkdir()
        file = folder / "part.parquet"
        pq.write_table(
            make_table(range(100)), file,
            row_group_size=50, compression=compression, write_page_checksum=checksums,
        )  # fmt: skip
        data = bytearray(file.read_bytes())
        end = len(data) - int.from_bytes(data[-8:-4], "little") - 8
        for at in random.integers(4, end, random.choice([1, 3, 20])):
            data[at] ^= 1 << int(random.integers(8))
        file.write_bytes(data)
        found = open_data(str(folder))
        batches, quarantine = read_good(found, keys=("name",))
        assert sum(batch.num_rows for batch in batches) == 100 - sum(quarantine.groups.values())


# Passes before training


def test_passes_read_the_rows_that_training_will_read(tmp_path: Path) -> None:
    cells: dict[int, tuple[str, Any]] = {3: ("click", 5), 4: ("age", np.inf), 150: ("country", "xx")}
    folder = Path(write(tmp_path / "data", ROWS, GROUP, FILES, spoil(cells)))
    ruin_group(folder / "part-1.parquet", 2)
    data = open_data(str(folder))
    assert good_rows(data, SCHEMA, None) is data
    good = good_rows(data, SCHEMA, 0.2)
    assert isinstance(good, GoodRows) and (good.rows, good.fingerprint) == (data.rows, data.fingerprint)
    # A vocabulary of all rows must not be taken for one of the good rows, nor that of another schema.
    lenient = replace(SCHEMA, scenarios=(*SCHEMA.scenarios, "xx"))
    assert len({data.contents, good.contents, good_rows(data, lenient, 0.2).contents}) == 3
    assert good.contents == good_rows(data, SCHEMA, 0.5).contents and data.contents == data.fingerprint
    tables = [good.read_group(group, ["name", "row_id"]) for group in range(len(data.group_rows))]
    assert tables[0].column_names == ["name", "row_id"]
    rows = flat(table["row_id"].to_pylist() for table in tables)
    batches, _ = read_good(data, shuffle=False, lanes=1, batch_size=64)
    assert rows == flat(rows_of(batches)) and len(rows) == ROWS - GROUP - 3
    few = good_rows(data, SCHEMA, 0.1)
    with pytest.raises(InputError, match="rows are bad"):
        for group in range(len(data.group_rows)):
            few.read_group(group, ["age"])
