"""The jobs that come with XMarket: pairwise factorization of one market, or of all. docs/xmarket.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

RECIPE: dict[str, Any] = {
    "dim": 32,
    "table_init": 0.01,
    "table_lr": 0.2,
    "embedding_l2": 0.004,
    "batch_size": 512,
    "epochs": 100,
    "every_epochs": 4,
    "patience": 4,
    "per_positive": 4,
}
"""One for all markets, chosen on valid; docs/xmarket.md says what was tried."""

EXPECTED = {
    "ca": ("4 minutes", "0.376"),
    "de": ("3 minutes", "0.392"),
    "mx": ("1.5 minutes", "0.595"),
    "uk": ("7 minutes", "0.513"),
}
"""Markets of a job -> its time on one busy core, and nDCG@10 on their test rows: of Electronics, by
`python -m benchmarks.results_xmarket`."""
UNKNOWN = ("not known", "not known; docs/xmarket.md has it for each of ca, de, mx, uk")

_JOB = """\
# XMarket, {what}: whom a user rated next, among up to 100 candidates. From this folder:
#   mtlrec train {file} --workers 0     (without --workers 0: on Ray)
#   mtlrec evaluate runs/{name} --data {folder}/test
# Expected time, with Electronics on one core: {time}. Expected metric, interaction/ndcg@10 on test: {metric}.
# `mtlrec prepare xmarket` wrote this; docs/xmarket.md has the protocol.
name: {name}
seed: 0
schema:
  scenario: {{column: market, values: [{markets}], as_feature: false}}
  user: user_id
  item: item_id
  tables:
    user: {{ids: vocabulary, id_space: xmarket_user}}
    item: {{ids: vocabulary, id_space: asin}}
    item_bias: {{ids: vocabulary, id_space: asin, dim: {bias_dim}}}   # a column for each market
  features:
    user_id: {{kind: id, tables: [user]}}
    item_id: {{kind: id, tables: [item, item_bias]}}
  tasks:
    interaction: {{kind: pairwise}}
data:
  train: {folder}/train
  eval: {folder}/valid
  batch_size: {batch_size}
  negatives: {{per_positive: {per_positive}, task: interaction, distribution: uniform}}
model:
  dim: {dim}
  table_init: {table_init}
  backbone: {{kind: factorization, factors: [user, item], biases: [item_bias]}}
objective: {{embedding_l2: {embedding_l2}}}
optimizer:
  tables: {{kind: adagrad, lr: {table_lr}}}
run:
  workers: 2
  epochs: {epochs}
  evaluate: {{every_epochs: {every_epochs}, metric: [interaction/ndcg@10], patience: {patience}}}
"""


def job_text(file: str, folder: str, markets: Sequence[str]) -> str:
    """YAML of the job `file`, which trains on `markets` from `folder`/train."""
    time, metric = EXPECTED.get(" ".join(sorted(markets)), UNKNOWN)
    return _JOB.format(
        file=file,
        what=f"market {markets[0]}" if folder == markets[0] else f"{len(markets)} markets together",
        name=f"xmarket-{folder}",
        folder=folder,
        time=time,
        metric=metric,
        # In quotes: `no` is a market, and YAML's false.
        markets=", ".join(json.dumps(market) for market in markets),
        # fbgemm wants a multiple of 4.
        bias_dim=-(-len(markets) // 4) * 4,
        **RECIPE,
    )
