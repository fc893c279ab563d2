"""Comparisons: the table is plain arithmetic, runs are resumed, and the commands say what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mtlrec.cli import main
from mtlrec.commands.checkpoint import choose
from mtlrec.compare import cells as cells_module
from mtlrec.compare.cells import Outcome, Setting, run_cells
from mtlrec.compare.grid import Grid, read_grid
from mtlrec.compare.table import columns, comparison, markdown, mean_and_deviation
from mtlrec.data.prepare.catalog import PREPARERS
from mtlrec.job.errors import InputError
from tests.small_data import small_job, write_small_data


@pytest.fixture
def job(tmp_path: Path) -> str:
    """A job whose data is not there: nothing here reads any."""
    raw = small_job(Path("train"), Path("runs"), run__seeds=[7, 3])
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


def test_the_grid_resolves_every_job(job: str, tmp_path: Path) -> None:
    grid = read_grid(job, ["data.batch_size=96"], ["model.backbone={kind: mmoe, experts: 3},ple"], None)
    names = [cell.name for cell in grid.cells]
    assert len(set(names)) == 4 and names[1::2] == ["small-backbone-ple-seed7", "small-backbone-ple-seed3"]
    assert [cell.seed for cell in grid.cells] == [7, 7, 3, 3] == [cell.job.seed for cell in grid.cells]
    assert [cell.job.model.backbone.kind for cell in grid.cells] == ["mmoe", "ple"] * 2
    assert {cell.job.data.batch_size for cell in grid.cells} == {96}
    assert all(cell.job.run.seeds is None for cell in grid.cells)
    assert grid.cells[0].job.data.train == str(tmp_path / "train"), "paths start at the job file"
    larger = read_grid(job, [], ["model.backbone=mmoe,ple"], "9")
    assert "small-backbone-ple-seed7" in {cell.name for cell in larger.cells}, "a larger grid finds its runs"
    alone = read_grid(job, [], [], "4,")
    assert [cell.name for cell in alone.cells] == ["small-seed4"]


def test_a_long_name_is_cut_and_stays_its_own(job: str) -> None:
    vary = [f"schema.features.{'f' * 60}={{kind: number, column: {'x' * 70}}},{{kind: number}}"]
    grid = read_grid(job, ["name=" + "n" * 60], vary, "2")
    assert len({cell.name for cell in grid.cells}) == 4
    assert all(len(cell.name) <= 128 for cell in grid.cells)


# The table

tree = st.fixed_dictionaries(
    {"auc": st.none() | st.floats(0, 1), "rows": st.integers(0, 10**6), "reasons": st.just({"auc": "why"})}
)


@given(st.lists(tree, min_size=1, max_size=5))
def test_means_and_deviations_are_those_of_numpy(trees: list[dict[str, Any]]) -> None:
    means, deviations = mean_and_deviation([{"all": {"click": each}} for each in trees])
    assert means["all"]["click"].keys() == {"auc", "rows"}
    for metric in ("auc", "rows"):
        column = [each[metric] for each in trees]
        mean, deviation = means["all"]["click"][metric], deviations["all"]["click"][metric]
        if None in column:
            assert mean is None and deviation is None
        else:
            assert mean == pytest.approx(np.mean(column))
            spread = np.std(column, ddof=1) if len(column) > 1 else None
            assert deviation == (pytest.approx(spread, abs=1e-9) if spread is not None else None)


def metrics(auc: float | None, rmse: float = 1.0) -> dict[str, Any]:
    one = {"click": {"auc": auc, "gauc": None, "rows": 5}, "rating": {"rmse": rmse, "rows": 5}}
    return dict.fromkeys(("all", "ca", "de", "mx"), one)


def done(auc: float | None, rmse: float = 1.0, seconds: float = 10.0) -> Outcome:
    result = {"run_dir": "/r", "steps": 30, "parameters": {"dense": 1200, "tables": 34000}}
    return Outcome("done", 0, None, result, "/r/c", metrics(auc, rmse), seconds)


@pytest.fixture
def grid(job: str) -> Grid:
    return read_grid(job, [], ["model.backbone=mmoe,ple,shared_bottom"], None)


def test_the_table_is_plain_arithmetic(grid: Grid) -> None:
    mmoe, ple, shared = (f"small-backbone-{name}-seed" for name in ("mmoe", "ple", "shared_bottom"))
    outcomes = {
        f"{mmoe}7": done(0.7, 1.0),
        f"{mmoe}3": done(0.8, 2.0, 30.0),
        f"{ple}7": done(0.9, 3.0),
        f"{shared}7": Outcome("failed", 1, "out of luck"),
    }
    found = comparison(grid, outcomes, None, None)
    assert found["columns"] == ["all/click/auc", "all/rating/rmse"] and not found["complete"]
    first, second, third = found["variations"]
    assert first["settings"] == {"model.backbone": "mmoe"}
    assert (first["n"], second["n"], third["n"], third["failed"]) == (2, 1, 0, 1)
    assert first["mean"]["de"]["click"]["auc"] == pytest.approx(0.75)
    assert first["deviation"]["all"]["click"]["auc"] == pytest.approx(np.std([0.7, 0.8], ddof=1))
    assert second["deviation"]["all"]["click"]["auc"] is None
    assert (first["seconds"], first["steps"]) == (20.0, 30)
    assert third["runs"]["7"]["error"] == "out of luck" and third["runs"]["3"]["status"] == "waiting"
    assert json.loads(json.dumps(found)) == found
    lines = markdown(found).splitlines()
    assert lines[0] == "| model.backbone | click/auc | rating/rmse | n | steps | seconds | dense | tables |"
    assert lines[2:] == [
        "| mmoe | 0.7500 ± 0.0707 | **1.5000** ± 0.7071 | 2 | 30 | 20 | 1,200 | 34,000 |",
        "| ple | **0.9000** ± - | 3.0000 ± - | 1 | 30 | 10 | 1,200 | 34,000 |",
        "| shared_bottom | - | - | 0 | - | - | - | - |",
    ]
    assert markdown(found, by_scenario=True).count("| ple | **0.9000** ± - | 3.0000 ± - | 1 |\n") == 3


def test_columns_can_be_chosen(grid: Grid) -> None:
    assert columns(grid, []) is None
    assert columns(grid, ["rmse", "click/logloss", "de/click/auc", "all/click/auc"]) == [
        ("all", "rating", "rmse"),
        ("all", "click", "logloss"),
        ("de", "click", "auc"),
        ("all", "click", "auc"),
    ]
    for wrong in ("nosuch", "rating/auc", "fr/click/auc", "buy/auc"):
        with pytest.raises(InputError, match=f"--metric {wrong}: .*click/auc"):
            columns(grid, [wrong])
    found = comparison(grid, {}, [("de", "click", "auc")], "/data")
    assert "| de/click/auc |" in markdown(found)


# The runs: a program in place of mtlrec, so that only how runs are started and kept is tried here

CHILD = """
import json, os, pathlib, signal, sys, time
command, target, *rest = sys.argv[1:]
if command == "evaluate":
    data = rest[rest.index("--data") + 1]
    runs = pathlib.Path(target).parent
    with open(runs / "calls", "a") as file:
        print("evaluate", pathlib.Path(target).name, file=file)
    one = {"click": {"auc": 0.25}, "rating": {"rmse": 1.0}}
    print(json.dumps({"checkpoint": target, "data": data, "metrics": {"all": one}}))
    sys.exit(0)
