"""Which shards become a generation, and when: looks at a folder that others write to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtlrec import generations, storage
from mtlrec.data.shards import Dataset
from mtlrec.generations import Record, Watch
from mtlrec.job.errors import InputError
from mtlrec.job.follow import FollowSection
from mtlrec.schema import Column

COLUMNS = [Column("user", "id", "schema.features.user"), Column("click", "label", "schema.tasks.click")]


def write(path: Path, rows: int = 5, user: pa.DataType | None = None, **more: pa.Array) -> bytes:
    """A shard; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"user": pa.array(np.arange(rows)).cast(user or pa.int64()), "click": pa.array([1.0] * rows)}
    pq.write_table(pa.table({**columns, **more}), path)
    return path.read_bytes()


class Follower:
    """A folder with one shard, generation 0, and what looks for more."""

    def __init__(self, folder: Path, tolerance: float | None = None, unreadable_s: float = 3600.0) -> None:
        self.data, self.run = folder / "data", str(folder / "run")
        self.said: list[str] = []
        self._section = FollowSection(unreadable_s=unreadable_s)
        self._tolerance = tolerance
        if not self.data.exists():
            write(self.data / "b.parquet")
            first = generations.open_first(str(self.data), COLUMNS, None)
            generations.create_record(self.run, generations.record_of(0, first.index(), first.id_kinds))
        self.watch = Watch(
            str(self.data), COLUMNS, self._section, self.run, self._tolerance, self.said.append
        )

    def look(self, number: int = 1) -> Record | None:
        return self.watch.look(number)


def paths(record: Record | None) -> list[str]:
    return [] if record is None else [shard["path"] for shard in record["shards"]]


def test_new_shards_are_taken_by_name_once_two_looks_see_them_alike(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    assert follower.look() is None and follower.watch.is_quiet
    write(follower.data / "d=2" / "a.parquet")
    write(follower.data / "d=1" / "a.parquet", rows=7)
    write(follower.data / "_hidden.parquet")
    assert follower.look() is None and not follower.watch.is_quiet
    record = follower.look()
    assert paths(record) == ["d=1/a.parquet", "d=2/a.parquet"]
    assert record is not None and (record["generation"], record["rows"]) == (1, 12)
    assert follower.look(2) is None and follower.watch.is_quiet
    generations.create_record(follower.run, record)
    assert generations.read_record(follower.run, 1) == record
    # Another process, later: it knows what was taken; what was trained may be gone.
    (follower.data / "b.parquet").unlink()
    write(follower.data / "e.parquet")
    again = Follower(tmp_path)
    assert again.look(2) is None
    assert paths(again.look(2)) == ["e.parquet"]


def test_a_shard_that_is_still_written_waits(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    whole = write(tmp_path / "elsewhere.parquet")
    late = follower.data / "late.parquet"
    for size in (10, 20, 20, 20):
        late.write_bytes(whole[:size])
        assert follower.look() is None
    assert follower.watch.is_quiet and follower.watch.unfinished == ["late.parquet"]
    write(follower.data / "ready.parquet")
    assert follower.look() is None
    assert paths(follower.look()) == ["ready.parquet"], "one that waits holds no other up"
    late.write_bytes(whole)
    assert follower.look(2) is None
    assert paths(follower.look(2)) == ["late.parquet"]
    assert follower.said == []


def test_one_that_stays_unreadable_is_bad_in_the_end(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "error", unreadable_s=0)
    (follower.data / "broken.parquet").write_bytes(b"PAR1 and no more")
    assert follower.look() is None
    with pytest.raises(InputError, match=r"broken.parquet: not a Parquet file, .* has not changed for 0 s"):
        follower.look()
    skips = Follower(tmp_path / "skip", tolerance=0.1, unreadable_s=0)
    broken = skips.data / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    assert [skips.look() for _ in range(3)] == [None] * 3
    assert len(skips.said) == 1 and skips.said[0].startswith(f"left out: {broken}")
    write(broken)
    assert skips.look() is None
    assert paths(skips.look()) == ["broken.parquet"], "a whole one in its place is new"


def test_what_was_taken_and_changes_is_passed_over_and_told_once(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    write(follower.data / "b.parquet", rows=50)
    assert [follower.look() for _ in range(3)] == [None] * 3
    assert len(follower.said) == 1 and "changed after it was taken" in follower.said[0]


def test_shards_without_rows_are_no_generation(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    write(follower.data / "none.parquet", rows=0)
    assert [follower.look() for _ in range(3)] == [None] * 3 and follower.watch.is_quiet


def test_a_shard_that_does_not_fit_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "kind")
    write(follower.data / "c.parquet", user=pa.string())
    follower.look()
    with pytest.raises(InputError, match="'user' holds strings or binary, but integers in the shards before"):
        follower.look()
    other = Follower(tmp_path / "column")
    pq.write_table(pa.table({"user": [1]}), other.data / "c.parquet")
    other.look()
    with pytest.raises(InputError, match=r"c.parquet: .*'click'"):
        other.look()


def test_a_generation_must_be_as_it_was_written_down(tmp_path: Path) -> None:
    data, run = tmp_path / "data", str(tmp_path / "run")
    for name in ("a", "b", "later"):
        write(data / f"{name}.parquet")
    chosen = Dataset.open(str(data), COLUMNS, only=["a.parquet", "b.parquet"])
    record = generations.record_of(3, chosen.index(), chosen.id_kinds)
    generations.create_record(run, record)
    generations.create_record(run, record)  # a request that was answered late
    opened = generations.open_recorded(str(data), COLUMNS, record, None)
    assert (opened.fingerprint, opened.rows) == (chosen.fingerprint, 10)
    whole = Dataset.open(str(data), COLUMNS)
    with pytest.raises(storage.StorageError, match="another start"):
        generations.create_record(run, generations.record_of(3, whole.index(), {}))
    write(data / "a.parquet", rows=9)
    with pytest.raises(InputError, match=r"shards have changed .*a.parquet.*generation 3"):
        generations.open_recorded(str(data), COLUMNS, record, None)
    (data / "a.parquet").unlink()
    with pytest.raises(InputError, match=r"a.parquet of 2 shards gone, which generation 3"):
        generations.open_recorded(str(data), COLUMNS, record, None)


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    assert generations.read_record(str(tmp_path), 0) is None
    (tmp_path / "generations").mkdir()
    (tmp_path / "generations" / "0.json").write_text("{")
    with pytest.raises(InputError, match=r"0.json: not the record of a generation"):
        generations.read_record(str(tmp_path), 0)
    with pytest.raises(InputError, match=r"0.json: missing"):
        generations.read_records(str(tmp_path / "elsewhere"), 0)


def test_generations_that_no_checkpoint_knows_of_are_forgotten(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    for number in range(1, 12):
        record = {"generation": number, "shards": [{"path": f"{number}.parquet", "size": 1}]}
        generations.create_record(follower.run, record)
        generations.write_metrics(follower.run, number, 7, {})
    generations.remove_later(follower.run, 1)
    left = sorted(path.name for path in (tmp_path / "run" / "generations").iterdir())
    assert left == ["0.json", "1.json", "1.metrics.json"]
    # What they had is new again.
    write(follower.data / "5.parquet")
    again = Follower(tmp_path)
    assert again.look(2) is None
    assert paths(again.look(2)) == ["5.parquet"]
