"""The jobs that come with Epinions: both tasks, each alone, and without the scenario. docs/epinions.md."""

from __future__ import annotations

from typing import Any

CATEGORIES = tuple(range(1, 28))
"""The scenarios."""
HISTORIES = {"user": ("user_id",), "item": ("item_id",), "user_category": ("user_id", "category_id")}
"""Whose past is counted: name -> columns that identify it."""
MEANS = ("like", "helpful", "rating", "helpfulness")
"""Columns that each history has the mean of."""

RECIPE: dict[str, Any] = {
    "dim": 8,
    "table_init": 0.01,
    "item_min_count": 3,
    "backbone": "{kind: mmoe, experts: 3, hidden: [32, 16]}",
    "tower": "[16]",
    "dropout": 0.2,
    "embedding_l2": 0.01,
    "batch_size": 2048,
    "table_lr": 0.01,
    "dense_lr": 0.004,
    "decay_steps": 308,
    "epochs": 2,
}
"""Chosen on valid; `decay_steps` are those of the epochs."""

JOBS = {
    "job.yaml": ("joint", ("like", "helpful"), True),
    "job_like.yaml": ("like", ("like",), True),
    "job_helpful.yaml": ("helpful", ("helpful",), True),
    "job_no_scenario.yaml": ("no-scenario", ("like", "helpful"), False),
}
"""File -> end of the run's name, tasks, whether the model knows the category."""

_JOB = """\
# Epinions: {what}. The scenario is the category. From this folder:
#   mtlrec train {file} --workers 0     (without --workers 0: on Ray)
#   mtlrec evaluate runs/{name} --data test
# `mtlrec prepare epinions` wrote this; docs/epinions.md has the protocol.
name: {name}
seed: 0
schema:
  scenario: {{column: category_id, values: [{categories}], as_feature: {as_feature}}}
  user: user_id
  item: item_id
  features:
    user_id: {{kind: id, ids: vocabulary, id_space: epinions_user}}
    item_id: {{kind: id, ids: vocabulary, id_space: epinions_item, min_count: {item_min_count}}}
{numbers}
  tasks:
{tasks}
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
objective: {{embedding_l2: {embedding_l2}}}
optimizer:
  tables: {{kind: rowwise_adagrad, lr: {table_lr}}}
  dense: {{kind: adam, lr: {dense_lr}, schedule: {{decay: linear, decay_steps: {decay_steps}}}}}
run:
  workers: 2
  epochs: {epochs}
  evaluate: {{every_epochs: 1, metric: [{metrics}]}}
"""


def job_text(file: str) -> str:
    """YAML of the job `file`."""
    name, tasks, scenario = JOBS[file]
    # What a user did in the row's category would tell the category.
    histories = [history for history in HISTORIES if scenario or history != "user_category"]
    return _JOB.format(
        file=file,
        what=" and ".join(tasks) + ("" if scenario else ", without telling the model the scenario"),
        name=f"epinions-{name}",
        categories=", ".join(map(str, CATEGORIES)),
        as_feature=str(scenario).lower(),
        numbers="\n".join(f"    {line}" for history in histories for line in _numbers(history)),
        tasks="\n".join(f"    {task}: {{kind: binary}}" for task in tasks),
        metrics=", ".join(f"{task}/auc" for task in tasks),
        **RECIPE,
    )


def _numbers(history: str) -> list[str]:
    """Its count, logged, and each mean as it is."""
    return [
        f"{history}_count: {{kind: number, transform: log1p}}",
        *(f"{history}_{mean}_mean: {{kind: number, transform: standardise}}" for mean in MEANS),
    ]
