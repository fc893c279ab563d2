"""A batch that is not finite, on real Ray Train workers: Ray restarts nobody for it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.e2e.driven import Command, checkpoints
from tests.small_data import small_job, write_small_data


def test_a_batch_that_is_not_finite_ends_the_run_at_once(tmp_path: Path) -> None:
    """In the second of two workers: its lanes are the last of four, and read in the order of the files."""
    write_small_data(tmp_path / "train", rows=480, shards=2, group_rows=100)
    file = tmp_path / "train" / "part-1.parquet"
    table = pq.read_table(file)
    ratings = table["rating"].to_pylist()
    row = 460 - (480 - table.num_rows)
    ratings[row] = 1e30
    place = table.column_names.index("rating")
    pq.write_table(table.set_column(place, "rating", pa.array(ratings)), file, row_group_size=100)
    job = small_job(Path("train"), Path("runs"), "stops", run__workers=2, data__shuffle=False)
    job["schema"]["tasks"]["rating"] |= {"mean": 0.0, "std": 1.0}
    job["run"] |= {"checkpoint": {"every_steps": 2}, "max_failures": 3}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    error = Command(tmp_path, "train", "job.yaml").result(code=1)["error"]
    # Row 460 is the 100th of its lane's 120, of which a step takes 12.
    assert "step 9 (epoch 0, after 384 of its rows) is not finite: loss of rating; in 1 row(s): 460" in error
    assert f"460 (part-1.parquet, row group {row // 100}, row {row % 100})" in error
    starts = sorted(path.name for path in (tmp_path / "runs" / "stops" / "starts").iterdir())
    assert len(starts) == 1, f"a restart was spent on it: {starts}"
    assert checkpoints(tmp_path, "stops")[-1].startswith("step-000000000008.")
    assert len(checkpoints(tmp_path, "stops")) == 2
