"""What is saved by some ranks is read by any others, to the bit, and no rank reads more than its rows."""

from __future__ import annotations

import os
import signal
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlrec import storage
from mtlrec.checkpoint import parts, ranges, save
from mtlrec.checkpoint.folder import checkpoint_url, discard, latest, sweep
from mtlrec.checkpoint.load import load_dense, load_tables
from mtlrec.checkpoint.manifest import CHUNK_ROWS, read_manifest
from mtlrec.checkpoint.save import finish
from mtlrec.checkpoint.tensors import TableBlock
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
    random_bits,
    same_bits,
    save_ranks,
)

pytest_plugins = ["tests.s3_server"]


def reload(url: str, table: FakeTable, rows: Sequence[int] = (), columns: Sequence[int] = ()) -> FakeTable:
    """The table as ranks with these borders read it, each on its own."""
    read = blank(table)
    for block in cut(read, rows, columns):
        load_tables(url, read_manifest(url), [block])
    return read


PLANS: dict[str, tuple[list[int], list[int]]] = {
    "whole": ([], []),
    "2 rows": ([10_001], []),
    "3 rows": ([6_667, 13_334], []),
    "chunks": ([4_096, 8_192], []),
    "columns": ([], [4, 8]),
    "grid": ([9_000], [4]),
}


@pytest.mark.parametrize(
    ("plan", "kind"),
    # A row's one state does not belong to a part of its columns.
    [
        (plan, kind)
        for plan in PLANS
        for kind in ("row", "element", "none")
        if kind != "row" or not PLANS[plan][1]
    ],
)
def test_any_plan_reads_any_other(tmp_path: Path, plan: str, kind: str) -> None:
    rows, columns = PLANS[plan]
    table = make_table("user", 20_000, 12, kind)
    blocks = cut(table, rows, columns)
    url = str(tmp_path / "saved")
    save_ranks(url, [blocks[::2], blocks[1::2]], [table])
    for reader_rows, reader_columns in PLANS.values():
        if kind != "row" or not reader_columns:
            assert_same(reload(url, table, reader_rows, reader_columns), table)


