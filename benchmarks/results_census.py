"""What mtlrec reaches on all test rows of Census-Income, beside LightGBM: the block of docs/results.md.

    pip install -e '.[docs]'      # LightGBM; without it: --without-lightgbm
    python -m benchmarks.results_census SRC WORK --seeds 3

SRC holds the published files; WORK gets the prepared data, the runs and what was measured, and the same
command goes on there. Trains the job that `mtlrec prepare census` writes with each of its three backbones,
and once more balanced by uncertainty, with every seed; each run is measured after the epoch that was best on
valid. The model that is best on valid is the one that has to reach `WANTED`. Expected: 20 minutes on one
core, six of them LightGBM's.

Prints one block of markdown, and a line of JSON with `met`. N rows of the test.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import yaml

from benchmarks.commands import mtlrec, prepare, table
from mtlrec.data.prepare.census_job import JOBS
from mtlrec.metrics.sketch import ScoreSketch

TASKS = ("income", "never_married")
WANTED = {"income": 0.9545, "never_married": 0.9946}
"""Mean AUC of the issue."""
UNCERTAINTY = {"objective.balance": "uncertainty", "schema.tasks.income.weight": "1.0"}
"""The losses' weights are learnt (Kendall et al. 2018), from 1 for both."""
BALANCED = "shared_bottom"
"""The backbone that is trained with it too."""
HALVINGS = 200


@dataclass(frozen=True)
class Model:
    """One row of the table; every AUC by task, then by seed."""

    name: str
    test: dict[str, list[float]]
    valid: dict[str, list[float]]
    trained: str
    """Epochs or trees of the model that was scored, by seed."""
    parameters: int | None
    """Of the dense part."""
    seconds: float
    """Of training, mean over seeds."""
    run_dirs: tuple[str, ...] = ()
    """By seed."""

    def mean(self, task: str) -> float:
        return statistics.fmean(self.test[task])

    @property
    def chosen_by(self) -> float:
        """Mean over tasks and seeds of AUC on valid, by which the best model is chosen."""
        return statistics.fmean(value for values in self.valid.values() for value in values)


def compare(data: Path, seeds: int) -> list[Model]:
    """The job with every backbone, then one of them with the balance that is learnt."""
    backbones = {yaml.safe_load(backbone)["kind"]: backbone for _, backbone, *_ in JOBS.values()}
    models = _compare(data, seeds, "census", [*backbones], [*backbones.values()], {})
    learnt = _compare(
        data,
        seeds,
        "census-uncertainty",
        [f"{BALANCED}, uncertainty"],
        [backbones[BALANCED]],
        UNCERTAINTY,
    )
    return [*models, *learnt]


def _compare(
    data: Path, seeds: int, name: str, titles: list[str], backbones: list[str], settings: dict[str, str]
) -> list[Model]:
    """`mtlrec compare` of the job, under `name` and with `settings`, over `backbones` and the seeds."""
    options = ["--seeds", str(seeds), "--workers", "0", "--vary", "model.backbone=" + ",".join(backbones)]
    for path, value in {"name": name, **settings}.items():
        options += ["--set", f"{path}={value}"]
    out = data / "runs" / f"{name}-results"
    found = mtlrec("compare", data / "job.yaml", "--data", data / "test", "--out", out, *options)
    return [_read(row, title) for row, title in zip(found["variations"], titles, strict=True)]


def _read(row: dict[str, Any], name: str) -> Model:
    runs = list(row["runs"].values())
    best = [json.loads((Path(run["run_dir"]) / "result.json").read_text())["best"] for run in runs]
    return Model(
        name=name,
        test={task: [run["metrics"]["all"][task]["auc"] for run in runs] for task in TASKS},
        valid={task: [each["metrics"]["all"][task]["auc"] for each in best] for task in TASKS},
        trained="steps " + ", ".join(str(each["step"]) for each in best),
        parameters=row["parameters"]["dense"],
        seconds=row["seconds"],
        run_dirs=tuple(run["run_dir"] for run in runs),
    )


def light_gbm(data: Path, seeds: int) -> Model:
    """benchmarks/census_lightgbm.py, whose result is kept beside the runs."""
    kept = data / "runs" / f"lightgbm-{seeds}.json"
    if not kept.exists():
        from benchmarks import census_lightgbm

        kept.write_text(json.dumps(census_lightgbm.measure(data, seeds)))
    found = json.loads(kept.read_text())
    trees = "; ".join(", ".join(map(str, found["trees"][task])) for task in TASKS)
    return Model(
        name=found["model"],
        test=found["auc"],
        valid=found["valid"],
        trained=f"trees {trees}",
        parameters=None,
        seconds=found["seconds"] / seeds,
    )


