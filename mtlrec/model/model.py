"""The whole model: tables, backbone, towers.

M rows (those of the batch and their negatives), E columns of embeddings, W width of the trunk's input with
its padding, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torchrec.distributed.types import ShardedModule

from mtlrec.batch import Batch
from mtlrec.job.job import Job
from mtlrec.model.backbones.registry import BACKBONES
from mtlrec.model.dropout import Dropout
from mtlrec.model.layers import initialise_dense, pad_trunk
from mtlrec.model.tables import SentIds, build_tables, pool
from mtlrec.model.towers import OutputBias, Towers
from mtlrec.schema import Lookup, Schema, Task


class Recommender(nn.Module):
    """Batch -> [M, T] float32: a logit for each binary task, a standardised value for each regression task,
    a score for each pairwise task.

    `tables` (a collection, sharded or not) may be None where the schema has no id feature; `lookups` are the
    schema's. `dropout` is the one that the hidden layers of `backbone` and `towers` were made with; None
    where they need none. With `mixed`, everything behind the tables computes in bfloat16 by autocast, weights
    and outputs staying float32.
    """

    def __init__(
        self,
        tables: nn.Module | None,
        lookups: Sequence[Lookup],
        backbone: nn.Module,
        towers: nn.Module,
        dropout: Dropout | None = None,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.tables = tables
        self.backbone = backbone
        self.towers = towers
        self.mixed = mixed
        self._lookups = tuple(lookups)
        self._embedding_width = sum(lookup.width for lookup in lookups)
        self._dropout = dropout

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.dense_part(self.trunk_input(batch), batch)

    def send_ids(self, batch: Batch) -> SentIds | None:
        """Send the ids of a batch that comes later to the workers that hold their rows; None where the tables
        are not sharded. A collective.
        """
        return SentIds(self.tables, batch.ids) if isinstance(self.tables, ShardedModule) else None

    def trunk_input(self, batch: Batch, sent: SentIds | None = None) -> torch.Tensor:
        """[M, W] float32: pooled embeddings in the order of the lookups, the dense numbers, and the padding.

        With its gradient, but for the dense numbers alone where there are no tables. `sent`: what `send_ids`
        gave of this batch, if it was called.
        """
        pooled = pool(self.tables, batch.ids, self._lookups, sent) if self.tables is not None else []
        return pad_trunk([*pooled, batch.dense])

    def embeddings(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled embeddings in a trunk's input [M, W]: [M, E], a view."""
        return x[:, : self._embedding_width]

    def dense_part(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Everything behind the tables: the trunk's input x [M, W] of `batch` -> outputs [M, T] float32."""
        if self._dropout is not None and self.training:
            self._dropout.begin(batch)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.mixed):
            outputs: torch.Tensor = self.towers(self.backbone(x, batch.scenario))
        return outputs.float().t()


def build_model(job: Job, schema: Schema, device: torch.device) -> Recommender:
    """The job's model: tables on the meta device, to be sharded; everything else on `device`, at its start.

    The dense starting weights are a function of (job.seed, parameter name); but the biases of the outputs
    start at the logit of their task's prior.
    """
    dropout = Dropout(job.model.dropout, job.seed)
    backbone = BACKBONES[job.model.backbone.kind](
        inputs=schema.embedding_width + schema.dense_width,
        num_tasks=len(schema.tasks),
        num_scenarios=len(schema.scenarios),
        lookups=schema.lookups,
        dropout=dropout,
        **job.model.backbone.model_dump(exclude={"kind"}),
    )
    towers = (
        OutputBias(num_tasks=len(schema.tasks))
        if backbone.scores
        else Towers(
            inputs=backbone.outputs,
            num_tasks=len(schema.tasks),
            hidden=job.model.tower.hidden,
            dropout=dropout,
        )
    )
    model = Recommender(
        build_tables(schema, torch.device("meta")),
        schema.lookups,
        backbone,
        towers,
        dropout,
        mixed=job.model.precision == "bfloat16",
    )
    dropout.name_layers(model)
    initialise_dense(model, job.seed)
    with torch.no_grad():
        starts = torch.tensor([_first_guess(task) for task in schema.tasks])
        towers.output_bias.copy_(starts.view_as(towers.output_bias))
    model.backbone.to(device)
    model.towers.to(device)
    if any(task.kind == "pairwise" for task in schema.tasks):
        # It cancels in every difference of scores: only rounding reaches it, of which Adam would make steps.
        learnt = torch.tensor([task.kind != "pairwise" for task in schema.tasks], device=device)
        towers.output_bias.register_hook(lambda gradient: gradient * learnt.view_as(gradient))
    return model


def _first_guess(task: Task) -> float:
    """Where a task's output starts: the logit of a binary task's prior, and 0 for what has its mean there."""
    if task.kind != "binary" or task.prior is None:
        return 0.0
    return math.log(task.prior / (1.0 - task.prior))
