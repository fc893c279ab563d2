"""Gradient-boosted trees on the census data: the line that docs/results.md prints beside mtlrec's.

    pip install -e '.[docs]'
    python -m benchmarks.census_lightgbm OUT --seeds 3

Reads the Parquet that `mtlrec prepare census` wrote to OUT, and imports nothing of mtlrec. One model a
task: the codes are categorical features; the seven numbers and the year are numbers. Trees are added until
the AUC on valid has not risen for `PATIENCE` of them; the best count of trees scores the test rows, once.
LightGBM is an extra of mtlrec that nothing else needs. Prints one JSON line with the AUC.

N rows of a split, F features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

TASKS = ("income", "never_married")
NOT_FEATURES = ("line", *TASKS)
"""`line` is the row's number in its file."""
MOST_TREES, PATIENCE = 3000, 100
PARAMETERS: dict[str, Any] = {
    "objective": "binary",
    "metric": "auc",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}

Matrix = npt.NDArray[np.float64]


def read(folder: Path) -> tuple[Matrix, dict[str, npt.NDArray[np.float64]], list[str], list[str]]:
    """A split: features [N, F], labels task -> [N], names of the features [F] and of the categorical ones."""
    table = pq.read_table(folder)
    features = [field for field in table.schema if field.name not in NOT_FEATURES]
    # Categories are int32 codes; so is the year, of which a number says as much.
    categories = [field.name for field in features if pa.types.is_int32(field.type) and field.name != "year"]
    names = [field.name for field in features]
    x = np.stack([table[name].to_numpy().astype(np.float64) for name in names], axis=1)
    return x, {task: table[task].to_numpy().astype(np.float64) for task in TASKS}, names, categories


def measure(
    out: Path, seeds: int, split: str = "test", chosen: dict[str, Any] | None = None
) -> dict[str, Any]:
    """AUC of both tasks on a split of the folder `out`, for the seeds 0, 1, ...; `chosen` over PARAMETERS."""
    start = time.perf_counter()
    settings = PARAMETERS | (chosen or {})
    x, y, names, categories = read(out / "train")
    valid_x, valid_y, _, _ = read(out / "valid")
    scored_x, scored_y, _, _ = read(out / split)
    aucs: dict[str, list[float]] = {task: [] for task in TASKS}
    on_valid: dict[str, list[float]] = {task: [] for task in TASKS}
    trees: dict[str, list[int]] = {task: [] for task in TASKS}
    for task in TASKS:
        for seed in range(seeds):
            parameters = settings | {"seed": seed, "num_threads": _threads()}
            learn = lightgbm.Dataset(
                x, y[task], feature_name=names, categorical_feature=categories, params=parameters
            )
            model = lightgbm.train(
                parameters,
                learn,
                num_boost_round=MOST_TREES,
                valid_sets=[lightgbm.Dataset(valid_x, valid_y[task], reference=learn)],
                callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
            )
            aucs[task].append(auc(scored_y[task], model.predict(scored_x)))
            on_valid[task].append(auc(valid_y[task], model.predict(valid_x)))
            trees[task].append(model.best_iteration)
            print(f"{task}, seed {seed}: {aucs[task][-1]:.5f}", file=sys.stderr, flush=True)
    return {
        "model": f"lightgbm {lightgbm.__version__}",
        "split": split,
        "parameters": settings,
        "trees": trees,
        "auc": aucs,
        "valid": on_valid,
        "mean": {task: statistics.fmean(values) for task, values in aucs.items()},
        "sd": {task: statistics.stdev(v) if len(v) > 1 else None for task, v in aucs.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="LightGBM on the census data.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that mtlrec prepare census wrote")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--split", default="test", help="rows that are scored (default: test)")
    for name in ("learning_rate", "num_leaves", "min_data_in_leaf", "feature_fraction", "bagging_fraction"):
        kind = type(PARAMETERS[name])
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=PARAMETERS[name])
    arguments = parser.parse_args()
    chosen = {key: value for key, value in vars(arguments).items() if key in PARAMETERS}
    print(json.dumps(measure(arguments.out, arguments.seeds, arguments.split, chosen)))


def auc(labels: npt.NDArray[np.float64], scores: npt.NDArray[np.float64]) -> float:
    """Share of the pairs of a positive and a negative row that are in order; a tie counts half."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    # The mean rank, from 1, of each group of equal scores.
    ranks = np.cumsum(sizes) - (sizes - 1) / 2
    positives = labels.sum()
    return float(
        (ranks[group][labels == 1].sum() - positives * (positives + 1) / 2)
        / (positives * (len(labels) - positives))
    )


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


if __name__ == "__main__":
    main()