def halves(run_dir: Path, data: Path) -> dict[str, float]:
    """Sample deviation of the run's AUC of each task between random halves of the test rows."""
    rows = pq.read_table(data / "test", columns=["line", *TASKS])
    out = run_dir.parent / "predictions" / run_dir.name
    if not (out / "_predictions.json").exists():
        shutil.rmtree(out, ignore_errors=True)  # of a call that was cut off
        mtlrec("predict", run_dir, "--data", data / "test", "--out", out, "--keys", "line")
    scores = pq.read_table(out)
    if not scores["line"].equals(rows["line"]):
        raise SystemExit(f"{out}: not the predictions of the test rows; remove the folder")
    generator = np.random.default_rng(0)
    count = len(rows)
    chosen = [generator.permutation(count)[: count // 2] for _ in range(HALVINGS)]
    return {
        task: _deviation(scores[task].to_numpy().astype(np.float32), rows[task].to_numpy() == 1, chosen)
        for task in TASKS
    }


def _deviation(
    scores: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_], halves: list[npt.NDArray[np.int64]]
) -> float:
    """`scores` and `positive` [N]; `halves`: each N // 2 rows. Sample deviation of AUC over the halves."""
    areas = []
    for half in halves:
        sketch = ScoreSketch()
        sketch.update(scores[half], positive[half])
        area = sketch.auc()
        assert area is not None, "both labels are frequent"
        areas.append(area)
    return statistics.stdev(areas)


def spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.5f}"
    return f"{mean} ± {statistics.stdev(values):.5f}" if len(values) > 1 else mean


def block(models: list[Model]) -> str:
    rows = [
        [
            model.name,
            *(spread(model.test[task]) for task in TASKS),
            *(f"{statistics.fmean(model.valid[task]):.5f}" for task in TASKS),
            model.trained,
            "" if model.parameters is None else f"{model.parameters:,}",
            f"{model.seconds:.0f}",
        ]
        for model in models
    ]
    head = ["mean AUC", *(f"{task}, test" for task in TASKS), *(f"{task}, valid" for task in TASKS)]
    return table([*head, "scored after", "dense parameters", "seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="What mtlrec reaches on Census-Income.")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of the published files")
    parser.add_argument("work", type=Path, metavar="WORK", help="gets data, runs and measurements")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every model")
    parser.add_argument("--without-lightgbm", action="store_true", help="leave out the line of LightGBM")
    arguments = parser.parse_args()
    with_trees = not arguments.without_lightgbm
    if with_trees and importlib.util.find_spec("lightgbm") is None:
        print("lightgbm is not installed: pip install -e '.[docs]', or --without-lightgbm", file=sys.stderr)
        raise SystemExit(2)
    data = prepare("census", arguments.source, arguments.work.resolve())
    ours = compare(data, arguments.seeds)
    best = max(ours, key=lambda model: model.chosen_by)
    trees = light_gbm(data, arguments.seeds) if with_trees else None
    deviation = halves(Path(best.run_dirs[0]), data)
    reached = " / ".join(f"{best.mean(task):.5f}" for task in TASKS)
    wanted = " / ".join(f"{value:.4f}" for value in WANTED.values())
    met = {task: best.mean(task) >= value for task, value in WANTED.items()}
    print(block([*ours, trees] if trees else ours))
    print(f"\nBest on valid: {best.name}, {reached} on test. At least {wanted} is", end=" ")
    print("met." if all(met.values()) else "NOT met.")
    if trees:
        met["above_lightgbm"] = all(best.mean(task) > trees.mean(task) for task in TASKS)
        less = " / ".join(f"{best.mean(task) - trees.mean(task):+.5f}" for task in TASKS)
        print(f"\nIts test AUC less LightGBM's: {less}. Above it is", end=" ")
        print("met." if met["above_lightgbm"] else "NOT met.")
    halved = " / ".join(f"{deviation[task]:.5f}" for task in TASKS)
    print(
        f"\nSample deviation of the AUC of {best.name}, seed 0, between {HALVINGS} random halves of the test "
        f"rows: {halved}.\n"
    )
    result = {"met": met, "models": [asdict(each) for each in ours], "halves": deviation}
    if trees:
        result["lightgbm"] = asdict(trees)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
