"""Embedding tables: from a schema to a collection, and from a collection to the trunk's input.

B batch rows, F id features, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mtlrec.schema import Schema

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


def pool(tables: nn.Module, ids: KeyedJaggedTensor, features: Sequence[str]) -> list[torch.Tensor]:
    """Pooled embeddings of each of `features`, in this order: F times [B, D] float32.

    Picked by key: the order in which a sharded collection returns them depends on its sharding plan.
    """
    pooled = tables(ids)
    if isinstance(pooled, Awaitable):
        pooled = pooled.wait()
    assert isinstance(pooled, KeyedTensor)
    parts = dict(zip(pooled.keys(), pooled.values().split(pooled.length_per_key(), dim=1), strict=True))
    return [parts[feature] for feature in features]


def _leave(weights: torch.Tensor) -> torch.Tensor:
    return weights
