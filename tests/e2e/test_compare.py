"""One real comparison: two variations, two seeds, each an ordinary run that evaluate finds again."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

from mtlrec.cli import main
from tests.small_data import small_job, write_small_data


def test_two_variations_with_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small_data(tmp_path / "train", rows=400, shards=2)
    write_small_data(tmp_path / "test", rows=300, shards=1, seed=1)
    job = small_job(Path("train"), Path("runs"), data__eval=None, run__epochs=1)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    arguments = ["compare", str(tmp_path / "job.yaml"), "--vary", "model.backbone=shared_bottom,mmoe"]
    arguments += ["--seeds", "2", "--data", str(tmp_path / "test"), "--workers", "0", "--json"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and found["complete"] and err.count(" finished after ") == 4
    runs = tmp_path / "runs"
    for row, name in zip(found["variations"], ("shared_bottom", "mmoe"), strict=True):
        assert list(row["runs"]) == ["7", "8"] and row["steps"] == 9
        measured = [run["metrics"]["de"]["click"]["auc"] for run in row["runs"].values()]
        assert row["mean"]["de"]["click"]["auc"] == pytest.approx(statistics.fmean(measured))
        assert row["deviation"]["de"]["click"]["auc"] == pytest.approx(statistics.stdev(measured))
        assert row["runs"]["8"]["run_dir"] == str(runs / f"small-backbone-{name}-seed8")
        text = (runs / f"small-backbone-{name}-seed8" / "job.yaml").read_text()
        assert yaml.safe_load(text)["model"]["backbone"]["kind"] == name
    assert found["variations"][0]["parameters"]["dense"] != found["variations"][1]["parameters"]["dense"]

    # What has finished is not trained again, what is gone is; both come out as they were.
    lost = runs / "small-backbone-mmoe-seed7"
    before = {
        path: path.stat().st_mtime_ns for path in runs.glob("small-backbone-*/checkpoints/*/manifest.json")
    }
    shutil.rmtree(lost)
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err.count(" had finished before ") == 3 and err.count(" finished after ") == 1
    for row, old in zip(json.loads(out)["variations"], found["variations"], strict=True):
        assert row["mean"] == old["mean"] and row["deviation"] == old["deviation"]
    for path, written in before.items():
        assert lost in path.parents or path.stat().st_mtime_ns == written
