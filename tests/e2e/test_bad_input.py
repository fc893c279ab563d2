"""Bad input: exit code 2, one line that says where and what, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mtlrec.checkpoint.lease import Lease
from mtlrec.cli import main
from tests.small_data import small_job, write_small_data


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_small_data(tmp_path / "train", rows=300)
    job = small_job(Path("train"), Path("runs"), data__eval=None, run__epochs=1)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr after the progress lines; asserts exit code 2 and no traceback."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("mtlrec: ")
    assert sum(line.startswith("mtlrec: ") for line in err.splitlines()) == 1
    return last + out


def change(home: Path, column: str, values: object, shard: int = 2) -> Path:
    """Replace a column of one shard (None: drop it); returns the shard's file."""
    file = home / "train" / f"part-{shard}.parquet"
    table = pq.read_table(file)
    index = table.column_names.index(column)
    table = table.remove_column(index)
    if values is not None:
        table = table.add_column(index, column, values(table) if callable(values) else values)
    pq.write_table(table, file, row_group_size=50)
    return file


def one_value(value: object, of: type | pa.DataType, otherwise: object = 0) -> Callable[[pa.Table], pa.Array]:
    """A column with `value` in row 60 (so in the second row group)."""
    return lambda table: pa.array([value if row == 60 else otherwise for row in range(table.num_rows)], of)


BEFORE_A_WORKER_STARTS = {
    "missing column": (lambda home: change(home, "price", None), ["part-2.parquet", "price"]),
    "mistyped column": (
        lambda home: change(home, "item_id", lambda t: pa.array([0.5] * len(t))),
        ["item_id"],
    ),
    "mistyped list": (
        lambda home: change(home, "history", lambda t: pa.array([1] * len(t))),
        ["part-2.parquet", "history"],
    ),
    "mistyped label": (lambda home: change(home, "click", lambda t: pa.array(["y"] * len(t))), ["click"]),
    "truncated file": (
        lambda home: (home / "train" / "part-1.parquet").write_bytes(
            (home / "train" / "part-1.parquet").read_bytes()[:-200]
        ),
        ["part-1.parquet"],
    ),
    "not a parquet file": (lambda home: (home / "train" / "x.parquet").write_text("hello"), ["x.parquet"]),
}


