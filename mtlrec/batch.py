"""The unit that flows from the reader to the objective.

B rows of this worker (its stride, padding included), F id features, N dense numbers, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtlrec.data.order import Position


@dataclass
class Batch:
    """One worker's part of a global batch. Padding rows come last: no ids, zeros, no label, row -1."""

    ids: KeyedJaggedTensor
    """Rows of tables for each id feature: keys as `schema.id_features`, stride B, int64 values."""
    dense: torch.Tensor
    """float32 [B, N], transformed."""
    labels: torch.Tensor
    """float32 [B, T]; 0 where there is none."""
    valid: torch.Tensor
    """bool [B, T]: the row has a label for the task."""
    scenario: torch.Tensor
    """int64 [B], index into `schema.scenarios`; 0 for padding."""
    rows: torch.Tensor
    """int64 [B]: the row's number in the whole data set, on the CPU; -1 for padding. Keys all chance."""
    num_rows: int
    """Rows that are not padding; they come first."""
    position: Position
    """Where the run stands once this batch has been trained."""
    keys: pa.Table | None = None
    """Columns passed through for prediction, `num_rows` long."""

    def to(self, device: torch.device) -> Batch:
        """This batch on `device`, copied without waiting where its memory is pinned."""
        if device.type == "cpu":
            return self
        return Batch(
            self.ids.to(device, non_blocking=True),
            self.dense.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.valid.to(device, non_blocking=True),
            self.scenario.to(device, non_blocking=True),
            self.rows,
            self.num_rows,
            self.position,
            self.keys,
        )
