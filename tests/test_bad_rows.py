"""`data.bad_rows: skip` from the job down: what is measured and built before training, and the commands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mtlrec import preflight, storage
from mtlrec.cli import main
from mtlrec.control import Silent
from mtlrec.data.order import Position
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World
from mtlrec.feed import Feed, open_feed
from mtlrec.job.job import Job, job_from_dict
from mtlrec.preflight import Run
from tests.data.test_quarantine import ruin_group
from tests.small_data import small_job, write_small_data

pytest_plugins = ["tests.s3_server"]

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
GROUP = 97
BAD: dict[tuple[int, int], dict[str, Any]] = {
    (0, 3): {"click": 2, "price": 1e6},
    (0, 5): {"country": "fr", "user_id": 70},
    (0, 150): {"hour": 24, "item_id": "never seen elsewhere"},
    (1, 7): {"price": np.inf},
    (3, 20): {"rating": -np.inf, "user_id": 71},
    (3, 21): {"picture": [1.0, np.inf, 0.0], "item_id": "i3"},
}
"""(Shard, row) -> what stands there; each has one value that no row may have."""
LOST = (2, 1)
"""A row group that cannot be read."""


def write_spoiled(folder: Path) -> None:
    """The small data with bad rows in it and a row group that is corrupt."""
    write_small_data(folder)
    for shard in range(4):
        file = folder / f"part-{shard}.parquet"
        table = pq.read_table(file)
        rows = table.to_pylist()
        for (where, row), values in BAD.items():
            if where == shard:
                rows[row] |= values
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file, row_group_size=GROUP)
    ruin_group(folder / f"part-{LOST[0]}.parquet", LOST[1])


def write_good(folder: Path, spoiled: Path) -> None:
    """The spoiled data's good rows, in the row groups that they had."""
    folder.mkdir()
    for shard in range(4):
        file = pq.ParquetFile(spoiled / f"part-{shard}.parquet")
        with pq.ParquetWriter(folder / f"part-{shard}.parquet", file.schema_arrow) as writer:
            for group in range(file.num_row_groups):
                if (shard, group) != LOST:
                    table, first = file.read_row_group(group), group * GROUP
                    good = [(shard, first + row) not in BAD for row in range(len(table))]
                    writer.write_table(table.filter(pa.array(good)))


def job_on(data: Path, storage: Path, **changes: Any) -> dict[str, Any]:
    job = small_job(data, storage, data__eval=None, **changes)
    job["data"]["bad_rows"] = "skip"
    return job


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_spoiled(folder / "spoiled")
    write_good(folder / "good", folder / "spoiled")
    return folder


def measured(data: Path, storage: Path) -> Job:
    """The job that a run on `data` begins with, its statistics measured."""
    raw = job_on(data, storage)
    schema = raw["schema"]
    schema |= {"user": "user_id", "item": "item_id"}
    schema["features"]["price"] = {"kind": "number", "transform": "standardise"}
    schema["features"]["priced"] = {
        "kind": "number", "column": "price", "transform": "bucketise", "buckets": 5,
    }  # fmt: skip
    for name in ("user_id", "item_id"):
        schema["features"][name] = {"kind": "id", "ids": "vocabulary", "reserved": 2}
    raw["data"]["negatives"] = {"per_positive": 2, "task": "click", "features": ["price"]}
    return preflight._measured(job_from_dict(raw, "test"), None, lambda event: None)


def feed_of(job: Job, storage: Path) -> Feed:
    data = Dataset.open(job.data.train, ())
    run, start = Run(job.to_dict(), str(storage), 1, data.fingerprint), Position.start(job.data.lanes)
    return open_feed(run, ALONE, Silent(), start, None, None)


