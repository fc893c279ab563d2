"""The whole model: tables, backbone, towers.

B batch rows, F id features, D embedding dim, I trunk input width, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtlrec.batch import Batch
from mtlrec.job.job import Job
from mtlrec.model.backbones.registry import BACKBONES
from mtlrec.model.layers import initialise_dense
from mtlrec.model.tables import build_tables, pool
from mtlrec.model.towers import Towers
from mtlrec.schema import Schema


class Recommender(nn.Module):
    """Batch -> [B, T] float32: a logit for each binary task, a value for each regression task.

    `tables` (a collection, sharded or not) may be None where the schema has no id feature; `features` names
    the id features in the order in which the trunk reads them. With `mixed`, everything behind the tables
    computes in bfloat16 by autocast, weights and outputs staying float32.
    """

    def __init__(
        self,
        tables: nn.Module | None,
        features: Sequence[str],
        backbone: nn.Module,
        towers: nn.Module,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.tables = tables
        self.features = tuple(features)
        self.backbone = backbone
        self.towers = towers
        self.mixed = mixed

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.dense_part(self.trunk_input(batch), batch.scenario)

    def trunk_input(self, batch: Batch) -> torch.Tensor:
        """[B, I] float32: pooled embeddings in the order of `features`, then the dense numbers."""
        if self.tables is None:
            return batch.dense
        return torch.cat([*pool(self.tables, batch.ids, self.features), batch.dense], dim=1)

    def dense_part(self, x: torch.Tensor, scenario: torch.Tensor) -> torch.Tensor:
        """x [B, I], scenario int64 [B] -> outputs [B, T] float32."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.mixed):
            outputs: torch.Tensor = self.towers(self.backbone(x, scenario))
        return outputs.float().t()


def build_model(job: Job, schema: Schema, device: torch.device) -> Recommender:
    """The job's model: tables on the meta device, to be sharded; everything else on `device`, at its start.

    The dense starting weights are a function of (job.seed, parameter name).
    """
    inputs = sum(schema.table_of[feature.table].dim for feature in schema.id_features) + schema.dense_width
    fields = job.model.backbone.model_dump(exclude={"kind"})
    backbone = BACKBONES[job.model.backbone.kind](
        inputs=inputs, num_tasks=len(schema.tasks), num_scenarios=len(schema.scenarios), **fields
    )
    towers = Towers(inputs=backbone.outputs, num_tasks=len(schema.tasks), hidden=job.model.tower.hidden)
    model = Recommender(
        build_tables(schema, torch.device("meta")),
        [feature.name for feature in schema.id_features],
        backbone,
        towers,
        mixed=job.model.precision == "bfloat16",
    )
    initialise_dense(model, job.seed)
    model.backbone.to(device)
    model.towers.to(device)
    return model
