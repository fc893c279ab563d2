"""Embedding tables: from a schema to a collection, and from a collection to the trunk's input.

M rows, L lookups (an id feature in one of its tables), D embedding dim of a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import Awaitable, ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mtlrec.schema import Lookup, Schema


def build_tables(schema: Schema, device: torch.device) -> EmbeddingBagCollection | None:
    """The schema's tables, weights unset; on the meta device they take no memory. None without tables."""
    if not schema.tables:
        return None
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.rows,
                embedding_dim=table.dim,
                feature_names=list(table.features),
                # A mean is its sum divided, by `pool`: tables that pool alike are one kernel, and row-wise
                # sharding would divide all columns of all tables.
                pooling=PoolingType.SUM,
                # Starting weights are set after sharding; filling them here would be wasted.
                init_fn=_leave,
            )
            for table in schema.tables
        ],
        device=device,
    )


def output_names(lookups: Sequence[Lookup]) -> list[str]:
    """The key under which a collection returns each of `lookups`, all that there are.

    TorchRec names an embedding after its feature, and `feature@table` where the feature has several tables.
    """
    tables = Counter(lookup.feature for lookup in lookups)
    return [
        f"{lookup.feature}@{lookup.table}" if tables[lookup.feature] > 1 else lookup.feature
        for lookup in lookups
    ]


class SentIds:
    """Ids of a batch on their way to the workers that hold their rows, while this one computes.

    In two legs: how many each worker gets, then the ids, which `go_on` sends. All workers make it, call
    `go_on` once and then look up, at the same places among their collectives.
    """

    def __init__(self, tables: ShardedModule[Any, Any, Any, Any], ids: KeyedJaggedTensor) -> None:
        self._tables, self._context = tables, tables.create_context()
        self._leg = tables.input_dist(self._context, ids)

    def go_on(self) -> None:
        """Wait for the first leg and begin the second."""
        self._leg = self._leg.wait()

    def look_up(self) -> Any:
        """What `tables(ids)` returns."""
        return self._tables.compute_and_output_dist(self._context, self._leg.wait())


def pool(
    tables: nn.Module, ids: KeyedJaggedTensor, lookups: Sequence[Lookup], sent: SentIds | None = None
) -> list[torch.Tensor]:
    """Pooled embeddings of `lookups`, all that there are, side by side in this order: float32 parts of M
    rows, each of one lookup or of several that follow one another. `sent`: the ids, where they were sent
    ahead.

    Picked by key: the order in which a sharded collection returns them depends on its sharding plan. What
    lies in order there is not cut, as it would be put together again, in the backward too.
    """
    pooled = tables(ids) if sent is None else sent.look_up()
    if isinstance(pooled, Awaitable):
        pooled = pooled.wait()
    assert isinstance(pooled, KeyedTensor)
    place = {name: number for number, name in enumerate(output_names(lookups))}
    runs: list[range] = []
    for key in pooled.keys():  # noqa: SIM118
        at = place.pop(key)
        if runs and runs[-1].stop == at and not (lookups[at].mean or lookups[at - 1].mean):
            runs[-1] = range(runs[-1].start, at + 1)
        else:
            runs.append(range(at, at + 1))
    assert not place, f"nothing was returned for {', '.join(place)}"
    widths = [sum(lookups[at].width for at in run) for run in runs]
    values = pooled.values()
    found: list[tuple[int, torch.Tensor]] = []
    for run, part in zip(runs, values.split(widths, dim=1) if len(runs) > 1 else [values], strict=True):
        first = lookups[run.start]
        found.append((run.start, part / _divisor(ids, first.feature) if first.mean else part))
    return [part for _, part in sorted(found, key=lambda each: each[0])]


def _divisor(ids: KeyedJaggedTensor, feature: str) -> torch.Tensor:
    """How many ids each row has of a feature, 1 where it has none: [M, 1]."""
    keys = ids.keys()
    lengths = ids.lengths().view(len(keys), -1)[keys.index(feature)]
    return lengths.clamp(min=1)[:, None]


def _leave(weights: torch.Tensor) -> torch.Tensor:
    return weights