job = json.loads(pathlib.Path(target).read_text())
runs = pathlib.Path(job["run"]["storage"])
run = runs / job["name"]
run.mkdir(parents=True, exist_ok=True)
with open(runs / "calls", "a") as file:
    print("train", job["name"], file=file)
print("learning", file=sys.stderr)
if (run / "result.json").exists():
    print(json.dumps({**json.loads((run / "result.json").read_text()), "already_finished": True}))
    sys.exit(0)
if (runs / "fail").exists() and (runs / "fail").read_text() in job["name"]:
    print("it broke", file=sys.stderr)
    sys.exit(1)
result = {"run_dir": str(run), "checkpoint": f"{runs}/last-{job['seed']}", "steps": 5, "seconds": 2.0,
          "stopped": False, "parameters": {"dense": 1, "tables": 2},
          "metrics": {"all": {"click": {"auc": 0.5}, "rating": {"rmse": 1.0}}}}
def save():
    folder = run / "checkpoints" / "step-000000000001.a0001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
if (runs / "wait").exists():
    def stop(number, frame):
        save()
        print(json.dumps({**result, "stopped": True}), flush=True)
        sys.exit(3)
    signal.signal(signal.SIGINT, stop)
    (run / "ready").touch()
    if (runs / "interrupt").exists():
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if (runs / "best").exists():
    better = {"all": {"click": {"auc": job["seed"] / 10}, "rating": {"rmse": 1.0}}}
    result["best"] = {"checkpoint": f"{runs}/best-{job['seed']}", "step": 4, "score": 1, "metrics": better}
