"""What is shown of the data before training says nothing that is not known yet."""

from __future__ import annotations

from pathlib import Path

from mtlrec.data.overview import overview
from mtlrec.data.shards import Dataset
from mtlrec.job.job import job_from_dict
from mtlrec.schema import build_schema
from tests.small_data import small_job, write_small_data


def test_a_vocabulary_that_is_not_built_yet_is_not_counted(tmp_path: Path) -> None:
    """Its table has reserved rows alone until workers have built it: the plan, after that, shows tables."""
    write_small_data(tmp_path / "train", rows=200, shards=2)
    found = []
    for rows, ids in ((40, "hash"), (None, "vocabulary")):
        raw = small_job(tmp_path / "train", tmp_path / "runs")
        raw["schema"]["features"]["item_id"].update(rows=rows, ids=ids)
        job = job_from_dict(raw, "job")
        schema = build_schema(job.schema_, job.model)
        found.append(overview(Dataset.open(str(tmp_path / "train"), schema.columns()), schema))
    assert found[0] == found[1]
    assert found[1].keys() == {"url", "shards", "groups", "rows", "sampled_rows", "scenarios"}
    assert found[1]["rows"] == 200
