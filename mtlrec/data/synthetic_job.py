"""The job that comes with the synthetic data."""

from __future__ import annotations

from typing import Any

from mtlrec.data.population import CAMPAIGNS, CATEGORIES, CITIES, HOURS, LONGEST_HISTORY, SIGNALS

MARK = "mtlrec synth"
"""Stands in the first line of a job that a synth wrote."""

_JOB = """\
# Data with a known answer, made by: mtlrec synth OUT {options}
#   mtlrec train job.yaml                                (from this folder)
#   mtlrec evaluate runs/synthetic --data test
# About {minutes} on 2 cores. Expected click AUC on valid: {expected}; of the true probabilities: {ideal}.
# docs/synthetic.md says what the columns mean. Relative paths start at this file's folder.
name: synthetic
seed: 0
schema:
  scenario: {{column: scenario, values: [{scenarios}]}}
  user: user_id
  item: item_id
  features:
    user_id: {{kind: id, ids: identity, rows: {users}}}
    item_id: {{kind: id, ids: identity, rows: {items}}}
    category: {{kind: id, ids: identity, rows: {categories}}}
    hour: {{kind: id, ids: identity, rows: {hours}}}
    device: {{kind: id, rows: 256}}
    city: {{kind: id, rows: {city_rows}}}
    campaign: {{kind: id, rows: {campaign_rows}}}
    # Looks up the items' own table, so that what is learnt of an item counts in every history.
    history: {{kind: id_list, table: item_id, pooling: mean, max_length: {longest}}}
    price: {{kind: number, transform: log1p}}
    recency: {{kind: number, transform: standardise}}
    age: {{kind: number, transform: bucketise, boundaries: [22, 26, 30, 35, 40, 45, 50, 55, 60, 65, 70]}}
    signals: {{kind: vector, size: {signals}}}
  tasks:
    # A loss is the mean over the task's own labels, and few rows have a buy or a rating: a weight of 1 would
    # let each of them pull the tables many times as hard as a click does.
    click: {{kind: binary}}
    buy: {{kind: binary, weight: 0.1}}
    rating: {{kind: regression, weight: 0.01}}
data:
  train: train
  eval: valid
  batch_size: {batch_size}
model:
  dim: 16
  backbone: {{kind: mmoe, experts: 4, hidden: [128, 64]}}
  tower: {{hidden: [32]}}
optimizer:
  tables: {{kind: rowwise_adagrad, lr: 0.2}}
  dense: {{kind: adam, lr: {lr}}}
run:
  storage: runs
  workers: 2
  epochs: {epochs}
"""


def job_text(
    *,
    rows: int,
    users: int,
    items: int,
    scenarios: int,
    files: int,
    seed: int,
    ideal: dict[str, Any],
) -> str:
    """YAML of the ready job: sizes of the tables, and steps that suit the number of rows.

    `ideal`: the metrics of the true probabilities on valid, as `Metrics.result`.
    """
    options = {
        "rows": rows,
        "users": users,
        "items": items,
        "scenarios": scenarios,
        "files": files,
        "seed": seed,
    }
    epochs = 1 if rows >= 10_000_000 else 2
    batch_size = 4096 if rows >= 1_000_000 else 2048 if rows >= 200_000 else 1024
    best = ideal["all"]["click"]["auc"]
    return _JOB.format(
        options=" ".join(f"--{name} {value}" for name, value in options.items()),
        minutes=_minutes(rows * epochs),
        ideal="undefined" if best is None else f"{best:.4f}",
        expected=_expected(rows, users, best),
        scenarios=", ".join(f"s{scenario}" for scenario in range(scenarios)),
        users=users,
        items=items,
        categories=CATEGORIES,
        hours=HOURS,
        # Eight rows an id: nine in ten ids have a row to themselves.
        city_rows=CITIES * 8,
        campaign_rows=CAMPAIGNS * 8,
        longest=LONGEST_HISTORY,
        signals=SIGNALS,
        batch_size=batch_size,
        # Adam's step grows with the batch, over which it averages.
        lr=f"{batch_size / 1_024_000:.3f}",
        epochs=epochs,
    )


def _minutes(samples: int) -> str:
    """Start of Ray and the workers, and then what a worker on a core trains."""
    minutes = 1 + samples / 30_000 / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"


def _expected(rows: int, users: int, ideal: float | None) -> str:
    """Where runs of 20 and of 100 rows a user came to, on the way from 0.5 to the ideal."""
    if ideal is None or rows < 200_000:
        return "more than 0.5"
    share = 0.75 if rows >= 2_000_000 and rows >= 100 * users else 0.55 if rows >= 20 * users else 0.4
    return f"{0.5 + share * (ideal - 0.5):.2f}"