save()
(run / "result.json").write_text(json.dumps(result))
print(json.dumps(result))
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runs lie: their `calls`; files `fail`, `wait`, `interrupt` and `best` change how they go."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    monkeypatch.setattr(cells_module, "COMMAND", (sys.executable, str(child)))
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def calls(runs: Path) -> list[str]:
    """What has been started since the last look."""
    found = (runs / "calls").read_text().splitlines() if (runs / "calls").exists() else []
    (runs / "calls").unlink(missing_ok=True)
    return found


def perform(
    grid: Grid,
    runs: Path,
    data: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    parallel: int = 1,
) -> tuple[dict[str, Outcome], list[str]]:
    lines: list[str] = []
    setting = Setting(str(runs / "out"), data, "f1", parallel=parallel)
    outcomes = run_cells(
        grid.cells, setting, say=lines.append, should_stop=stop, changed=lambda outcomes: None
    )
    return outcomes, lines


def test_a_failing_run_is_reported_and_the_others_go_on(grid: Grid, runs: Path) -> None:
    (runs / "fail").write_text("ple-seed7")
    outcomes, lines = perform(grid, runs)
    assert [each.status for each in outcomes.values()].count("done") == 5
    assert outcomes["small-backbone-ple-seed7"].error == "it broke"
    assert sum("failed after" in line and "it broke" in line for line in lines) == 1
    assert any("to go, about" in line for line in lines)
    assert "learning" in (runs / "out" / "logs" / "small-backbone-mmoe-seed7.log").read_text()
    calls(runs)
    (runs / "fail").unlink()
    again, lines = perform(grid, runs, parallel=3)
    assert {each.status for each in again.values()} == {"done"}
    assert sum("had finished before" in line for line in lines) == 5


def test_what_was_measured_is_kept_while_checkpoint_and_data_stay(grid: Grid, runs: Path) -> None:
    (runs / "best").touch()
    outcomes, _ = perform(grid, runs)
    assert outcomes["small-backbone-ple-seed3"].metrics == {
        "all": {"click": {"auc": 0.3}, "rating": {"rmse": 1.0}}
    }, "the best checkpoint's"
    calls(runs)
    outcomes, _ = perform(grid, runs, "/data")
    assert [call for call in calls(runs) if call.startswith("evaluate")] == [
        f"evaluate best-{seed}" for seed in (7, 7, 7, 3, 3, 3)
    ]
    assert {each.metrics["all"]["click"]["auc"] for each in outcomes.values() if each.metrics} == {0.25}
    perform(grid, runs, "/data")
    assert not [call for call in calls(runs) if call.startswith("evaluate")]
    perform(grid, runs, "/other")
    assert len([call for call in calls(runs) if call.startswith("evaluate")]) == 6


