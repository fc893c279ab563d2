"""The unit that flows from the reader to the objective.

B rows of this worker (its stride, padding included), K negatives a row, F id features, N dense numbers, T
tasks. The model computes M = B (1 + K) rows: first those B, then the K negatives of the first, of the second,
and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtlrec.data.order import Position


@dataclass
class Batch:
    """One worker's part of a global batch. Padding rows come last: no ids, zeros, no label, row -1."""

    ids: KeyedJaggedTensor
    """Rows of tables for each id feature: keys as `schema.id_features`, stride M, int64 values. A negative
    that is not there (its row is no positive, or the user has met every item) looks nothing up."""
    dense: torch.Tensor
    """float32 [M, N], transformed."""
    labels: torch.Tensor
    """float32 [B, T]; 0 where there is none."""
    valid: torch.Tensor
    """bool [B, T]: the row has a label for the task."""
    scenario: torch.Tensor
    """int64 [M], index into `schema.scenarios`; 0 for padding."""
    rows: torch.Tensor
    """int64 [B]: the row's number in the whole data set, on the CPU; -1 for padding. Keys all chance."""
    num_rows: int
    """Rows that are not padding; they come first."""
    position: Position
    """Where the run stands once this batch has been trained."""
    step: int = 0
    """How many steps the run has taken before this one. With the row's number it keys all chance."""
    weight: torch.Tensor | None = None
    """float32 [B], sample weights, 0 for padding; None: every row counts 1, padding nothing."""
    negatives: torch.Tensor | None = None
    """bool [B, K]: which negatives there are; None where none are drawn (K = 0)."""
    keys: pa.Table | None = None
    """Columns passed through for prediction, `num_rows` long."""
    bad: NDArray[np.bool_] | None = None
    """[num_rows]: rows that do not fit the schema, whose outputs mean nothing; None: none is among them.
    Training and evaluation get none."""

    @property
    def per_positive(self) -> int:
        """K."""
        return 0 if self.negatives is None else self.negatives.shape[1]

    def to(self, device: torch.device) -> Batch:
        """This batch on `device`, copied without waiting where its memory is pinned."""
        if device.type == "cpu":
            return self
        moved = ("ids", "dense", "labels", "valid", "scenario", "weight", "negatives")
        there = {
            name: value.to(device, non_blocking=True)
            for name in moved
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **there)


def carry(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU on `device`, through pinned memory: from any other, copying waits for the
    device to have done all that it was told.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
