"""`data.follow` as a user has it: a command that ends when nothing is new, and goes on with what is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtlrec import storage
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.cli import main
from mtlrec.job.errors import InputError
from mtlrec.job.job import job_from_dict
from tests.distributed.test_training import recorded_rows
from tests.small_data import small_job, write_small_data

pytest_plugins = ["tests.s3_server"]

ROWS = (480, 240, 96, 144)
"""Of the shards, one a day: multiples of the batch, so that steps are rows / 48."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The first day under `train`, a job that follows it, the other days beside."""
    for day, rows in enumerate(ROWS):
        write_small_data(tmp_path / f"made-{day}", rows=rows, shards=1, seed=day)
    (tmp_path / "train").mkdir()
    arrive(tmp_path, 0)
    job = small_job(Path("train"), Path("runs"), data__eval=None)
    job["data"]["follow"] = {"poll_s": 0.05, "idle_s": 0}
    job["run"] |= {"epochs": 1, "record_rows": True}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return tmp_path


def arrive(home: Path, day: int, name: str | None = None) -> Path:
    shard = home / "train" / (name or f"day-{day}.parquet")
    shard.write_bytes((home / f"made-{day}" / "part-0.parquet").read_bytes())
    return shard


def train(
    home: Path, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0
) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    found = main(["train", str(home / "job.yaml"), *more, "--json"])
    out, err = capsys.readouterr()
    assert found == code, err
    return json.loads(out), err