def test_what_was_measured_of_a_run_that_was_removed_is_not_kept(job: str, runs: Path) -> None:
    """Its successor has the same URL, whether the comparison trains it or somebody else."""
    grid = read_grid(job, [], [], "3,")
    perform(grid, runs, "/data")
    calls(runs)
    result = runs / "small-seed3" / "result.json"
    shutil.rmtree(result.parent)
    outcomes, _ = perform(grid, runs, "/data")
    assert [call for call in calls(runs) if call.startswith("evaluate")] == ["evaluate last-3"]
    assert outcomes["small-seed3"].seconds == 2.0
    result.write_text(json.dumps({**json.loads(result.read_text()), "seconds": 7.0}))
    outcomes, _ = perform(grid, runs, "/data")
    assert [call for call in calls(runs) if call.startswith("evaluate")] == ["evaluate last-3"]
    assert outcomes["small-seed3"].seconds == 7.0
    perform(grid, runs, "/data")
    assert not [call for call in calls(runs) if call.startswith("evaluate")]


def test_a_finished_run_keeps_its_time_through_a_failed_start(job: str, runs: Path) -> None:
    grid = read_grid(job, [], [], "3,")
    perform(grid, runs)
    result = runs / "small-seed3" / "result.json"
    text = result.read_text()
    result.unlink()
    (runs / "fail").write_text("seed3")
    outcomes, _ = perform(grid, runs)
    assert outcomes["small-seed3"].status == "failed"
    (runs / "fail").unlink()
    result.write_text(text)
    outcomes, _ = perform(grid, runs)
    assert outcomes["small-seed3"].seconds == 2.0, "not twice"


def test_a_stop_reaches_the_run_and_its_time_counts_after_the_resume(grid: Grid, runs: Path) -> None:
    (runs / "wait").touch()
    ready = runs / "small-backbone-mmoe-seed7" / "ready"
    outcomes, _ = perform(grid, runs, stop=ready.exists)
    assert [(each.status, each.seconds) for each in outcomes.values()] == [("stopped", 2.0)]
    assert calls(runs) == ["train small-backbone-mmoe-seed7"]
    (runs / "wait").unlink()
    outcomes, _ = perform(grid, runs)
    assert [each.seconds for each in outcomes.values()] == [4.0, *[2.0] * 5]
    outcomes, _ = perform(grid, runs)
    assert [each.seconds for each in outcomes.values()] == [4.0, *[2.0] * 5]


def test_a_second_interrupt_ends_the_runs_at_once(grid: Grid, runs: Path) -> None:
    (runs / "wait").touch()
    ready = runs / "small-backbone-mmoe-seed7" / "ready"

    def interrupted() -> bool:
        if ready.exists():
            raise KeyboardInterrupt
        return False

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        perform(grid, runs, stop=interrupted)
    assert time.monotonic() - began < 30
    assert calls(runs) == ["train small-backbone-mmoe-seed7"]


# The commands


