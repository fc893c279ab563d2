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
    job = small_job(Path("train"), Path("runs"), data__eval="test", run__epochs=1)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    arguments = ["compare", str(tmp_path / "job.yaml"), "--seeds", "2", "--workers", "0", "--json"]
    assert main([*arguments, "--vary", "model.backbone=shared_bottom,mmoe"]) == 0
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
    shared, mmoe = found["variations"]
    assert shared["parameters"]["dense"] != mmoe["parameters"]["dense"]

    # What has finished is not trained again, what is gone is; measured anew, both come out as they were.
    shutil.rmtree(runs / "small-backbone-mmoe-seed7")
    kept = next((runs / "small-backbone-mmoe-seed8" / "checkpoints").rglob("manifest.json"))
    written = kept.stat().st_mtime_ns
    assert main([*arguments, "--vary", "model.backbone=mmoe", "--data", str(tmp_path / "test")]) == 0
    out, err = capsys.readouterr()
    assert err.count(" had finished before ") == 1 and err.count(" finished after ") == 1
    (row,) = json.loads(out)["variations"]
    assert row["mean"]["all"] == mmoe["mean"]["all"] and row["deviation"]["all"] == mmoe["deviation"]["all"]
    assert kept.stat().st_mtime_ns == written

    # Two of the runs beside one another on the same rows.
    first, second = (str(runs / f"small-backbone-{name}-seed8") for name in ("shared_bottom", "mmoe"))
    assert main(["evaluate", first, "--against", second, "--replicates", "20", "--json"]) == 0
    out, err = capsys.readouterr()
    both = json.loads(out)
    assert f"against    {both['against']} (the run's " in err
    assert both["metrics"]["all"]["click"]["auc"] == shared["runs"]["8"]["metrics"]["all"]["click"]["auc"]
    difference = both["differences"]["all"]["click"]["auc"]
    assert difference["b"] == pytest.approx(mmoe["runs"]["8"]["metrics"]["all"]["click"]["auc"], abs=1e-6)
    assert difference["difference"] == pytest.approx(difference["a"] - difference["b"])
