"""Embedding tables: from a schema to a collection, and from a collection to the trunk's input.

M rows, L lookups (an id feature in one of its tables), D embedding dim of a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mtlrec.schema import Lookup, Schema

_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


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
                pooling=_POOLING[table.pooling],
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


def pool(tables: nn.Module, ids: KeyedJaggedTensor, names: Sequence[str]) -> list[torch.Tensor]:
    """Pooled embeddings of each of `names` (see `output_names`), in this order: L times [M, D] float32.

    Picked by key: the order in which a sharded collection returns them depends on its sharding plan.
    """
    pooled = tables(ids)
    if isinstance(pooled, Awaitable):
        pooled = pooled.wait()
    assert isinstance(pooled, KeyedTensor)
    parts = dict(zip(pooled.keys(), pooled.values().split(pooled.length_per_key(), dim=1), strict=True))
    return [parts[name] for name in names]


def _leave(weights: torch.Tensor) -> torch.Tensor:
    return weights
