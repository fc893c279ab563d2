"""How the tasks' losses become one number to go down.

B batch rows, K negatives a row, M = B (1 + K) model rows, T tasks, E columns of embeddings.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from mtlrec.batch import Batch
from mtlrec.job.job import Job
from mtlrec.objective.losses import LOSSES, binary, pairwise
from mtlrec.schema import Schema

LOG_VARIANCE = "log_variance"
"""Name of the parameter that uncertainty weighting learns."""


class Objective(nn.Module):
    """Sum of the tasks' losses, each a mean over the labels of the global batch, and what balances them.

    A worker's part of a task is its own sum x world size / the global amount: under gradients that are
    averaged over the workers, any number of them then takes the same step. A batch of fewer rows than
    `batch_size` takes a step in proportion.

    balance "uncertainty" (Kendall, Gal, Cipolla 2018, eq. 7 to 10): task t with the loss L_t adds
    exp(-s_t) L_t + s_t / 2, a regression exp(-s_t) L_t / 2 + s_t / 2, where s_t = log sigma_t^2 is learnt and
    starts at 0; in this form nothing is divided and no root or logarithm is taken. All of it is times the
    task's `weight`.
    """

    _weights: torch.Tensor
    _by_batch: torch.Tensor
    _halved: torch.Tensor
    _factor: torch.Tensor
    _shift: torch.Tensor

    def __init__(
        self,
        schema: Schema,
        *,
        balance: Literal["weights", "uncertainty"] = "weights",
        embedding_l2: float = 0.0,
        batch_size: int | None = None,
        sampled: str | None = None,
    ) -> None:
        """batch_size: rows of a whole global batch; None: every batch counts as whole. sampled: the task that
        negatives are drawn for; where it is binary, they are rows with the label 0.
        """
        super().__init__()
        self._kinds = [task.kind for task in schema.tasks]
        self._batch_size = batch_size
        self._sampled = next((t for t, task in enumerate(schema.tasks) if task.name == sampled), None)
        self.embedding_l2 = embedding_l2
        tasks = range(len(schema.tasks))
        self.log_variance = nn.Parameter(torch.zeros(len(tasks))) if balance == "uncertainty" else None

        def constant(name: str, values: list[float] | list[bool]) -> None:
            self.register_buffer(name, torch.tensor(values), persistent=False)

        constant("_weights", [task.weight for task in schema.tasks])
        constant("_by_batch", [task.normalise == "batch" for task in schema.tasks])
        constant("_halved", [0.5 if kind == "regression" else 1.0 for kind in self._kinds])
        # What the model learns of a label y: y * factor + shift.
        constant("_factor", [(1.0 - task.label_smoothing) / task.std for task in schema.tasks])
        constant("_shift", [task.label_smoothing / 2 - task.mean / task.std for task in schema.tasks])

    def amounts(self, batch: Batch) -> torch.Tensor:
        """This worker's share of what losses are divided by: float64 [T + 2].

        For each task the sample weight of the rows that train it (a row that carries its label; of a pairwise
        task a positive with a negative; each sampled negative of a binary task counts as a row), then the
        sample weight of all rows, and their number. Summed over the workers it is what `loss` wants.
        """
        weight = batch.weight.double() if batch.weight is not None else None
        trains = self._trains(batch)
        by_task = trains.sum(dim=0, dtype=torch.float64) if weight is None else weight @ trains.double()
        if batch.negatives is not None and self._adds_rows:
            drawn = batch.negatives.sum(dim=1, dtype=torch.float64)
            by_task[self._sampled] += drawn.sum() if weight is None else drawn @ weight
        rows = by_task.new_full((1,), batch.num_rows)
        return torch.cat([by_task, rows if weight is None else weight.sum()[None], rows])

    def loss(
        self,
        outputs: torch.Tensor,
        batch: Batch,
        amounts: torch.Tensor,
        world_size: int,
        embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [M, T], embeddings [M, E] and the global batch's `amounts` [T + 2] -> (loss, sums).

        `loss` is the scalar whose gradient, averaged over workers, is the global objective's; `sums` [T] the
        weighted sum of each task's loss over this worker's rows. A task that no row of the global batch
        trains adds exactly nothing to the loss or to any gradient, its uncertainty included.
        """
        each, zero = self.row_losses(outputs, batch), outputs.new_zeros(())
        sums = each.sum(dim=0) if batch.weight is None else batch.weight @ each
        by_task, weight, rows = amounts[:-2], amounts[-2], amounts[-1]
        trained = by_task > 0
        divisor = torch.where(self._by_batch, weight, by_task)
        scale = torch.where(trained, self._weights / torch.where(trained, divisor, 1.0), zero)
        share = 1.0 if self._batch_size is None else rows / self._batch_size
        if self.log_variance is None:
            total = (sums * scale).sum() * world_size
        else:
            precision = torch.exp(-self.log_variance) * self._halved
            total = (sums * scale * precision).sum() * world_size
            total = total + (torch.where(trained, self._weights, zero) * self.log_variance).sum() / 2
        total = total * share
        if self.embedding_l2:
            assert embeddings is not None
            whole = rows if self._batch_size is None else self._batch_size
            total = total + embeddings.square().sum() * (self.embedding_l2 * world_size / whole)
        return total, sums

    def row_losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [M, T] -> each task's loss of each row with its negatives, unweighted, [B, T]; 0 where a
        task does not learn from the row.
        """
        own, num_rows = outputs[: len(batch.valid)], len(batch.valid)
        there = batch.negatives
        drawn = outputs[num_rows:].view(num_rows, -1, outputs.shape[1]) if there is not None else None
        zero = outputs.new_zeros(())
        # Labels are cleared first: whatever stands where there is none must not reach a gradient.
        labels = torch.where(batch.valid, batch.labels, zero) * self._factor + self._shift
        losses = []
        for task, kind in enumerate(self._kinds):
            if kind == "pairwise":
                assert drawn is not None and there is not None, "a pairwise task is sampled"
                losses.append(pairwise(own[:, task], drawn[:, :, task], there))
            else:
                losses.append(LOSSES[kind](own[:, task], labels[:, task]))
        each = torch.where(self._trains(batch), torch.stack(losses, dim=1), zero)
        if drawn is not None and there is not None and self._adds_rows:
            against = binary(drawn[:, :, self._sampled], self._shift[self._sampled].expand(there.shape))
            each[:, self._sampled] += torch.where(there, against, zero).sum(dim=1)
        return each

    @property
    def _adds_rows(self) -> bool:
        return self._sampled is not None and self._kinds[self._sampled] == "binary"

    def _trains(self, batch: Batch) -> torch.Tensor:
        """bool [B, T]: the rows that a task learns from."""
        if "pairwise" not in self._kinds:
            return batch.valid
        assert batch.negatives is not None, "a pairwise task is sampled"
        trains, any_drawn = batch.valid.clone(), batch.negatives.any(dim=1)
        for task, kind in enumerate(self._kinds):
            if kind == "pairwise":
                trains[:, task] &= (batch.labels[:, task] > 0.5) & any_drawn
        return trains


def build_objective(job: Job, schema: Schema) -> Objective:
    """The job's objective."""
    return Objective(
        schema,
        balance=job.objective.balance,
        embedding_l2=job.objective.embedding_l2,
        batch_size=job.data.batch_size,
        sampled=job.data.negatives.task if job.data.negatives else None,
    )
