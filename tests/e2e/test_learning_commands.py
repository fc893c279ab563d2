"""What a job may ask for beside plain training, as a user types it: vocabularies, sampled negatives, the best
checkpoint, early stopping, two models on the same rows; also where a run was killed in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.checkpoint.vocabularies import load_vocabularies
from mtlrec.cli import main
from tests.small_data import small_job, write_small_data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under `train` and `test`; a job with a vocabulary, pairs, dropout and uncertainty."""
    folder = tmp_path_factory.mktemp("home")
    write_small_data(folder / "train", rows=600)
    write_small_data(folder / "test", rows=300, shards=1, seed=1)
    job = small_job(Path("train"), Path("runs"), data__eval="test", run__epochs=100)
    schema = job["schema"]
    schema["features"]["item_id"] = {"kind": "id", "ids": "vocabulary", "min_count": 2, "reserved": 3}
    schema["features"]["user_id"] = {"kind": "id", "ids": "vocabulary", "rows": 60}
    schema["tasks"]["rank"] = {"kind": "pairwise", "label": "click"}
    job["data"]["negatives"] = {"per_positive": 2, "task": "rank"}
    job["model"]["dropout"] = 0.2
    job["objective"] = {"balance": "uncertainty"}
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """A command with --json -> (the one object on stdout, stderr)."""
    capsys.readouterr()
    found = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert found == code, err
    assert out.count("\n") == 1 and "Traceback" not in err
    return json.loads(out), err


def tables(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "vocabularies").glob("*.parquet")}