@settings(max_examples=25)
@given(data=st.data())
def test_any_borders(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 20_000), "rows")
    kind = data.draw(st.sampled_from(["row", "element", "none"]), "state")

    def borders(size: int, most: int) -> list[int]:
        return sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=most))) if size > 1 else []

    table = make_table("user", num_rows, 5, kind, seed=num_rows)
    shapes = [(borders(num_rows, 3), [] if kind == "row" else borders(5, 2)) for _ in range(2)]
    url = str(tmp_path_factory.mktemp("any") / "saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK_ROWS", 2 * CHUNK_ROWS)
        patch.setattr(ranges, "PIECE_BYTES", 3 * CHUNK_ROWS * 20)
        save_ranks(url, [[block] for block in cut(table, *shapes[0])], [table])
        assert_same(reload(url, table, *shapes[1]), table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_element_types(tmp_path: Path, dtype: torch.dtype) -> None:
    table = FakeTable("user", random_bits([5_000, 3], 1, dtype), {"sum": random_bits([5_000], 2)})
    url = str(tmp_path / "saved")
    save_ranks(url, [cut(table)], [table])
    assert_same(reload(url, table, [4_999]), table)


def test_replicated_tables_are_written_once(tmp_path: Path) -> None:
    table, other = make_table("small", 100, 4), make_table("large", 100, 4, seed=1)
    halves = cut(other, [50])
    ranks = [[*cut(table, replicated=True), half] for half in halves]
    manifest = save_ranks(str(tmp_path / "saved"), ranks, [table, other])
    assert [block.rows for block in manifest.tables["small"].blocks] == [100]
    assert_same(reload(str(tmp_path / "saved"), table), table)


def test_dense_tensors(tmp_path: Path) -> None:
    dense = {
        "weights.tower.bias": random_bits([], 1),
        "weights.trunk": random_bits([9_000, 3], 2),
        "optimizer.trunk.step": torch.tensor(7, dtype=torch.int64),
        "half": random_bits([5], 3, torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "bytes": random_bits([3, 1], 4, torch.uint8),
        "empty": torch.empty(0, 4),
        "no width": torch.empty(4, 0),
        "turned": random_bits([4, 6], 5).t(),
    }
    url = str(tmp_path / "saved")
    save_ranks(url, [[]], [], dense)
    read = load_dense(url, read_manifest(url))
    assert read.keys() == dense.keys()
    assert [name for name in dense if not same_bits(read[name], dense[name])] == []


def test_a_rank_reads_only_the_chunks_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table("user", 200_000, 4)
    url = str(tmp_path / "saved")
    manifest = save_ranks(url, [cut(table)], [table])
    asked: list[tuple[str, int, int]] = []
    read_into = storage.read_into

    def recorded(url: str, spans: Sequence[tuple[int, memoryview]]) -> list[int]:
        asked.extend((storage.name(url), start, start + len(room)) for start, room in spans)
        return read_into(url, spans)

    monkeypatch.setattr(storage, "read_into", recorded)
    read = blank(table)
    load_tables(url, manifest, cut(read, [70_000, 70_010])[1:2])
    # Row 70,000 is row 4,464 of the second file: its second chunk, 4,096 to 8,192.
    entry = manifest.tables["user"].blocks[1].tensors
    assert sorted(asked) == [
        (
            "000000065536.safetensors",
            entry[name].offset + 4_096 * entry[name].row_bytes,
            entry[name].offset + 8_192 * entry[name].row_bytes,
        )
        for name in ("weights", "state.sum")
    ]
    assert same_bits(read.weights[70_000:70_010], table.weights[70_000:70_010])
    assert (read.weights[70_010:] == 0.25).all() and (read.weights[:70_000] == 0.25).all()


def test_memory_is_a_block_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "THREADS", 1)
    monkeypatch.setattr(parts, "THREADS", 1)
    table = make_table("user", 300_000, 32, "none")  # 38 MB in 5 files of 8.4 MB
    url = str(tmp_path / "saved")
    tracemalloc.start()
    manifest = save_ranks(url, [cut(table)], [table])
    _, while_saving = tracemalloc.get_traced_memory()
    read = blank(table)
    tracemalloc.reset_peak()
    for block in cut(read, [150_000]):
        load_tables(url, manifest, [block])
    _, while_loading = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_same(read, table)
    assert while_saving < 8.4e6 and while_loading < 2.5 * 8.4e6, (while_saving, while_loading)


def test_save_alone(tmp_path: Path) -> None:
    table = make_table("user", 10, 4)
    url = str(tmp_path / "saved")
    written = save.save(url, cut(table), {"b": torch.ones(3)}, meta_of([table]), ALONE)
    manifest = read_manifest(url)
    assert written == manifest and manifest.meta["saved_at"].startswith("20")
    assert not (tmp_path / "saved/parts").exists()
    with pytest.raises(StorageError, match="not an empty folder"):
        save.save(url, cut(table), {}, meta_of([table]), ALONE)
    assert read_manifest(url) == manifest, "what was there is left alone"


def test_finish_adds_metrics(tmp_path: Path) -> None:
    table = make_table("user", 10, 4)
    url = str(tmp_path / "saved")
    before = save_ranks(url, [cut(table)], [table])
    metrics = {"all": {"click": {"auc": 0.75, "rows": 10, "reasons": {"logloss": "none"}, "logloss": None}}}
    finish(url, metrics)
    after = read_manifest(url)
    assert after.meta == {**before.meta, "metrics": metrics} and after.tables == before.tables


@pytest.mark.parametrize(
    ("failing", "error", "what"),
    [
        ("write_stream", StorageError("disk full"), "tables"),
        ("write", StorageError("disk full"), "parts"),
        ("create", InputError("no permission"), "manifest"),
        ("create", RuntimeError("a bug"), "manifest"),
    ],
)
def test_a_failed_save_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception, what: str
) -> None:
    table = make_table("user", 10, 4)
    url = str(tmp_path / "saved")
    original = getattr(storage, failing)

    def fail(url: str, *rest: Any) -> Any:
        if what in url:
            raise error
        return original(url, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(storage, failing, fail)
        with pytest.raises(type(error), match=str(error)):
            save.save(url, cut(table), {}, meta_of([table]), ALONE)
    assert not (tmp_path / "saved/manifest.json").exists()
    if type(error) is not RuntimeError:
        assert not (tmp_path / "saved").exists()
        assert save.save(url, cut(table), {}, meta_of([table]), ALONE), "the folder is new again"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (make_table("item", 10, 4), "no table 'item', only user"),
        (make_table("user", 11, 4), "10 x 4 .* at least 11 x 4"),
        (make_table("user", 10, 5), "10 x 4 .* at least 10 x 5"),
        (make_table("user", 10, 4, "none"), "saved with state.sum, weights and the model has weights"),
        (make_table("user", 10, 4, "element"), "the model has state.exp_avg, state.exp_avg_sq, weights"),
        (
            FakeTable("user", torch.zeros(10, 4), {"sum": torch.zeros(10, 4)}),
            "its state.sum was saved with one number a row, and the model has one a weight",
        ),
        (
            FakeTable("user", torch.zeros(10, 4, dtype=torch.float16), {"sum": torch.zeros(10)}),
            "its weights are F32, the model's F16",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, wanted: FakeTable, words: str) -> None:
    table = make_table("user", 10, 4)
    manifest = save_ranks(str(tmp_path / "saved"), [cut(table)], [table])
    with pytest.raises(InputError, match=words):
        load_tables(str(tmp_path / "saved"), manifest, cut(wanted))


def test_weights_alone_for_a_model_with_another_optimizer(tmp_path: Path) -> None:
    table = make_table("user", 5_000, 4)
    url = str(tmp_path / "saved")
    manifest = save_ranks(url, [cut(table)], [table])
    read = FakeTable("user", torch.zeros(5_000, 4), {"other": torch.full((5_000, 4), 3.0)})
    load_tables(url, manifest, cut(read, [17]), strict=False)
    assert same_bits(read.weights, table.weights) and (read.state["other"] == 3.0).all()


def test_loading_writes_into_strided_views_of_a_parameter(tmp_path: Path) -> None:
    table = make_table("user", 100, 4, "none")
    url = str(tmp_path / "saved")
    manifest = save_ranks(url, [cut(table)], [table])
    whole = torch.nn.Parameter(torch.zeros(100, 10))
    load_tables(url, manifest, [TableBlock("user", 0, 100, 0, 4, whole[:, 3:7], {}, False)])
    assert same_bits(whole.detach()[:, 3:7], table.weights)
    assert not np.any(whole.detach()[:, 7:].numpy())


def test_object_storage(bucket: str) -> None:
    table = make_table("user", 20_000, 8)
    url = f"{bucket}/runs/fake/checkpoints/step-000000000012.a0001"
    dense = {"weights.trunk": random_bits([3], 2)}
    with pytest.raises(InputError, match="no such checkpoint"):
        read_manifest(url)
    written = save.save(url, cut(table, [9_000]), dense, meta_of([table]), ALONE)
    manifest = read_manifest(url)
    assert manifest == written
    assert_same(reload(url, table, [5_000, 5_001]), table)
    assert same_bits(load_dense(url, manifest)["weights.trunk"], dense["weights.trunk"])
    assert not [file for file in storage.list_files(url) if "parts" in file.path]
    file = storage.join(url, manifest.tables["user"].blocks[1].file)
    data = storage.read(file)
    storage.write(file, data[:-1])
    with pytest.raises(InputError, match="truncated"):
        read_manifest(url)
    with pytest.raises(InputError, match="truncated"):
        load_tables(url, manifest, cut(blank(table)))
    storage.write(file, data[:5_000] + bytes([data[5_000] ^ 1]) + data[5_001:])
    with pytest.raises(InputError, match=r"9000\.safetensors: damaged: rows 0 to 4,096 of 'weights'"):
        load_tables(url, read_manifest(url), cut(blank(table)))
    storage.remove(file)
    with pytest.raises(InputError, match="missing"):
        load_tables(url, manifest, cut(blank(table)))


def test_a_kill_at_any_moment_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 before each of the files that a save writes: what counts is whole, the rest is swept."""
    table = make_table("user", 9_000, 4)
    run = str(tmp_path / "run")
    before = checkpoint_url(run, 1, 1)
    save_ranks(before, [cut(table, [5_000])], [table])
    fsync = os.fsync
    for survived in range(100):
        url = checkpoint_url(run, 2, 2 + survived)
        child = os.fork()
        if child == 0:
            left = [None] * survived

            def die_later(descriptor: Any, left: list[None] = left) -> None:
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left.pop()
                fsync(descriptor)

            monkeypatch.setattr(os, "fsync", die_later)
            try:
                save.save(url, cut(table, [5_000]), {}, meta_of([table]), ALONE)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        found = latest(run)
        assert found is not None
        assert_same(reload(found.url, table), table)
        if not os.WIFSIGNALED(status):
            break
        if found.url == before:
            assert sweep(run, 3 + survived) == [url] or not Path(url).exists()
        else:
            # Killed with the manifest in place and its folder not yet synced: as good as saved.
            assert found.url == url
            discard(url)
    # Two files of the table, the dense one, the part's list, the manifest: each synced, and then its folder.
    assert found is not None and found.url == url and survived == 10
