"""The commands in one process, as a user types them, on data with every kind of feature and label."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import log_loss, roc_auc_score

from mtlrec.cli import main
from tests.small_data import SCENARIOS, small_job, write_small_data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under `train` and `test`, a job that saves every 30 steps."""
    folder = tmp_path_factory.mktemp("home")
    write_small_data(folder / "train")
    write_small_data(folder / "test", rows=700, shards=2, seed=1)
    job = small_job(Path("train"), Path("runs"), data__eval="test")
    job["run"]["checkpoint"] = {"every_steps": 30}
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """A command with --json -> (the one object on stdout, stderr)."""
    capsys.readouterr()
    found = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert found == code, err
    assert out.count("\n") == 1
    return json.loads(out), err


@pytest.fixture(scope="module")
def trained(home: Path) -> dict[str, Any]:
    assert main(["train", str(home / "job.yaml")]) == 0
    return json.loads((home / "runs" / "small" / "result.json").read_text())


def test_train_says_where_everything_is(
    home: Path, trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result, err = run(capsys, "train", str(home / "job.yaml"))
    assert result["already_finished"] and "has finished at step 96" in err
    assert {"run_dir", "checkpoint", "steps", "rows", "samples_per_s", "metrics"} <= result.keys()
    assert (result["steps"], result["rows"]) == (96, 4500)
    run_dir = Path(result["run_dir"])
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step-000000000090.a0001",
        "step-000000000096.a0001",
    ]
    assert list((run_dir / "tensorboard").rglob("events.out.tfevents.*"))
    assert yaml.safe_load((run_dir / "job.yaml").read_text())["data"]["train"] == str(home / "train")
    metrics = result["metrics"]
    assert list(metrics) == ["all", *SCENARIOS]
    assert metrics["all"]["click"]["rows"] == 700
    assert metrics["all"]["click"]["auc"] > 0.6
    assert metrics["all"]["rating"]["rmse"] > 0


def test_more_epochs_go_on_where_the_run_ended(
    home: Path, trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "runs", home / "longer")
    result, err = run(
        capsys,
        "train",
        str(home / "job.yaml"),
        "--set",
        f"run.storage={home}/longer",
        "--set",
        "run.epochs=4",
    )
    assert "resuming small at step 96" in err
    assert (result["steps"], result["rows"]) == (128, 1500)


def test_evaluate_agrees_with_scikit_learn(
    home: Path, trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, _ = run(capsys, "evaluate", trained["run_dir"], "--data", str(home / "test"))
    assert measured["checkpoint"] == trained["checkpoint"]
    assert measured["metrics"] == trained["metrics"]
    out = tmp_path / "scores"
    predicted, _ = run(
        capsys, "predict", trained["checkpoint"], "--data", str(home / "test"), "--out", str(out)
    )
    assert predicted["rows"] == 700
    scores = pq.read_table(sorted(out.glob("*.parquet"))).to_pydict()
    data = pq.read_table(home / "test").to_pydict()
    assert list(scores) == ["user_id", "item_id", "country", "click", "rating"]
    assert (scores["user_id"], scores["item_id"]) == (data["user_id"], data["item_id"])
    for scenario in ["all", *SCENARIOS]:
        here = np.array([scenario in ("all", country) for country in data["country"]])
        label, score = np.array(data["click"])[here], np.array(scores["click"], dtype=np.float64)[here]
        click = measured["metrics"][scenario]["click"]
        assert click["auc"] == pytest.approx(roc_auc_score(label, score), abs=1e-4)
        assert click["logloss"] == pytest.approx(log_loss(label, score), abs=1e-4)
        assert click["calibration"] == pytest.approx(score.sum() / label.sum(), abs=1e-4)
        assert (click["rows"], click["positives"]) == (here.sum(), label.sum())
        stars = np.array(data["rating"], dtype=np.float64)
        known = here & ~np.isnan(stars)
        error = np.array(scores["rating"])[known] - stars[known]
        rating = measured["metrics"][scenario]["rating"]
        assert rating["rmse"] == pytest.approx(np.sqrt((error**2).mean()), abs=1e-4)
        assert rating["mae"] == pytest.approx(np.abs(error).mean(), abs=1e-4)


def test_predict_needs_no_labels_and_numbers_rows_without_keys(
    home: Path, trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(home / "test").drop_columns(["click", "rating"])
    (tmp_path / "bare").mkdir()
    pq.write_table(table, tmp_path / "bare" / "rows.parquet")
    arguments = [
        "predict",
        trained["run_dir"],
        "--data",
        str(tmp_path / "bare"),
        "--out",
        str(tmp_path / "out"),
    ]
    run(capsys, *arguments, "--keys", "")
    scores = pq.read_table(tmp_path / "out" / "part-00000-00000.parquet")
    assert scores.column_names == ["row", "click", "rating"]
    assert scores["row"].to_pylist() == list(range(700))
    refused, _ = run(capsys, *arguments, code=2)
    assert "not empty" in refused["error"]


def test_inspect_shows_what_the_checkpoint_holds(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = run(capsys, "inspect", trained["run_dir"], "--verify")
    assert found["step"] == 96
    assert {"item_id", "user_id", "hour", "scenario", "price_bucket"} <= {t["name"] for t in found["tables"]}
    assert main(["inspect", trained["checkpoint"]]) == 0
    assert "item_id" in capsys.readouterr().out


def test_a_job_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job-schema"]) == 0
    assert "optimizer" in json.loads(capsys.readouterr().out)["properties"]