def test_a_run_with_vocabularies_that_was_killed_ends_as_if_it_had_not_been(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(home / "job.yaml"), "--set", "run.checkpoint.every_steps=10", "--name"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mtlrec.cli", *arguments, "killed", "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    killed, deadline = home / "runs" / "killed", time.monotonic() + 120
    try:
        while not list(killed.glob("checkpoints/*/manifest.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    reached = max(int(path.parent.name[5:17]) for path in killed.glob("checkpoints/*/manifest.json"))
    assert reached < 1300, "killed before its end"
    limits = ["--set", f"run.max_steps={reached + 20}"]
    resumed, err = run(capsys, *arguments, "killed", *limits)
    assert f"resuming killed at step {reached}" in err
    straight, _ = run(capsys, *arguments, "straight", *limits)
    assert resumed["steps"] == straight["steps"] == reached + 20
    assert resumed["metrics"] == straight["metrics"]
    assert tables(killed) == tables(home / "runs" / "straight") != {}


def test_inspect_and_python_tell_which_ids_the_rows_are(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, err = run(capsys, "train", str(home / "job.yaml"), "--name", "told", "--set", "run.max_steps=2")
    assert "vocabulary of user_id: 59 of 80 ids have a row of their own" in err
    found, _ = run(capsys, "inspect", result["run_dir"], "--verify")
    assert {(table["table"], table["kind"], table["reserved"]) for table in found["vocabularies"]} == {
        ("item_id", "string", 3),
        ("user_id", "int64", 1),
    }
    rows = {table["name"]: table["rows"] for table in found["tables"]}
    assert rows["user_id"] == 60
    assert result["parameters"]["tables"] == sum(t["rows"] * t["dim"] for t in found["tables"])
    url = result["checkpoint"]
    vocabularies = load_vocabularies(url, read_manifest(url))
    saved = pq.read_table(home / "runs" / "told" / "vocabularies" / "item_id.parquet")
    raw = vocabularies["item_id"].raw_ids().to_pylist()
    assert raw == [None] * 3 + saved["id"].to_pylist() and len(raw) == rows["item_id"]


def test_the_best_checkpoint_is_named_kept_and_used(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = [str(home / "job.yaml"), "--name", "early", "--set", "optimizer.dense.lr=0.05"]
    evaluate = "run.evaluate={every_steps: 8, metric: [click/auc, ca/rank/ndcg@10], patience: 2}"
    result, err = run(capsys, "train", *job, "--set", evaluate)
    best = result["best"]
    assert result["steps"] == best["step"] + 16 < 1300
    assert "no better for 2 measurements: done" in err
    both = best["metrics"]["all"]["click"]["auc"], best["metrics"]["ca"]["rank"]["ndcg@10"]
    assert best["score"] == pytest.approx(sum(both) / 2)
    measured, err = run(capsys, "evaluate", result["run_dir"])
    assert measured["checkpoint"] == best["checkpoint"] and "(the run's best)" in err
    assert measured["metrics"] == best["metrics"]
    measured, err = run(capsys, "evaluate", result["run_dir"], "--last")
    assert measured["checkpoint"] == result["checkpoint"] != best["checkpoint"]
    predicted, _ = run(capsys, "predict", result["run_dir"], "--out", str(home / "scores"))
    assert predicted["checkpoint"] == best["checkpoint"]

    again, _ = run(capsys, "train", *job, "--set", evaluate)
    assert again["already_finished"] and again["best"] == best
    more, _ = run(capsys, "train", *job, "--set", evaluate.replace("patience: 2", "patience: 4"))
    assert more["steps"] > result["steps"], "more patience goes on"
    assert more["best"]["score"] >= best["score"] and Path(more["best"]["checkpoint"]).is_dir()


def test_an_undefined_metric_cannot_decide(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "clicked").mkdir()
    table = pq.read_table(home / "test")
    column = pa.array([1] * table.num_rows, pa.int8())
    pq.write_table(
        table.set_column(table.column_names.index("click"), "click", column), home / "clicked" / "a.parquet"
    )
    limits = ["--set", "run.max_steps=2", "--set", f"data.eval={home}/clicked", "--name", "undefined"]
    evaluate = ["--set", "run.evaluate={every_steps: 1, metric: [click/auc]}"]
    refused, _ = run(capsys, "train", str(home / "job.yaml"), *limits, *evaluate, code=2)
    assert "click/auc is undefined on data.eval" in refused["error"]
    result, _ = run(capsys, "train", str(home / "job.yaml"), *limits)
    rank = result["metrics"]["all"]["rank"]
    assert rank["auc"] is None and rank["gauc"] is None and rank["ndcg@10"] == 1
    assert rank["reasons"] == {"auc": "every label is 1", "gauc": "no user has both labels"}


def test_two_models_that_know_different_things_are_compared(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "full": [],
        "pooled": ["--set", "schema.scenario=null", "--set", "model.backbone=shared_bottom"],
        "other": [
            "--set",
            "schema.tasks={clicked: {kind: binary, label: click}}",
            "--set",
            "data.negatives=",
        ],
    }
    runs = {}
    for name, change in changes.items():
        arguments = ["train", str(home / "job.yaml"), "--name", name, "--set", "run.max_steps=20", *change]
        runs[name] = run(capsys, *arguments)[0]["run_dir"]
    pooled = ["evaluate", runs["pooled"], "--against", runs["full"], "--replicates", "30"]
    found, err = run(capsys, *pooled)
    assert list(found["differences"]) == ["all", "ca", "de", "mx"], "measured in the other's scenarios"
    assert list(found["differences"]["de"]["rank"]) == [
        "auc",
        "gauc",
        "ndcg@10",
        "recall@10",
        "hit@10",
        "mrr",
    ]
    for task, metrics in found["differences"]["all"].items():
        for metric, told in metrics.items():
            # Of the model without scenarios, ranking has other groups alone than beside one that knows them.
            if metric in ("auc", "logloss", "rmse", "mae"):
                assert told["a"] == pytest.approx(found["metrics"]["all"][task][metric], abs=1e-6)
            assert told["b"] == pytest.approx(found["against_metrics"]["all"][task][metric], abs=1e-6)
            assert told["low"] <= told["high"] and told["replicates"] <= 30
    assert "excludes 0" in err
    refused, _ = run(capsys, "evaluate", runs["full"], "--against", runs["other"], code=2)
    assert "no task in common" in refused["error"]
    refused, _ = run(capsys, "evaluate", runs["full"], "--replicates", "9", code=2)
    assert "only with --against" in refused["error"]