def test_a_wrong_variation_is_named_before_anything_runs(
    job: str, tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--vary", "model.backbone=mmoe,nosuch"], "--vary model.backbone=nosuch: "),
        (["--vary", "model.dims=3"], "model.dims: unknown field"),
        (["--metric", "nosuch"], "--metric nosuch"),
        (["--seeds", "3,3"], "stands twice"),
        (["--parallel", "0"], "--parallel 0"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
        (["--set", "data.eval=null"], "--data"),
        (["--address", "127.0.0.1:1"], "127.0.0.1:1"),
    ):
        assert main(["compare", job, *arguments]) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and not out
    assert not list(runs.iterdir())


def test_compare_prints_one_object_and_writes_both_tables(
    job: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vary = ["--vary", "model.backbone=mmoe,ple", "--vary", "model.dim=4,8"]
    assert main(["compare", job, *vary, "--json"]) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and found["complete"] and len(found["variations"]) == 4
    folder = runs / "small-compare"
    assert json.loads((folder / "compare.json").read_text()) == found
    assert "| ple | 8 | **0.5000** ± 0.0000 |" in (folder / "compare.md").read_text()
    (runs / "fail").write_text("mmoe-dim-12")
    more = ["--vary", "model.dim=4,8,12", "--out", str(runs / "else")]
    assert main(["compare", job, *vary[:2], *more]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("| model.backbone | model.dim |") and "it broke" in err
    assert "- small-backbone-mmoe-dim-12-seed7 failed: it broke" in (runs / "else" / "compare.md").read_text()


def test_a_stopped_comparison_exits_with_3(job: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "wait").touch()
    (runs / "interrupt").touch()
    assert main(["compare", job, "--json"]) == 3
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["variations"]
    assert [run["status"] for run in row["runs"].values()] == ["stopped", "waiting"]
    assert "the same command goes on from here" in err


def test_train_with_seeds_is_one_run_for_each(
    job: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "best").touch()
    assert main(["train", job, "--json", "--name", "other"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["seeds"].keys() == {"7", "3"} and found["seeds"]["3"]["steps"] == 5
    assert found["mean"]["all"]["click"]["auc"] == pytest.approx(0.5)
    assert found["deviation"]["all"]["click"]["auc"] == pytest.approx(np.std([0.7, 0.3], ddof=1))
    assert calls(runs) == ["train other-seed7", "train other-seed3"]
    assert "| other | 0.5000 ± 0.2828 |" in err


def test_a_run_means_its_best_checkpoint_unless_the_last_is_asked_for(tmp_path: Path) -> None:
    def checkpoint(step: int) -> str:
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:012d}.a0001"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        return str(folder)

    first, second = checkpoint(3), checkpoint(6)
    run = str(tmp_path / "run")
    assert choose(run, last=False) == (second, "the run's latest")
    moved = first.replace(str(tmp_path), "/where/it/was/trained")
    (tmp_path / "run" / "result.json").write_text(json.dumps({"best": {"checkpoint": moved}}))
    assert choose(run, last=False) == (first, "the run's best")
    assert choose(run, last=True) == (second, "the run's latest")
    assert choose(second, last=False) == (second, "as named")
    (tmp_path / "run" / "result.json").write_text(
        json.dumps({"best": {"checkpoint": "/gone/step-000000000004.a0001"}})
    )
    url, which = choose(run, last=False)
    assert url == second and which == "the run's latest, as its best, step-000000000004.a0001, is not there"
    odds: tuple[Any, ...] = (
        {"best": None},
        {"best": first},
        {"best": [1]},
        {"best": {}},
        {"best": {"checkpoint": 3}},
        [1],
    )
    for odd in odds:
        (tmp_path / "run" / "result.json").write_text(json.dumps(odd))
        assert choose(run, last=False) == (second, "the run's latest")


def test_data_of_the_comparison_is_opened_first(
    job: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small_data(tmp_path / "held", rows=50, shards=1)
    assert main(["compare", job, "--data", str(tmp_path / "held"), "--json", "--set", "data.eval=null"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == str(tmp_path / "held")
    assert found["variations"][0]["mean"]["all"]["click"]["auc"] == 0.25


def test_help_names_what_can_be_prepared(capsys: pytest.CaptureFixture[str]) -> None:
    """Written out there, as importing the catalogue would slow every command."""
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in PREPARERS)


@pytest.mark.parametrize("options", [["--replicates", "9"], ["--against", "x", "--replicates", "0"]])
def test_replicates_need_another_model_and_a_number(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "nowhere", *options]) == 2
    assert f"--replicates {options[-1]}: " in capsys.readouterr().err
