"""A checkpoint is written beside training: from a copy, step by step to its end; failures reach training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlrec import storage
from mtlrec.checkpoint.folder import checkpoint_url, latest
from mtlrec.checkpoint.load import load_dense, load_tables
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.checkpoint.save import Saving
from mtlrec.checkpoint.snapshot import Snapshot
from mtlrec.job.errors import InputError
from mtlrec.storage import StorageError
from tests.checkpoint.tables import (
    ALONE,
    FakeTable,
    assert_same,
    blank,
    cut,
    make_table,
    meta_of,
    same_bits,
    save_ranks,
)


def copied(table: FakeTable) -> FakeTable:
    states = {name: value.clone() for name, value in table.state.items()}
    return FakeTable(table.name, table.weights.clone(), states)


def read(url: str, table: FakeTable) -> FakeTable:
    found = blank(table)
    load_tables(url, read_manifest(url), cut(found))
    return found


def until_idle(saving: Saving) -> None:
    """The thread's end, however long this machine takes."""
    assert saving._thread is not None
    saving._thread.join(60)
    assert not saving.is_busy


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no file of a table is begun."""
    opened, original = threading.Event(), storage.write_stream

    def wait(url: str) -> Any:
        assert "/tables/" not in url or opened.wait(60)
        return original(url)

    monkeypatch.setattr(storage, "write_stream", wait)
    yield opened
    opened.set()


def test_what_changes_while_it_is_written_is_saved_as_it_was(tmp_path: Path, gate: threading.Event) -> None:
    table, url = make_table("user", 9_000, 4), str(tmp_path / "saved")
    before, dense, meta = copied(table), {"weights.a": torch.ones(3)}, meta_of([table])
    snapshot = Snapshot(0)
    saving = Saving(url, *snapshot.take(cut(table, [5_000]), dense), meta, ALONE)
    table.weights.zero_()
    table.state["sum"].zero_()
    dense["weights.a"].zero_()
    meta["step"] = 99
    for _ in range(3):
        saving.advance(saving.is_busy, saving.has_failed)
        assert saving.is_busy and not saving.is_complete
    gate.set()
    until_idle(saving)
    assert latest(str(tmp_path)) is None and not Path(url, "manifest.json").exists()
    saving.advance(False, False)
    assert not saving.is_complete, "now the manifest is written"
    until_idle(saving)
    saving.advance(False, False)
    assert saving.is_complete and saving.manifest == read_manifest(url)
    assert saving.manifest.meta["step"] == 12
    assert_same(read(url, table), before)
    assert load_dense(url, saving.manifest)["weights.a"].tolist() == [1.0] * 3


def test_the_memory_of_copies_is_used_again(tmp_path: Path) -> None:
    table, other = make_table("user", 9_000, 4), make_table("small", 10, 4, "element")
    blocks, dense = [*cut(table, [5_000]), *cut(other, replicated=True)], {"weights.a": torch.tensor(1.5)}
    snapshot = Snapshot(0)
    snapshot.prepare(blocks, dense)
    places = []
    for number in range(2):
        table.weights.fill_(number)
        held, rest = snapshot.take(blocks, dense)
        for mine, theirs in zip(held, blocks, strict=True):
            assert (mine.table, mine.row, mine.rows, mine.column, mine.columns, mine.replicated) == (
                theirs.table,
                theirs.row,
                theirs.rows,
                theirs.column,
                theirs.columns,
                theirs.replicated,
            )
            assert same_bits(mine.weights, theirs.weights) and mine.state.keys() == theirs.state.keys()
            assert all(same_bits(mine.state[name], theirs.state[name]) for name in mine.state)
        assert rest["weights.a"].item() == 1.5
        places.append([each.weights.data_ptr() for each in held] + [rest["weights.a"].data_ptr()])
    assert places[0] == places[1]
    assert not set(places[0]) & {block.weights.data_ptr() for block in blocks}
    held, rest = Snapshot(1).take(blocks, dense)
    assert [block.table for block in held] == ["user", "user"] and rest == {}, "the rest is rank 0's to write"


def test_columns_are_copied_without_their_neighbours() -> None:
    table = make_table("user", 50, 12, "element")
    for mine, theirs in zip(Snapshot(0).take(cut(table, [], [4]), {})[0], cut(table, [], [4]), strict=True):
        assert mine.weights.is_contiguous() and same_bits(mine.weights, theirs.weights)


@pytest.mark.parametrize("step_by_step", [True, False])
@pytest.mark.parametrize("error", [StorageError("disk full"), InputError("no permission"), MemoryError("no")])
def test_a_failure_in_the_thread_is_raised_where_training_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_by_step: bool, error: Exception
) -> None:
    table, run = make_table("user", 9_000, 4), str(tmp_path / "run")
    before = checkpoint_url(run, 1, 1)
    save_ranks(before, [cut(table)], [table])

    def fail(url: str) -> Any:
        raise error

    monkeypatch.setattr(storage, "write_stream", fail)
    url = checkpoint_url(run, 2, 1)
    saving = Saving(url, *Snapshot(0).take(cut(table), {}), meta_of([table]), ALONE)
    with pytest.raises(type(error), match=str(error)):
        if step_by_step:
            until_idle(saving)
            assert saving.has_failed
            saving.advance(False, saving.has_failed)
        else:
            saving.wait()
    assert not Path(url).exists()
    newest = latest(run)
    assert newest is not None and newest.url == before
    assert_same(read(before, table), table)


def test_a_failure_after_the_manifest_leaves_the_checkpoint(tmp_path: Path) -> None:
    table, url = make_table("user", 10, 4), str(tmp_path / "saved")

    def fail() -> None:
        raise StorageError("gone")

    saving = Saving(url, cut(table), {}, meta_of([table]), ALONE, after=fail)
    with pytest.raises(StorageError, match="gone"):
        saving.wait()
    assert_same(read(url, table), table)


def test_what_belongs_beside_a_checkpoint_is_there_before_its_manifest(tmp_path: Path) -> None:
    table, url = make_table("user", 10, 4), str(tmp_path / "saved")
    seen: list[bool] = []

    def look() -> None:
        seen.append(Path(url, "manifest.json").exists())

    Saving(url, cut(table), {}, meta_of([table]), ALONE, beside=look, after=look).wait()
    assert seen == [False, True]
