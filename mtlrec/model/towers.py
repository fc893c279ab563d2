"""What stands on a backbone: one small multi-layer perceptron per task, all of them as one batched product.

B rows, H input width, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from mtlrec.model.dropout import Dropout
from mtlrec.model.layers import BatchedLinear


class Towers(nn.Module):
    """x [T, B, H] -> [T, B]: each task's own hidden layers, ending in one number."""

    def __init__(self, *, inputs: int, num_tasks: int, hidden: Sequence[int], dropout: Dropout) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.layers = nn.ModuleList(BatchedLinear(num_tasks, a, b, dropout) for a, b in pairwise(widths))
        self.last = BatchedLinear(num_tasks, widths[-1], 1)

    @property
    def output_bias(self) -> nn.Parameter:
        """What each task's output starts from: T numbers."""
        assert self.last.bias is not None
        return self.last.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        last: torch.Tensor = self.last(x)
        return last.squeeze(-1)


class OutputBias(nn.Module):
    """On a backbone whose output is the score itself: x [T, B, 1] -> [T, B], each task's bias added."""

    def __init__(self, *, num_tasks: int) -> None:
        super().__init__()
        self.output_bias = nn.Parameter(torch.zeros(num_tasks, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(-1) + self.output_bias
