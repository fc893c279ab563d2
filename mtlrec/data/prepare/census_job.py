"""The jobs that come with the census data: one recipe, three backbones. docs/census.md has their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

NUMBERS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "stock_dividends",
    "num_emp",
    "weeks_worked",
)
YEARS = (94, 95)
"""The scenarios."""
BUCKETS = 30
"""At most, of the numbers above 0; 0 has a bucket of its own."""

RECIPE: dict[str, Any] = {
    "dim": 8,
    "table_init": 0.01,
    "tower": "[32]",
    "dropout": 0.1,
    "income_weight": 3.0,
    "batch_size": 1024,
    "table_lr": 0.2,
    "dense_lr": 0.005,
    "epochs": 5,
    "decay_steps": 880,
}
"""Chosen on valid."""

JOBS = {
    "job.yaml": (
        "census-mmoe",
        "{kind: mmoe, experts: 2, hidden: [256, 128]}",
        "75 s",
        "0.9557 / 0.9948",
    ),
    "job_ple.yaml": (
        "census-ple",
        "{kind: ple, levels: 1, shared_experts: 1, task_experts: 1, hidden: [256, 128]}",
        "85 s",
        "0.9557 / 0.9948",
    ),
    "job_shared_bottom.yaml": (
        "census-shared-bottom",
        "{kind: shared_bottom, hidden: [256, 128]}",
        "45 s",
        "0.9557 / 0.9948",
    ),
}
"""File -> name of the run, backbone, time on one core, and AUC of both tasks on the test rows."""

_JOB = """\
# Census-Income (KDD): income above 50,000, and never married; the scenario is the year. From this folder:
#   mtlrec train {file} --workers 0              {time} on one core; without --workers 0, on Ray
#   mtlrec evaluate runs/{name} --data test      of the epoch that was best on valid
# Expected on the 99,762 test rows: AUC {auc} (income / never_married), +-0.0003 / 0.0001 by seed.
# `mtlrec prepare census` wrote this; docs/census.md has the protocol. Ids are codes of categories.json.
name: {name}
seed: 0
schema:
  scenario: {{column: year, values: [{years}]}}
  features:
{features}
  tasks:
    income: {{kind: binary, weight: {income_weight}}}
    never_married: {{kind: binary}}
data:
  train: train
  eval: valid
  batch_size: {batch_size}
model:
  dim: {dim}
  table_init: {table_init}
  backbone: {backbone}
  tower: {{hidden: {tower}}}
  dropout: {dropout}
optimizer:
  tables: {{kind: rowwise_adagrad, lr: {table_lr}}}
  # 176 steps an epoch.
  dense: {{kind: adam, lr: {dense_lr}, schedule: {{decay: linear, decay_steps: {decay_steps}}}}}
run:
  workers: 2
  epochs: {epochs}
  evaluate: {{every_epochs: 1, metric: [income/auc, never_married/auc]}}
"""


def job_text(file: str, sizes: Mapping[str, int], numbers: Mapping[str, npt.NDArray[np.float64]]) -> str:
    """YAML of the job `file`: `sizes` of the categorical columns' tables, `numbers` of the learn file."""
    name, backbone, time, auc = JOBS[file]
    features = [f"{column}: {{kind: id, ids: identity, rows: {rows}}}" for column, rows in sizes.items()]
    for column, values in numbers.items():
        listed = ", ".join(f"{value:.17g}" for value in boundaries(values))
        features += [
            f"{column}: {{kind: number, transform: log1p}}",
            f"{column}_bucket: {{kind: number, column: {column}, transform: bucketise, "
            f"boundaries: [{listed}]}}",
        ]
    return _JOB.format(
        file=file,
        name=name,
        time=time,
        auc=auc,
        years=", ".join(map(str, YEARS)),
        features="\n".join(f"    {feature}" for feature in features),
        backbone=backbone,
        **RECIPE,
    )


def boundaries(values: npt.NDArray[np.float64]) -> list[float]:
    """Increasing boundaries at values that occur: the smallest above 0, then quantiles of those above 0.

    Most rows have no capital gains, so plain quantiles of all rows would fall together on 0.
    """
    above = values[values > 0]
    at = np.arange(BUCKETS) / BUCKETS
    return [float(value) for value in np.unique(np.quantile(above, at, method="inverted_cdf"))]
