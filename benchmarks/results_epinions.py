"""Where sharing between tasks and knowing the scenario help on Epinions: the block of docs/epinions.md.

    python -m benchmarks.results_epinions SRC WORK --seeds 3

SRC holds epinions_ratings.parquet; WORK gets the prepared data and the runs, and the same command goes on
there. Trains the four jobs that `mtlrec prepare epinions` writes (both tasks, each alone, both without the
scenario) with every seed; each run is measured on test at the checkpoint that was best on valid.
Beside them stand the means of a row's user and item, as the models are told them (docs/epinions.md): over all
rows before the test, drawn to the general mean, which stands where there is none. The plain means of the rows
before valid are printed once. The intervals are user-paired bootstraps of the first seed's models (`mtlrec
evaluate A --against B`), the means of differences those of all seeds. Expected: 2 minutes a seed on one free
core, and one for the intervals.

Prints one block of markdown, and a line of JSON with `met`. N rows of the test, M rows before valid.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.commands import mtlrec, prepare, table
from mtlrec.data.prepare.epinions_job import JOBS
from mtlrec.metrics.sketch import ScoreSketch

TASKS = ("like", "helpful")
LEAST_POSITIVES = 100
"""Scenarios with fewer positive test rows are left out."""
BASELINES = {"user mean": "user", "item mean": "item"}
"""Name -> the history whose mean of the label is the score."""
BEFORE = ("earlier", "train")
JOINT, NO_SCENARIO = "job.yaml", "job_no_scenario.yaml"
ALONE = {"like": "job_like.yaml", "helpful": "job_helpful.yaml"}

Tree = dict[str, dict[str, dict[str, Any]]]
"""Scenario -> task -> metric, or baseline -> value."""


def train(data: Path, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Job file -> its runs by seed, as `mtlrec compare` gives them, measured on test."""
    found = {}
    for file in JOBS:
        name = JOBS[file][0]
        out = data / "runs" / f"results-{name}"
        options = ("--seeds", str(seeds), "--workers", "0", "--data", data / "test", "--out", out)
        (row,) = mtlrec("compare", data / file, *options)["variations"]
        found[file] = list(row["runs"].values())
    return found


def against(first: Path, second: Path, data: Path) -> Tree:
    """How much better `first` is than `second` on test, as `mtlrec evaluate first --against second` says."""
    return dict(mtlrec("evaluate", first, "--against", second, "--data", data / "test")["differences"])


def baselines(data: Path) -> Tree:
    """AUC on test of the row's history, and in "all" that of the plain means of the rows before valid."""
    columns = ["category_id", *TASKS]
    columns += [f"{key}_id" for key in BASELINES.values()]
    before = pa.concat_tables([pq.read_table(data / split, columns=columns) for split in BEFORE])
    test = pq.read_table(data / "test")
    scenario = test["category_id"].to_numpy()
    parts = {"all": np.ones(len(scenario), np.bool_)}
    parts |= {str(each): scenario == each for each in np.unique(scenario)}
    found: Tree = {part: {task: {} for task in TASKS} for part in parts}
    for name, key in BASELINES.items():
        for task in TASKS:
            positive = test[task].to_numpy() == 1
            past = test[f"{key}_{task}_mean"].fill_null(before[task].to_numpy().mean()).to_numpy()
            for part, rows in parts.items():
                found[part][task][name] = area(past[rows], positive[rows])
            plain = means(
                before[f"{key}_id"].to_numpy(), before[task].to_numpy(), test[f"{key}_id"].to_numpy()
            )
            found["all"][task][f"plain {name}"] = area(plain, positive)
    return found


def area(scores: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_]) -> float | None:
    """AUC of `scores` [N]; None where all are positive, or none is."""
    sketch = ScoreSketch()
    sketch.update(scores, positive)
    return sketch.auc()