@pytest.mark.parametrize("case", BEFORE_A_WORKER_STARTS)
def test_data_that_does_not_fit_is_refused_before_a_worker_starts(
    home: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, words = BEFORE_A_WORKER_STARTS[case]
    spoil(home)
    line = refused(capsys, "train", str(home / "job.yaml"), "--workers", "2")
    for word in words:
        assert word in line
    assert not (home / "runs").exists()


WHILE_READING = {
    "identity id out of range": (
        "hour",
        one_value(24, pa.int32()),
        ["part-2.parquet", "row group 1", "hour", "24"],
    ),
    "label not 0 or 1": ("click", one_value(2, pa.int8()), ["part-2.parquet", "row group 1", "click", "2"]),
    "unknown scenario": ("country", one_value("fr", pa.string(), "ca"), ["country", "'fr'", "ca, de, mx"]),
    "null scenario": ("country", one_value(None, pa.string(), "ca"), ["part-2.parquet", "country", "null"]),
    "infinite number": ("price", one_value(np.inf, pa.float64()), ["part-2.parquet", "price", "inf"]),
    "wrong vector": ("picture", one_value([1.0], pa.list_(pa.float32()), [1.0, 2.0, 3.0]), ["picture", "3"]),
}


@pytest.mark.parametrize("case", WHILE_READING)
def test_a_bad_row_is_named_by_file_row_group_column_and_value(
    home: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    column, values, words = WHILE_READING[case]
    change(home, column, values)
    line = refused(capsys, "train", str(home / "job.yaml"))
    for word in words:
        assert word in line, line
    checkpoints = home / "runs" / "small" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


def test_empty_and_missing_data_are_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "nothing").mkdir()
    job = str(home / "job.yaml")
    assert "nothing" in refused(capsys, "train", job, "--set", f"data.train={home}/nothing")
    assert "nowhere" in refused(capsys, "train", job, "--set", f"data.train={home}/nowhere")
    assert not (home / "runs").exists()


def test_wrong_jobs_and_options_are_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(home / "job.yaml")
    assert "model.dims: unknown field" in refused(capsys, "train", job, "--set", "model.dims=3")
    assert "run.workers: 9" in refused(capsys, "train", job, "--workers", "9")
    assert "no such job file" in refused(capsys, "train", str(home / "none.yaml"))
    assert "allowed: census" in refused(capsys, "prepare", "nosuch", str(home), str(home / "out"))
    assert "arguments are required: JOB" in refused(capsys, "train")
    assert main(["train", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit"] == 2
    assert not (home / "runs").exists()


def test_what_cannot_be_written_to_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "file").write_text("in the way")
    job = str(home / "job.yaml")
    assert str(home / "file") in refused(capsys, "train", job, "--set", f"run.storage={home}/file")


def test_changed_jobs_and_shards_are_refused_on_resume(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(home / "job.yaml")
    assert main(["train", job, "--set", "run.max_steps=3"]) == 0
    line = refused(capsys, "train", job, "--set", "model.dim=16")
    assert "model.dim was 8, is 16" in line and "another name" in line
    change(home, "price", lambda table: pa.array(np.ones(table.num_rows)))
    line = refused(capsys, "train", job)
    assert "part-2.parquet" in line


def test_checkpoints_that_are_none_are_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate", "inspect"):
        assert "nowhere" in refused(capsys, command, str(home / "nowhere"))
        assert "not a checkpoint" in refused(capsys, command, str(home))
    assert main(["train", str(home / "job.yaml"), "--set", "run.max_steps=2"]) == 0
    block = next((home / "runs" / "small" / "checkpoints").rglob("item_id/*.safetensors"))
    block.write_bytes(block.read_bytes()[:-8])
    line = refused(capsys, "evaluate", str(home / "runs" / "small"), "--data", str(home / "train"))
    assert block.name in line


def test_an_unknown_scenario_or_column_is_named_when_predicting(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(home / "job.yaml"), "--set", "run.max_steps=2"]) == 0
    run_dir, out = str(home / "runs" / "small"), str(home / "out")
    common = ["predict", run_dir, "--data", str(home / "train"), "--out", out]
    assert "nosuch" in refused(capsys, *common, "--keys", "nosuch")
    assert "click" in refused(capsys, *common, "--keys", "click")
    change(home, "country", one_value("fr", pa.string(), "ca"))
    assert "'fr'" in refused(capsys, *common)
    assert not Path(out, "_predictions.json").exists()


def test_storage_that_does_not_answer_is_named(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-shown")
    line = refused(capsys, "train", str(home / "job.yaml"), "--set", "run.storage=s3://bucket/runs")
    assert "127.0.0.1:9" in line and "not-to-be-shown" not in line


def test_a_device_that_is_not_there_is_named_with_its_cure(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "train", str(home / "job.yaml"), "--set", "run.device=cuda")
    assert "CUDA" in line and "run.device: cpu" in line
    assert not (home / "runs").exists()


def test_two_drivers_on_one_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(home / "job.yaml")
    with Lease.acquire(str(home / "runs" / "small"), {"command": "the first driver"}):
        line = refused(capsys, "train", job)
    assert "the first driver" in line and "held" in line
    assert main(["train", job, "--set", "run.max_steps=1"]) == 0


def test_options_of_evaluate_and_predict_are_checked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(home / "job.yaml"), "--set", "run.max_steps=2"]) == 0
    evaluate = ["evaluate", str(home / "runs" / "small"), "--data", str(home / "train")]
    assert "--workers -1" in refused(capsys, *evaluate, "--workers", "-1")
    assert "--batch-size 0" in refused(capsys, *evaluate, "--batch-size", "0")
    assert "needs --workers" in refused(capsys, *evaluate, "--address", "127.0.0.1:1")
    assert "127.0.0.1:1" in refused(capsys, *evaluate, "--address", "127.0.0.1:1", "--workers", "1")
    assert "127.0.0.1:1" in refused(capsys, "train", str(home / "job.yaml"), "--address", "127.0.0.1:1")
    assert main([*evaluate[:3], str(home / "train" / "part-0.parquet")]) == 0, "one file is a data set too"
    keys = ["--out", str(home / "out"), "--keys", "user_id,user_id"]
    assert main(["predict", *evaluate[1:], *keys]) == 0


def test_runs_among_the_data_and_unknown_tables_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(home / "job.yaml")
    assert "keep it elsewhere" in refused(capsys, "train", job, "--set", f"run.storage={home}/train")
    assert "run.sharding.nosuch" in refused(capsys, "train", job, "--set", "run.sharding={nosuch: row_wise}")
    assert "run.report_every_s" in refused(capsys, "train", job, "--set", "run.report_every_s=.inf")
    assert not (home / "runs").exists()


def test_measured_features_are_part_of_what_a_run_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(home / "job.yaml")
    measured = ["--set", "schema.features.price={kind: number, transform: bucketise, buckets: 4}"]
    assert main(["train", job, *measured, "--set", "run.max_steps=2"]) == 0
    assert main(["train", job, *measured, "--set", "run.max_steps=3"]) == 0
    other = ["--set", "schema.features.price={kind: number, transform: bucketise, buckets: 5}"]
    assert "buckets was 4, is 5" in refused(capsys, "train", job, *other)
    standardised = ["--set", "schema.features.price={kind: number, transform: standardise}"]
    assert "price.transform was 'bucketise', is 'standardise'" in refused(capsys, "train", job, *standardised)


def test_a_loss_that_is_not_finite_fails_the_run_and_keeps_the_last_checkpoint(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(home / "job.yaml")
    change(home, "rating", lambda table: pa.array(np.full(table.num_rows, 1e30)), shard=0)
    change(home, "rating", lambda table: pa.array(np.full(table.num_rows, 1e30)), shard=1)
    # Measured, mean and deviation would bring even these labels back to where the model can learn them.
    assert main(["train", job, "--set", "run.max_steps=2"]) == 0
    as_it_is = ["--set", "schema.tasks.rating={kind: regression, mean: 0.0, std: 1.0}"]
    assert main(["train", job, "--name", "diverged", *as_it_is]) == 1
    assert "step 1 (epoch 0, after 0 of its rows) is not finite: loss of rating" in capsys.readouterr().err
    assert not (home / "runs" / "diverged" / "checkpoints").exists()


def test_a_run_that_went_on_after_its_end_is_not_finished(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(home / "job.yaml")
    assert main(["train", job, "--set", "run.max_steps=2"]) == 0
    assert main(["train", job, "--set", "run.max_steps=4"]) == 0
    assert main(["train", job, "--set", "run.max_steps=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result.get("already_finished")) == (4, None)


OF_LEARNING = {
    "unknown balance": ("objective.balance=uncertain", ["objective.balance", "'weights' or 'uncertainty'"]),
    "field of another backbone": (
        "model.backbone={kind: ple, experts: 3}",
        ["backbone.experts", "task_experts"],
    ),
    "no factors": ("model.backbone=factorization", ["model.backbone.factors", "required"]),
    "unknown factor": (
        "model.backbone={kind: factorization, factors: [user_id, nosuch]}",
        ["model.backbone.factors", "'nosuch'", "user_id"],
    ),
    "decay of tables": ("optimizer.tables.weight_decay=0.1", ["weight_decay: unknown field", "lr"]),
    "given nothing": ("schema.tasks.rating={kind: regression, given: buy}", ["rating.given", "'buy'"]),
    "given a regression": ("schema.tasks.click={kind: binary, given: rating}", ["click.given", "'rating'"]),
    "given itself": ("schema.tasks.click={kind: binary, given: click}", ["click -> click", "circle"]),
    "mean without std": ("schema.tasks.rating={kind: regression, mean: 3}", ["tasks.rating", "std"]),
    "pairs without negatives": ("schema.tasks.click={kind: pairwise}", ["data.negatives", "per_positive"]),
    "negatives of a regression": ("data.negatives={task: rating}", ["data.negatives.task", "'rating'"]),
    "negatives with the user": (
        "data.negatives={task: click, features: [user_id]}",
        ["data.negatives.features", "'user_id'"],
    ),
    "all rows reserved": (
        "schema.features.item_id={kind: id, ids: vocabulary, rows: 5, reserved: 5}",
        ["item_id.rows: 5", "reserved"],
    ),
    "minimum of a hash": (
        "schema.features.item_id={kind: id, rows: 9, min_count: 2}",
        ["schema.features.item_id", "vocabulary"],
    ),
    "table that nobody reads": ("schema.tables={extra: {rows: 9}}", ["schema.tables.extra", "no feature"]),
    "unknown table": ("schema.features.item_id={kind: id, tables: [a]}", ["item_id.tables", "'a'"]),
    "weight that is missing": ("schema.weight=trust", ["part-0.parquet", "'trust'", "schema.weight"]),
    "weight of text": ("schema.weight=country", ["part-0.parquet", "'country'", "string"]),
    "mistyped metric": ("run.evaluate={metric: [click/acu]}", ["'click/acu'", "auc, gauc"]),
    "metric of no task": ("run.evaluate={metric: [clik/auc]}", ["'clik/auc'", "click, rating"]),
    "metric of no scenario": ("run.evaluate={metric: [fr/click/auc]}", ["'fr'", "ca, de, mx"]),
    "metrics of two sorts": ("run.evaluate={metric: [click/auc, rating/rmse]}", ["larger", "smaller"]),
    "two intervals": ("run.evaluate={metric: [click/auc], every_steps: 5, every_epochs: 1}", ["not both"]),
    "nothing to measure on": ("run.evaluate={metric: [click/auc]}", ["run.evaluate", "data.eval"]),
    "a seed twice": ("run.seeds=[1, 1]", ["1, 1", "twice"]),
}


@pytest.mark.parametrize("case", OF_LEARNING)
def test_a_wrong_choice_of_learning_is_named(
    home: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    override, words = OF_LEARNING[case]
    job = [str(home / "job.yaml"), "--set", override, "--workers", "0"]
    if "nothing" not in case:
        write_small_data(home / "test", rows=60, shards=1)
        job += ["--set", f"data.eval={home}/test"]
    line = refused(capsys, "train", *job)
    for word in words:
        assert word in line, line
    assert not (home / "runs").exists()


VOCABULARY = "schema.features.{}={{kind: id, ids: vocabulary, min_count: {}}}"


def every_shard(home: Path, column: str, values: Callable[[pa.Table], pa.Array]) -> None:
    for shard in range(4):
        change(home, column, values, shard)


WHAT_THE_DATA_LACKS = {
    "no id often enough": (
        lambda home: None,
        [VOCABULARY.format("item_id", 1000)],
        ["table 'item_id'", "1000 times", "history, item_id"],
    ),
    "no id at all": (
        lambda home: every_shard(home, "user_id", lambda table: pa.nulls(len(table), pa.int64())),
        [VOCABULARY.format("user_id", 1)],
        ["table 'user_id'", "no id"],
    ),
    "ids of two kinds in a column": (
        lambda home: change(home, "item_id", lambda table: pa.array(range(len(table)))),
        [VOCABULARY.format("item_id", 1)],
        ["part-2.parquet", "'item_id'", "integers"],
    ),
    "ids of two kinds in a table": (
        lambda home: None,
        [
            "schema.tables={both: {ids: vocabulary}}",
            "schema.features.user_id={kind: id, tables: [both]}",
            "schema.features.item_id={kind: id, tables: [both]}",
            "schema.features.history={kind: id_list, table: both}",
        ],
        ["table 'both'", "integers"],
    ),
    "no positive": (
        lambda home: every_shard(home, "click", lambda table: pa.array([0] * len(table))),
        ["data.negatives={task: click}"],
        ["'click'", "data.negatives"],
    ),
    "half a label": (
        lambda home: change(home, "click", one_value(0.5, pa.float64())),
        ["schema.tasks={click: {kind: pairwise}}", "data.negatives={task: click}"],
        ["part-2.parquet", "row group 1", "click: 0.5", "pairwise"],
    ),
    "no weight": (
        lambda home: change(home, "weight", one_value(None, pa.float32(), 1)),
        ["schema.weight=weight"],
        ["part-2.parquet", "row group 1", "column weight", "null"],
    ),
    "a negative weight": (
        lambda home: change(home, "weight", one_value(-1, pa.float32(), 1)),
        ["schema.weight=weight"],
        ["part-2.parquet", "row group 1", "column weight", "-1"],
    ),
}


@pytest.mark.parametrize("case", WHAT_THE_DATA_LACKS)
def test_data_that_cannot_be_learnt_from_as_asked_is_named(
    home: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, overrides, words = WHAT_THE_DATA_LACKS[case]
    spoil(home)
    sets = [argument for override in overrides for argument in ("--set", override)]
    line = refused(capsys, "train", str(home / "job.yaml"), *sets)
    for word in words:
        assert word in line, line
    assert not list(home.glob("runs/*/checkpoints/*"))


def test_other_negatives_are_refused_on_resume(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["train", str(home / "job.yaml"), "--set", "data.negatives={task: click, per_positive: 2}"]
    assert main([*job, "--set", "run.max_steps=2"]) == 0
    line = refused(capsys, *job, "--set", "data.negatives.per_positive=3")
    assert "data.negatives.per_positive was 2, is 3" in line and "another name" in line
    assert main([*job, "--set", "run.max_steps=3"]) == 0


def test_a_comparison_that_makes_no_sense_is_refused_before_a_run(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = ["compare", str(home / "job.yaml"), "--data", str(home / "train"), "--workers", "0"]
    for options, words in (
        (["--vary", "model.bakbone=ple"], "model.bakbone: unknown field"),
        (["--vary", "model.backbone=ple,nosuch"], "--vary model.backbone=nosuch"),
        (["--vary", "model.backbone="], "--vary model.backbone="),
        (["--vary", "model.backbone=ple,ple"], "ple stands twice"),
        (["--vary", "seed=1,2"], "--seeds"),
        (["--seeds", "0"], "--seeds 0"),
        (["--metric", "click/acu"], "--metric click/acu"),
        (["--parallel", "0"], "--parallel 0"),
        (["--data", str(home / "nowhere")], "nowhere"),
    ):
        assert words in refused(capsys, *compare, *options)
    assert not (home / "runs").exists()
