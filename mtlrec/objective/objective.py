"""How the tasks' losses become one number to go down.

B batch rows, T tasks.
"""

from __future__ import annotations

import torch

from mtlrec.batch import Batch
from mtlrec.objective.losses import LOSSES
from mtlrec.schema import Schema


class Objective:
    """Weighted sum of the tasks' losses, each the mean over the valid labels of the global batch.

    A worker's part of a task is its own sum x world size / global count: under gradients that are averaged
    over the workers, any number of them then takes the same step.
    """

    def __init__(self, schema: Schema) -> None:
        self._losses = [LOSSES[task.kind] for task in schema.tasks]
        self._weights = torch.tensor([task.weight for task in schema.tasks])

    def loss(
        self, outputs: torch.Tensor, batch: Batch, counts: torch.Tensor, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [B, T] and the global batch's `counts` [T] of valid labels -> (loss, sums).

        `loss` is the scalar whose gradient, averaged over workers, is the global objective's; `sums` [T] the
        sum of each task's loss over this worker's valid labels. A task without a valid label in the global
        batch adds exactly nothing to the loss or to any gradient.
        """
        zero = outputs.new_zeros(())
        # Labels are cleared first: whatever stands where there is none must not reach a gradient.
        labels = torch.where(batch.valid, batch.labels, zero)
        each = torch.stack(
            [loss(outputs[:, task], labels[:, task]) for task, loss in enumerate(self._losses)], dim=1
        )
        sums = torch.where(batch.valid, each, zero).sum(dim=0)
        self._weights = self._weights.to(outputs.device)
        scale = self._weights * world_size / counts.to(outputs).clamp(min=1.0)
        return (sums * scale).sum(), sums
