"""Shared bottom (Caruana 1997, "Multitask Learning"): one trunk that every task reads.

B batch rows, I trunk input width, H output width, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtlrec.model.dropout import Dropout
from mtlrec.model.layers import MLP
from mtlrec.schema import Lookup


class SharedBottom(nn.Module):
    """x [B, I] -> [T, B, H], the same for every task."""

    scores = False

    def __init__(
        self,
        *,
        inputs: int,
        num_tasks: int,
        num_scenarios: int,
        lookups: Sequence[Lookup],
        dropout: Dropout,
        hidden: Sequence[int],
    ) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.outputs = hidden[-1]
        self.trunk = MLP(inputs, hidden, dropout)

    def forward(self, x: torch.Tensor, scenario: torch.Tensor) -> torch.Tensor:
        """`scenario` [B] is not looked at: the trunk knows the scenario by its embedding alone."""
        shared: torch.Tensor = self.trunk(x)
        return shared.expand(self.num_tasks, *shared.shape)
