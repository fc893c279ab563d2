"""The opponent of the end-to-end benchmarks: the same model as a careful engineer writes it with TorchRec.

`EmbeddingBagCollection` under `DistributedModelParallel` (which wraps the rest in DistributedDataParallel),
on a plan that TorchRec's own planner makes. What a careful engineer would see to: every table is trained, as
small ones are kept from being data parallel, where no optimizer would reach them; RowWiseAdagrad is fused
into the backward; the pooled output is taken as one tensor instead of key by key; Adam is torch's fused one.
Experts, gates and towers are modules in a loop. Only the loop of `steps` is timed: it has no metrics, no
check of anything, no checkpoint, and its batches are all in memory.

B batch rows, I trunk input width, H expert width, T tasks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.nn import functional
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from benchmarks.sized import EPS, EXPERTS, HIDDEN, LEARNING_RATES, TOWER
from mtlrec.batch import Batch
from mtlrec.data.order import Position
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World
from mtlrec.job.job import Job
from mtlrec.schema import Table, build_schema

PARTS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Rows:
    """One batch, as the plain model takes it."""

    ids: KeyedJaggedTensor
    dense: torch.Tensor
    """float32 [B, 3]"""
    labels: torch.Tensor
    """float32 [B, T]"""

    def to(self, device: torch.device) -> Rows:
        return Rows(self.ids.to(device), self.dense.to(device), self.labels.to(device))


def first_batches(job: Job, count: int, world: World) -> list[Batch]:
    """This worker's first so many full batches of the job, for a side that has all of them in memory."""
    schema, data = build_schema(job.schema_, job.model), job.data
    with Reader(
        Dataset.open(data.train, schema.columns()),
        schema,
        batch_size=data.batch_size,
        lanes=data.lanes,
        window=data.window,
        shuffle=data.shuffle,
        seed=job.seed,
        position=Position.start(data.lanes),
        epochs=1,
        rank=world.rank,
        world_size=world.world_size,
    ) as reader:
        full = (batch for batch in reader if batch.num_rows == len(batch.labels))
        return list(islice(full, count))


class Mmoe(nn.Module):
    """Trunk input [B, I] -> logits [B, T]: experts, gates and towers as modules in a loop."""

    def __init__(self, inputs: int, num_tasks: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_layers([inputs, *HIDDEN]) for _ in range(EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(inputs, EXPERTS, bias=False) for _ in range(num_tasks))
        tower = [HIDDEN[-1], *TOWER]
        self.towers = nn.ModuleList(
            nn.Sequential(*_layers(tower), nn.Linear(tower[-1], 1)) for _ in range(num_tasks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # [B, experts, H]
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            mixed = torch.bmm(gate(x).softmax(dim=1).unsqueeze(1), experts).squeeze(1)
            logits.append(tower(mixed))
        return torch.cat(logits, dim=1)


class PlainModel(nn.Module):
    """Rows -> the scalar loss: the sum over tasks of their mean binary cross-entropy."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig], num_dense: int, num_tasks: int) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(tables=list(tables), device=torch.device("meta"))
        inputs = sum(table.embedding_dim * table.num_features() for table in tables) + num_dense
        self.rest = Mmoe(inputs, num_tasks)

    def forward(self, rows: Rows) -> torch.Tensor:
        pooled: KeyedTensor = self.tables(rows.ids)
        logits = self.rest(torch.cat([pooled.values(), rows.dense], dim=1))
        loss = functional.binary_cross_entropy_with_logits(logits, rows.labels)
        return loss * rows.labels.shape[1]


class Plain:
    """The model, its optimizers, and the batches that it goes round and round, all on the worker's device."""

    def __init__(self, tables: Sequence[Table], batches: Sequence[Rows], world: World) -> None:
        configs = [
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.rows,
                embedding_dim=table.dim,
                feature_names=list(table.features),
                pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
            )
            for table in tables
        ]
        model = PlainModel(configs, batches[0].dense.shape[1], batches[0].labels.shape[1])
        sharder: Any = EmbeddingBagCollectionSharder(
            fused_params={
                "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                "learning_rate": LEARNING_RATES["tables"],
                "eps": EPS,
            }
        )
        wholly = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
        planner = EmbeddingShardingPlanner(
            topology=Topology(
                world_size=world.world_size,
                local_world_size=world.local_world_size,
                compute_device=world.device.type,
            ),
            batch_size=batches[0].dense.shape[0],
            constraints={table.name: wholly for table in tables},
        )
        group = dist.group.WORLD
        assert group is not None
        self._model = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(group),
            device=world.device,
            plan=planner.collective_plan(model, [sharder], group),
            sharders=[sharder],
        )
        dense = [value for name, value in self._model.named_parameters() if "tables." not in name]
        self._optimizer = torch.optim.Adam(dense, lr=LEARNING_RATES["dense"], fused=True)
        self._batches, self.taken = [rows.to(world.device) for rows in batches], 0
        self.parameters = {
            "dense": sum(value.numel() for value in dense),
            "tables": sum(table.rows * table.dim for table in tables),
        }
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """Spent in each part of a step so far."""

    def steps(self, count: int) -> float:
        """Take so many; the loss of the last one, on this rank."""
        clock, seconds = time.perf_counter, self.seconds
        loss = torch.zeros(())
        for _ in range(count):
            rows = self._batches[self.taken % len(self._batches)]
            self.taken += 1
            began = clock()
            loss = self._model(rows)
            forward = clock()
            self._optimizer.zero_grad()
            loss.backward()
            backward = clock()
            self._optimizer.step()
            seconds["forward"] += forward - began
            seconds["backward"] += backward - forward
            seconds["optimizer"] += clock() - backward
        return float(loss.detach())


def _layers(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers)
