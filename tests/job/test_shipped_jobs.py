"""Every job that is shipped or shown reads, and says its command, expected time and expected metric."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtlrec.job.job import parse_job
from mtlrec.schema import build_schema

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_shipped_job_reads_and_has_its_header(path: Path) -> None:
    text = path.read_text()
    job = parse_job(text, path.name)
    assert job.data.batch_size % job.data.lanes == 0
    header = text[: text.index("name:")].lower()
    for word in ("mtlrec train", "expected time", "expected metric"):
        assert word in header


def test_the_jobs_in_the_documentation_read() -> None:
    texts = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "job.md").read_text(), re.DOTALL)
    assert len(texts) == 2
    # Its quantiles would be measured on the data when a run starts.
    job = parse_job(texts[0], "docs/job.md", ["schema.features.age={kind: number}"])
    assert build_schema(job.schema_, job.model).table_of["item_id"].features == ("item_id", "history")
    assert parse_job(texts[1], "docs/job.md").model.backbone.kind == "factorization"