def test_the_same_command_goes_on_with_what_is_new(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, err = train(home, capsys)
    assert (result["steps"], result["rows"]) == (10, 480)
    assert "no new shards for 0 s (data.follow.idle_s)" in err
    # Old shards may be removed, and several new ones are one generation.
    (home / "train" / "day-0.parquet").unlink()
    arrive(home, 2)
    arrive(home, 1)
    result, err = train(home, capsys)
    assert "resuming small at step 10" in err
    assert "generation 1: 336 rows in 2 new shards: day-1.parquet, day-2.parquet" in err
    assert (result["steps"], result["rows"]) == (17, 336)
    (generation,) = result["generations"]
    assert (generation["generation"], generation["rows"], generation["step"]) == (1, 336, 10)
    assert generation["metrics"]["all"]["click"]["rows"] == 336
    trained = [row for step in recorded_rows(result["run_dir"])[10:] for row in step]
    assert sorted(trained) == list(range(336))
    capsys.readouterr()
    assert main(["inspect", result["run_dir"]]) == 0
    assert "generation 1, epoch 1, 0 rows into it" in capsys.readouterr().out
    # Nothing new, and no checkpoint more.
    result, _ = train(home, capsys)
    assert (result["steps"], result["rows"], result["generations"]) == (17, 0, [])


def test_a_generation_that_is_begun_must_stay_and_no_other(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = arrive(home, 1)
    train(home, capsys, "--set", "run.max_steps=10")
    result, _ = train(home, capsys, "--set", "run.max_steps=10")
    assert result["already_finished"]
    shard.rename(home / "late.parquet")
    refused, _ = train(home, capsys, code=2)
    assert "day-1.parquet of 2 shards gone, which generation 0" in refused["error"]
    (home / "late.parquet").rename(shard)
    result, _ = train(home, capsys)
    assert (result["steps"], result["rows"]) == (15, 720 - 480)


def test_epochs_are_of_each_generation_and_may_be_raised(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(home, capsys)
    arrive(home, 1)
    result, _ = train(home, capsys, "--set", "run.epochs=2")
    # Once more the first, then the second twice.
    assert (result["steps"], result["rows"]) == (10 + 10 + 10, 480 + 2 * 240)
    assert [each["generation"] for each in result["generations"]] == [0, 1]


def test_a_shard_of_other_ids_or_without_a_column_ends_the_run_and_can_be_put_right(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    train(home, capsys)
    shard = arrive(home, 1)
    whole = pq.read_table(shard)
    pq.write_table(whole.drop_columns(["price"]), shard)
    refused, _ = train(home, capsys, code=2)
    assert "day-1.parquet" in refused["error"] and "'price'" in refused["error"]
    users = whole["user_id"].cast("string")
    pq.write_table(whole.set_column(whole.column_names.index("user_id"), "user_id", users), shard)
    refused, _ = train(home, capsys, code=2)
    assert "'user_id' holds strings or binary, but integers" in refused["error"]
    assert not (home / "runs" / "small" / "generations" / "1.json").exists()
    pq.write_table(whole, shard)
    result, _ = train(home, capsys)
    assert (result["steps"], result["rows"]) == (15, 240)


def test_an_unknown_scenario_is_a_bad_row(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    train(home, capsys)
    shard = arrive(home, 1)
    whole = pq.read_table(shard)
    country = whole["country"].to_pylist()
    country[7] = "fr"
    place = whole.column_names.index("country")
    pq.write_table(whole.set_column(place, "country", pa.array(country)), shard)
    refused, _ = train(home, capsys, code=2)
    assert "'fr'" in refused["error"] and "day-1.parquet" in refused["error"]
    # The generation is written down and nothing of it trained: a fork that leaves bad rows out goes on.
    result, _ = train(home, capsys, "--fork", "tolerant", "--set", "data.bad_rows=skip")
    assert (result["steps"], result["rows"]) == (15, 239)
    assert result["bad_rows"]["rows"] == 1


def test_a_finished_run_becomes_one_that_follows_by_a_fork(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(home, capsys, "--set", "data.follow=false")
    arrive(home, 1)
    result, err = train(home, capsys, "--fork", "live")
    assert "its order of rows goes on" in err
    assert (result["steps"], result["rows"]) == (15, 240)
    arrive(home, 3)
    (home / "train" / "day-0.parquet").unlink()
    # A fork of a run that follows takes over which generations there were.
    result, _ = train(home, capsys, "--name", "live", "--fork", "faster", "--set", "optimizer.dense.lr=0.01")
    assert (result["steps"], result["rows"]) == (18, 144)
    assert sorted(path.name for path in (home / "runs" / "faster" / "generations").iterdir()) == [
        "0.json",
        "1.json",
        "2.json",
        "2.metrics.json",
    ]
    # With nothing new it writes and measures a checkpoint of its own, and leaves its source's alone.
    source = home / "runs" / "faster" / "checkpoints"
    before = {path: path.read_bytes() for path in source.rglob("manifest.json")}
    sets = ("--set", "optimizer.dense.lr=0.02", "--set", f"data.eval={home / 'made-2'}")
    result, _ = train(home, capsys, "--name", "faster", "--fork", "idle", *sets)
    assert (result["steps"], result["rows"]) == (18, 0)
    assert result["checkpoint"].startswith(str(home / "runs" / "idle"))
    assert result["metrics"]["all"]["click"]["rows"] == ROWS[2]
    assert {path: path.read_bytes() for path in source.rglob("manifest.json")} == before


def test_on_an_object_store_it_is_the_same_run(
    home: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a vocabulary that generation 0 has made, and negatives of each generation's own positives."""
    job = yaml.safe_load((home / "job.yaml").read_text())
    job["schema"]["features"]["item_id"] = {"kind": "id", "ids": "vocabulary"}
    job["schema"]["features"]["history"] = {"kind": "id_list", "ids": "vocabulary", "max_length": 3}
    job["data"]["negatives"] = {"per_positive": 2, "task": "click"}
    learnt = []
    for place in (str(home / "here"), f"{bucket}/live"):
        job["data"]["train"], job["run"]["storage"] = f"{place}/train", f"{place}/runs"
        (home / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
        for day in (0, 1):
            shard = (home / f"made-{day}" / "part-0.parquet").read_bytes()
            storage.write(f"{place}/train/day-{day}.parquet", shard)
            result, _ = train(home, capsys)
        assert (result["steps"], result["rows"]) == (15, 240)
        manifest = read_manifest(result["checkpoint"])
        learnt.append(
            {
                file.file: {name: entry.checksums for name, entry in file.tensors.items()}
                for file in manifest.files()
            }
        )
        learnt[-1]["metrics"] = result["generations"][0]["metrics"]
    assert learnt[0] == learnt[1]


def test_follow_is_a_switch_or_a_section(tmp_path: Path) -> None:
    job = small_job(tmp_path, tmp_path)
    for value, poll_s in ((True, 60.0), ({"poll_s": 5.0}, 5.0), (False, None), (None, None)):
        job["data"]["follow"] = value
        follow = job_from_dict(job, "test").data.follow
        assert (follow.poll_s if follow is not None else None) == poll_s
    job["data"]["follow"] = {"poll": 5}
    with pytest.raises(InputError, match=r"data\.follow\.poll"):
        job_from_dict(job, "test")
    job["data"]["follow"] = True
    job["run"]["seeds"] = [1, 2]
    with pytest.raises(InputError, match=r"idle_s: the first of run\.seeds would wait"):
        job_from_dict(job, "test")
    job["run"]["seeds"] = None
    job["data"]["follow"] = {"state_decay": 0.5}
    job["optimizer"]["tables"] = {"kind": "sgd"}
    with pytest.raises(InputError, match=r"state_decay: sgd has no Adagrad state"):
        job_from_dict(job, "test")