def test_passes_before_training_leave_out_the_same_rows(home: Path, tmp_path: Path) -> None:
    """Against the data without them: statistics of numbers and labels, vocabularies, the negatives' index."""
    jobs = [measured(home / name, tmp_path) for name in ("spoiled", "good")]
    schemas = [job.to_dict()["schema"] for job in jobs]
    assert schemas[0]["features"]["price"]["mean"] is not None
    assert schemas[0]["features"]["priced"]["boundaries"] and schemas[0]["tasks"]["click"]["prior"]
    assert schemas[0] == schemas[1]
    feeds = [feed_of(job, tmp_path / name) for job, name in zip(jobs, ("spoiled", "good"), strict=True)]
    for table in ("user_id", "item_id"):
        here, there = (feed.vocabularies[table] for feed in feeds)
        assert np.array_equal(here.hashes, there.hashes) and np.array_equal(here.counts, there.counts), table
    one, two = (feed.sampler._index for feed in feeds if feed.sampler is not None)
    for name in ("users", "items", "pairs", "entries", "positives"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert np.array_equal(one.catalogue.ids, two.catalogue.ids)
    assert np.array_equal(one.catalogue.dense, two.catalogue.dense)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    found = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert found == code, err
    return json.loads(out), err


def good_numbers(folder: Path) -> list[int]:
    """Numbers in the whole data set of the rows that are not bad."""
    numbers, first = [], 0
    for shard in range(4):
        footer = pq.read_metadata(folder / f"part-{shard}.parquet")
        for group in range(footer.num_row_groups):
            for row in range(footer.row_group(group).num_rows):
                if (shard, group) != LOST and (shard, group * GROUP + row) not in BAD:
                    numbers.append(first + row)
            first += footer.row_group(group).num_rows
    return numbers


def test_a_run_trains_every_good_row_once_an_epoch_and_says_what_it_left_out(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small_data(tmp_path / "lost")
    extra = (tmp_path / "lost" / "part-1.parquet").read_bytes()
    data = tmp_path / "train"
    data.mkdir()
    for file in (home / "spoiled").iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    (data / "part-9.parquet").write_bytes(extra[:-300])
    raw = job_on(data, tmp_path / "runs", run__epochs=2)
    raw["run"]["record_rows"], raw["data"]["max_bad_share"] = True, 0.3
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(raw))
    result, err = run(capsys, "train", str(job))
    lost = pq.read_metadata(data / "part-2.parquet").row_group(LOST[1]).num_rows
    assert result["bad_rows"] == {"rows": len(BAD) + lost, "row_groups": 5, "files": 5}
    assert f"left out   {len(BAD) + lost} bad rows in 5 row groups, 5 files; " in err
    assert "1 of 5 files cannot be read: part-9.parquet: not a Parquet file, or cut short" in err
    expected = good_numbers(data)
    assert result["rows"] == 2 * len(expected)
    recorded = [np.load(file) for file in sorted((tmp_path / "runs" / "small" / "rows").iterdir())]
    rows = np.concatenate([each.ravel() for each in recorded])
    assert Counter(rows[rows >= 0].tolist()) == Counter(2 * expected)
    # Evaluation leaves out the same where the job does, and says so.
    measured, err = run(capsys, "evaluate", result["run_dir"], "--data", str(data))
    assert measured["bad_rows"] == result["bad_rows"] and f"left out of {data}: " in err
    assert measured["metrics"]["all"]["click"]["rows"] == len(expected)
    check_prediction(result["run_dir"], data, tmp_path, capsys)


def check_prediction(run_dir: str, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prediction has a line for every row, null where the row is bad; what it cannot read it refuses."""
    out = folder / "out"
    _, err = run(capsys, "predict", run_dir, "--data", str(data), "--out", str(out), code=2)
    assert "part-9.parquet: not a Parquet file" in err
    (data / "part-9.parquet").unlink()
    _, err = run(capsys, "predict", run_dir, "--data", str(data), "--out", str(out), code=2)
    assert "part-2.parquet: row group 1 is corrupt" in err
    (data / "part-2.parquet").unlink()
    made, err = run(capsys, "predict", run_dir, "--data", str(data), "--out", str(folder / "more"))
    # Labels are not looked at, so two of the rows are not bad here.
    shards = [pq.read_metadata(data / f"part-{shard}.parquet").num_rows for shard in (0, 1, 3)]
    first = dict(zip((0, 1, 3), np.cumsum([0, *shards]), strict=False))
    bad = sorted(first[shard] + row for (shard, row) in BAD if (shard, row) not in ((0, 3), (3, 20)))
    before, after = pq.read_table(data), pq.read_table(folder / "more")
    assert made["bad_rows"]["rows"] == len(bad) and made["rows"] == before.num_rows
    assert "without a prediction: 4 bad rows in " in err
    for name in ("user_id", "item_id", "country"):
        assert after[name].to_pylist() == before[name].to_pylist()
    for task in ("click", "rating"):
        values = after[task].to_pylist()
        assert [row for row, value in enumerate(values) if value is None] == bad


def test_too_many_bad_rows_are_an_error_of_the_input(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = job_on(home / "spoiled", tmp_path / "runs")
    raw["data"]["max_bad_share"] = 0.05
    # All that is measured is given, so that training itself meets them.
    raw["schema"]["tasks"] = {"click": {"kind": "binary", "prior": 0.5}}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(raw))
    _, err = run(capsys, "train", str(job), code=2)
    assert "rows are bad, more than data.max_bad_share allows (0.05)" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    raw["data"] |= {"bad_rows": "error"}
    job.write_text(yaml.safe_dump(raw))
    _, err = run(capsys, "train", str(job), "--name", "strict", code=2)
    assert "part-2.parquet: row group 1 is corrupt" in err.strip().splitlines()[-1]


def test_on_object_storage_the_same_is_left_out_and_written_down(
    home: Path, tmp_path: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (home / "spoiled").iterdir():
        storage.write(f"{bucket}/spoiled/{file.name}", file.read_bytes())
    results, records = [], []
    for data, runs in (
        (str(home / "spoiled"), str(tmp_path / "runs")),
        (f"{bucket}/spoiled", f"{bucket}/runs"),
    ):
        raw = job_on(Path("data"), Path("runs"), run__epochs=1)
        raw["data"]["train"], raw["run"]["storage"] = data, runs
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
        results.append(run(capsys, "train", str(tmp_path / "job.yaml"))[0])
        files = storage.list_files(f"{runs}/small/quarantine")
        records.append({file.path: storage.read(file.url) for file in files})
    for key in ("bad_rows", "rows", "steps"):
        assert results[0][key] == results[1][key], key
    assert results[1]["bad_rows"]["row_groups"] == 5 and records[0] == records[1]


def test_a_small_generation_may_be_worse_than_all_of_them_together(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 of 4 rows are bad, behind 103 of 1,500: 7 % of all. By themselves they would be too much."""
    data = tmp_path / "train"
    data.mkdir()
    for file in (home / "spoiled").iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    raw = job_on(data, tmp_path / "runs", run__epochs=1)
    raw["data"] |= {"follow": {"poll_s": 0.05, "idle_s": 0.1}, "max_bad_share": 0.08}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    first, _ = run(capsys, "train", str(tmp_path / "job.yaml"))
    write_small_data(tmp_path / "later", rows=4, shards=1)
    table = pq.read_table(tmp_path / "later" / "part-0.parquet")
    rows = table.to_pylist()
    for row in rows[1:]:
        row["hour"] = 24
    pq.write_table(pa.Table.from_pylist(rows, table.schema), data / "part-7.parquet")
    second, err = run(capsys, "train", str(tmp_path / "job.yaml"))
    assert [each["generation"] for each in second["generations"]] == [1]
    assert (second["rows"], second["steps"]) == (1, first["steps"] + 1)
    assert second["bad_rows"]["rows"] == first["bad_rows"]["rows"] + 3
    assert "3 bad rows in 1 row group, 1 file" in err, "of the measurement before it is trained"
    found, _ = run(capsys, "inspect", second["run_dir"])
    bad = first["bad_rows"]["rows"]
    assert found["bad_rows"] == {"earlier_rows": 1500, "earlier_bad": bad, "epoch": 0, "epoch_bad": 3}
    alone = small_job(data, tmp_path / "runs", "alone", data__eval=None, data__train=str(tmp_path / "alone"))
    alone["data"] |= {"bad_rows": "skip", "max_bad_share": 0.08}
    (tmp_path / "alone").mkdir()
    (data / "part-7.parquet").rename(tmp_path / "alone" / "part-7.parquet")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(alone))
    _, err = run(capsys, "train", str(tmp_path / "job.yaml"), code=2)
    assert "of 4 rows are bad, more than data.max_bad_share allows (0.08)" in err
