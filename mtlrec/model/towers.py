"""Task towers: one small multi-layer perceptron per task, all of them as one batched product.

B batch rows, H input width, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from mtlrec.model.layers import BatchedLinear


class Towers(nn.Module):
    """x [T, B, H] -> [T, B]: each task's own layers, ReLU between them, ending in one number."""

    def __init__(self, *, inputs: int, num_tasks: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.layers = nn.ModuleList(BatchedLinear(num_tasks, a, b) for a, b in pairwise(widths))
        self.last = BatchedLinear(num_tasks, widths[-1], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu_()
        last: torch.Tensor = self.last(x)
        return last.squeeze(-1)