def means(
    keys: npt.NDArray[np.int32], labels: npt.NDArray[np.int8], asked: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """[N]: mean of `labels` [M] over the rows whose `keys` [M] are `asked` [N]; over all where none are."""
    highest = int(max(keys.max(), asked.max()))
    count = np.bincount(keys, minlength=highest + 1)
    total = np.bincount(keys, labels, minlength=highest + 1)
    mean = np.where(count > 0, total / np.maximum(count, 1), labels.mean())
    return mean[asked].astype(np.float32)


def verdict(difference: Mapping[str, Any], by_seed: list[float]) -> str:
    """`helps` or `hurts` where the interval excludes 0 and every seed agrees; else `?`."""
    if difference["low"] > 0 and min(by_seed) > 0:
        return "helps"
    return "hurts" if difference["high"] < 0 and max(by_seed) < 0 else "?"


def block(
    task: str, differences: Mapping[str, Tree], runs: Mapping[str, list[dict[str, Any]]], base: Tree
) -> str:
    """The table of `task`: over all rows, then each scenario with enough positives, the largest first."""
    metrics: Tree = runs[JOINT][0]["metrics"]
    enough = [part for part in metrics if metrics[part].get(task, {}).get("positives", 0) >= LEAST_POSITIVES]
    rows = []
    for part in sorted(enough, key=lambda part: (part != "all", -metrics[part][task]["rows"])):
        measured = metrics[part][task]
        cells = [part, f"{measured['rows']:,}", f"{measured['positives']:,}", f"{measured['auc']:.4f}"]
        for file in (ALONE[task], NO_SCENARIO):
            found = differences[file][part][task]["auc"]
            by_seed = [
                joint["metrics"][part][task]["auc"] - other["metrics"][part][task]["auc"]
                for joint, other in zip(runs[JOINT], runs[file], strict=True)
            ]
            cells += [f"{found['b']:.4f}", interval(found), f"{statistics.fmean(by_seed):+.4f}"]
            cells.append(verdict(found, by_seed))
        cells += [f"{base[part][task][name]:.4f}" for name in BASELINES]
        rows.append(cells)
    head = [
        task,
        "rows",
        "positives",
        "joint",
        "single-task",
        "joint - single-task",
        "mean of seeds",
        "sharing",
    ]
    head += ["no scenario", "joint - no scenario", "mean of seeds", "knowing it"]
    return table([*head, *BASELINES], rows)


def interval(difference: Mapping[str, Any]) -> str:
    return f"{difference['difference']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"


def over_seeds(runs: Mapping[str, list[dict[str, Any]]], base: Tree) -> str:
    """AUC over all test rows: of every model, mean ± sample deviation over seeds; of the baselines."""
    rows = []
    for file, each in runs.items():
        cells = [JOBS[file][0]]
        for task in TASKS:
            known = task in JOBS[file][1]
            cells.append(_spread([run["metrics"]["all"][task]["auc"] for run in each]) if known else "")
        rows.append([*cells, str(len(each)), f"{statistics.fmean(run['seconds'] for run in each):.0f}"])
    for name in base["all"][TASKS[0]]:
        rows.append([name, *(f"{base['all'][task][name]:.4f}" for task in TASKS), "", ""])
    return table(["AUC, all test rows", *TASKS, "seeds", "seconds"], rows)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description="Where sharing and scenarios help on Epinions.")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of epinions_ratings.parquet")
    parser.add_argument("work", type=Path, metavar="WORK", help="gets data, runs and measurements")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every model")
    arguments = parser.parse_args()
    data = prepare("epinions", arguments.source, arguments.work.resolve())
    runs = train(data, arguments.seeds)
    first = {file: Path(each[0]["run_dir"]) for file, each in runs.items()}
    differences = {file: against(first[JOINT], first[file], data) for file in (*ALONE.values(), NO_SCENARIO)}
    base = baselines(data)
    for task in TASKS:
        print(block(task, differences, runs, base), end="\n\n")
    print(over_seeds(runs, base), end="\n\n")
    joint = {
        task: statistics.fmean(run["metrics"]["all"][task]["auc"] for run in runs[JOINT]) for task in TASKS
    }
    met = {
        f"{task} above {name}": joint[task] > value
        for task in TASKS
        for name, value in base["all"][task].items()
    }
    print(json.dumps({"met": met, "joint": joint, "differences": differences, "baselines": base}))


if __name__ == "__main__":
    main()
