"""`mtlrec train --fork`: what comes along, what may change, what is refused, and that the source stays."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtlrec import actions, distributed
from mtlrec.checkpoint.folder import discard, latest, list_checkpoints
from mtlrec.cli import main
from mtlrec.control import Silent
from mtlrec.job.errors import InputError
from mtlrec.job.job import job_from_dict
from mtlrec.preflight import open_run
from tests.distributed.test_training import checkpoint_bytes, recorded_rows
from tests.small_data import small_job, write_small_data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a job, and its run `small`, stopped after 20 of its 96 steps."""
    folder = tmp_path_factory.mktemp("home")
    write_small_data(folder / "train")
    write_small_data(folder / "other", rows=400, shards=2, seed=1)
    job = small_job(Path("train"), Path("runs"), data__eval=None)
    job["run"] |= {"record_rows": True, "max_steps": 20}
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    assert main(["train", str(folder / "job.yaml"), "--quiet"]) == 0
    return folder


def command(home: Path, *more: str) -> list[str]:
    return ["train", str(home / "job.yaml"), *more, "--json"]


def train(
    home: Path, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0
) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    found = main(command(home, *more))
    out, err = capsys.readouterr()
    assert found == code, err
    return json.loads(out), err


def files(run: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def test_an_unchanged_fork_is_the_source_going_on_to_the_bit(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = home / "runs" / "small"
    before = files(source)
    forked, err = train(home, capsys, "--fork", "same", "--set", "run.max_steps=40")
    assert "forking same from" in err and "step 20; its order of rows goes on" in err
    assert files(source) == before, "the source was written to"
    assert (forked["steps"], forked["run_dir"]) == (40, str(home / "runs" / "same"))
    straight, _ = train(home, capsys, "--name", "straight", "--set", "run.max_steps=40")
    assert checkpoint_bytes(forked) == checkpoint_bytes(straight)
    assert recorded_rows(forked["run_dir"]) == recorded_rows(straight["run_dir"])[20:]
    origin = {
        "run": str(source),
        "checkpoint": str(source / "checkpoints" / "step-000000000020.a0001"),
        "step": 20,
        "order": "kept",
    }
    capsys.readouterr()
    assert main(["inspect", forked["checkpoint"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forked_from"] == origin
    assert main(["inspect", forked["run_dir"]]) == 0
    assert f"forked from  {origin['checkpoint']}" in capsys.readouterr().out


def test_a_fork_stands_alone_after_its_first_checkpoint(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both the same command and its own name go on with it; it keeps saying where it came from."""
    first, _ = train(
        home, capsys, "--fork", "alone", "--set", "run.max_steps=24", "--set", "optimizer.dense.lr=0.001"
    )
    again = ("--set", "run.max_steps=28", "--set", "optimizer.dense.lr=0.001")
    begun = list_checkpoints(first["run_dir"])[0]
    assert begun.step == 20, "written before its first step"
    result, err = train(home, capsys, "--fork", "alone", *again)
    assert "resuming alone at step 24" in err and result["rows"] == 4 * 48
    result, err = train(home, capsys, "--fork", "alone", *again)
    assert result["already_finished"] and "run alone has finished" in err
    result, _ = train(home, capsys, "--name", "alone", *again, "--set", "run.max_steps=30")
    capsys.readouterr()
    assert main(["inspect", result["checkpoint"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forked_from"]["step"] == 20
    refused, _ = train(home, capsys, "--fork", "alone", "--set", "run.max_steps=40", code=2)
    assert "optimizer.dense.lr was 0.001, is 0.003" in refused["error"] and "--fork" in refused["error"]


@pytest.mark.parametrize("command", [("--fork", "early"), ("--name", "early")])
def test_a_fork_cut_off_before_its_first_checkpoint_starts_from_the_source_again(
    home: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, str]
) -> None:
    job = job_from_dict(yaml.safe_load((home / "job.yaml").read_text()), "test").to_dict()
    name = f"early{command[0].strip('-')}"
    job["data"]["train"], job["run"]["storage"] = str(home / "train"), str(home / "runs")
    opened = open_run(job_from_dict({**job, "run": {**job["run"], "max_steps": 22}}, "test"), {}, print, name)
    assert isinstance(opened, tuple)
    opened[1].release()  # the driver is gone
    assert latest(str(home / "runs" / name)) is None
    result, err = train(home, capsys, command[0], name, "--set", "run.max_steps=22")
    assert "step 20; its order of rows goes on" in err
    assert (result["steps"], result["rows"]) == (22, 96)


def test_a_checkpoint_that_the_source_removes_before_it_is_read_is_told(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doomed, _ = train(home, capsys, "--name", "doomed", "--set", "run.max_steps=2")
    job = yaml.safe_load((Path(doomed["run_dir"]) / "job.yaml").read_text())
    job["run"]["max_steps"] = 4
    opened = open_run(job_from_dict(job, "test"), {}, lambda event: None, "orphan")
    assert isinstance(opened, tuple)
    run, lease = opened
    discard(doomed["checkpoint"])
    world = distributed.init_single_process(60)
    try:
        with (
            lease,
            pytest.raises(InputError, match=r"000002\.a0001: its run has removed .*start the command"),
        ):
            actions.perform("train", asdict(run), world, Silent())
    finally:
        distributed.shut_down()


def test_other_data_start_a_new_order_with_the_learnt_weights(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("data.train=other", "run.max_steps=null", "run.epochs=2", "data.batch_size=40")
    sets = [word for change in changes for word in ("--set", change)]
    sets[1] = f"data.train={home / 'other'}"
    result, err = train(home, capsys, "--fork", "moved", *sets)
    assert "its order of rows starts anew: data.train has other shards" in err
    assert (result["steps"], result["rows"]) == (20 + 2 * 10, 800)
    recorded = recorded_rows(result["run_dir"])
    for epoch in (recorded[:10], recorded[10:]):
        assert sorted(row for step in epoch for row in step) == list(range(400))


def test_the_balance_of_the_losses_may_change(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("--set", "objective.balance=uncertainty", "--set", "run.max_steps=22")
    first, _ = train(home, capsys, "--fork", "balanced", *sets)
    back, _ = train(home, capsys, "--name", "balanced", "--fork", "plain", "--set", "run.max_steps=24")
    found = {}
    for result in (first, back):
        capsys.readouterr()
        assert main(["inspect", result["checkpoint"], "--json"]) == 0
        dense = json.loads(capsys.readouterr().out)["dense"]
        found[result["run_dir"]] = [each["name"] for each in dense if ".objective." in f".{each['name']}"]
    assert found[first["run_dir"]] and not found[back["run_dir"]]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("model.dim=16", "model.dim was 8, is 16"),
        ("schema.features.item_id.rows=6000", "schema.features.item_id.rows was 5000, is 6000"),
        ("optimizer.tables.kind=adagrad", "optimizer.tables.kind was 'rowwise_adagrad', is 'adagrad'"),
        ("optimizer.dense={kind: sgd, lr: 0.1}", "optimizer.dense.kind was 'adam', is 'sgd'"),
        ("run.max_steps=20", "nothing is left to train; raise run.max_steps"),
        ("run.seeds=[1, 2]", "run.seeds asks for several"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(
    home: Path, capsys: pytest.CaptureFixture[str], changed: str, words: str
) -> None:
    sets = ("--set", "run.max_steps=40", "--set", changed)
    refused, _ = train(home, capsys, "--fork", "refused", *sets, code=2)
    assert words in refused["error"] and "\n" not in refused["error"]
    assert not (home / "runs" / "refused").exists()


def test_names_that_cannot_be_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("--fork", "small"), "the run's own name"),
        (("--fork", "a/b"), "name"),
        (("--name", "nobody", "--fork", "new"), "no complete checkpoint that a fork could start from"),
    ):
        refused, _ = train(home, capsys, *arguments, code=2)
        assert words in refused["error"]
    train(home, capsys, "--name", "another", "--set", "run.max_steps=2")
    refused, _ = train(home, capsys, "--fork", "another", code=2)
    assert "is no fork of small" in refused["error"]


def test_a_changed_job_is_pointed_to_fork(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused, _ = train(home, capsys, "--set", "model.dropout=0.5", code=2)
    assert "model.dropout was 0.0, is 0.5" in refused["error"] and "--fork NEW_NAME" in refused["error"]
